"""What people install: the version, what an import brings in, messages of a failed build or import, sdist and wheel."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import cbp_fast
from cbp_fast import _C

ROOT = Path(__file__).parents[1]
PARTS = ("cbp_fast", "csrc", "tests", "benchmarks")


def python(*args, cwd, path="", **environment):
    """Runs this Python with `path` ahead of what is installed."""
    environment = os.environ | {"PYTHONPATH": str(path)} | environment
    return subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True)


def source_files(root, *parts):
    """Files of the source tree, without what was built or cached in it."""
    made = re.compile(r"__pycache__|\.so$|\.pyd$|\.egg-info")
    files = (path.relative_to(root).as_posix() for part in parts for path in (root / part).rglob("*") if path.is_file())
    return {name for name in files if not made.search(name)}


def test_the_change_log_begins_with_this_version():
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == cbp_fast.__version__


def test_import_is_light():
    program = """
import os, sys, warnings
warnings.simplefilter("ignore")
# an import of these fails
sys.modules.update(dict.fromkeys(["numpy", "triton"]))
import torch
before, threads = set(sys.modules), len(os.listdir("/proc/self/task"))
import cbp_fast
assert len(os.listdir("/proc/self/task")) == threads
print(*{name for name in set(sys.modules) - before if not name.startswith("cbp_fast")})
"""
    done = python("-c", program, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    # nothing of PyTorch that it had not brought itself, its compiler among others
    assert set(done.stdout.split()) <= set(sys.stdlib_module_names), done.stdout


def test_no_cpp_symbol_of_pytorch_is_imported():
    imported = subprocess.check_output(["nm", "-DC", "--undefined-only", _C.__file__], text=True)
    names = [line.split()[1] for line in imported.splitlines()]
    assert "torch_parallel_for" in names
    assert not [name for name in names if re.match(r"(at|c10|torch|caffe2)::", name)]
    libraries = subprocess.check_output(["readelf", "-dW", _C.__file__], text=True)
    assert re.findall(r"NEEDED.*\[(lib(?:torch|c10|gomp|omp|iomp).*)\]", libraries) == ["libtorch_cpu.so"]


@pytest.mark.parametrize(
    ("file", "program", "message"),
    [
        ("", "", "no file in"),
        ("_C.cpython-39-x86_64-linux-gnu.so", "", "_C.cpython-39-x86_64-linux-gnu.so in"),
        ("", "import torch; torch.__version__ = type(torch.__version__)('2.9.1')", 'pip install "torch>=2.10"'),
    ],
    ids=["missing", "another Python", "old PyTorch"],
)
def test_without_the_compiled_module_an_import_says_what_to_do(tmp_path, file, program, message):
    shutil.copytree(ROOT / "cbp_fast", tmp_path / "cbp_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if file:
        (tmp_path / "cbp_fast" / file).touch()
    done = python("-c", program + "\nimport cbp_fast", cwd=tmp_path)
    assert f"ImportError: cbp_fast {cbp_fast.__version__} has no compiled module for Python" in done.stderr
    assert message in done.stderr
    assert "Type:\n    pip install" in done.stderr


@pytest.mark.parametrize(
    ("program", "cxx", "message"),
    [
        ("import sys; sys.modules['torch'] = None", "c++", "the build environment lacks torch. Type:\n    pip install"),
        ("import sys; sys.modules['pybind11'] = None", "c++", "the build environment lacks pybind11. Type:\n"),
        ("import torch; torch.__version__ = '2.9.1'", "c++", "needs PyTorch 2.10 or newer, and this is 2.9.1. Type:\n"),
        ("", "no-such-c++", "there is no C++ compiler 'no-such-c++'. Install one (apt-get install g++,"),
    ],
    ids=["no PyTorch", "no pybind11", "old PyTorch", "no compiler"],
)
def test_a_build_that_cannot_be_says_what_to_type(tmp_path, program, cxx, message):
    build = "import sys, runpy; sys.argv = ['setup.py', '-q', 'build_ext', '-b', '.', '-t', '.']"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    done = python("-c", f"{program}\n{build}\nrunpy.run_path('setup.py')", cwd=tmp_path, CXX=cxx)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.slow
def test_the_sdist_holds_all_and_the_wheel_what_runs(tmp_path):
    built = python("setup.py", "-q", "egg_info", "-e", tmp_path, "sdist", "-d", tmp_path, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"cbp_fast-{cbp_fast.__version__}.tar.gz"
    with tarfile.open(archive) as sdist:
        sdist.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    assert source_files(unpacked, *PARTS) == source_files(ROOT, *PARTS)
    alone = {"setup.py", "pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in"}
    assert alone <= {path.name for path in unpacked.iterdir()}

    built = python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, archive, cwd=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 1e6
    with zipfile.ZipFile(wheel) as contents:
        names = {name for name in contents.namelist() if ".dist-info/" not in name}
    compiled = f"cbp_fast/{Path(_C.__file__).name}"
    assert names == source_files(ROOT, "cbp_fast") | {compiled}

    target = tmp_path / "installed"
    python("-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    done = python(ROOT / "tests" / "wheel_run.py", cwd=tmp_path, path=target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cbp_fast {cbp_fast.__version__}, torch ")
