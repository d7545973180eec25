"""The int64 table that the compiled kernels walk; csrc/plan.h mirrors its order."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ..groups.layers import out_axis
from ..rules.arithmetic import CHOICES
from ..tensors.native import DTYPES
from .arrangement import Arrangement
from .layout import conv_groups_here

MAX_DIMS = 5


def pack(arrangement: Arrangement, offsets: Sequence[int], nbytes: int, utility_bytes: int) -> Tensor:
    """The table of an arrangement.

    Args:
        offsets: of the fields of the state in its buffer.
        nbytes: of the buffer.
        utility_bytes: of one utility.
    """
    arithmetic = arrangement.rule.arithmetic
    table = [
        len(arrangement.layouts),
        len(arrangement.slots),
        len(arrangement.weights),
        len(arrangement.regions),
        sum(len(layout.incoming) for layout in arrangement.layouts),
        arrangement.layouts[-1].units.stop,
        arrangement.slots[-1].columns.stop,
        utility_bytes,
        arithmetic.number("activation"),
        int(arrangement.rule.keeps_mean),
        *map(arithmetic.number, ("outgoing", "incoming", "normalisation", "score", "accrual", "count")),
        *offsets,
        nbytes,
        arrangement.flat_size,
        int(arrangement.previous_mean),
    ]
    first = 0
    for layout in arrangement.layouts:
        incoming = len(layout.incoming)
        units = layout.units.start
        table += [units, layout.num_units, layout.columns_per_unit, layout.slots[0], len(layout.slots)]
        table += [first, incoming, layout.stream]
        first += incoming
    for slot in arrangement.slots:
        table += [slot.group, slot.columns.start, slot.columns.stop - slot.columns.start, slot.weight, slot.spatial]
        table += [slot.features, *slot.block, len(slot.seen), slot.first_seen, slot.here.start]
        table += [slot.here.stop - slot.here.start, int(slot.counts), int(slot.adds)]
    for layout in arrangement.layouts:
        for number, block in layout.incoming:
            table += [number, *block]

    def padded(sizes: Sequence[int], filler: int = 1) -> list[int]:
        return [*sizes, *(filler,) * (MAX_DIMS - len(sizes))]

    for i, (ref, module) in enumerate(zip(arrangement.weights, arrangement.modules, strict=True)):
        axis = out_axis(module)
        # a grouped convolution that only makes units has its rows summed like any other
        conv_groups = getattr(module, "groups", 1) if arrangement.reads_inputs[i] else 1
        table += [DTYPES[ref.dtype], len(ref.shape), *padded(ref.shape), conv_groups, axis]
        reads = (int(arrangement.reads_outputs[i]), int(arrangement.reads_inputs[i]))
        places = (arrangement.outputs[i].start, arrangement.inputs[i].start)
        table += [reads[axis], reads[1 - axis], places[axis], places[1 - axis]]
        groups_here, group = conv_groups_here(ref, conv_groups)
        table += [*padded(ref.extent.part), groups_here, ref.extent.first[0]]
        table += [ref.extent.first[1] + group * ref.shape[1], int(ref.extent.adds)]
    for r in arrangement.regions:
        (value,) = struct.unpack("q", struct.pack("d", r.value))
        table += [r.kind, r.group, r.axis, *r.block, r.conv_groups, r.stream]
        table += [CHOICES["distribution"].index(r.distribution), value, r.slot, len(r.ref.shape), *padded(r.ref.shape)]
        table += [*padded(r.ref.extent.part), *padded(r.ref.extent.first, 0)]
    return torch.tensor(table, dtype=torch.int64, device="cpu")
