"""What a step on a GPU takes of the host: time here, and instructions by callgrind; the launches themselves are stubs.

TRITON_INTERPRET=1 python benchmarks/host_step.py [--write]    # the counts need valgrind; `make instructions` runs both

Counted are Python, PyTorch and the compiled module, in the forward hooks and the step, of a chain of layers of 256
units with Adam. The tensors are on the CPU, where nothing of CUDA's own is counted: a launch is a driver call more, and
the two questions to CUDA (which device, which stream) are not asked.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from cbp_fast import ContinualBackprop
from cbp_fast.backends.triton import backend, launching
from cbp_fast.cli.info import versions

RESULTS = Path(__file__).parent / "results" / "host_step.json"
DEPTHS = (2, 12)
_STEPS = 20


class _Stub(dict[Any, Any]):
    """In the place of the compiled kernels: a launch that does nothing."""

    def get(self, key: Any, default: Any = None) -> Any:
        """Any kernel, by any key."""
        return self

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args: None


def prepared(depth: int) -> Callable[[], None]:
    """One step of a net of so many groups, after a few of training."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    widths = [256] * (depth + 1) + [10]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters())
    # as a device's choice is: not known to the host
    backend.chosen_of = lambda state: -1
    launching._compiled = _Stub()
    cbp = ContinualBackprop(model, optimizer, backend="triton", capture="deferred", seed=0)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(32, 256)).square().mean().backward()
        optimizer.step()
    held = [torch.randn(32, 256) for _ in range(depth)]
    record, step = cbp._engine.record, cbp.step

    def run() -> None:
        for slot, h in enumerate(held):
            record(slot, h)
        step()

    for _ in range(50):
        run()
    return run


def microseconds(depth: int, repeats: int = 2000) -> float:
    """Median time of a step."""
    run, times = prepared(depth), []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times) * 1e6


def instructions(depth: int) -> int:
    """Instructions of one step, the mean of some, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        command = ["valgrind", "--tool=callgrind", "--quiet", f"--callgrind-out-file={out}"]
        command += ["--toggle-collect=ffi_call", sys.executable, __file__, "--run", str(depth)]
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True)
        total = re.search(r"^summary: (\d+)", out.read_text(), re.MULTILINE)
    if not total or total[1] == "0":
        sys.exit("callgrind saw no call by ctypes, within which the steps run")
    return int(total[1]) // _STEPS


def inside_one_call(run: Callable[[], None]) -> None:
    """Some steps within one call that ctypes makes: callgrind counts what is in it."""
    compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

    def steps(key: int, entry: int) -> int:
        for _ in range(_STEPS):
            run()
        return 0

    two = (ctypes.c_int * 2)()
    ctypes.CDLL(None).qsort(two, ctypes.c_size_t(2), ctypes.c_size_t(4), compare(steps))


def main() -> None:
    """Counts and times, beside the committed ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace {RESULTS.name}")
    parser.add_argument("--no-count", action="store_true", help="times only, without valgrind")
    parser.add_argument("--run", type=int, metavar="DEPTH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        inside_one_call(prepared(args.run))
        return
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"groups": {}}
    found: dict[str, Any] = {"about": versions(), "groups": {}}
    print("groups  us a step  committed  instructions  committed")
    for depth in DEPTHS:
        mine = {"us": round(microseconds(depth), 1)}
        if not args.no_count:
            mine["instructions"] = instructions(depth)
        then = before["groups"].get(str(depth), {})
        row = (depth, mine["us"], then.get("us", "-"), mine.get("instructions", "-"), then.get("instructions", "-"))
        print("{:6}  {:>9}  {:>9}  {:>12}  {:>9}".format(*row))
        found["groups"][str(depth)] = mine
    if args.write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
