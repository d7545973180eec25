"""Which program takes which tile: the plan of a launch that sums, and the groups' blocks of units that it brings on.

A plan is made when shapes or strides change, and kept; only the addresses of its tensors are sent again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from ...state.state import State
from . import sending
from .rows import FEWER_UNITS, NARROW, TYPE_NUMBERS, UNITS, WIDE, Job
from .sums import Axis, Sum, split_axes

_WIDE, _NARROW = WIDE.value, NARROW.value
_TILE = _WIDE * _NARROW


class UnitBlocks(NamedTuple):
    """How the units of a group are divided."""

    width: int  # units of each block but the last
    number: int


def blocks_of(state: State) -> list[UnitBlocks]:
    """The blocks of units of each group.

    One program may have to finish all blocks whose sums are in one block of outputs: of units with several columns, as
    many as those are of, and no more than pays.
    """
    found = []
    for layout in state.layouts:
        per_unit, unit_stride = layout.columns_per_unit, state.slots[layout.slots[0]].block.unit_stride
        width = UNITS.value
        if per_unit > 1:
            width = 32 if unit_stride == 1 else max(FEWER_UNITS.value, min(32, _WIDE // per_unit))
        found.append(UnitBlocks(width, -(-layout.num_units // width)))
    return found


class _Tiling(NamedTuple):
    """How one sum is divided among programs."""

    outer: list[Axis]  # three of them
    inner: Axis
    kind: int  # as in `Job`
    size: int  # of a block of outputs
    blocks: int
    splits: int
    steps: int

    @classmethod
    def of(cls, s: Sum, address: int, share: int) -> _Tiling:
        """Of a sum whose first element has this address, to within 16 bytes, by tiles that a program should have."""
        outer, inner, along = split_axes(s)
        size, item = _NARROW if along else _WIDE, s.dtype.itemsize
        apart = (s.near, inner.stride) if along else (inner.stride, s.near)
        is_aligned = (
            not outer
            and s.first == 0
            and s.period >= s.outputs
            and apart[1] == 1
            and (apart[0] * item % 16 == 0 or (s.outputs if along else inner.size) == 1)
            and (inner.size if along else s.outputs) * item % 16 == 0
            and address % 16 == 0
        )
        reduced = _TILE // size // (1 if is_aligned and item < 8 else 2)
        tiles = math.prod(a.size for a in outer) * -(-inner.size // reduced)
        # the parts of a split sum are read again: few, beside what was summed
        steps = max(share, 8 // item, -(-tiles // 128))
        splits = max(1, -(-tiles // steps))
        steps = -(-tiles // splits)
        splits = max(1, -(-tiles // steps)) if steps else 1
        kind = 4 * TYPE_NUMBERS[s.dtype] + 2 * along + is_aligned
        three = [Axis(1, 0)] * (3 - len(outer)) + outer
        return cls(three, inner, kind, size, -(-s.outputs // size), splits, steps)


class SumPlan:
    """The tables of one launch over sums: which there are, and which program takes which tile of them."""

    def __init__(self, state: State, sums: Sequence[Sum], aligned: Sequence[int]) -> None:
        """`aligned`: the last four bits of each tensor's address."""
        work = sum(s.outputs * math.prod(a.size for a in s.reduced) for s in sums)
        # programs for every multiprocessor of a large GPU, of two tiles and more; for all GPUs the same, since sums
        # that are split in another way would round in another way
        share = min(max(work // 512, 2**12), 2**16) // _TILE
        unit_blocks = blocks_of(state)
        first_block = [0, *accumulate(blocks.number for blocks in unit_blocks)]
        # of each job, its place in the workspace; of each block of units, the blocks of outputs that it waits for
        self.totals: list[int] = []
        self.expected = [0] * first_block[-1]
        self.types = 0
        jobs: list[int] = []
        tiles: list[int] = []
        place = 0
        # one for each block of units, one for each group and one for the groups come first
        counter = len(self.expected) + len(unit_blocks) + 1
        for number, s in enumerate(sums):
            tiling = _Tiling.of(s, aligned[s.tensor] + s.offset * s.dtype.itemsize, share)
            is_split = tiling.splits > 1
            partial = place
            place += tiling.splits * s.outputs * 8 if is_split else 0
            jobs += _job(s, tiling, partial, place, counter)
            self.totals.append(place)
            self.types |= 1 << TYPE_NUMBERS[s.dtype]
            place += s.outputs * 8
            counter += tiling.blocks if is_split else 0
            units, (width, in_group) = state.layouts[s.group].num_units, unit_blocks[s.group]
            for block in range(tiling.blocks):
                unit, end = s.units(block * tiling.size, min((block + 1) * tiling.size, s.outputs), units)
                first, last = unit // width, (end - 1) // width
                if end > units:
                    # from the last block on to the first ones
                    last = in_group + (end - units - 1) // width
                touched = min(last - first + 1, in_group)
                for b in range(first, first + touched):
                    self.expected[first_block[s.group] + b % in_group] += 1
                first += first_block[s.group]
                for split in range(tiling.splits):
                    tiles += (number, block, split, first, touched, first_block[s.group + 1], in_group)
        self.programs = len(tiles) // 7
        self.jobs, self.tiles, self.counters = sending.upload(
            state.buffer.device, (jobs or [0], 64), (tiles or [0], 32), ([0] * counter, 32)
        )
        self.place = place
        # which of a step's tensors a job reads, and from which byte
        self.sources = [(s.tensor, s.offset * s.dtype.itemsize) for s in sums]
        self.sender = sending.Sender(self.sources, state.buffer.device)
        self.dirty = False

    def allocate(self, scratch: int) -> None:
        """Make the workspace, with so many more bytes."""
        self.workspace = torch.empty((self.place + scratch) // 8, dtype=torch.int64, device=self.counters.device)


def _job(s: Sum, tiling: _Tiling, partial: int, total: int, counter: int) -> Job:
    """The row of a sum, by its places in the workspace and its first counter."""
    outer, inner = tiling.outer, tiling.inner
    return Job(
        kind=tiling.kind,
        outputs=s.outputs,
        first=s.first,
        period=s.period,
        far=s.far,
        near=s.near,
        inner=inner.size,
        inner_stride=inner.stride,
        outer=math.prod(a.size for a in outer),
        size1=outer[1].size,
        size2=outer[2].size,
        stride0=outer[0].stride,
        stride1=outer[1].stride,
        stride2=outer[2].stride,
        splits=tiling.splits,
        steps=tiling.steps,
        partial=partial,
        total=total,
        group=s.group,
        counter=counter,
        column=s.column,
        samples=s.samples,
        slot=s.slot,
    )
