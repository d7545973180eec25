"""What the Triton kernels take on each GPU they are compiled for, and what a step moves; no GPU is needed.

TRITON_INTERPRET=0 python benchmarks/triton_targets.py    # writes benchmarks/results/triton_targets.md

With a column for each Triton that `make test-triton VERSION=...` has been run with.
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
sys.path[:0] = [str(HERE.parent / "tests" / "backends" / "on_triton"), str(HERE)]

from ahead_of_time import TARGETS, Specialisation, compiled  # noqa: E402
from gpu import NETS, build  # noqa: E402
from triton_tail import tail_table  # noqa: E402

from cbp_fast import ContinualBackprop, Rule, UnitGroup  # noqa: E402
from cbp_fast.backends.triton.rows import FLOAT64, Job  # noqa: E402
from cbp_fast.backends.triton.specialising import kernels_of  # noqa: E402
from cbp_fast.backends.triton.step_plan import StepPlan  # noqa: E402

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
    """What networks of one type take, by rule, and sums of every type in one."""
    rules = {
        "nature": (Rule.nature(), 1 << 2),
        "clarena": (Rule.clarena(), 1 << 2),
        "adaptable_contribution, transfer_bias": (Rule.gnt("adaptable_contribution", transfer_bias=True), 1 << 2),
        "nature, normal, every type": (Rule.nature(init="normal"), 2**4 - 1),
    }
    found = {}
    for name, (rule, types) in rules.items():
        for kernel, meta in kernels_of(rule, False, types, False):
            what = {0: "abs(h), ", 1: "h, ", 2: "abs(h - hat), "}.get(meta.get("SUM"), "")
            found.setdefault(
                Specialisation.of(kernel.fn.__name__, target, **meta), f"{kernel.fn.__name__}, {what}{name}"
            )
    found[Specialisation.of("rank", target)] = "rank"
    return {name: specialisation for specialisation, name in found.items()}


def pythons() -> dict[str, str]:
    """By version of Triton, an interpreter that has it: this one, and those that `make test-triton` has made."""
    found = {triton.__version__: sys.executable}
    for python in HERE.parent.glob(".venv-triton-*/bin/python"):
        found[python.parts[-3].removeprefix(".venv-triton-")] = str(python)
    return dict(sorted(found.items()))


def of_versions(target: str) -> list[list[object]]:
    """For each kernel what it takes with each Triton: registers, spilt bytes and instructions, 16-byte loads."""
    rows: list[list[object]] = [[target, name] for name in kernels(target)]
    for python in pythons().values():
        for row, kernel in zip(rows, compiled(*kernels(target).values(), python=python), strict=True):
            wide = len(re.findall(r"\bLDG\.E\.128\b", kernel.sass))
            row.append(f"{kernel.registers}, {kernel.stack + kernel.spills}, {wide}")
    return rows


def bytes_of_step(name: str) -> tuple[int, int, int]:
    """Bytes of weights and activations, bytes that `select` reads besides, and its programs; from its own tables."""
    _, groups, held = build(NETS[name], "cpu")
    model = nn.ModuleList(dict.fromkeys(layer for group in groups for layer in (*group.incoming, *group.outgoing)))
    state = ContinualBackprop(model, groups=groups, backend="reference")._engine.state
    weights = [ref.get() for ref in state.weights]
    aligned = [0] * (len(weights) + len(held))
    plan = StepPlan(state, weights, held, list(range(len(held))), aligned, ())
    besides = 0
    for job in map(Job._make, plan.jobs.view(-1, len(Job._fields)).tolist()):
        item = 8 if job.kind // 4 == FLOAT64.value else 4
        besides += job.outputs * (8 + (job.splits * item if job.splits > 1 else 0))
    # each program its tile and job; each block of units its row, each unit its y, key, utility and age
    besides += plan.programs * (28 + 8 * len(Job._fields)) + plan.blocks.nbytes + state.age.numel() * (8 + 8 + 4 + 4)
    return sum(t.nbytes for t in (*weights, *held)), besides, plan.programs


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
        for name, kernel in zip(kernels(target), compiled(*kernels(target).values()), strict=True):
            resident = occupancy(target, kernel.registers, kernel.shared)
            percent = f"{100 * resident * 128 // THREADS[target]} %"
            rows.append([target, name, kernel.registers, kernel.shared, resident, percent])
    head = ["target", "kernel", "registers", "shared bytes", "programs a multiprocessor", "of its threads"]
    versions = [row for target in TARGETS for row in of_versions(target)]
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
        + "\n\n## With each Triton\n\nRegisters; bytes on the stack and instructions that spill, together; loads of 16 "
        "bytes in the code.\n\n"
        + table(["target", "kernel", *pythons()], versions)
        + "\n\n## Bytes of a step\n\nOne step of `nature`, by the kernel's tables; "
        "the last column is an **estimate**, not a measurement: the first one at the 3.35 TB/s of an H100.\n\n"
        + table([*columns.split(","), "floor on an H100 (estimate)"], moved)
        + f"\n\n## After the last byte\n\n{tail_table()}\n"
    )
    (HERE / "results" / "triton_targets.md").write_text(text)
    print(text)
