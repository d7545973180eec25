"""`cbp-fast demo`: plain backprop beside continual backprop on a stream of changing tasks."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..programs import ignored
from .arguments import FORMATS, count, device, file, unwritable
from .info import cpu_name, versions

if TYPE_CHECKING:
    from ..demo.problem import Problem
    from ..demo.report import Row
    from ..demo.training import History, Run

_PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}
# a worker takes seconds to start; with fewer steps than this in all it does not pay
_STEPS_FOR_WORKERS = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--problem", choices=("digits", "regression"), default="digits", help="default: digits")
    parser.add_argument("--tasks", type=count(), metavar="N", help="length of the stream")
    parser.add_argument("--seeds", type=count(), metavar="N", help="networks trained at every setting")
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--rule", choices=("nature", "gnt", "clarena"), default="nature", help="default: nature")
    parser.add_argument("--out", default="", metavar="PATH", help="for the picture: a .png, .pdf, .svg or a folder")
    parser.add_argument(
        "--json", nargs="?", const="-", type=file, metavar="FILE", help="results as JSON, to FILE or to stdout"
    )


def run(args: argparse.Namespace) -> int:
    """Trains all networks, then shows and writes what came out, or what there is if it ends early."""
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _fail(f"the demo needs {', '.join(missing)}: pip install 'cbp_fast[demo]'")
    picture = Path(args.out)
    if picture.suffix.lower() not in FORMATS or picture.is_dir():
        if picture.suffix and not picture.is_dir() and not args.out.endswith(("/", os.sep)):
            return _fail(f"--out: {picture} must be a folder, whose name may end with a /, or {', '.join(FORMATS)}")
        picture /= f"demo_{args.problem}.png"
    json_file = None if args.json in (None, Path("-")) else args.json
    wrong = unwritable([("--json", json_file)] if json_file else [], [("--out", picture)])
    if wrong:
        return _fail(wrong)

    from ..demo import report
    from ..demo.problems import load
    from ..demo.training import History, Run

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
    scores: dict[Run, list[float]] = {run: [] for run in runs}
    histories: dict[Run, History] = {}
    failed: dict[Run, str] = {}
    interrupted = False
    try:
        with closing(_train_with_bar(runs, workers, scores)) as outcomes:
            for run, outcome in outcomes:
                if isinstance(outcome, History):
                    histories[run] = outcome
                else:
                    failed[run] = f"{type(outcome).__name__}: {outcome}"
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.perf_counter() - start
    for run, why in failed.items():
        _complain(f"{run.method}, step size {run.step_size:g}, seed {run.seed}: {why}")
    if not any(scores.values()):
        _complain("interrupted before there was a result" if interrupted else "no network was trained")
        return 130 if interrupted else 1

    finished = [run for run in runs if run in histories]
    rows = report.make_rows(finished, [histories[run] for run in finished])
    # at every setting at least one network
    comparable = len(rows) == len(report.METHODS) * len(problem.step_sizes)
    backend = next((h.backend for h in histories.values() if h.backend is not None), None)
    results: dict[str, Any] = {
        "results": {m: row.to_json() for m, row in report.compared(problem, rows).items()} if comparable else {},
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
    if len(finished) < len(runs):
        results["unfinished"] = [
            {"method": run.method, "step_size": run.step_size, "seed": run.seed, "scores": scores[run]}
            | ({"error": failed[run]} if run in failed else {})
            for run in runs
            if run not in histories
        ]
    # stdout is the JSON's where that was asked for
    out = sys.stderr if args.json == Path("-") else sys.stdout
    with ignored():
        written, complaints = _write(args, results, problem, rows if comparable else [], picture)
    for complaint in complaints:
        _complain(complaint)
    print(
        f"{problem.title}, {problem.score}: {tasks} tasks of {problem.examples} examples, {seeds} seed(s), "
        f"network {'-'.join(map(str, problem.widths))}, batch {problem.batch_size}, {problem.optimizer};",
        f"continual backprop: rule {args.rule}, replacement_rate {problem.replacement_rate:g}, "
        f"maturity_threshold {problem.maturity_threshold}, backend {backend}",
        "",
        report.table(problem, rows) if comparable else report.scores_so_far(scores),
        "",
        f"{seconds:.0f} s with {workers} process(es) of one thread on {cpu_name()}, device {args.device}",
        *(f"picture: {path}" for path in written if path == picture),
        sep="\n",
        file=out,
    )
    if interrupted:
        where = f"; what there is is in {', '.join(map(str, written))}" if written else ""
        print(
            f"cbp-fast demo: interrupted with {len(finished)} of {len(runs)} networks trained{where}", file=sys.stderr
        )
        return 130
    return int(bool(failed or complaints))


def _write(
    args: argparse.Namespace, results: dict[str, Any], problem: Problem, rows: Sequence[Row], picture: Path
) -> tuple[list[Path], list[str]]:
    """Writes the JSON and, of rows that can be compared, the picture; what was written, and what could not be."""
    from ..demo import report

    written: list[Path] = []
    complaints: list[str] = []
    text = json.dumps(results, indent=2)
    try:
        if args.json == Path("-"):
            print(text)
        elif args.json:
            args.json.write_text(text + "\n")
            written.append(args.json)
    except BrokenPipeError:
        raise
    except OSError as error:
        complaints.append(str(error))
    try:
        if rows:
            picture.parent.mkdir(parents=True, exist_ok=True)
            report.plot(problem, rows, picture)
            written.append(picture)
    except OSError as error:
        complaints.append(str(error))
    return written, complaints


def _train_with_bar(
    runs: Sequence[Run], workers: int, scores: dict[Run, list[float]]
) -> Generator[tuple[Run, History | BaseException]]:
    """Trains all runs behind a progress bar with the mean score of each method's latest 30 tasks; fills `scores`."""
    from tqdm import tqdm

    from ..demo.training import train_all

    latest: dict[str, deque[float]] = {}
    with tqdm(total=sum(run.tasks for run in runs), desc=runs[0].problem, unit="task", mininterval=0.5) as bar:

        def on_task(run: Run, score: float) -> None:
            scores[run].append(score)
            latest.setdefault(run.method, deque(maxlen=30)).append(score)
            bar.set_postfix({method: f"{fmean(values):.3f}" for method, values in latest.items()}, refresh=False)
            bar.update()

        with closing(train_all(runs, workers, on_task)) as outcomes:
            yield from outcomes


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fail(message: str) -> int:
    _complain(message)
    return 2


def _complain(message: str) -> None:
    print(f"cbp-fast demo: error: {message}", file=sys.stderr)
