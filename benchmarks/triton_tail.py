"""How long a step goes on after its last byte was read: round trips to memory that wait for each other, without a GPU.

The compiled kernels run on the machine of the tests, whose clock counts. The tail is what of the first launch is left
when the last program has begun to store its sums, and all of each further one, but for `reinit`.

python benchmarks/triton_tail.py [--before COMMIT]    # writes benchmarks/results/triton_tail[_before].json
"""

from __future__ import annotations

import argparse
import functools
import gc
import inspect
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests" / "backends" / "on_triton"), str(HERE)]

from ahead_of_time import Specialisation, compiled  # noqa: E402
from ptx_assembler import Assembler  # noqa: E402
from ptx_machine import Launch  # noqa: E402

from cbp_fast import ContinualBackprop, UnitGroup  # noqa: E402
from cbp_fast.backends.triton import launching  # noqa: E402
from cbp_fast.backends.triton.rows import Job  # noqa: E402

BEFORE, NOW = (HERE / "results" / f"triton_tail{name}.json" for name in ("_before", ""))
# microseconds
TRIP = 0.15
assembled = functools.cache(Assembler)


class Tail(NamedTuple):
    launches: int
    trips: int


class Net(NamedTuple):
    """Layers that make and read each group's units, and the batch that each of those reads."""

    pairs: list[tuple[nn.Module, nn.Linear]]
    held: list[torch.Tensor]


def chain(depth: int, width: int, samples: int) -> Net:
    """Layers of one width."""
    layers = [nn.Linear(width, width, bias=False) for _ in range(depth + 1)]
    return Net(list(itertools.pairwise(layers)), [torch.randn(samples, width) for _ in range(depth)])


def wide(units: int) -> Net:
    """One group, with little to sum."""
    return Net([(nn.Linear(2, units), nn.Linear(units, 4))], [torch.randn(4, units)])


def mlp() -> Net:
    """The MLP of a block of GPT-2 small, the activations of 8 sequences of 1,024 in 16 bits."""
    pair = nn.Linear(768, 3072, bias=False), nn.Linear(3072, 768, bias=False)
    return Net([pair], [torch.randn(8192, 3072).bfloat16()])


def flattened() -> Net:
    """As VGG-16 ends: 512 channels of 7 x 7 positions, and two layers of 4,096 units."""
    pairs = [(nn.Conv2d(2, 512, 3), nn.Linear(512 * 49, 4))]
    pairs += [(nn.Linear(2, 4096), nn.Linear(4096, 4)) for _ in range(2)]
    return Net(pairs, [torch.randn(4, reader.in_features) for _, reader in pairs])


class OnClock:
    """In the place of `launch`: the kernels on the machine, with one tile a program, as the tail is the same."""

    def __init__(self) -> None:
        self.tails: list[int] = []

    def launch(self, kernel: Any, grid: tuple[int, ...], args: Any, meta: Any) -> None:
        name = kernel.fn.__name__
        if name == "reinit":
            return
        names, args = list(inspect.signature(kernel.fn).parameters), list(args)
        if "jobs" in names:
            jobs = args[names.index("jobs")].clone()
            jobs.view(-1, len(Job._fields))[:, Job._fields.index("steps")] = 1
            args[names.index("jobs")] = jobs
        (built,) = compiled(Specialisation.of(name, **meta))
        # whatever the tables point to
        every = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter) and t.device.type == "cpu"]
        launch = Launch(assembled(built.ptx), grid[0], args, every, built.shared, burst=10**4, by_time=True)
        self.tails.append(launch.finished - (0 if self.tails else launch.summed))


def tail(net: Net, chosen: int) -> Tail:
    """Of the first step, in which every group replaces so many units."""
    clock = OnClock()
    groups = [UnitGroup(f"{i}", a, b) for i, (a, b) in enumerate(net.pairs)]
    model = nn.ModuleList(dict.fromkeys(layer for pair in net.pairs for layer in pair))
    units = min(p[0].weight.shape[0] for p in net.pairs)
    options = {"replacement_rate": (chosen + 0.5) / units, "maturity_threshold": 0, "decay_rate": 0.5}
    cbp = ContinualBackprop(model, groups=groups, backend="reference", capture="deferred", **options)
    cbp._engine.use("triton")
    for slot, h in enumerate(net.held):
        cbp._engine.record(slot, h)
    with mock.patch.object(launching, "launch", clock.launch):
        cbp.step()
    assert min(map(len, cbp.last_replaced.values())) == chosen
    return Tail(len(clock.tails), sum(clock.tails))


