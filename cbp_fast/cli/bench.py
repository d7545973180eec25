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

import torch

from .info import cpu_name, versions

_SUITES = ("step", "kernels", "training", "scaling")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--suite", choices=(*_SUITES, "all"), default="step", help="default: step")
    parser.add_argument("--cases", nargs="*", metavar="NAME", help='a choice of a suite\'s cases, such as "3 x 4096"')
    parser.add_argument("--rule", choices=("nature", "gnt", "clarena"), help="default: clarena for step, else nature")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of PyTorch (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--seconds", type=float, default=20, help="after which a case is cut short (default: 20)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times to FILE as well")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all times to FILE, a line each")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw the pictures in DIR (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Times the suites, prints their tables, and writes what was asked for."""
    suites = {n: importlib.import_module(f"cbp_fast.bench.{n}") for n in _SUITES if args.suite in (n, "all")}
    wrong = _complaint(args, suites)
    if wrong:
        print(f"cbp-fast bench: {wrong}", file=sys.stderr)
        return 2
    from ..bench import report
    from ..bench.timing import Options

    torch.set_num_threads(args.threads)
    command = shlex.join(["cbp-fast", "bench", *sys.argv[2:]])
    about = {**versions(), "cpu": cpu_name(), "device": _device_name(args.device), "threads": args.threads}
    about |= {"rule": args.rule or "default", "command": command}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = []
    for name, suite in suites.items():
        options = Options(args.threads, args.device, args.rule, not args.no_compile, args.cases, args.seconds)
        options.tick, write, close = _progress(name, suite.rounds(options))
        for line, found in suite.run(options):
            write(line)
            rows += found
        close()
        print()
    if args.csv:
        report.write_csv(args.csv, about, rows)
    if args.json:
        report.write_json(args.json, about, rows)
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        for path in report.plot(args.plot, about, rows):
            print(path)
    return 0


def _complaint(args: argparse.Namespace, suites: dict[str, ModuleType]) -> str | None:
    cases = [name for suite in suites.values() for name in suite.case_names()]
    unknown = [name for name in args.cases or () if name not in cases]
    if unknown:
        return f"there is no case {', '.join(unknown)}; there are: {'; '.join(cases)}"
    if args.device != "cpu" and not torch.cuda.is_available():
        return f"there is no device {args.device} here; leave --device cpu"
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install 'cbp_fast[bench]'"
    folders = [path.parent for path in (args.json, args.csv) if path and not path.parent.is_dir()]
    return f"there is no folder {folders[0]}" if folders else None


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
