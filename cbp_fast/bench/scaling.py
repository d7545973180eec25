"""Suite `scaling`: how the cost of a step grows with weights, with depth and with the units that are replaced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from ..continual_backprop import ContinualBackprop
from .networks import build, mlp
from .step import Case, backend_for_device, stated_bytes, timers_of
from .timing import Options, Row, Timer, hook_seconds, in_turns, row, timer

LEGEND = """\
How one step grows, in microseconds, hooks included: median (10th to 90th percentile).
  weights  three hidden layers of equal width, batch 32, nothing replaced, beside reading the bytes once
  depth    layers of 64 units, batch 32; what a layer costs is the slope of a line
  rate     3 x 4096, batch 32, Adam: steps in which a share of all units is replaced, beside steps that replace none"""

_WEIGHTS = (1e5, 3e5, 1e6, 3e6, 1e7, 3e7, 1e8)
_DEPTHS = (1, 2, 5, 10, 20, 50, 100)
# of 4096 units: none, one a layer and step, 4, 41
_UNITS = (0, 1, 4, 41)
_ROUNDS = {"weights": 50, "depth": 50, "rate": 100}


def case_names() -> list[str]:
    """What `--cases` may name."""
    return list(_ROUNDS)


def rounds(options: Options) -> int:
    """How many rounds the suite takes."""
    sizes = {"weights": len(_WEIGHTS), "depth": len(_DEPTHS), "rate": 1}
    return sum(_ROUNDS[part] * sizes[part] for part in _parts(options))


def _parts(options: Options) -> list[str]:
    return [part for part in _ROUNDS if not options.cases or part in options.cases]


def run(options: Options) -> Iterator[tuple[str, list[Row]]]:
    """A line of the table at a time, and its times."""
    parts: dict[str, Callable[[Options], Iterator[tuple[str, list[Row]]]]] = {
        "weights": _weights,
        "depth": _depth,
        "rate": _rate,
    }
    yield LEGEND, []
    for part in _parts(options):
        with options.case(part):
            yield from parts[part](options)


def slope(x: list[float], y: list[float]) -> float:
    """Of the line of least squares through the points."""
    mean = sum(x) / len(x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x)


def _weights(options: Options) -> Iterator[tuple[str, list[Row]]]:
    ours, rule = backend_for_device(options), options.rule or "nature"
    yield f"\n{'weights':>12} {'width':>6} {ours:>26} {'read':>26} {'ns a weight':>12}", []
    found: list[Row] = []
    machinery = 3 * hook_seconds()
    for weights in _WEIGHTS:
        case = Case(f"{weights:.0e}", 3, math.isqrt(int(weights) // 3), 32, _ROUNDS["weights"])
        with options.case(f"{case.name} weights"):
            times = in_turns(timers_of(case, rule, options.device, (ours,)), case.rounds, options)
            times[ours] = [t + machinery for t in times[ours]]
            moved = stated_bytes(case, rule)
            rows = [row("scaling", case.name, "weights", name, times[name], x=weights, moved=moved) for name in times]
            found += [r for r in rows if r.method == ours]
            cells = "".join(f"{_cell(r):>27}" for r in rows)
            yield f"{weights:12.0e} {case.width:6}{cells} {1e3 * rows[0].median / weights:12.3f}", rows
    points = [(math.log(r.x), math.log(r.median)) for r in found]
    parts = (points, [p for p in points if p[0] >= math.log(1e6)])
    if min(map(len, parts)) < 2:
        return
    exponents = [slope(*map(list, zip(*part, strict=True))) for part in parts]
    yield f"{'':12} time grows with weights to the power {exponents[0]:.2f}; {exponents[1]:.2f} from 1e+06 on", []


def _depth(options: Options) -> Iterator[tuple[str, list[Row]]]:
    ours, rule = backend_for_device(options), options.rule or "nature"
    yield f"\n{'depth':>12} {'':6} {ours:>26} {'us a layer':>26}", []
    found: list[Row] = []
    machinery = hook_seconds()
    for depth in _DEPTHS:
        case = Case(str(depth), depth, 64, 32, _ROUNDS["depth"])
        with options.case(f"{depth} layers"):
            times = in_turns({ours: timers_of(case, rule, options.device, (ours,))[ours]}, case.rounds, options)
            seconds = [t + depth * machinery for t in times[ours]]
            moved = stated_bytes(case, rule)
            found.append(row("scaling", case.name, "depth", ours, seconds, x=depth, moved=moved))
            yield f"{depth:12} {'':6} {_cell(found[-1]):>26} {found[-1].median / depth:26.1f}", found[-1:]
    if len(found) < 2:
        return
    cost = slope([r.x for r in found], [r.median for r in found])
    yield f"{'':12} each layer more costs {cost:.1f} us", []


def _rate(options: Options) -> Iterator[tuple[str, list[Row]]]:
    ours, rule = backend_for_device(options), options.rule or "nature"
    network = build(mlp, 3, 4096, 32, device=options.device)
    optimizer = torch.optim.Adam(network.model.parameters(), lr=0.0)
    network.model(network.x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    cbp = ContinualBackprop(network.model, rule=rule, replacement_rate=0.0, maturity_threshold=0)
    # the moments are reset as well, but the optimizer's own step is not what is timed
    cbp._optimizers = [optimizer]
    network.model(network.x)
    held = list(zip(*cbp._engine._intact(), strict=True))

    def replace(units: int) -> Timer[float]:
        def step() -> None:
            for slot, h in held:
                cbp._engine.record(slot, h)
            cbp.step()

        timed = timer(step, options.device)

        def at_this_rate() -> float:
            # half a unit more than wanted is due, whatever was left over from other rates
            cbp._engine.state.pending.fill_(units + 0.5)
            return timed(1)[0]

        return lambda calls: [at_this_rate() for _ in range(calls)]

    yield f"\n{'units':>12} {'rate':>6} {ours:>26} {'over none':>26}", []
    times = in_turns({str(units): replace(units) for units in _UNITS}, _ROUNDS["rate"], options)
    machinery = 3 * hook_seconds()
    rows = []
    for units in _UNITS:
        seconds = [t + machinery for t in times[str(units)]]
        rows.append(row("scaling", f"{units} of 4096", "rate", ours, seconds, x=units / 4096))
        yield (
            f"{units:12} {units / 4096:6.2%} {_cell(rows[-1]):>26} {rows[-1].median / rows[0].median - 1:26.1%}",
            rows[-1:],
        )


def _cell(r: Row) -> str:
    return f"{r.median:.0f} ({r.low:.0f} to {r.high:.0f})"
