"""What runs here is the installed wheel, whose binary was built with another PyTorch."""

from pathlib import Path

import cbp_fast


def test_the_installed_package_is_what_is_tested(request):
    package = Path(cbp_fast.__file__).parent
    assert package.parent.name == "site-packages"
    assert package != request.config.rootpath / "cbp_fast"
