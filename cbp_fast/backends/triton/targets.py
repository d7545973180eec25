"""What is written where units are replaced: the tables of `transfer` and `reinit`."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ...state.regions import DRAW, TRANSFER, Region
from ...state.state import State
from . import sending
from .rows import BLOCK, FILL, FORGET, FORGET_MEAN, TYPE_NUMBERS, UNITS, Bias, Mask, Target, Transfer


class Targets:
    """The tables of one re-initialisation: transfers and then the rest, all of each at once."""

    def __init__(self, state: State, regions: Sequence[int], tensors: Sequence[Tensor]) -> None:
        rest = iter(tensors)
        transfers: list[list[tuple[Region, Tensor, Tensor]]] = [[]]
        others: list[list[tuple[Region, bool, Tensor]]] = [[]]
        # layers that are drawn anew: where such a one is read, in a circle of layers, what is new is read
        drawn: set[int] = set()
        for number in regions:
            region, is_entry, tensor = state.regions[number >> 1], bool(number & 1), next(rest)
            if region.kind == TRANSFER:
                if id(region.ref.owner) in drawn:
                    transfers.append([])
                    others.append([])
                    drawn.clear()
                transfers[-1].append((region, tensor, next(rest)))
                continue
            if not is_entry and (region.kind == DRAW or region.ref.key == "bias"):
                drawn.add(id(region.ref.owner))
            others[-1].append((region, is_entry, tensor))
        self.rounds = [
            (_transfers_of(state, first), _writes_of(state, then, last=then is others[-1]))
            for first, then in zip(transfers, others, strict=True)
        ]


def _transfers_of(state: State, transfers: Sequence[tuple[Region, Tensor, Tensor]]) -> tuple[int, list[Tensor]]:
    """Programs and tables of `transfer`."""
    of_bias: dict[int, list[tuple[Region, Tensor, Tensor]]] = {}
    for one in transfers:
        of_bias.setdefault(id(one[1]), []).append(one)
    tiles: list[int] = []
    biases: list[int] = []
    rows: list[int] = []
    for number, found in enumerate(of_bias.values()):
        bias = found[0][1]
        first = len(rows) // len(Transfer._fields)
        biases += Bias(bias.data_ptr(), TYPE_NUMBERS[bias.dtype], len(bias), bias.stride(0), first, len(found))
        tiles += [n for b in range(-(-len(bias) // UNITS.value)) for n in (number, b)]
        for region, _, weight in found:
            inner_shape = (*weight.shape[2:], *(1,) * (5 - weight.dim()))
            strides = (*weight.stride()[2:], *(0,) * (5 - weight.dim()))
            start, unit_stride, per_unit, position_stride = region.block
            rows += Transfer(
                address=weight.data_ptr(),
                dtype=TYPE_NUMBERS[weight.dtype],
                group=region.group,
                columns=region.slot,
                start=start,
                unit_stride=unit_stride,
                position_stride=position_stride,
                per_unit=per_unit,
                rows=weight.shape[1 - region.axis] // region.conv_groups,
                width=weight.shape[region.axis],
                inner=math.prod(inner_shape),
                size3=inner_shape[1],
                size4=inner_shape[2],
                row_stride=weight.stride(1 - region.axis),
                column_stride=weight.stride(region.axis),
                stride2=strides[0],
                stride3=strides[1],
                stride4=strides[2],
            )
    tables = sending.upload(state.buffer.device, (tiles or [0], 32), (biases or [0], 64), (rows or [0], 64))
    return len(tiles) // 2, tables


def _writes_of(state: State, writes: Sequence[tuple[Region, bool, Tensor]], last: bool) -> tuple[int, list[Tensor]]:
    """Programs and tables of `reinit`; the last one forgets what was known of the units."""
    # what is written, so that regions which write the same may do so in any order
    what = [
        (r.kind == DRAW and not is_entry, r.stream, r.distribution, 0.0 if is_entry else r.value)
        for r, is_entry, _ in writes
    ]
    targets: list[int] = []
    masks: list[int] = []
    owners: list[int] = []
    tiles: list[int] = []
    for i, (region, _, tensor) in enumerate(writes):
        draws, _, distribution, value = what[i]
        first_mask = len(masks) // len(Mask._fields)
        for j in range(i + 1, len(writes)):
            later, _, other = writes[j]
            if other is tensor and what[j] != what[i] and later.axis != region.axis:
                masks += Mask(len(owners), later.axis, tensor.shape[0] // later.conv_groups, tensor.shape[1])
                owners += _owners(state, later, tensor.shape)
        shape = (*tensor.shape, *(1,) * (5 - tensor.dim()))
        strides = (*tensor.stride(), *(0,) * (5 - tensor.dim()))
        inner = math.prod(shape[2:])
        start, unit_stride, per_unit, position_stride = region.block
        rows = shape[0] // region.conv_groups
        elements = per_unit * inner * (rows if region.axis else shape[1])
        (bits,) = struct.unpack("q", struct.pack("d", value))
        programs = min(-(-elements // BLOCK.value), 1024)
        tiles += [n for program in range(programs) for n in (len(targets) // len(Target._fields), program)]
        targets += Target(
            address=tensor.data_ptr(),
            dtype=TYPE_NUMBERS[tensor.dtype],
            kind=("uniform", "normal", "unit").index(distribution) if draws else FILL.value,
            value=bits,
            group=region.group,
            first_unit=state.layouts[region.group].units.start,
            elements=elements,
            programs=programs,
            start=start,
            unit_stride=unit_stride,
            position_stride=position_stride,
            axis=region.axis,
            rows=rows,
            columns=shape[1],
            inner=inner,
            size3=shape[3],
            size4=shape[4],
            stride0=strides[0],
            stride1=strides[1],
            stride2=strides[2],
            stride3=strides[3],
            stride4=strides[4],
            stream=region.stream,
            first_mask=first_mask,
            masks=len(masks) // len(Mask._fields) - first_mask,
        )
    nothing = Target._make([0] * len(Target._fields))
    for g, layout in enumerate(state.layouts if last else ()):
        units = nothing._replace(kind=FORGET.value, group=g, first_unit=layout.units.start)
        tiles += (len(targets) // len(Target._fields), 0)
        targets += units
        for slot in (state.slots[s] for s in layout.slots if state.rule.keeps_mean):
            _, unit_stride, per_unit, position_stride = slot.block
            tiles += (len(targets) // len(Target._fields), 0)
            targets += units._replace(
                kind=FORGET_MEAN.value,
                start=slot.columns.start,
                unit_stride=unit_stride,
                position_stride=position_stride,
                elements=per_unit,
            )
    tables = ((tiles, 32), (targets or [0], 64), (masks or [0], 64), (owners or [0], 32))
    return len(tiles) // 2, sending.upload(state.buffer.device, *tables)


def _owners(state: State, region: Region, shape: Sequence[int]) -> list[int]:
    """Which unit owns each index of a region's axis, in the numbering of all groups; -1 for none."""
    units = state.layouts[region.group].units
    size = shape[0] if region.axis == 0 else shape[1] * region.conv_groups
    start, unit_stride, per_unit, position_stride = region.block
    owners = torch.full((size,), -1, dtype=torch.int32)
    places = owners[start:].as_strided((units.stop - units.start, per_unit), (unit_stride, position_stride))
    places.copy_(torch.arange(units.start, units.stop, dtype=torch.int32)[:, None].expand_as(places))
    return owners.tolist()


def biases_of(state: State, regions: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that transfers add to."""
    rest, found = iter(tensors), {}
    for number in regions:
        tensor = next(rest)
        if state.regions[number >> 1].kind == TRANSFER:
            next(rest)
            found[id(tensor)] = tensor
    return list(found.values())
