"""The installed package is the wheel, and runs under another PyTorch than that it was built with."""

from pathlib import Path

import torch

import cbp_fast


def test_the_installed_package_is_what_is_tested():
    assert "site-packages" in Path(cbp_fast.__file__).parts


def test_the_binary_was_built_with_another_pytorch(request):
    built = (request.config.rootpath / ".venv" / "torch.txt").read_text().strip()
    assert not f"torch=={torch.__version__.partition('+')[0]}".startswith(built)
