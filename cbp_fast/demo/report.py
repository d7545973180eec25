"""Table, picture and JSON of a demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from .problem import Problem
from .training import History, Run, tenth

METHODS = {"backprop": "backprop", "cbp": "continual backprop"}
_COLORS = {"backprop": "#b5533c", "cbp": "#2b6a99"}


@dataclass(frozen=True)
class Row:
    """One method at one step size, over all seeds."""

    method: str
    step_size: float
    histories: Sequence[History]

    @property
    def mean(self) -> float:
        """Score over the whole stream."""
        return fmean(fmean(h.scores) for h in self.histories)

    def over(self, part: str) -> list[float]:
        """Score over the "first" or the "last" tenth of the tasks, one a seed."""
        n = tenth(len(self.histories[0].scores))
        return [fmean(h.scores[:n] if part == "first" else h.scores[-n:]) for h in self.histories]

    @property
    def seconds_per_step(self) -> float:
        """In the fastest task, which other programs have disturbed least."""
        return min(h.seconds_per_step for h in self.histories)

    def to_json(self) -> dict[str, Any]:
        """All numbers of the row; `std` is over seeds, None where there is one."""
        first, last = self.over("first"), self.over("last")
        return {
            "step_size": self.step_size,
            "networks": len(self.histories),
            "mean": self.mean,
            "first": fmean(first),
            "last": fmean(last),
            "std": {"first": _std(first), "last": _std(last)},
            "dormant_units": fmean(h.dormant for h in self.histories),
            "effective_rank": fmean(h.effective_rank for h in self.histories),
            "seconds_per_step": self.seconds_per_step,
        }


def make_rows(runs: Sequence[Run], histories: Sequence[History]) -> list[Row]:
    """One row a method and step size, plain backprop first."""
    groups: dict[tuple[str, float], list[History]] = {}
    for run, history in zip(runs, histories, strict=True):
        groups.setdefault((run.method, run.step_size), []).append(history)
    return [Row(method, step_size, group) for (method, step_size), group in sorted(groups.items())]


def compared(problem: Problem, rows: Sequence[Row]) -> dict[str, Row]:
    """The two rows to compare, by method, at one step size: that of plain backprop's best mean over the whole stream.

    No step size is chosen for continual backprop; the table shows it at every one all the same.
    """
    plain = [row for row in rows if row.method == "backprop"]
    step_size = (max if problem.higher_is_better else min)(plain, key=lambda row: row.mean).step_size
    return {row.method: row for row in rows if row.step_size == step_size}


def table(problem: Problem, rows: Sequence[Row]) -> str:
    """The rows as text, the compared ones starred, and the time of a step."""
    starred = compared(problem, rows).values()
    lines = [("method", "step size", "whole stream", "first tenth", "last tenth", "dormant", "eff. rank", "ms a step")]
    for row in rows:
        numbers = row.to_json()
        lines.append(
            (
                ("* " if row in starred else "  ") + row.method,
                f"{row.step_size:g}",
                f"{row.mean:.3f}",
                _with_std(row.over("first")),
                _with_std(row.over("last")),
                f"{numbers['dormant_units']:.0%}",
                f"{numbers['effective_rank']:.1f}",
                f"{1000 * row.seconds_per_step:.3f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    text += [
        "* the step size, of those tried, at which plain backprop has its best mean over the whole stream",
        "dormant: units of all hidden layers, and eff. rank: of the last one; both over the last tenth of the tasks",
    ]
    without, with_cbp = (min(row.seconds_per_step for row in rows if row.method == method) for method in METHODS)
    text.append(
        f"seconds a step, in the fastest task: {without:.6f} without and {with_cbp:.6f} with continual backprop"
    )
    return "\n".join(text)


def scores_so_far(scores: Mapping[Run, Sequence[float]]) -> str:
    """As text, what networks have reached that were not all trained over the whole stream."""
    groups: dict[tuple[str, float], list[Sequence[float]]] = {}
    for run, values in scores.items():
        if values:
            groups.setdefault((run.method, run.step_size), []).append(values)
    lines = [
        f"{method}, step size {step_size:g}: {fmean(map(fmean, found)):.3f} "
        f"(networks: {len(found)}; tasks of each: {', '.join(str(len(values)) for values in found)})"
        for (method, step_size), found in sorted(groups.items())
    ]
    return "\n".join(["score so far, mean over tasks", *lines])


def plot(problem: Problem, rows: Sequence[Row], path: Path) -> None:
    """Score against task for the compared rows: mean over seeds, and their standard deviation as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    tasks = len(rows[0].histories[0].scores)
    width = max(1, tasks // 25)
    starts = range(0, tasks, width)
    middle = [(start + 1 + min(start + width, tasks)) / 2 for start in starts]
    for method, row in compared(problem, rows).items():
        bins = [[fmean(h.scores[start : start + width]) for h in row.histories] for start in starts]
        mean, std = [fmean(b) for b in bins], [_std(b) or 0.0 for b in bins]
        axes.plot(middle, mean, color=_COLORS[method], label=METHODS[method])
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        axes.fill_between(middle, low, high, color=_COLORS[method], alpha=0.2, linewidth=0)
    averaged = f" (mean of {width} tasks)" if width > 1 else ""
    axes.set(
        title=f"{problem.title}, {problem.optimizer} {row.step_size:g}",
        xlabel="task",
        ylabel=problem.score + averaged,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _std(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _with_std(values: Sequence[float]) -> str:
    std = _std(values)
    return f"{fmean(values):.3f}" + ("" if std is None else f" ±{std:.3f}")
