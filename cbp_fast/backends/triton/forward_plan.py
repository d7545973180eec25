"""The plans of activations that are summed apart from the step: in a forward, or before what needs their mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from ...state.state import State
from . import sending
from .rows import UNITS
from .sum_plan import SumPlan
from .sums import Sum, activation_sums


class ForwardPlan:
    """The tables of `capture` and `hat` for one forward of each of some slots.

    Of several launches where an activation has too many axes for one.
    """

    def __init__(self, state: State, parts: Sequence[Sequence[Sum]], aligned: Sequence[int]) -> None:
        self.plans = [SumPlan(state, sums, aligned) for sums in parts]
        for plan in self.plans:
            plan.allocate(0)
        blocks: list[int] = []
        for s in parts[0] if state.rule.centred else ():
            units = state.layouts[s.group].num_units
            blocks += [n for b in range(-(-units // UNITS.value)) for n in (s.slot, b)]
        self.hats = len(blocks) // 2
        (self.hat_blocks,) = sending.upload(state.buffer.device, (blocks or [0], 32))


def forward_plans(
    state: State, held: Sequence[Tensor], slots: Sequence[int], aligned: Sequence[int]
) -> list[ForwardPlan]:
    """Plans for activations, one after the other where a slot has several."""
    return [ForwardPlan(state, parts, aligned) for parts in _rounds(activation_sums(state, held, slots))]


def _rounds(sums: Sequence[Sum]) -> list[list[list[Sum]]]:
    """By forward of a slot and by part of an activation: no two sums of a list are of the same columns."""
    rounds: list[list[list[Sum]]] = []
    seen: dict[int, list[int]] = {}
    parts: Counter[int] = Counter()
    for s in sums:
        forwards = seen.setdefault(s.slot, [])
        if s.tensor not in forwards:
            forwards.append(s.tensor)
        n, part = forwards.index(s.tensor), parts[s.tensor]
        parts[s.tensor] += 1
        if n == len(rounds):
            rounds.append([])
        if part == len(rounds[n]):
            rounds[n].append([])
        # only the first part counts samples
        rounds[n][part].append(s if part == 0 else s._replace(samples=0))
    return rounds
