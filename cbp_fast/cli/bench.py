"""`cbp-fast bench`: one step of continual backprop on every backend, beside reading the same bytes once."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ContinualBackprop, reference
from .info import cpu_name, versions


class Case(NamedTuple):
    """A network of `depth` hidden layers of `width` units, and how often its step is timed."""

    name: str
    depth: int
    width: int
    batch: int
    repeats: int
    compiled: bool = True


CASES = (
    Case("3 x 4096", 3, 4096, 256, 40),
    Case("3 x 1024", 3, 1024, 32, 300),
    Case("2 x 256", 2, 256, 32, 1000),
    # PyTorch takes minutes to compile the unrolled reference of a hundred layers
    Case("100 x 64", 100, 64, 32, 200, compiled=False),
)
# glibc returns large blocks to the system when they are freed; kept, the reference's temporaries cost no page faults
_TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}
_COLUMNS = ("read", "cpp", "eager", "eager tuned", "compiled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--rule", choices=("nature", "gnt", "clarena"), default="clarena", help="default: clarena")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of PyTorch (default: 1)")
    parser.add_argument("--cases", nargs="*", metavar="NAME", help='a choice of cases, such as "3 x 4096"')
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE as well")
    # the process with the tuned allocator: it times one step for every line it reads
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Times all cases and prints a table."""
    torch.set_num_threads(args.threads)
    if args.worker:
        return _serve(next(case for case in CASES if case.name == args.worker), args.rule)
    unknown = set(args.cases or ()) - {case.name for case in CASES}
    if unknown:
        names = ", ".join(f'"{case.name}"' for case in CASES)
        print(f"cbp-fast bench: there is no case {', '.join(sorted(unknown))}; there are {names}", file=sys.stderr)
        return 2
    cases = [case for case in CASES if not args.cases or case.name in args.cases]
    command = "cbp-fast bench " + " ".join(sys.argv[2:])
    about = {**versions(), "cpu": cpu_name(), "threads": args.threads, "rule": args.rule, "command": command.strip()}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print("one step, hooks included: median in microseconds (10th to 90th percentile)\n")
    print(f"{'hidden':10} {'batch':>5} " + "".join(f"{name:>26}" for name in _COLUMNS))
    results = []
    for case in cases:
        times = measure(case, args.rule, args.threads, compiled=case.compiled and not args.no_compile)
        row = {name: _summary(times[name]) for name in times}
        moved = _bytes(case, args.rule)
        results.append({"case": case._asdict(), "bytes": moved, "microseconds": row})
        cells = ("{:.0f} ({:.0f} to {:.0f})".format(*row[name].values()) if name in row else "-" for name in _COLUMNS)
        print(f"{case.name:10} {case.batch:>5} " + "".join(f"{cell:>26}" for cell in cells))
        cpp = row["cpp"]["median"]
        ratios = [f"{row[name]['median'] / cpp:.1f} of {name}" for name in row if name not in ("read", "cpp")]
        print(
            f"{'':16} cpp: {cpp / case.depth:.1f} us a layer, {cpp / row['read']['median']:.2f} of reading the bytes,"
            f" {moved / cpp / 1e3:.1f} GB/s; times faster: {', '.join(ratios)}"
        )
    if args.json:
        args.json.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
    return 0


