"""The plan of a whole step: sums over held activations and weights, then every group's choice."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from torch import Tensor

from ...groups.layers import out_axis
from ...state.state import State
from . import sending
from .rows import RANKED, Reader, UnitBlock
from .sum_plan import SumPlan, blocks_of
from .sums import activation_sums, input_sum, output_sum


class StepPlan(SumPlan):
    """The tables of `select`, `score` and `rank`.

    Args:
        held: activations that wait for the step, and the slot of each.
        aligned: the last four bits of each tensor's address, of the activations and then of the weights.
        ranked: groups that may choose so many units that `rank` sorts them.
    """

    def __init__(
        self,
        state: State,
        weights: Sequence[Tensor],
        held: Sequence[Tensor],
        slots: Sequence[int],
        aligned: Sequence[int],
        ranked: Sequence[int],
    ) -> None:
        # activations by slot, so that a slot's sums are neighbours
        arithmetic = state.rule.arithmetic
        activations = sorted(activation_sums(state, held, slots) if arithmetic.activation else [], key=lambda s: s.slot)
        sums = list(activations)
        # of each slot, the sum of its weight; of each group one after the other, its producers' sums, outputs a unit
        sum_of_slot = [0] * len(state.slots)
        for i, slot in enumerate(state.slots):
            if arithmetic.outgoing:
                module, number = state.modules[slot.weight], len(held) + slot.weight
                sum_of_slot[i] = len(sums)
                weight = weights[slot.weight]
                sums.append(input_sum(weight, number, slot, getattr(module, "groups", 1), out_axis(module)))
        incoming: list[tuple[int, int]] = []
        for g, layout in enumerate(state.layouts):
            for i, block in layout.incoming:
                incoming.append((len(sums), block.per_unit))
                out = out_axis(state.modules[i])
                sums.append(output_sum(weights[i], len(held) + i, g, layout.num_units, block, out))
        super().__init__(state, sums, aligned)
        # only the first part of a divided activation brings its samples
        samples = [0] * len(state.slots)
        for h, s in zip(held, slots, strict=True):
            slot = state.slots[s]
            samples[s] += h.numel() // h.shape[h.dim() - 1 - slot.spatial]
        of_slot = [s.slot for s in activations]
        readers: list[int] = []
        for i, slot in enumerate(state.slots):
            _, unit_stride, per_unit, position_stride = slot.block
            elements = per_unit
            if arithmetic.outgoing:
                elements = per_unit * (weights[slot.weight].numel() // slot.features)
            first, last = bisect_left(of_slot, i), bisect_right(of_slot, i)
            readers += Reader(
                column=slot.columns.start,
                unit_stride=unit_stride,
                position_stride=position_stride,
                samples=samples[i] & 0x7FFFFFFF,
                more_samples=samples[i] >> 31,
                jobs=last - first,
                activation_total=self.totals[first] // 8 if last > first else 0,
                first_job=first,
                weight_total=self.totals[sum_of_slot[i]] // 8 if arithmetic.outgoing else 0,
                fold=sums[sum_of_slot[i]].fold if arithmetic.outgoing else 1,
                elements=elements,
            )
        blocks, several, end = self._blocks(state, weights, ranked)
        places = [n for number, per_unit in incoming for n in (self.totals[number] // 8, per_unit)]
        self.readers, self.blocks, self.incoming, self.ranked_tiles = sending.upload(
            state.buffer.device, (readers, 32), (blocks, 32), (places or [0], 32), (several or [0], 32)
        )
        self.ranked = len(several) // 2
        self.allocate(end - self.place)

    def _blocks(
        self, state: State, weights: Sequence[Tensor], ranked: Sequence[int]
    ) -> tuple[list[int], list[int], int]:
        """Rows of `UnitBlock`, the tiles of `rank`, and the end of what the groups need of the workspace."""
        rows: list[int] = []
        several: list[int] = []
        expected = iter(self.expected)
        first_incoming, scratch = 0, self.place
        for g, (layout, (width, blocks)) in enumerate(zip(state.layouts, blocks_of(state), strict=True)):
            fan_in = 0
            for i, block in layout.incoming:
                fan_in += block.per_unit * (weights[i].numel() // weights[i].shape[out_axis(state.modules[i])])
            if g in ranked:
                first_row = len(rows) // len(UnitBlock._fields)
                parts = -(-layout.num_units // RANKED.value)
                several += [n for part in range(parts) for n in (first_row, part)]
            for b in range(blocks):
                rows += UnitBlock(
                    group=g,
                    number=b,
                    first=b * width,
                    here=min(width, layout.num_units - b * width),
                    unit=layout.units.start + b * width,
                    expected=next(expected),
                    blocks=blocks,
                    width=width,
                    units=layout.num_units,
                    keys=scratch // 8,
                    columns_per_unit=layout.columns_per_unit,
                    first_reader=layout.slots[0],
                    readers=len(layout.slots),
                    first_incoming=first_incoming,
                    incoming=len(layout.incoming),
                    fan_in=fan_in,
                    # as a signed number of 32 bits
                    stream=layout.stream - (layout.stream >> 31 << 32),
                    ranked=int(g in ranked),
                )
            first_incoming += len(layout.incoming)
            scratch += 8 * (2 * layout.num_units + 4 * blocks)
        return rows, several, scratch
