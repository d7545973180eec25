"""`cbp-fast info`: what to paste into a bug report."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

from .._version import __version__
from ..backends.registry import TESTED_TRITON, is_tested_triton, triton_version, why_not_triton
from ..rules.rule import Rule
from ..tensors.native import _C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> int:
    """Prints a line a fact."""
    build, sets = _C.build_info(), _C.isa_levels()
    rest = [name for name in build["instruction_sets"] if name not in sets]
    for name, value in {
        **versions(),
        "system": platform.platform(),
        "CPU": f"{cpu_name()}, {torch.get_num_threads()} threads in use",
        "GPU": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none",
        "built with": f"compiler {build['compiler']}, pybind11 {build['pybind11']}",
        "instruction set": f"{_C.get_isa()} in use; this CPU runs {', '.join(sets)}"
        + (f", not {', '.join(rest)}" if rest else ""),
        "backend cpp": "available, for tensors on the CPU",
        "backend reference": "available, for every device",
        "backend triton": _triton(),
    }.items():
        print(f"{name:18} {value}")
    return 0


def _triton() -> str:
    """Whether the Triton backend can run, or why not."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    version = triton_version()
    if version is None:
        return "not available: Triton is not installed"
    tested = f"{TESTED_TRITON} are tested" if is_tested_triton(version) else f"not tested; {TESTED_TRITON} are"
    why = why_not_triton(Rule.nature(), device, split=False)
    which = f"Triton {version} ({tested})"
    return f"not available: {which} {why}" if why else f"available, with {which}"


def versions() -> dict[str, str]:
    """Versions of what decides a result or a time."""
    return {"cbp_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}


def cpu_name() -> str:
    """The CPU's model, as well as the system tells it."""
    # platform.processor() is empty or "x86_64" on Linux
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