def measure(case: Case, rule: str, threads: int, compiled: bool) -> dict[str, list[float]]:
    """Seconds of each way to do the step, taken in turns so that a slow spell of the machine hits all of them."""
    model, steps = _steps(case, rule)
    steps["read"] = _read(model, case, rule)
    if compiled:
        steps["compiled"] = _compiled(case, rule)
    machinery = _hook_machinery() * case.depth
    times: dict[str, list[float]] = {name: [] for name in steps}
    worker = subprocess.Popen(
        [sys.executable, "-m", "cbp_fast", "bench", "--worker", case.name, "--rule", rule, "--threads", str(threads)],
        env=os.environ | _TUNED,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    times["eager tuned"] = []
    for turn in range(case.repeats + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start + (machinery if name != "read" else 0))
        worker.stdin.write("\n")
        worker.stdin.flush()
        times["eager tuned"].append(float(worker.stdout.readline()) + machinery)
        if turn == 2:
            # warm now
            for measured in times.values():
                measured.clear()
    worker.stdin.close()
    worker.wait()
    return {name: times[name] for name in _COLUMNS if name in times}


def _serve(case: Case, rule: str) -> int:
    _, steps = _steps(case, rule, backends=("reference",))
    for _ in sys.stdin:
        start = time.perf_counter()
        steps["eager"]()
        print(time.perf_counter() - start, flush=True)
    return 0


def _model(case: Case) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(case.depth):
        layers += [nn.Linear(case.width, case.width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(case.width, 10))


def _activations(model: nn.Sequential, case: Case) -> list[Tensor]:
    """What the reading layers see in one forward."""
    seen: list[Tensor] = []
    x = torch.randn(case.batch, case.width)
    for layer in model:
        if isinstance(layer, nn.Linear):
            seen.append(x.detach())
        x = layer(x)
    return seen[1:]


def _steps(
    case: Case, rule: str, backends: tuple[str, ...] = ("cpp", "reference")
) -> tuple[nn.Sequential, dict[str, Callable[[], None]]]:
    """A step by name: the hooks of every reading layer, then the choice. Nothing is due, as in most steps."""
    steps: dict[str, Callable[[], None]] = {}
    for backend in backends:
        model = _model(case)
        cbp = ContinualBackprop(model, rule=rule, replacement_rate=0.0, backend=backend)
        seen = _activations(model, case)
        cbp._engine.forget_forwards()
        slots = cbp._engine.state.slots
        hooks = [list(slot.module._forward_pre_hooks.values())[-1] for slot in slots]
        calls = list(zip(hooks, [slot.module for slot in slots], [(h,) for h in seen], strict=True))

        def step(cbp: ContinualBackprop = cbp, calls: list[Any] = calls) -> None:
            for hook, module, args in calls:
                hook(module, args, {})
            cbp.step()

        steps["cpp" if backend == "cpp" else "eager"] = step
    return model, steps


def _compiled(case: Case, rule: str) -> Callable[[], None]:
    model = _model(case)
    # deferred, so that all of it is compiled
    cbp = ContinualBackprop(model, rule=rule, replacement_rate=0.0, backend="reference", capture="deferred")
    engine, seen = cbp._engine, _activations(model, case)
    engine.forget_forwards()
    # the compiler wants tensors that do not share memory
    for name, _, _ in engine.state._fields:
        setattr(engine.state, name, getattr(engine.state, name).clone())

    @torch.compile
    @torch.no_grad()
    def step(weights: list[Tensor], seen: list[Tensor]) -> None:
        reference.sum_(engine.state, weights, seen, range(len(seen)))
        reference.choose_groups_(engine.state)

    hooks = [list(slot.module._forward_pre_hooks.values())[-1] for slot in engine.state.slots]
    calls = list(zip(hooks, [slot.module for slot in engine.state.slots], [(h,) for h in seen], strict=True))

    def hooked() -> None:
        for hook, module, args in calls:
            hook(module, args, {})
        step([ref.owner[ref.key] for ref in engine.state.weights], engine._held)  # type: ignore[misc]
        engine.finish()

    return hooked


def _read(model: nn.Sequential, case: Case, rule: str) -> Callable[[], None]:
    """PyTorch's sum over everything that the step has to read."""
    weights: list[Tensor] = [p.data for p in model.parameters() if p.dim() == 2]
    tensors = _activations(model, case) + (weights[:-1] if rule == "clarena" else weights[1:])

    def read() -> None:
        for tensor in tensors:
            tensor.sum()

    return read


def _bytes(case: Case, rule: str) -> int:
    rows = case.depth * case.width if rule == "clarena" else (case.depth - 1) * case.width + 10
    return 4 * case.width * (rows + case.depth * case.batch)


def _hook_machinery() -> float:
    """Seconds that PyTorch itself takes to call a forward pre-hook that does nothing."""
    plain, hooked = nn.Identity(), nn.Identity()
    hooked.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    x, times = torch.zeros(1), {plain: [], hooked: []}  # type: ignore[var-annotated]
    for _ in range(200):
        for module, measured in times.items():
            start = time.perf_counter()
            for _ in range(20):
                module(x)
            measured.append((time.perf_counter() - start) / 20)
    return median(times[hooked]) - median(times[plain])


def _summary(seconds: list[float]) -> dict[str, float]:
    deciles = quantiles(seconds, n=10)
    return {"median": median(seconds) * 1e6, "low": deciles[0] * 1e6, "high": deciles[-1] * 1e6}
