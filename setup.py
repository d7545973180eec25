"""Builds the compiled module, cbp_fast._C. All else about the package stands in pyproject.toml."""

import os
import shlex
import shutil
import sys
from glob import glob

from setuptools import Extension, setup

HOW_TO_BUILD = """Type:
    pip install "torch>=2.10" "setuptools>=77.0.3" "pybind11>=3.0" ninja
    pip install --no-build-isolation ."""

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    sys.exit(f"cbp_fast: the build environment lacks {error.name}. {HOW_TO_BUILD}")

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    sys.exit(f"cbp_fast: the build needs PyTorch 2.10 or newer, and this is {torch.__version__}. {HOW_TO_BUILD}")

# No contraction, because every instruction set must give the same bits. The next two change no value: they give up
# errno and floating-point traps, so that square roots and conditional divisions can be vector code. No -march, because
# the sources compile themselves for several instruction sets and choose at load.
GNU_FLAGS = ["-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
MSVC_FLAGS = ["/std:c++20", "/O2", "/fp:precise"]


class BuildExtension(cpp_extension.BuildExtension):
    """PyTorch's ninja build, which says what to install when there is no compiler."""

    def build_extensions(self) -> None:
        """Adds the flags of the compiler in use, and builds."""
        if self.compiler.compiler_type == "msvc":
            flags = MSVC_FLAGS
        else:
            # --debug is for the sanitizers: quick to compile, and with line numbers
            flags = GNU_FLAGS + (["-O1", "-g1"] if self.debug else ["-O3", "-g0"])
            compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
            if shutil.which(compiler) is None:
                sys.exit(
                    f"cbp_fast: there is no C++ compiler {compiler!r}. Install one (apt-get install g++, "
                    "dnf install gcc-c++, xcode-select --install) or name yours, as in: CXX=clang++ pip install ..."
                )
        for extension in self.extensions:
            extension.extra_compile_args += flags
        super().build_extensions()


setup(
    ext_modules=[
        Extension(
            "cbp_fast._C",
            sources=sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            # pybind11's own headers before those that PyTorch carries
            include_dirs=[pybind11.get_include(), *cpp_extension.include_paths()],
            library_dirs=cpp_extension.library_paths(),
            # the stable ABI is C functions, and they are in this library
            libraries=["torch_cpu"],
            # the oldest PyTorch that the binary must run on, 2.10
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
