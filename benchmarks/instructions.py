"""Instructions that callgrind counts in three fixed operations, repeatable where time is not: `make instructions`.

Counted are three calls, from the compiled function's entry to its return, in float32 on one thread, at instruction set
v3. Another compiler, C library or PyTorch gives another count; the committed ones name theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from cbp_fast import _C
from cbp_fast.bench.kernels import Case, convolutions, mlp_with_few_inputs, operations
from cbp_fast.cli.info import versions

RESULTS = Path(__file__).parent / "results" / "instructions.json"
ISA = "v3"
CASES = (
    Case("select_", "2 x 512", 512, mlp_with_few_inputs, (2, 512, 32)),
    Case("select_", "conv 64 @ 8 x 8", 64, convolutions, (64, 8, 4)),
    Case("reinit_", "2 x 512", 512, mlp_with_few_inputs, (2, 512, 1), chosen=4),
)
_CALLS = 3


def label(case: Case) -> str:
    """What the case is called in the results."""
    return f"{case.op} {case.name}"


def count(case: Case) -> int:
    """Instructions of all calls of the case's function in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        collected = f"--toggle-collect=(anonymous namespace)::Call<&cbp::{case.op}>::call(*"
        command = ["valgrind", "--tool=callgrind", "--quiet", f"--callgrind-out-file={out}", collected]
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        run = ["--run", str(CASES.index(case))]
        subprocess.run([*command, sys.executable, __file__, *run], env=environment, check=True)
        total = re.search(r"^summary: (\d+)", out.read_text(), re.MULTILINE)
    if not total or total[1] == "0":
        sys.exit(f"callgrind saw no call of {case.op}: is the module stripped of its symbols?")
    return int(total[1])


def run(case: Case) -> None:
    """What callgrind watches."""
    torch.set_num_threads(1)
    _C.set_isa(ISA)
    functions, _ = operations(case, "nature", "cpu", ("cpp",))
    for _ in range(_CALLS):
        functions["cpp"]()


def main() -> None:
    """Counts, and shows the counts beside the committed ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace {RESULTS.name}")
    parser.add_argument("--run", type=int, metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        run(CASES[args.run])
        return
    about = {**versions(), "compiler": _C.build_info()["compiler"], "instruction set": ISA}
    counts = {label(case): count(case) for case in CASES}
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"about": {}, "instructions": {}}
    print(f"{'':44} {'instructions':>14} {'committed':>14} {'change':>8}")
    for name, instructions in counts.items():
        then = before["instructions"].get(name)
        committed, change = (f"{then:,}", f"{instructions / then - 1:+8.2%}") if then else ("-", "")
        print(f"{name:44} {instructions:14,} {committed:>14} {change}")
    for key, value in about.items():
        print(f"{key} {value}, committed {before['about'].get(key, '-')}")
    if args.write:
        RESULTS.write_text(json.dumps({"about": about, "instructions": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
