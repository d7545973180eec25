"""`cbp-fast demo`: plain backprop beside continual backprop on a stream of changing tasks."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from .info import cpu_name, versions

if TYPE_CHECKING:
    from ..demo.training import History, Run

_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
# a worker takes seconds to start; with fewer steps than this in all it does not pay
_STEPS_FOR_WORKERS = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--problem", choices=("digits", "regression"), default="digits", help="default: digits")
    parser.add_argument("--tasks", type=_count, metavar="N", help="length of the stream")
    parser.add_argument("--seeds", type=_count, metavar="N", help="networks trained at every setting")
    parser.add_argument("--device", type=_device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--rule", choices=("nature", "gnt", "clarena"), default="nature", help="default: nature")
    parser.add_argument("--out", type=Path, default=Path(), metavar="PATH", help="for the picture: a .png or a folder")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="results as JSON, to FILE or to stdout")


def run(args: argparse.Namespace) -> int:
    """Trains all networks, then shows and writes what came out."""
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _fail(f"the demo needs {', '.join(missing)}: pip install 'cbp_fast[demo]'")
    try:
        picture = _picture(args.out, args.problem)
        json_file = None if args.json in (None, "-") else _writable(Path(args.json))
    except OSError as error:
        return _fail(str(error))

    from ..demo import report
    from ..demo.problem import load
    from ..demo.training import Run

    problem = load(args.problem, args.rule)
    tasks, seeds = args.tasks or problem.tasks, args.seeds or problem.seeds
    # the methods last, so that both run side by side
    runs = [
        Run(args.problem, args.rule, method, step_size, seed, tasks, args.device)
        for seed in range(seeds)
        for step_size in problem.step_sizes
        for method in report.METHODS
    ]
    steps = len(runs) * tasks * problem.examples // problem.batch_size
    workers = 1 if steps < _STEPS_FOR_WORKERS else min(len(runs), _processors())
    start = time.perf_counter()
    histories = _train_with_bar(runs, workers)
    seconds = time.perf_counter() - start

    rows = report.make_rows(runs, histories)
    report.plot(problem, rows, picture)
    backend = next(h.backend for h in histories if h.backend is not None)
    results = {
        "results": {method: row.to_json() for method, row in report.compared(problem, rows).items()},
        "tried": [{"method": row.method, **row.to_json()} for row in rows],
        "settings": {
            "problem": args.problem,
            "score": problem.score,
            "tasks": tasks,
            "examples_per_task": problem.examples,
            "seeds": list(range(seeds)),
            "widths": problem.widths,
            "optimizer": problem.optimizer,
            "step_sizes": problem.step_sizes,
            "step_size_chosen_by": "best mean score of plain backprop over the whole stream",
            "batch_size": problem.batch_size,
            "rule": args.rule,
            "replacement_rate": problem.replacement_rate,
            "maturity_threshold": problem.maturity_threshold,
            "backend": backend,
            "device": args.device,
            "cpu": cpu_name(),
            "workers": workers,
            "seconds": seconds,
            **versions(),
        },
    }
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=2) + "\n")
    elif args.json:
        print(json.dumps(results, indent=2))
    print(
        f"{problem.title}, {problem.score}: {tasks} tasks of {problem.examples} examples, {seeds} seed(s), "
        f"network {'-'.join(map(str, problem.widths))}, batch {problem.batch_size}, {problem.optimizer};",
        f"continual backprop: rule {args.rule}, replacement_rate {problem.replacement_rate:g}, "
        f"maturity_threshold {problem.maturity_threshold}, backend {backend}",
        "",
        report.table(problem, rows),
        "",
        f"{seconds:.0f} s with {workers} process(es) of one thread on {cpu_name()}, device {args.device}",
        f"picture: {picture}",
        sep="\n",
        # stdout is the JSON's where that was asked for
        file=sys.stderr if args.json == "-" else sys.stdout,
    )
    return 0


def _train_with_bar(runs: Sequence[Run], workers: int) -> list[History]:
    """Trains all runs behind a progress bar that shows the mean score of each method's latest 30 tasks."""
    from tqdm import tqdm

    from ..demo.training import train_all

    latest: dict[str, deque[float]] = {}
    with tqdm(total=sum(run.tasks for run in runs), desc=runs[0].problem, unit="task", mininterval=0.5) as bar:

        def on_task(run: Run, score: float) -> None:
            latest.setdefault(run.method, deque(maxlen=30)).append(score)
            bar.set_postfix({method: f"{fmean(scores):.3f}" for method, scores in latest.items()}, refresh=False)
            bar.update()

        return train_all(runs, workers, on_task)


def _picture(path: Path, problem: str) -> Path:
    """The file for the picture; makes its folder."""
    if path.suffix != ".png" or path.is_dir():
        path = path / f"demo_{problem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return _writable(path)


def _writable(path: Path) -> Path:
    # so that it fails now, and not when minutes of training are over
    path.open("a").close()
    return path


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be cpu or cuda")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    return text


def _fail(message: str) -> int:
    print(f"cbp-fast demo: error: {message}", file=sys.stderr)
    return 2
