"""What is kept of a run: CSV, JSON and pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .timing import Row

_OURS = ("cpp", "triton")


def write_csv(path: Path, about: Mapping[str, Any], rows: Sequence[Row]) -> list[Path]:
    """A line a time, in microseconds, each with the device, versions and threads it was taken with."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Row._fields, *about])
        writer.writerows([*r, *about.values()] for r in rows)
    return [path]


def write_json(path: Path, about: Mapping[str, Any], rows: Sequence[Row]) -> list[Path]:
    """The same as one object: what was run, and a list of times."""
    path.write_text(json.dumps({"about": about, "microseconds": [r._asdict() for r in rows]}, indent=1) + "\n")
    return [path]


PICTURES = ("time_against_width", "share_of_training", "scaling")


def plot(folder: Path, about: Mapping[str, Any], rows: Sequence[Row]) -> list[Path]:
    """The pictures for which there are rows; returns their paths."""
    from matplotlib.figure import Figure

    device = about["cpu"] if about["device"] == "cpu" else about["device"]
    note = f"{device}, {about['threads']} thread(s), PyTorch {about['torch']}"
    pictures = (
        (_width, [r for r in rows if _is_width(r)]),
        (_share, [r for r in rows if r.share is not None]),
        (_scaling, [r for r in rows if r.suite == "scaling"]),
    )
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (draw, chosen) in zip(PICTURES, pictures, strict=True):
        if chosen:
            figure = Figure(figsize=(11, 4.5), layout="constrained")
            draw(figure, chosen)
            figure.suptitle(note, fontsize=9)
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=120)
    return paths


def _is_width(r: Row) -> bool:
    return r.suite == "kernels" and r.case.endswith("float32") and r.case[1:].startswith(f" x {r.x},")


def _of(rows: Iterable[Row], **fields: object) -> list[Row]:
    return [r for r in rows if all(getattr(r, name) == value for name, value in fields.items())]


def _curve(axes: Any, rows: list[Row], label: str, **style: Any) -> None:
    rows = sorted(rows, key=lambda r: r.x)
    x = [r.x for r in rows]
    axes.plot(x, [r.median for r in rows], label=label, **({"marker": "o", "markersize": 4} | style))
    axes.fill_between(x, [r.low for r in rows], [r.high for r in rows], alpha=0.15, color=style.get("color"))


def _width(figure: Any, rows: list[Row]) -> None:
    """One panel an operation: time against width, and reading as many bytes as the floor."""
    for i, (op, batch) in enumerate((("capture_", "batch 256"), ("select_", "batch 32"))):
        shown = [r for r in _of(rows, op=op) if batch in r.case]
        # of a run that was cut short
        if not shown:
            continue
        axes = figure.add_subplot(1, 2, i + 1)
        for method in dict.fromkeys(r.method for r in shown):
            style = {"color": "black", "linestyle": "--", "marker": ""} if method == "read" else {}
            label = "reading the bytes once" if method == "read" else method
            _curve(axes, _of(shown, method=method), label, **style)
        axes.set(xscale="log", yscale="log", xlabel="units in a layer", ylabel="microseconds", title=f"{op}, {batch}")
        axes.legend()


def _share(figure: Any, rows: list[Row]) -> None:
    """Bars by network and method, for the allocator that serves the method best."""
    axes = figure.add_subplot()
    cases = list(dict.fromkeys(r.case for r in rows))
    methods = list(dict.fromkeys(r.method for r in rows))
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        places, shares = [], []
        for place, case in enumerate(cases):
            found = [r.share for r in _of(rows, case=case, method=method) if r.share is not None]
            if found:
                places.append(place + (i - (len(methods) - 1) / 2) * width)
                shares.append(100 * min(found))
        axes.bar(places, shares, width, label=method)
    axes.set_xticks(range(len(cases)), cases)
    axes.set(ylabel="per cent of the training step", yscale="log", title="continual backprop's share, best allocator")
    axes.legend(ncols=2)


def _scaling(figure: Any, rows: list[Row]) -> None:
    """Cost against weights, depth and replaced units."""
    titles = {"weights": "weights in three layers", "depth": "layers of 64 units", "rate": "units replaced a step, %"}
    for i, (op, label) in enumerate(titles.items()):
        shown = _of(rows, op=op)
        if not shown:
            continue
        axes = figure.add_subplot(1, 3, i + 1)
        for method in dict.fromkeys(r.method for r in shown):
            style = {"color": "black", "linestyle": "--", "marker": ""} if method == "read" else {}
            points = [r._replace(x=100 * r.x) if op == "rate" else r for r in _of(shown, method=method)]
            _curve(axes, points, "reading the bytes once" if method == "read" else method, **style)
        axes.set(xlabel=label, ylabel="microseconds a step")
        if op == "weights":
            axes.set(xscale="log", yscale="log")
        else:
            axes.set_ylim(bottom=0)
        axes.legend()
