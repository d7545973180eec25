"""Suite `step`: one step of continual backprop on every backend, beside reading the same bytes once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import reference
from ..backends.registry import backend_for
from ..continual_backprop import ContinualBackprop
from ..rules.rule import Rule
from .networks import build, mlp
from .timing import TUNED, Options, Row, Timer, Worker, hook_seconds, in_turns, row, timer

LEGEND = """\
One step in microseconds, hooks included: median (10th to 90th percentile); nothing is replaced, as in most steps.
  read         PyTorch's sum() over every weight and activation that the step has to read
  cpp, triton  the kernels
  eager        the reference, which is plain PyTorch
  eager tuned  the same where the allocator keeps freed memory (MALLOC_MMAP_THRESHOLD_ and its like)
  compiled     torch.compile of the reference"""


class Case(NamedTuple):
    """A network of `depth` hidden layers of `width` units, and how many turns each way to do its step gets."""

    name: str
    depth: int
    width: int
    batch: int
    rounds: int
    compiled: bool = True


CASES = (
    Case("3 x 4096", 3, 4096, 256, 40),
    Case("3 x 1024", 3, 1024, 32, 200),
    Case("2 x 256", 2, 256, 32, 200),
    # PyTorch takes minutes to compile the unrolled reference of a hundred layers
    Case("100 x 64", 100, 64, 32, 60, compiled=False),
)
_COLUMNS = ("read", "cpp", "triton", "eager", "eager tuned", "compiled")


def case_names() -> list[str]:
    """What `--cases` may name."""
    return [case.name for case in CASES]


def rounds(options: Options) -> int:
    """How many rounds the suite takes."""
    return sum(case.rounds for case in _cases(options))


def run(options: Options) -> Iterator[tuple[str, list[Row]]]:
    """A line of the table at a time, and its times."""
    rule = options.rule or "clarena"
    columns = [name for name in _COLUMNS if name not in ("cpp", "triton") or name == backend_for_device(options)]
    yield LEGEND + f"\n\n{'hidden':10} {'batch':>5} " + "".join(f"{name:>26}" for name in columns), []
    for case in _cases(options):
        with options.case(case.name):
            yield _line(case, rule, columns, options)


def _line(case: Case, rule: str, columns: list[str], options: Options) -> tuple[str, list[Row]]:
    times = _measure(case, rule, options)
    ours = backend_for_device(options)
    speedup = {name: times.pop(name) for name in _SPEEDUPS if name in times}
    moved = stated_bytes(case, rule)
    rows = [row("step", case.name, "step", name, times[name], x=case.width, moved=moved) for name in times]
    by_name = {r.method: r for r in rows}
    cells = (
        "{0.median:.0f} ({0.low:.0f} to {0.high:.0f})".format(by_name[name]) if name in by_name else "-"
        for name in columns
    )
    line = f"{case.name:10} {case.batch:>5} " + "".join(f"{cell:>26}" for cell in cells)
    if ours in by_name:
        mine, read = by_name[ours].median, by_name["read"].median
        ratios = [f"{r.median / mine:.1f} of {r.method}" for r in rows if r.method not in ("read", ours)]
        line += (
            f"\n{'':16} {ours}: {mine / read:.2f} of reading, {moved / mine / 1e3:.1f} GB/s;"
            f" times faster: {', '.join(ratios)}"
        )
        if case.depth >= 100:
            line += f"\n{'':16} a layer: {mine / case.depth:.1f} us"
    if speedup:
        rows += [row("step", case.name, name, ours, speedup[name], x=case.width, moved=moved) for name in speedup]
        faster = {what: _ratio(speedup, what, options.threads) for what in (ours, "read")}
        line += (
            f"\n{'':16} {options.threads} threads over one, two processes in turns: {ours} {faster[ours]:.2f},"
            f" read {faster['read']:.2f}; {faster[ours] / faster['read']:.2f} of it"
        )
    return line, rows


_SPEEDUPS = [f"{name}, {threads}" for name in ("cpp", "read") for threads in ("one thread", "all threads")]


def backend_for_device(options: Options) -> str:
    """The backend that users get on the device."""
    return backend_for(torch.device(options.device), None, Rule.make(options.rule or "nature"))


def _ratio(times: dict[str, list[float]], name: str, threads: int) -> float:
    return median(times[f"{name}, one thread"]) / median(times[f"{name}, all threads"])


def _cases(options: Options) -> list[Case]:
    return [case for case in CASES if not options.cases or case.name in options.cases]


def _measure(case: Case, rule: str, options: Options) -> dict[str, list[float]]:
    """Seconds of each way to do the step, of which those with a hook a layer count what PyTorch takes to call it."""
    device, ours = options.device, backend_for_device(options)
    cpu = device == "cpu"
    timers = timers_of(case, rule, device, (ours, "reference"))
    if case.compiled and options.compiled:
        timers["compiled"] = timer(_compiled(case, rule, device), device)
    with ExitStack() as processes:

        def worker(backend: str, threads: int, **environment: str) -> Worker:
            made = Worker(timers_of, case, rule, device, (backend,), threads=threads, **environment)
            return processes.enter_context(made)

        tuned = worker("reference", options.threads, **TUNED) if cpu else None
        counted = {"one thread": 1, "all threads": options.threads} if cpu and options.threads > 1 else {}
        for label, process in {label: worker("cpp", threads) for label, threads in counted.items()}.items():
            timers |= {f"{name}, {label}": timed for name, timed in process.timers().items()}
        if tuned:
            timers["eager tuned"] = tuned.timers()["eager"]
        times = in_turns(timers, case.rounds, options)
    machinery = hook_seconds() * case.depth
    return {
        name: [t + machinery for t in measured] if not name.startswith("read") else measured
        for name, measured in times.items()
    }


def timers_of(case: Case, rule: str, device: str, backends: Sequence[str]) -> dict[str, Timer[float]]:
    """Timers of a case's step by backend, and of reading its bytes."""
    functions, read = steps(case, rule, device, backends)
    return {name: timer(step, device) for name, step in {**functions, "read": read}.items()}


