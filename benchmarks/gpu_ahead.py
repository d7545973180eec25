"""Compiles what `make gpu` will launch, into Triton's cache, on a machine that needs no GPU: `make gpu-cache`.

TRITON_INTERPRET=0 TRITON_CACHE_DIR=build/triton python benchmarks/gpu_ahead.py --capability 90

The tests and the measurements run once in full size on the CPU, with a driver that names the GPU and launches nothing.
All else is Triton's own way from a launch to its cache, so that the GPU's machine finds there what it looks for, if its
Triton (with the compilers that it brings) and these kernels are the same. Results are nonsense and are not looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_run import settle

ROOT = Path(__file__).parents[1]
# what every process of a run reads; unset, nothing here does anything
CAPABILITY = "CBP_FAST_COMPILE_FOR"
# the programs besides the tests
PHASES = ("facts", "sanitizer", "order", "times", "where", "training", "options launch", "options num_warps=8")


class Utilities:
    """What Triton asks a driver about a device and a binary."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**18, "max_num_regs": 2**16, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills and the most threads."""
        return 0, 0, 0, 0, 1024


class Driver:
    """Triton's driver of a GPU that is not there: it is asked what to compile for, and launches nothing."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = Utilities()

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None


def install(capability: int) -> None:
    """From now on, in this process, the Triton backend takes CPU tensors and compiles for a GPU."""
    import torch
    import triton

    from cbp_fast.backends.triton import backend

    triton.runtime.driver.set_active(Driver(capability))
    # what is launched on the device of a tensor is launched on the CPU's
    torch.cuda.device = lambda device: contextlib.nullcontext()
    why_not = backend.why_not
    # what it says of a device that is neither the CPU nor a GPU is about the rule
    backend.why_not = lambda rule, device, split: why_not(rule, torch.device("meta"), split)

    def chooses(function: Any) -> Any:
        def chosen(state: Any, *args: Any) -> int:
            function(state, *args)
            # as nothing was launched, nothing was chosen; a unit of each group is, so that it is re-initialised
            state.num_chosen.fill_(1)
            state.chosen.zero_()
            return len(state.layouts)

        return chosen

    for name in ("select_", "choose_"):
        setattr(backend, name, chooses(getattr(backend, name)))


def pytest_configure(config: Any) -> None:
    """The tests' processes load this file as a plugin."""
    install(int(os.environ[CAPABILITY]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="of the GPU, as in 80, 86, 90, 100")
    parser.add_argument("--tests", help="only these, as for pytest's -k; no measurements")
    given = parser.parse_args()
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    if given.capability < 80:
        parser.error(f"--capability is {given.capability}; the kernels need 80 or more")
    environment = {**os.environ, "TRITON_INTERPRET": "0", CAPABILITY: str(given.capability)}
    # the texts on the way to a binary are not needed, and many
    environment["TRITON_STORE_BINARY_ONLY"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    tests = [sys.executable, "-m", "pytest", "-p", "gpu_ahead", "-p", "no:cacheprovider", "-W", "ignore", "-q"]
    tests += ["--tb=no", "--no-summary", "tests/gpu/test_gpu.py", *(["-k", given.tests] if given.tests else [])]
    programs = [[sys.executable, "benchmarks/gpu.py", *phase.split()[:1]] for phase in PHASES]
    for program, phase in zip(programs, PHASES, strict=True):
        program += ["--options", phase.split()[1]] if " " in phase else []
    begin = time.monotonic()
    for command in [tests] if given.tests else [tests, *programs]:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        made = len(list(cache.glob("*/*.cubin")))
        print(f"{made} kernels after {time.monotonic() - begin:.0f} s: {' '.join(command[1:4])}", flush=True)
        # of the tests, only the launches matter; 1 says that some failed, as they must
        if done.returncode not in ((0, 1) if command is tests else (0,)):
            print(done.stdout[-3000:], done.stderr[-3000:], sep="\n")
            return 1
    # the first text stays even so; `settle` takes it off Triton's list
    for source in cache.glob("*/*.source"):
        source.unlink()
    settle(cache)
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    print(f"{cache}: {size / 1e6:.1f} MB for compute capability {given.capability / 10:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
