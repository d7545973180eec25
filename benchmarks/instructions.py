"""Instructions that callgrind counts in three fixed operations, repeatable where time is not: `make instructions`.

Counted is everything from the operator's entry to its return, in float32 on one thread, at instruction set v3. Another
compiler, C library or PyTorch gives another count; the committed ones name theirs.
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
from cbp_fast.bench.kernels import Case, mlp_with_few_inputs, operations
from cbp_fast.cli.info import versions

RESULTS = Path(__file__).parent / "results" / "instructions.json"
ISA = "v3"
CASES = (
    Case("capture_", "1 x 1024", 1024, mlp_with_few_inputs, (1, 1024, 256)),
    Case("select_", "2 x 512", 512, mlp_with_few_inputs, (2, 512, 32)),
    Case("reinit_", "2 x 512", 512, mlp_with_few_inputs, (2, 512, 1), chosen=4),
)
_CALLS = 2


def count() -> dict[str, int]:
    """Instructions of the second call of each case, the first one's allocations aside."""
    with tempfile.TemporaryDirectory() as folder:
        functions = [f"cbp::(anonymous namespace)::{case.op}(*" for case in CASES]
        options = [f"--{what}={function}" for function in functions for what in ("toggle-collect", "dump-after")]
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", *options]
        environment = os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, sys.executable, __file__, "--run"], env=environment, check=True)
        dumps = sorted(Path(folder).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        texts = [path.read_text() for path in dumps]
    counts: dict[str, int] = {}
    for text in texts:
        trigger = re.search(r"^desc: Trigger: --dump-after=.*::(\w+)\(", text, re.MULTILINE)
        total = re.search(r"^summary: (\d+)", text, re.MULTILINE)
        if trigger and total:
            counts[trigger[1]] = int(total[1])
    missing = {case.op for case in CASES} - counts.keys()
    if missing:
        sys.exit(f"callgrind saw no call of {', '.join(sorted(missing))}: is the module stripped of its symbols?")
    return {f"{case.op} {case.name}": counts[case.op] for case in CASES}


def run() -> None:
    """What callgrind watches."""
    torch.set_num_threads(1)
    _C.set_isa(ISA)
    for case in CASES:
        functions, _ = operations(case, "nature", "cpu", ("cpp",))
        for _ in range(_CALLS):
            functions["cpp"]()


def main() -> None:
    """Counts, and shows the counts beside the committed ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace {RESULTS.name}")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run()
        return
    about = {**versions(), "compiler": _C.build_info()["compiler"], "instruction set": ISA}
    counts = count()
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"about": {}, "instructions": {}}
    print(f"{'':44} {'instructions':>14} {'committed':>14} {'change':>8}")
    for name, instructions in counts.items():
        then = before["instructions"].get(name)
        change = f"{instructions / then - 1:+8.2%}" if then else ""
        print(f"{name:44} {instructions:14,} {then or '-':>14,} {change}")
    for key, value in about.items():
        print(f"{key} {value}, committed {before['about'].get(key, '-')}")
    if args.write:
        RESULTS.write_text(json.dumps({"about": about, "instructions": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
