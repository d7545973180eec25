"""The Triton backend: the five functions of every backend, each of a launch or a few; `reference` says what they do.

Two launches a step, whatever the number of layers; in several processes one more, and a few small copies. Tables are
built when shapes or strides change, and kept; addresses of tensors are sent when one has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from threading import Timer

import torch
import triton
from torch import Tensor
from torch.compiler import is_compiling

from ...rules.rule import Rule
from ...state.regions import DRAW
from ...state.state import State
from ...tensors.native import describe
from .. import reference
from . import kernels, launching
from .forward_plan import ForwardPlan, forward_plans
from .rows import DISTANCES, MAGNITUDES, MANY, TYPE_NUMBERS, VALUES
from .specialising import at_most, kernels_of, score_meta
from .step_plan import StepPlan
from .sum_plan import SumPlan
from .tables import Tables, recent, tables_of
from .targets import Targets, biases_of

_log = logging.getLogger("cbp_fast")
# seconds after which it is said that kernels are compiled
_QUICK = 1.0
_COMPILING = "compiling %s for %s, once; they are kept in %s"


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def why_not(rule: Rule, device: torch.device, split: bool) -> str | None:
    """Why this backend cannot serve a rule on a device, with `split` parameters or whole ones; None if it can."""
    if split:
        return "does not serve parameters that are split among processes"
    if device.type == "cpu" and not is_interpreted():
        return "serves CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type == "cuda" and is_interpreted():
        return "cannot reach a GPU's memory from Triton's interpreter (unset TRITON_INTERPRET)"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs a GPU of compute capability 8.0 and {torch.cuda.get_device_name(device)} has less"
    return None


def prepare(state: State, inline: bool) -> None:
    """Compile, for activations of the weights' types, what the steps of a state will launch on its device.

    Args:
        inline: whether activations may be summed in the forward.
    """
    device = state.buffer.device
    if is_interpreted():
        return
    types = 0
    for ref in (*state.weights, *(region.ref for region in state.regions if region.kind == DRAW)):
        types |= 1 << TYPE_NUMBERS[ref.dtype]
    wide = state.utility.dtype == torch.float64
    wanted = kernels_of(state.rule, wide, types, state.previous_mean, inline)
    if any(at_most(state.rule, layout.num_units, state.replacement_rate) > MANY.value for layout in state.layouts):
        wanted.append((kernels.rank, {}))
    names = ", ".join(dict.fromkeys(kernel.fn.__name__ for kernel, _ in wanted))
    # said only where it takes long: what is in the cache is loaded at once
    said = Timer(_QUICK, _log.warning, (_COMPILING, names, device, triton.knobs.cache.dir))
    said.daemon = True
    said.start()
    try:
        with torch.cuda.device(device):
            for kernel, meta in wanted:
                launching.compile_ahead(kernel, device, meta)
    finally:
        said.cancel()


def capture_(state: State, slot: int, h: Tensor) -> None:
    """See `reference.capture_`."""
    if is_compiling():
        # a compiler makes a kernel of its own from this
        reference.capture_(state, slot, h)
    elif state.rule.arithmetic.activation or state.rule.keeps_mean:
        tables = tables_of(state)
        with tables.on_device():
            _capture(state, tables, *_forwards(state, tables, [h], [slot]))
    else:
        reference.capture_(state, slot, h)


def _forwards(
    state: State, tables: Tables, held: Sequence[Tensor], slots: Sequence[int]
) -> tuple[list[ForwardPlan], list[int]]:
    """What adds forwards' activations to their sums, and the addresses that it takes."""
    held = [*held]
    layout, addresses = describe(held)

    def make() -> list[ForwardPlan]:
        return forward_plans(state, held, slots, [a % 16 for a in addresses])

    return recent(tables.forwards.setdefault(tuple(slots), {}), layout, make), addresses


def _capture(state: State, tables: Tables, forwards: Sequence[ForwardPlan], addresses: list[int]) -> None:
    rule = state.rule

    def add_up(plans: Sequence[SumPlan], what: int, counts: bool) -> None:
        for plan in plans:
            args = (plan.tiles, plan.jobs, plan.sender.send(addresses), tables.addresses, plan.workspace, plan.counters)
            meta = {"TYPES": plan.types, "SUM": what, "COUNTS": counts}
            tables.launch(plan, kernels.capture, plan.programs, args, meta)

    for forward in forwards:
        if rule.keeps_mean:
            add_up(forward.plans, VALUES.value, True)
        if rule.centred:
            tables.used(forward)
            hats = (forward.hat_blocks, tables.columns, tables.addresses)
            launching.launch(kernels.hat, (forward.hats,), hats, {"PREVIOUS": state.previous_mean})
            add_up(forward.plans, DISTANCES.value, False)
        elif rule.arithmetic.activation:
            add_up(forward.plans, MAGNITUDES.value, not rule.keeps_mean)