SHAPES: dict[str, Callable[[], Tail]] = {
    "2 x 256": lambda: tail(chain(2, 256, 32), 0),
    "3 x 1024": lambda: tail(chain(3, 1024, 32), 0),
    "3 x 4096": lambda: tail(chain(3, 4096, 256), 0),
    "3072 units of GPT-2 small": lambda: tail(mlp(), 0),
    "512 x 49, flattened, and 2 x 4096": lambda: tail(flattened(), 0),
    **{f"4096 units, {k} replaced": functools.partial(lambda k: tail(wide(4096), k), k) for k in (1, 8, 9, 40, 2048)},
}
# too many for the machine: by a line through fewer of them, with so many of these replaced
WIDE = 131072
WIDTHS = (1024, 2048, 4096)
LINES: dict[str, Callable[[int], int]] = {
    f"{WIDE} units, 1 replaced": lambda units: 1,
    f"{WIDE} units, 131 replaced": lambda units: 131,
    f"{WIDE} units, 65536 replaced": lambda units: units // 2,
}


def lines(tails: dict[int, int]) -> tuple[int, float]:
    """What the line through the tails by width comes to at `WIDE`, and how far it misses one of them."""
    widths, trips = np.array(list(tails)), np.array(list(tails.values()))
    slope, start = np.polyfit(widths, trips, 1)
    return round(float(start + slope * WIDE)), float(abs(start + slope * widths - trips).max())


def measure(name: str) -> dict[str, Any]:
    """Launches and trips of a shape."""
    if name in SHAPES:
        return SHAPES[name]()._asdict()
    tails = {units: tail(wide(units), LINES[name](units)) for units in WIDTHS}
    by_width = {units: t.trips for units, t in tails.items()}
    trips, miss = lines(by_width)
    launches = tails[WIDTHS[0]].launches
    return {"launches": launches, "trips": trips, "misses by": round(miss, 1), "by width": by_width}


def read(file: Path) -> dict[str, Any]:
    """What was measured before, if anything was."""
    return json.loads(file.read_text()) if file.exists() else {"commit": "-", "tails": {}}


def tail_table() -> str:
    """Markdown of what was measured, before and now."""
    before, now = read(BEFORE), read(NOW)
    head = ["shape", "round trips before", "now", "launches before", "now", "estimate before, us", "now"]
    rows = [head, ["---"] * len(head)]
    for name in (*SHAPES, *LINES):
        entries = [file["tails"].get(name, {}) for file in (before, now)]
        times = [f"{TRIP * e['trips']:.0f}" if e else "-" for e in entries]
        rows.append([name, *(str(e.get(what, "-")) for what in ("trips", "launches") for e in entries), *times])
    missed = max((t.get("misses by", 0) for file in (before, now) for t in file["tails"].values()), default=0)
    return (
        "Round trips to memory that wait for each other, from when the last program has begun to store its sums to the "
        "end of the choice. **Counted**, not timed, by the clock of the tests' PTX machine: a trip for each load of "
        "global memory, cached or not, nothing for arithmetic, shared memory and what a launch itself takes. Launches "
        "are without `reinit`. Nothing is replaced where no number says so. "
        f"Before: commit {before['commit']}. The rows of {WIDE} units are no count but a line through "
        f"{', '.join(map(str, WIDTHS))} units, which misses those by {missed:.0f} at most. "
        f"The **estimates** are {TRIP} us a trip, as to the second cache of an idle H100, and no measurement. "
        "Made by `python benchmarks/triton_tail.py`.\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", metavar="COMMIT", help="write the numbers to compare with, those of this commit")
    parser.add_argument("--only", default="", help="the shapes with this in their names; all others stay as they are")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = BEFORE if arguments.before else NOW
    for name in (*SHAPES, *LINES):
        if arguments.only in name:
            torch.manual_seed(0)
            start = time.perf_counter()
            entry = measure(name)
            print(f"{name}: {entry} in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            found = read(file)
            found = {"commit": arguments.before or "-", "tails": {**found["tails"], name: entry}}
            file.write_text(json.dumps(found, indent=1) + "\n")
    print(tail_table())
