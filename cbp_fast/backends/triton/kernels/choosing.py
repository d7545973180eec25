"""The k units of a group with the least keys: how many are due, which they are, and `rank` where they are many."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import (
    A_CHOSEN,
    A_IS_CHOSEN,
    A_NUM_BLOCKS,
    A_NUM_CHOSEN,
    A_NUM_GROUPS,
    A_NUM_REPLACED,
    A_PENDING,
    A_SEED,
    A_STEP,
    B_GROUP,
    B_KEYS,
    B_RANKED,
    B_STREAM,
    B_UNIT,
    B_UNITS,
    B_WIDTH,
    BLOCK,
    BLOCK_ROW,
    MANY,
    RANKED,
    UNITS,
)
from .drawing import unit_uniform
from .memory import arrive, field, in_workspace
from .scoring import NEVER


@triton.jit
def _least(minima, blocks):
    """The least key of all blocks."""
    least = tl.full([BLOCK], NEVER, tl.int64)
    for first in tl.range(0, blocks, BLOCK, loop_unroll_factor=4):
        b = first + tl.arange(0, BLOCK)
        least = tl.minimum(least, tl.load(minima + b, b < blocks, NEVER, cache_modifier=".cg"))
    return tl.min(least, 0)


@triton.jit
def _wanted(block, in_all, rate, pending, addresses, ACCRUAL: tl.constexpr, COUNT: tl.constexpr):
    """How many units are to be replaced, if so many can be, and what is pending before they are.

    Args:
        in_all: how many are mature, and in the lower half how many of those can be chosen.
    """
    mature = (in_all >> 32).to(tl.float64)
    if ACCRUAL == 1:
        mature = tl.where(mature > 0, block.units.to(tl.float64), 0.0)
    due = rate * mature
    if ACCRUAL == 2:
        due = tl.floor(due)
    pending += due
    if COUNT == 2:
        wanted = tl.where(pending > 1, 1.0, 0.0)
    elif COUNT == 0:
        wanted = tl.floor(pending)
    else:
        # the coin's element follows those of the random scores; a step that reached the group counts
        step = tl.load(field(addresses, A_STEP, tl.int64)) + 1
        seed = tl.load(field(addresses, A_SEED, tl.int64))
        stream = tl.load(block.row + B_STREAM).to(tl.int64)
        coin = unit_uniform(block.units.to(tl.int64), seed, step, stream).to(tl.float64)
        wanted = tl.floor(due) + tl.where(coin < due - tl.floor(due), 1.0, 0.0)
    return wanted, pending


@triton.jit
def _take(block, count, key, minima, width, chosen, is_chosen):
    """The units of the `count` least keys, one after the other; `key` is the least one."""
    lane = tl.arange(0, UNITS)
    for n in range(count):
        least_unit = key & 0x7FFFFFFF
        tl.store(chosen + n, least_unit.to(tl.int32))
        tl.store(is_chosen + least_unit, 1)
        if n + 1 < count:
            # the block that it was of is left with its next one
            of = least_unit // width
            in_block = of * width + lane
            mask = (lane < width) & (in_block < block.units)
            others = tl.load(block.keys + in_block, mask, NEVER, cache_modifier=".cg")
            left = tl.min(tl.where(others > key, others, NEVER), 0)
            tl.debug_barrier()
            tl.store(minima + of, left)
            tl.debug_barrier()
            key = _least(minima, block.blocks)


@triton.jit
def _count_step(reached, num_groups, num_blocks, addresses, counters):
    """One more step for the last group, if any group was reached in it."""
    # groups in the lower half, those that were reached in the upper one
    groups_here = counters + num_blocks + num_groups
    arrived = arrive(groups_here, 1 + (reached.to(tl.int32) << 16))
    if (arrived & 0xFFFF) == num_groups - 1:
        steps = field(addresses, A_STEP, tl.int64)
        before = tl.load(steps)
        # every warp has read before one writes
        tl.debug_barrier()
        more = (((arrived >> 16) > 0) | reached) & (before < 0x7FFFFFFFFFFFFFFF)
        tl.store(steps, before + more.to(tl.int64))
        tl.store(groups_here, 0)


@triton.jit
def choose(
    block, key, of_block, reached, hyper, counts, addresses, counters, ACCRUAL: tl.constexpr, COUNT: tl.constexpr
):
    """The choice of a group by the program of its last block; the others leave their block's least key and counts.

    Args:
        key, of_block: the least key, and the counts that `to_keys` gives.
        reached: whether there were samples.
    """
    minima, stats = block.keys + 2 * block.units, block.keys + 2 * block.units + block.blocks
    is_chosen = field(addresses, A_IS_CHOSEN, tl.int32) + (block.unit - block.first)
    tl.store(is_chosen + block.j, 0, block.inside)
    tl.store(minima + block.number, key)
    tl.store(stats + block.number, of_block)
    # what does not wait for others is under way while they are counted
    pendings = field(addresses, A_PENDING, tl.float64) + block.group
    totals_replaced = field(addresses, A_NUM_REPLACED, tl.int64) + block.group
    num_chosen = field(addresses, A_NUM_CHOSEN, tl.int32) + block.group
    chosen = field(addresses, A_CHOSEN, tl.int32) + (block.unit - block.first)
    num_groups, num_blocks = tl.load(addresses + A_NUM_GROUPS), tl.load(addresses + A_NUM_BLOCKS)
    width, ranked, rate = tl.load(block.row + B_WIDTH), tl.load(block.row + B_RANKED), tl.load(hyper)
    pending, num_replaced = tl.load(pendings), tl.load(totals_replaced)
    if arrive(counters + num_blocks + block.group, 1) == block.blocks - 1:
        tl.store(counters + num_blocks + block.group, 0)
        key = _least(minima, block.blocks)
        both = tl.zeros([BLOCK], tl.int64)
        for start in tl.range(0, block.blocks, BLOCK, loop_unroll_factor=4):
            i = start + tl.arange(0, BLOCK)
            both += tl.load(stats + i, i < block.blocks, 0, cache_modifier=".cg")
        in_all = tl.sum(both, 0)
        wanted, pending = _wanted(block, in_all, rate, pending, addresses, ACCRUAL, COUNT)
        k = tl.minimum(wanted, (in_all & 0xFFFFFFFF).to(tl.float64)).to(tl.int32)
        k = tl.where(reached, k, 0)
        # what was loaded above must be there for all warps before it changes
        tl.debug_barrier()
        if reached:
            if COUNT != 1:
                tl.store(pendings, pending - k.to(tl.float64))
            # stays at the greatest there is
            tl.store(totals_replaced, num_replaced + tl.minimum(k, 0x7FFFFFFFFFFFFFFF - num_replaced))
        tl.store(num_chosen, k)
        for each in range(block.first_reader, block.first_reader + block.readers):
            tl.store(counts + each, 0)
        one_by_one = tl.where((ranked != 0) & (k > MANY), 0, k)
        _take(block, one_by_one, key, minima, width, chosen, is_chosen)
        _count_step(reached, num_groups, num_blocks, addresses, counters)


@triton.jit
def rank(tiles, blocks, addresses, workspace_tensor):
    """chosen[number of lesser keys] = unit, for some units of a group that chooses more than MANY.

    Compares each of their keys with all of the group's: reads 8 bytes a unit of the group for each program.

    Args:
        tiles: int32 [programs, 2], the first block of a group and which RANKED of its units.
        blocks, addresses, workspace_tensor: as of `select`.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    row, part = blocks + tl.load(tile).to(tl.int64) * BLOCK_ROW, tl.load(tile + 1).to(tl.int64)
    k = tl.load(field(addresses, A_NUM_CHOSEN, tl.int32) + tl.load(row + B_GROUP))
    if k > MANY:
        units, first_unit = tl.load(row + B_UNITS), tl.load(row + B_UNIT)
        keys = in_workspace(workspace_tensor.to(tl.int64), tl.load(row + B_KEYS)).to(tl.pointer_type(tl.int64))
        j = part * RANKED + tl.arange(0, RANKED)
        key = tl.load(keys + j, j < units, NEVER)
        lesser = tl.zeros([RANKED, UNITS], tl.int32)
        for first in tl.range(0, units, UNITS, loop_unroll_factor=4):
            i = first + tl.arange(0, UNITS)
            other = tl.load(keys + i, i < units, NEVER)
            lesser += (other[None, :] < key[:, None]).to(tl.int32)
        place = tl.sum(lesser, 1)
        take = (key != NEVER) & (place < k)
        tl.store(field(addresses, A_CHOSEN, tl.int32) + first_unit + place, j.to(tl.int32), take)
        tl.store(field(addresses, A_IS_CHOSEN, tl.int32) + first_unit + j, 1, take)
