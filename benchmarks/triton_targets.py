"""What the Triton kernels take on each GPU they are compiled for, and what a step moves; no GPU is needed.

TRITON_INTERPRET=0 python benchmarks/triton_targets.py    # writes benchmarks/results/triton_targets.md
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE)]

from ahead_of_time import TARGETS, Specialisation, compiled  # noqa: E402
from gpu import NETS, build  # noqa: E402
from triton_tail import tail_table  # noqa: E402

from cbp_fast import ContinualBackprop, Rule, UnitGroup  # noqa: E402
from cbp_fast.triton_backend import _Step, meta_of  # noqa: E402
from cbp_fast.triton_kernels import FLOAT64, Job  # noqa: E402

# registers, threads and programs that one multiprocessor holds, and its shared memory in bytes
REGISTERS, PROGRAMS = 65536, 32
THREADS = {"sm_80": 2048, "sm_90": 2048, "sm_100": 2048}
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
H100_BANDWIDTH = 3.35e12


def occupancy(target: str, registers: int, shared: int, threads: int = 128) -> int:
    """Programs that are resident on one multiprocessor at a time."""
    # registers come in blocks of 256 a warp, shared memory with 1 KiB for the system
    by_registers = REGISTERS // (math.ceil(registers * 32 / 256) * 256 * threads // 32)
    return min(by_registers, THREADS[target] // threads, SHARED[target] // (shared + 1024), PROGRAMS)


def kernels(target: str) -> dict[str, Specialisation]:
    """What a network of one type takes for each rule, and all kinds of sums in one."""
    one = 1 << 9 | 1 << 11
    return {
        "select, nature, float32": Specialisation.of(
            "select", target, KINDS=one, **meta_of(Rule.nature(), False, False)
        ),
        "select, clarena, float32": Specialisation.of(
            "select", target, KINDS=one, **meta_of(Rule.clarena(), False, False)
        ),
        "select, nature, every kind": Specialisation.of(
            "select", target, KINDS=2**16 - 1, **meta_of(Rule.nature(), False, True)
        ),
        "capture, every kind": Specialisation.of("capture", target, KINDS=2**16 - 1),
        "reinit, uniform": Specialisation.of("reinit", target, WIDE_UTILITY=False, DISTRIBUTION=0),
        "reinit, normal": Specialisation.of("reinit", target, WIDE_UTILITY=False, DISTRIBUTION=1),
    }


def bytes_of_step(name: str) -> tuple[int, int, int]:
    """Bytes of weights and activations, bytes that `select` reads besides, and its programs; from its own tables."""
    _, groups, held = build(NETS[name], "cpu")
    model = nn.ModuleList(dict.fromkeys(layer for group in groups for layer in (*group.incoming, *group.outgoing)))
    state = ContinualBackprop(model, groups=groups, backend="reference")._engine.state
    weights = [ref.get() for ref in state.weights]
    plan = _Step(state, weights, held, list(range(len(held))))
    besides = 0
    for job in map(Job._make, plan.jobs.tolist()):
        item = 8 if job.kind // 4 == FLOAT64.value else 4
        besides += job.outputs * (8 + (job.splits * item if job.splits > 1 else 0))
    # each program its tile and job; each unit its y, key, utility and age
    besides += len(plan.tiles) * (12 + 8 * len(Job._fields)) + state.age.numel() * (8 + 8 + 4 + 4)
    return sum(t.nbytes for t in (*weights, *held)), besides, len(plan.tiles)


class Counter(TorchDispatchMode):
    """Counts what PyTorch computes; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not function.is_view
        return function(*args, **(kwargs or {}))


def eager_calls(depth: int) -> int:
    """Operators of one step of the reference in which every group replaces a unit."""
    layers = [nn.Linear(8, 8, bias=False) for _ in range(depth + 1)]
    cbp = ContinualBackprop(
        nn.Sequential(*layers),
        groups=[UnitGroup(f"{i}", a, b) for i, (a, b) in enumerate(itertools.pairwise(layers))],
        backend="reference",
        capture="deferred",
        replacement_rate=0.2,
        maturity_threshold=0,
    )
    for slot in range(depth):
        cbp._engine.record(slot, torch.ones(4, 8))
    with Counter() as counter:
        cbp.step()
    return counter.calls


def table(head: list[str], rows: list[list[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    rows: list[list[object]] = []
    for target in TARGETS:
        for name, specialisation in kernels(target).items():
            (kernel,) = compiled(specialisation)
            loads = len(re.findall(r"\bLDG\.E\.128\b", kernel.sass)), len(re.findall(r"\bLDG\b", kernel.sass))
            resident = occupancy(target, kernel.registers, kernel.shared)
            percent = f"{100 * resident * 128 // THREADS[target]} %"
            spilt = kernel.spills + kernel.stack
            rows.append([target, name, kernel.registers, kernel.shared, spilt, resident, percent, loads[0], loads[1]])
    head = ["target", "kernel", "registers", "shared bytes", "spills", "programs a multiprocessor", "of its threads"]
    head += ["16-byte loads", "loads"]
    moved: list[list[object]] = []
    for name, net in NETS.items():
        need, besides, programs = bytes_of_step(name)
        floor = f"{need / H100_BANDWIDTH * 1e6:.0f} us"
        share = f"{1 + besides / need:.4f}"
        moved.append([name, f"{need / 1e6:.1f}", share, programs, 2, eager_calls(net.depth), floor])
    columns = "net,MB of weights and activations,bytes read / those,programs,launches,operators of the eager reference"
    text = (
        "# The Triton kernels without a GPU\n\n"
        f"Triton {triton.__version__}, PyTorch {torch.__version__}; 128 threads a program. "
        "Made by `TRITON_INTERPRET=0 python benchmarks/triton_targets.py`.\n\n"
        + table(head, rows)
        + "\n\nThe loads are those in the code, not those that run.\n\nOne step of `nature`, by the kernel's tables; "
        "the last column is an **estimate**, not a measurement: the first one at the 3.35 TB/s of an H100.\n\n"
        + table([*columns.split(","), "floor on an H100 (estimate)"], moved)
        + f"\n\n## After the last byte\n\n{tail_table()}\n"
    )
    (HERE / "results" / "triton_targets.md").write_text(text)
    print(text)
