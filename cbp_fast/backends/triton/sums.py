"""Which sums a step takes: over activations, and over the weights that read and make units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...state.layout import Slot
from ...state.state import State


class Axis(NamedTuple):
    """One axis of a tensor as it lies in memory."""

    size: int
    stride: int  # in elements


def _merged(axes: Sequence[Axis]) -> list[Axis]:
    """The same elements with fewer axes, the greatest stride first."""
    merged: list[Axis] = []
    for axis in sorted((a for a in axes if a.size != 1), key=lambda a: -a.stride):
        if merged and merged[-1].stride == axis.size * axis.stride:
            merged[-1] = Axis(merged[-1].size * axis.size, axis.stride)
        else:
            merged.append(axis)
    return merged


class Sum(NamedTuple):
    """A sum of magnitudes over `reduced` axes of a tensor, for outputs as in `Job`."""

    tensor: int  # its number among the weights and activations of a step
    offset: int  # of its first element, in elements
    dtype: torch.dtype
    outputs: int
    first: int
    period: int
    far: int
    near: int
    reduced: list[Axis]
    group: int
    fold: int = 1  # neighbouring outputs that make up a column
    per_unit: int = 1  # columns of a unit, and whether they lie position by position; rows have been put together
    by_position: bool = False
    column: int = 0
    samples: int = 0
    slot: int = -1

    def units(self, first: int, end: int, num_units: int) -> tuple[int, int]:
        """First unit of a run of outputs, and the one after its last; past the last unit it goes on with the first."""
        low, high = first // self.fold, -(-end // self.fold)
        if not self.by_position:
            return low // self.per_unit, -(-high // self.per_unit)
        return low % num_units, low % num_units + min(high - low, num_units)


def split_axes(s: Sum) -> tuple[list[Axis], Axis, bool]:
    """Outer axes, the axis that tiles run along, and whether its elements are nearer than the outputs."""
    axes = list(s.reduced)
    if not axes:
        return [], Axis(1, 0), False
    along = s.near != 1 and axes[-1].stride < s.near
    inner = axes.pop() if along else axes.pop(max(range(len(axes)), key=lambda i: axes[i].size))
    return axes, inner, along


def _peeled(s: Sum) -> list[Sum]:
    """A job has three outer axes; what has more becomes several sums."""
    outer, _, _ = split_axes(s)
    if len(outer) <= 3:
        return [s]
    axis = outer[0]
    rest = [a for a in s.reduced if a is not axis]
    parts = [s._replace(offset=s.offset + i * axis.stride, reduced=rest) for i in range(axis.size)]
    return [p for part in parts for p in _peeled(part)]


def activation_sums(state: State, held: Sequence[Tensor], slots: Sequence[int]) -> list[Sum]:
    """abs(h) over all samples, for each column of the slot that h belongs to."""
    sums = []
    for number, (h, s) in enumerate(zip(held, slots, strict=True)):
        slot = state.slots[s]
        axis = h.dim() - 1 - slot.spatial
        axes = [Axis(*a) for a in zip(h.shape, h.stride(), strict=True)]
        feature = axes.pop(axis)
        columns = slot.columns.stop - slot.columns.start
        samples = math.prod(a.size for a in axes)
        one = Sum(
            number,
            slot.block.start * feature.stride,
            h.dtype,
            columns,
            0,
            columns,
            0,
            feature.stride,
            _merged(axes),
            slot.group,
            column=slot.columns.start,
            samples=samples,
            slot=s,
            **_arranged(slot),
        )
        sums += _peeled(one) if samples else []
    return sums


def input_sum(weight: Tensor, number: int, slot: Slot, groups: int, out: int) -> Sum:
    """abs(W_out) by column, or by several neighbouring outputs for each column."""
    shape, stride, columns = weight.shape, weight.stride(), slot.columns.stop - slot.columns.start
    kernel = _merged([Axis(*a) for a in zip(shape[2:], stride[2:], strict=True)])
    inputs, outputs = Axis(shape[1 - out], stride[1 - out]), Axis(shape[out] // groups, stride[out])
    fold, near, reduced = 1, inputs.stride, [outputs, *kernel]
    # rows dense in memory are read along it, and the kernel's positions put together afterwards
    if len(kernel) == 1 and inputs.stride == kernel[0].size * kernel[0].stride:
        (fold, near), reduced = kernel[0], [outputs]
    # of a grouped convolution, whose columns lie in the rows of their group, from the first group on that is read
    above, start = divmod(slot.block.start, inputs.size) if groups > 1 else (0, slot.block.start)
    group_stride = outputs.size * outputs.stride
    first, period, far, offset = start * fold, inputs.size * fold, group_stride, above * group_stride
    if groups == 1 or start + columns <= inputs.size:
        first, period, far, offset = 0, columns * fold, 0, offset + start * inputs.stride
    reduced = _merged(reduced)
    arranged, count = _arranged(slot), columns * fold
    return Sum(number, offset, weight.dtype, count, first, period, far, near, reduced, slot.group, fold, **arranged)


def _arranged(slot: Slot) -> dict[str, Any]:
    """How the columns of a reader belong to the units: readers of one group may differ in it."""
    return {"per_unit": slot.block.per_unit, "by_position": slot.block.per_unit > 1 and slot.block.unit_stride == 1}


def output_sum(weight: Tensor, number: int, group: int, units: int, block: Sequence[int], out: int) -> Sum:
    """abs(W_in) by row of each unit."""
    start, unit_stride, per_unit, position_stride = block
    axes = [Axis(*a) for a in zip(weight.shape, weight.stride(), strict=True)]
    stride = axes.pop(out).stride
    outputs, near = units * per_unit, position_stride * stride
    period, far = per_unit, unit_stride * stride
    if per_unit == 1 or unit_stride == per_unit * position_stride:
        period, far, near = outputs, 0, far if per_unit == 1 else near
    reduced = _merged(axes)
    return Sum(number, start * stride, weight.dtype, outputs, 0, period, far, near, reduced, group, per_unit)
