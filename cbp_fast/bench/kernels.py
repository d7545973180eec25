"""Suite `kernels`: each operation against the reference, and the bytes it moves against the bandwidth of reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.registry import functions_of
from ..continual_backprop import ContinualBackprop
from ..step.engine import Engine
from .networks import Network, build, chain, mlp
from .step import backend_for_device
from .timing import Options, Row, in_turns, row, timer

LEGEND = """\
Each operation by itself: medians in microseconds, and the GB/s of the bytes that it must at least read and write.
  capture_  sums one forward's activations;  select_  sums, utilities and choice, activations held;  reinit_  sets
            everything that belongs to k chosen units, Adam's two moments with it (rows are dense, columns scattered)
  of read   share of the bandwidth of sum() over as many bytes of float32, measured in turns with it
  faster    times as fast as the reference in eager PyTorch"""


class Case(NamedTuple):
    """One operation on one network.

    Attributes:
        shape: hidden layers x units, or what the network is.
        x: width or depth, for the plot.
        make: constructor of `networks` and its numbers; batch last.
        chosen: units of each group that `reinit_` sets.
    """

    op: str
    shape: str
    x: int
    make: Callable[..., Network]
    numbers: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    chosen: int = 1

    @property
    def name(self) -> str:
        """Shape, batch and type, as the table shows them."""
        last = f"k {self.chosen}" if self.op == "reinit_" else f"batch {self.numbers[-1]}"
        return f"{self.shape}, {last}, {str(self.dtype).removeprefix('torch.')}"


def mlp_with_few_inputs(depth: int, width: int, batch: int) -> Network:
    """`depth` hidden layers, whose square matrices are what is read, whichever sums the rule takes."""
    return mlp(depth, width, batch, inputs=64)


def convolutions(channels: int, size: int, batch: int) -> Network:
    """Three convolutions of 3 x 3 that keep `size` x `size` positions."""
    layers = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
    return chain(*layers, x=torch.randn(batch, channels, size, size), classes=2)


def _transformer_mlp(width: int, batch: int) -> Network:
    return chain(
        nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), x=torch.randn(batch, width), classes=2
    )


_TYPES = (torch.float64, torch.bfloat16, torch.float16)
WIDTHS = (64, 256, 1024, 4096, 16384)
CASES = (
    *(Case("capture_", f"1 x {n}", n, mlp_with_few_inputs, (1, n, 256)) for n in WIDTHS),
    *(Case("capture_", "1 x 4096", 4096, mlp_with_few_inputs, (1, 4096, batch)) for batch in (1, 32, 4096)),
    *(Case("capture_", "1 x 4096", 4096, mlp_with_few_inputs, (1, 4096, 256), dtype) for dtype in _TYPES),
    Case("capture_", "conv 64 @ 32 x 32", 64, convolutions, (64, 32, 16)),
    Case("capture_", "MLP 768-3072-768", 3072, _transformer_mlp, (768, 1024)),
    *(Case("select_", f"2 x {n}", n, mlp_with_few_inputs, (2, n, 32)) for n in WIDTHS),
    *(Case("select_", f"{depth} x 64", depth, mlp_with_few_inputs, (depth, 64, 32)) for depth in (1, 10, 100)),
    *(Case("select_", "2 x 4096", 4096, mlp_with_few_inputs, (2, 4096, 32), dtype) for dtype in _TYPES),
    *(Case("select_", "2 x 1024", 1024, mlp_with_few_inputs, (2, 1024, batch)) for batch in (1, 4096)),
    Case("select_", "conv 256 @ 8 x 8", 256, convolutions, (256, 8, 16)),
    Case("select_", "MLP 768-3072-768", 3072, _transformer_mlp, (768, 1024)),
    *(Case("reinit_", f"2 x {n}", n, mlp_with_few_inputs, (2, n, 1)) for n in (64, 1024, 4096)),
    Case("reinit_", "2 x 4096", 4096, mlp_with_few_inputs, (2, 4096, 1), chosen=41),
    Case("reinit_", "2 x 4096", 4096, mlp_with_few_inputs, (2, 4096, 1), torch.bfloat16),
    Case("reinit_", "conv 256 @ 8 x 8", 256, convolutions, (256, 8, 1)),
)
_ROUNDS = 50


def case_names() -> list[str]:
    """What `--cases` may name."""
    return list(dict.fromkeys(case.name for case in CASES))


def rounds(options: Options) -> int:
    """How many rounds the suite takes."""
    return _ROUNDS * len(_cases(options))


def run(options: Options) -> Iterator[tuple[str, list[Row]]]:
    """A line of the table at a time, and its times."""
    ours = backend_for_device(options)
    head = f"{'op':9} {'case':36} {ours:>10} {'GB/s':>7} {'of read':>8} {'eager':>11} {'faster':>7}"
    yield f"{LEGEND}\n\n{head}", []
    for case in _cases(options):
        with options.case(f"{case.op} {case.name}"):
            functions, moved = operations(case, options.rule or "nature", options.device, (ours, "reference"))
            wait = {name: timer(function, options.device) for name, function in functions.items()}
            times = in_turns(wait, _ROUNDS, options)
            rows = [row("kernels", case.name, case.op, name, times[name], x=case.x, moved=moved) for name in times]
            mine, eager, read = (next(r.median for r in rows if r.method == m) for m in (ours, "reference", "read"))
            yield (
                f"{case.op:9} {case.name:36} {mine:10.1f} {moved / mine / 1e3:7.1f} {read / mine:8.0%} {eager:11.1f}"
                f" {eager / mine:7.1f}",
                rows,
            )


def _cases(options: Options) -> list[Case]:
    dense = options.rule == "clarena"
    return [
        case
        for case in CASES
        if (not options.cases or case.name in options.cases) and not (dense and case.make is convolutions)
    ]


def operations(
    case: Case, rule: str, device: str, backends: tuple[str, ...]
) -> tuple[dict[str, Callable[[], None]], int]:
    """The case's operation by backend and, as "read", a sum over as many bytes; and how many those are."""
    network = build(case.make, *case.numbers, device=device)
    model, x = network.model.to(case.dtype), network.x.to(case.dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    functions: dict[str, Callable[[], None]] = {}
    for backend in backends:
        # deferred: what the readers see is held after a forward
        cbp = ContinualBackprop(
            model, rule=rule, replacement_rate=0.0, groups=network.groups, backend=backend, capture="deferred"
        )
        loss = model(x).sum()
        engine = cbp._engine
        if case.op == "reinit_" and not optimizer.state:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        functions[backend], touched = _operation(case, engine, functions_of(backend), optimizer)
        cbp.remove()
    buffers = [t if t.dtype == torch.float32 else torch.ones(t.nbytes // 4 or 1, device=device) for t in touched]

    def read() -> None:
        for tensor in buffers:
            tensor.sum()

    return {**functions, "read": read}, sum(t.nbytes for t in touched)


def _operation(
    case: Case, engine: Engine, backend: Any, optimizer: torch.optim.Optimizer
) -> tuple[Callable[[], None], list[Tensor]]:
    """What is timed, and the memory it must touch (for `reinit_`: as many bytes)."""
    state, (slots, held) = engine.state, engine._intact()
    if case.op == "capture_":
        return lambda: backend.capture_(state, 0, held[0]), held[:1]
    weights = engine._weights()
    if case.op == "select_":
        return lambda: backend.select_(state, weights, held, slots), [*(w.detach() for w in weights), *held]
    state.num_chosen.fill_(case.chosen)
    generator = torch.Generator().manual_seed(0)
    for layout in state.layouts:
        state.chosen[layout.units] = torch.randperm(layout.num_units, generator=generator).int().to(state.chosen.device)
    numbers, tensors = engine.collect([optimizer])
    elements = [
        tensor.nbytes // tensor.shape[region.axis] * region.block.per_unit * case.chosen // region.conv_groups
        for tensor, region in zip(tensors, (state.regions[n >> 1] for n in numbers), strict=True)
    ]
    return lambda: backend.reinit_(state, numbers, tensors), [
        torch.ones(sum(elements) // 4, device=state.buffer.device)
    ]
