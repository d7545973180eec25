"""`cbp-fast bench`: what continual backprop costs, beside other ways to do it and beside reading its bytes."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..programs import ignored
from .arguments import FORMATS, count, device, file, seconds, unwritable
from .info import cpu_name, versions

if TYPE_CHECKING:
    from ..bench.timing import Options, Row

_SUITES = ("step", "kernels", "training", "scaling")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--suite", choices=(*_SUITES, "all"), default="step", help="default: step")
    parser.add_argument("--cases", nargs="+", metavar="NAME", help='a choice of a suite\'s cases, such as "3 x 4096"')
    parser.add_argument("--rule", choices=("nature", "gnt", "clarena"), help="default: clarena for step, else nature")
    parser.add_argument("--threads", type=count(1024), default=1, metavar="N", help="threads of PyTorch (default: 1)")
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--seconds", type=seconds, default=20, help="after which a case is cut short (default: 20)")
    parser.add_argument("--json", type=file, metavar="FILE", help="write all times to FILE as well")
    parser.add_argument("--csv", type=file, metavar="FILE", help="write all times to FILE, a line each")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the pictures in DIR (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Times the suites, prints their tables, and writes what was asked for, or what there is if it ends early."""
    suites = {n: importlib.import_module(f"cbp_fast.bench.{n}") for n in _SUITES if args.suite in (n, "all")}
    wrong = _complaint(args, suites)
    if wrong:
        print(f"cbp-fast bench: error: {wrong}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    command = shlex.join(["cbp-fast", "bench", *sys.argv[2:]])
    about = {**versions(), "cpu": cpu_name(), "device": _device_name(args.device), "threads": args.threads}
    about |= {"rule": args.rule or "default", "command": command}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows: list[Row] = []
    failed: dict[str, str] = {}
    ended: BaseException | None = None
    try:
        for name, suite in suites.items():
            options = _options(args)
            options.tick, write, close = _progress(name, suite.rounds(options))
            try:
                for line, found in suite.run(options):
                    rows += found
                    write(line)
            finally:
                close()
                failed |= {f"{name}, {case}": why for case, why in options.failed.items()}
            print()
    except (KeyboardInterrupt, BrokenPipeError) as error:
        ended = error
    for case, why in failed.items():
        print(f"cbp-fast bench: error: {case}: {why}", file=sys.stderr)
    extra: dict[str, Any] = {"interrupted": True} if ended else {}
    with ignored():
        written = _write(args, about, rows, extra | ({"failed": failed} if failed else {}))
    if isinstance(ended, KeyboardInterrupt):
        where = f", in {', '.join(map(str, written))}" if written else ""
        print(f"cbp-fast bench: interrupted; there are {len(rows)} times{where}", file=sys.stderr)
        return 130
    if ended:
        raise ended
    for path in written or ():
        if path.suffix == ".png":
            print(path)
    return int(bool(failed) or written is None)


def _options(args: argparse.Namespace) -> Options:
    from ..bench.timing import Options

    return Options(args.threads, args.device, args.rule, not args.no_compile, args.cases, args.seconds)


def _write(
    args: argparse.Namespace, about: dict[str, Any], rows: list[Row], extra: dict[str, Any]
) -> list[Path] | None:
    """What was written; None if something could not be. Without a time there is nothing to write."""
    from ..bench import report

    written: list[Path] = []
    ways: list[tuple[Path | None, Callable[[Path], list[Path]]]] = [
        (args.csv, lambda path: report.write_csv(path, about, rows)),
        (args.json, lambda path: report.write_json(path, about | extra, rows)),
        (args.plot, lambda path: report.plot(path, about, rows)),
    ]
    wrong = False
    for path, write in ways:
        if path is None or not rows:
            continue
        try:
            written += write(path)
        except OSError as error:
            wrong = True
            print(f"cbp-fast bench: error: {error}", file=sys.stderr)
    return None if wrong else written


def _complaint(args: argparse.Namespace, suites: dict[str, ModuleType]) -> str | None:
    from ..bench.report import PICTURES

    cases = [name for suite in suites.values() for name in suite.case_names()]
    unknown = [name for name in args.cases or () if name not in cases]
    if unknown:
        return f"there is no case {', '.join(unknown)}; there are: {'; '.join(cases)}"
    if not any(suite.rounds(_options(args)) for suite in suites.values()):
        return f"rule {args.rule} takes linear layers only, and each case has others"
    if args.plot and args.plot.suffix.lower() in FORMATS and not args.plot.is_dir():
        return f"--plot: {args.plot} must be a folder, for {', '.join(PICTURES)}"
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install 'cbp_fast[bench]'"
    files = [("--json", args.json), ("--csv", args.csv)]
    pictures = [("--plot", args.plot / f"{name}.png") for name in PICTURES] if args.plot else []
    return unwritable([(option, path) for option, path in files if path], pictures)


def _device_name(device: str) -> str:
    return device if device == "cpu" else torch.cuda.get_device_name(device)


def _progress(name: str, total: int) -> tuple[Callable[[int], object], Callable[[str], object], Callable[[], object]]:
    """Functions that count rounds, write a line above the counter, and end it: tqdm's bar, or a plain counter."""
    if importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        # redrawn every half second at most, since the bar has a core of what is timed; no bar where stderr is a file
        bar = tqdm(total=total, desc=name, leave=False, mininterval=0.5, disable=None)
        return bar.update, tqdm.write, bar.close
    done = 0

    def tick(rounds: int) -> None:
        nonlocal done
        before, done = done, done + rounds
        if before * 20 // total != done * 20 // total:
            print(f"{name}: {done} of {total} rounds", file=sys.stderr)

    return tick, print, lambda: None