@torch.no_grad()
def sum_(state: State, weights: Sequence[Tensor], held: Sequence[Tensor], slots: Sequence[int]) -> None:
    """See `reference.sum_`; of processes that have all weights, which `choose_` reads."""
    assert not weights
    if state.rule.arithmetic.activation or state.rule.keeps_mean:
        tables = tables_of(state)
        with tables.on_device():
            _capture(state, tables, *_forwards(state, tables, held, slots))
    else:
        for number, h in zip(slots, held, strict=True):
            reference.capture_(state, number, h)
    for total, mine in zip(reference.totals(state), (state.count, state.activation, state.feature), strict=True):
        total.copy_(mine)


@torch.no_grad()
def choose_(state: State, weights: Sequence[Tensor]) -> int:
    """See `reference.choose_`."""
    for mine, total in zip((state.count, state.activation, state.feature), reference.totals(state), strict=True):
        mine.copy_(total)
    return select_(state, weights, [], [])


@torch.no_grad()
def select_(state: State, weights: Sequence[Tensor], held: Sequence[Tensor], slots: Sequence[int]) -> int:
    """See `reference.select_`."""
    if state.buffer.is_cpu and not held and not state.count.any():
        state.num_chosen.zero_()
        return 0
    tables = tables_of(state)
    with tables.on_device():
        forwards = None
        # a mean must be there before distances from it, and its samples twice
        if state.rule.keeps_mean and held:
            forwards = _forwards(state, tables, held, slots)
            held, slots = [], []
        tensors = [*held, *weights]
        layout, addresses = describe(tensors)
        ranked = tables.ranked(state)

        def make() -> StepPlan:
            return StepPlan(state, weights, held, slots, [a % 16 for a in addresses], ranked)

        plan = recent(tables.steps, (layout, tuple(slots), ranked), make)
        # all tables are there before the first launch
        sent = plan.sender.send(addresses)
        if forwards:
            _capture(state, tables, *forwards)
        meta, places = tables.meta, (tables.addresses, plan.workspace, plan.counters)
        if plan.programs:
            args = (plan.tiles, plan.jobs, sent, plan.blocks, plan.readers, plan.incoming, *places)
            tables.launch(plan, kernels.select, plan.programs, args, {"TYPES": plan.types, **meta})
        if meta["MIN_MAX"] or not plan.programs:
            rest = (plan.blocks, plan.jobs, plan.readers, plan.incoming, *places)
            tables.launch(plan, kernels.score, tables.num_blocks, rest, score_meta(meta))
        if plan.ranked:
            ranks = (plan.ranked_tiles, plan.blocks, tables.addresses, plan.workspace)
            launching.launch(kernels.rank, (plan.ranked,), ranks, {})
    return chosen_of(state)


def chosen_of(state: State) -> int:
    """How many units were chosen, which nobody waits for on a device: -1 there."""
    return int(state.num_chosen.sum()) if state.buffer.is_cpu else -1


@torch.no_grad()
def reinit_(state: State, regions: list[int], tensors: list[Tensor]) -> None:
    """See `reference.reinit_`."""
    tables = tables_of(state)
    layout, addresses = describe(tensors)
    with tables.on_device():
        key = (layout, tuple(addresses), tuple(regions))
        targets = recent(tables.targets, key, lambda: Targets(state, regions, tensors))
        tables.used(targets)
        # of each round, what was there before its transfers, or None after them
        redo = {} if state.redo is None else state.redo
        for i, ((outputs, transfers), (programs, writes)) in enumerate(targets.rounds):
            if i + 1 in redo:
                continue
            if outputs and redo.get(i, ()) is not None:
                tiles, biases, rows = transfers
                if state.redo is not None and i in redo:
                    for bias, before in redo[i]:
                        bias.copy_(before)
                elif state.redo is not None:
                    redo[i] = [(bias, bias.clone()) for bias in biases_of(state, regions, tensors)]
                launching.launch(
                    kernels.transfer, (outputs,), (tiles, biases, rows, tables.columns, tables.addresses), {}
                )
            redo[i] = None
            if programs:
                launching.launch(
                    kernels.reinit, (programs,), (*writes, tables.addresses), {"WIDE_UTILITY": tables.wide}
                )
