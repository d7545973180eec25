"""What the integrations need is asked for when they are imported, and never by `import cbp_fast`."""

import subprocess
import sys

import pytest


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_package_alone_imports_no_framework():
    result = run(
        "import sys, cbp_fast; print(sorted({'clarena', 'lightning', 'pytorch_lightning'} & set(sys.modules)))"
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize(
    ("module", "missing"), [("clarena", "clarena"), ("clarena", "lightning"), ("lightning", "lightning")]
)
def test_a_missing_framework_says_what_to_install(module, missing):
    # the other framework is there, and empty
    code = (
        "import sys, types\n"
        "sys.modules |= {name: types.ModuleType(name) for name in ('clarena', 'clarena.cl_algorithms', 'lightning')}\n"
        "sys.modules['clarena.cl_algorithms'].CBP = object\n"
        f"sys.modules |= dict.fromkeys([n for n in sys.modules if n.split('.')[0] == {missing!r}])\n"
        f"import cbp_fast.integrations.{module}\n"
    )
    last = run(code).stderr.strip().splitlines()[-1]
    assert last.startswith(f"ModuleNotFoundError: cbp_fast.integrations.{module} needs {missing}")
    assert last.endswith(f'pip install "cbp_fast[{module}]"')
