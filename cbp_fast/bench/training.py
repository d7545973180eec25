"""Suite `training`: what share of a whole training step continual backprop takes, by each way to do it."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.optim import Optimizer

from ..backends.registry import backend_for
from ..continual_backprop import ContinualBackprop
from ..rules.rule import Rule
from . import baselines
from .networks import Network, build, conv_net, gpt, mlp, resnet18
from .step import backend_for_device, compiled_select
from .timing import TUNED, Options, Row, Timer, Worker, hook_seconds, in_turns, row

LEGEND = """\
Whole training steps: forward, backward, Adam, continual backprop; replacement rate 1e-4 and every unit mature. In each
cell: milliseconds that continual backprop takes in such a step, hooks included, and its share of the step.
  stock, tuned   PyTorch's allocator as it is, and keeping freed memory (MALLOC_MMAP_THRESHOLD_ and its like), in turns
  cpp, triton    the kernels
  eager          the reference in eager PyTorch
  compiled       the reference's sums and choice by torch.compile, which takes minutes for most networks
  gnt            the authors' generate-and-test formulation, layer by layer (own code)
  clarena        clarena's arithmetic, layer by layer (own code); linear layers only
  ccbp           the package ccbp-pytorch, continuous=False; resets every step, and as by default every 1000th"""

RATE, MATURITY = 1e-4, 1
_METHODS = ("cpp", "triton", "eager", "compiled", "gnt", "clarena", "ccbp", "ccbp 1000")


class Case(NamedTuple):
    """A network, and how many turns each method gets to train it."""

    name: str
    make: Callable[..., Network]
    numbers: tuple[int, ...]
    rounds: int
    compiled: bool = False


CASES = (
    Case("MLP 3 x 4096, batch 32", mlp, (3, 4096, 32), 15, compiled=True),
    Case("MLP 3 x 256, batch 32", mlp, (3, 256, 32), 60, compiled=True),
    Case("conv net, batch 100", conv_net, (100,), 30),
    Case("ResNet-18, batch 8", resnet18, (8,), 10),
    Case("GPT 6 x 384, 4 x 64 tokens", gpt, (4,), 15),
)


def case_names() -> list[str]:
    """What `--cases` may name."""
    return [case.name for case in CASES]


def rounds(options: Options) -> int:
    """How many rounds the suite takes."""
    return sum(case.rounds for case in _cases(options))


def _cases(options: Options) -> list[Case]:
    return [
        case
        for case in CASES
        if (not options.cases or case.name in options.cases) and (options.rule != "clarena" or case.make is mlp)
    ]


def run(options: Options) -> Iterator[tuple[str, list[Row]]]:
    """A few lines of the table at a time, and their times."""
    yield LEGEND, []
    for case in _cases(options):
        allocators = {"stock": {}, "tuned": TUNED} if options.device == "cpu" else {"stock": {}}
        rule = options.rule or "nature"
        with options.case(case.name):
            with ExitStack() as processes:
                workers = {}
                for name, environment in allocators.items():
                    # once: in the setting that serves it best
                    compiled = case.compiled and options.compiled and name == list(allocators)[-1]
                    worker = Worker(
                        timers_of, case, rule, options.device, compiled, threads=options.threads, **environment
                    )
                    workers[name] = processes.enter_context(worker)
                timers = {
                    (method, name): timed
                    for name, worker in workers.items()
                    for method, timed in worker.timers().items()
                }
                times = in_turns(timers, case.rounds, options)
            yield _table(case, times, options, list(allocators))


def _table(
    case: Case, times: dict[tuple[str, str], list[tuple[float, float]]], options: Options, allocators: list[str]
) -> tuple[str, list[Row]]:
    ours, rows, lines = backend_for_device(options), [], []
    base = {a: 1e3 * median(whole for whole, _ in times["none", a]) for a in allocators}
    alone = ", ".join(f"{a} {ms:.2f} ms" for a, ms in base.items())
    lines.append(f"\n{case.name}: without continual backprop {alone}")
    head = "".join(f"{name:>20}" for name in allocators)
    lines.append(f"{'':12}{head}{f'times {ours}':>20}")
    for method in ("none", *_METHODS):
        cells, medians = {}, {}
        for allocator in allocators:
            if (method, allocator) not in times:
                continue
            whole, part = zip(*times[method, allocator], strict=True)
            share = median(p / w for w, p in times[method, allocator])
            rows.append(row("training", case.name, f"step, {allocator}", method, list(whole)))
            if method != "none":
                rows.append(row("training", case.name, f"CBP, {allocator}", method, list(part), share=share))
                medians[allocator] = median(part) / median(p for _, p in times[ours, allocator])
                cells[allocator] = f"{1e3 * median(part):.2f} ms {share:6.1%}"
        if method != "none" and (cells or method not in ("cpp", "triton")):
            ratio = " / ".join(f"{r:.1f}" for r in medians.values())
            lines.append(f"{method:12}" + "".join(f"{cells.get(a, '-'):>20}" for a in allocators) + f"{ratio:>20}")
    return "\n".join(lines), rows


class _Clock:
    """Seconds spent in the functions that it wraps.

    Args:
        wait: for the device.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds = 0.0
        self.wait = wait

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.wait()
            self.seconds += time.perf_counter() - start
            return result

        return timed