def steps(
    case: Case, rule: str, device: str, backends: Sequence[str]
) -> tuple[dict[str, Callable[[], None]], Callable[[], None]]:
    """A step by backend: the hooks of every reading layer, then the choice. And reading its bytes."""
    functions: dict[str, Callable[[], None]] = {}
    for backend in backends:
        cbp, calls = _attached(case, device, rule=rule, backend=backend)

        def step(cbp: ContinualBackprop = cbp, calls: list[Any] = calls) -> None:
            for hook, module, args in calls:
                hook(module, args, {})
            cbp.step()

        functions["eager" if backend == "reference" else backend] = step
    weights = [p.detach() for p in cbp._model.parameters() if p.dim() == 2]
    tensors = [h for _, _, (h,) in calls] + (weights[:-1] if rule == "clarena" else weights[1:])

    def read() -> None:
        for tensor in tensors:
            tensor.sum()

    return functions, read


def _attached(case: Case, device: str, **options: Any) -> tuple[ContinualBackprop, list[Any]]:
    """Continual backprop on a case's network, and the calls of its hooks that one forward makes."""
    network = build(mlp, case.depth, case.width, case.batch, device=device)
    cbp = ContinualBackprop(network.model, replacement_rate=0.0, **options)
    engine = cbp._engine
    seen: list[Tensor] = []
    x = network.x
    for layer in network.model.children():
        if isinstance(layer, nn.Linear):
            seen.append(x.detach())
        x = layer(x)
    engine.forget_forwards()
    modules = [slot.module for slot in engine.state.slots]
    hooks = [list(module._forward_pre_hooks.values())[-1] for module in modules]
    return cbp, list(zip(hooks, modules, [(h,) for h in seen[1:]], strict=True))


def _compiled(case: Case, rule: str, device: str) -> Callable[[], None]:
    # deferred, so that all of it is compiled
    cbp, calls = _attached(case, device, rule=rule, backend="reference", capture="deferred")
    select = compiled_select(cbp)

    def step() -> None:
        for hook, module, args in calls:
            hook(module, args, {})
        select()
        cbp._engine.finish()

    return step


def compiled_select(cbp: ContinualBackprop) -> Callable[[], None]:
    """Sums, utilities and choice of the reference, compiled; activations must all be held."""
    engine = cbp._engine
    # the compiler wants tensors that do not share memory
    for name, _, _ in engine.state._fields:
        setattr(engine.state, name, getattr(engine.state, name).clone())

    @torch.compile(dynamic=False)
    @torch.no_grad()
    def select(weights: list[Tensor], slots: list[int], seen: list[Tensor]) -> None:
        reference.sum_(engine.state, weights, seen, slots)
        reference.choose_groups_(engine.state)

    return lambda: select(engine._weights(), *engine._intact())


def stated_bytes(case: Case, rule: str) -> int:
    """Bytes of the weights and activations that a step has to read."""
    rows = case.depth * case.width if rule == "clarena" else (case.depth - 1) * case.width + 10
    return 4 * case.width * (rows + case.depth * case.batch)