def timers_of(case: Case, rule: str, device: str, compiled: bool) -> dict[str, Timer[tuple[float, float]]]:
    """By method, a function that trains some steps and returns the seconds of each and, in it, of continual backprop.

    Each method has modules, hooks and an optimizer of its own, but all share one set of parameters and moments.
    """
    network = build(case.make, *case.numbers, device=device)
    state = torch.optim.Adam(network.model.parameters()).state
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    ours = backend_for(torch.device(device), None, Rule.nature())
    makers: dict[str, Callable[[Network, Optimizer, _Clock], Callable[[], object] | None]] = {
        "none": lambda network, optimizer, clock: optimizer.step,
        ours: partial(_ours, rule=rule, backend=ours),
        "eager": partial(_ours, rule=rule, backend="reference"),
        "gnt": partial(_per_layer, make=baselines.PerLayerGnt),
        "ccbp": partial(_ccbp, every=1),
        "ccbp 1000": partial(_ccbp, every=1000),
    }
    if compiled:
        makers["compiled"] = partial(_compiled, rule=rule)
    if case.make is mlp:
        makers["clarena"] = partial(_per_layer, make=baselines.PerLayerClarena)
    machinery = len(network.groups) * hook_seconds()
    # each sees the optimizers of the others train its parameters
    warnings.filterwarnings("ignore", "an optimizer .* that was not given to continual backprop")
    timers = {}
    for name, make in makers.items():
        shared = {id(t): t for t in (*network.model.parameters(), *network.model.buffers())}
        twin = network._replace(model=copy.deepcopy(network.model, shared))
        optimizer = torch.optim.Adam(twin.model.parameters())
        optimizer.state = state
        clock = _Clock(wait)
        step = make(twin, optimizer, clock)
        if step is not None:
            hooks = 0.0 if name == "none" or name.startswith("ccbp") else machinery
            timers[name] = _training_step(twin, step, clock, hooks)
    return timers


def _training_step(
    network: Network, step: Callable[[], object], clock: _Clock, hooks: float
) -> Timer[tuple[float, float]]:
    def train() -> tuple[float, float]:
        clock.seconds = 0.0
        clock.wait()
        start = time.perf_counter()
        loss = F.cross_entropy(network.model(network.x), network.y)
        network.model.zero_grad()
        loss.backward()
        step()
        clock.wait()
        return time.perf_counter() - start, clock.seconds + hooks

    return lambda steps: [train() for _ in range(steps)]


def _ours(network: Network, optimizer: Optimizer, clock: _Clock, *, rule: str, backend: str) -> Callable[[], object]:
    cbp = ContinualBackprop(
        network.model,
        optimizer,
        rule=rule,
        groups=network.groups,
        backend=backend,
        replacement_rate=RATE,
        maturity_threshold=MATURITY,
    )
    cbp.step = clock.wrap(cbp.step)  # type: ignore[method-assign]
    cbp._engine.record = clock.wrap(cbp._engine.record)  # type: ignore[method-assign]
    return optimizer.step


def _compiled(network: Network, optimizer: Optimizer, clock: _Clock, *, rule: str) -> Callable[[], object]:
    cbp = ContinualBackprop(
        network.model,
        rule=rule,
        groups=network.groups,
        backend="reference",
        capture="deferred",
        replacement_rate=RATE,
        maturity_threshold=MATURITY,
    )
    engine, select = cbp._engine, compiled_select(cbp)
    engine.record = clock.wrap(engine.record)  # type: ignore[method-assign]

    def choose_and_replace() -> None:
        select()
        if not engine.state.buffer.is_cpu or engine.state.num_chosen.any():
            engine.reinit(*engine.collect([optimizer]))
        engine.finish()

    after = clock.wrap(choose_and_replace)

    def step() -> None:
        optimizer.step()
        after()

    return step


def _per_layer(
    network: Network, optimizer: Optimizer, clock: _Clock, *, make: type[baselines.PerLayer]
) -> Callable[[], object]:
    method = make(network.model, optimizer, network.groups, replacement_rate=RATE, maturity_threshold=MATURITY)
    method.observe = clock.wrap(method.observe)  # type: ignore[method-assign]
    after = clock.wrap(method.step)

    def step() -> None:
        optimizer.step()
        after()

    return step


def _ccbp(network: Network, optimizer: Optimizer, clock: _Clock, *, every: int) -> Callable[[], object] | None:
    inner = _Clock(clock.wait)
    optimizer.step = inner.wrap(optimizer.step)  # type: ignore[method-assign]
    outer = baselines.ccbp_pytorch(network.model, optimizer, network.groups, replacement_rate=RATE, every=every)
    if outer is None:
        return None
    both = clock.wrap(outer.step)

    def step() -> None:
        inner.seconds = 0.0
        both()
        clock.seconds -= inner.seconds

    return step
