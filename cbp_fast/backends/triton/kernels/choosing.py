"""Everything up to the choice: `select`, `score` where y needs all of a group, `rank` where many are chosen."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import (
    A_ACTIVATION,
    A_AGE,
    A_CHOSEN,
    A_COUNT,
    A_HYPER,
    A_IS_CHOSEN,
    A_NUM_BLOCKS,
    A_NUM_CHOSEN,
    A_NUM_GROUPS,
    A_NUM_REPLACED,
    A_PENDING,
    A_SEED,
    A_STEP,
    A_UTILITY,
    B_BLOCKS,
    B_EXPECTED,
    B_FAN_IN,
    B_FIRST,
    B_FIRST_INCOMING,
    B_FIRST_READER,
    B_GROUP,
    B_HERE,
    B_INCOMING,
    B_KEYS,
    B_NUMBER,
    B_PER_UNIT,
    B_RANKED,
    B_READERS,
    B_STREAM,
    B_UNIT,
    B_UNITS,
    B_WIDTH,
    BLOCK,
    BLOCK_ROW,
    FEWER_UNITS,
    JOB_ROW,
    MAGNITUDES,
    MANY,
    POSITIONS,
    R_MORE_SAMPLES,
    R_SAMPLES,
    RANKED,
    READER_ROW,
    UNITS,
)
from .drawing import unit_uniform
from .memory import arrive, field, in_workspace
from .scoring import NEVER, column_terms, reader_of, samples_of, to_keys
from .summing import sum_block


@triton.jit
def _least(minima, blocks):
    """The least key of all blocks."""
    least = tl.full([BLOCK], NEVER, tl.int64)
    for first in tl.range(0, blocks, BLOCK, loop_unroll_factor=4):
        b = first + tl.arange(0, BLOCK)
        least = tl.minimum(least, tl.load(minima + b, b < blocks, NEVER, cache_modifier=".cg"))
    return tl.min(least, 0)


@triton.jit
def _finish(
    r, arrives, mine, blocks_table, jobs, readers, incoming, addresses, workspace, counters,
    SUMMED: tl.constexpr, ACTIVATION: tl.constexpr, OUTGOING: tl.constexpr, INCOMING: tl.constexpr, MEAN: tl.constexpr,
    MIN_MAX: tl.constexpr, SCORE: tl.constexpr, ACCRUAL: tl.constexpr, COUNT: tl.constexpr, WIDE_UTILITY: tl.constexpr,
):  # fmt: skip
    """Bring block r of units from sums to keys, if all its sums are there.

    The last block of a group chooses, the last group counts the step. SUMMED: in a launch that has summed; the other
    one has what is left to do.

    Args:
        arrives: whether this program is to count its sums in.
        mine: if not, whether it has, as the last one.
    """
    U: tl.constexpr = tl.float64 if WIDE_UTILITY else tl.float32
    # where everything is, is asked for before the counter: after it nothing but the sums is waited for
    row = blocks_table + r * BLOCK_ROW
    g, b, first, here = tl.load(row + B_GROUP), tl.load(row + B_NUMBER), tl.load(row + B_FIRST), tl.load(row + B_HERE)
    units, blocks, unit = tl.load(row + B_UNITS), tl.load(row + B_BLOCKS), tl.load(row + B_UNIT)
    needed, per_unit = tl.load(row + B_EXPECTED), tl.load(row + B_PER_UNIT)
    keys_at = tl.load(row + B_KEYS)
    first_reader, num_readers = tl.load(row + B_FIRST_READER), tl.load(row + B_READERS)
    counts = field(addresses, A_COUNT, tl.int64)
    activation = field(addresses, A_ACTIVATION, tl.float64)
    utility = field(addresses, A_UTILITY, U) + unit
    ages = field(addresses, A_AGE, tl.int32) + unit
    hyper = field(addresses, A_HYPER, tl.float64)
    lane = tl.arange(0, UNITS)
    inside, j = lane < here, first + lane
    last_reader = first_reader + num_readers - 1
    (
        counted, low_held, high_held, column_, unit_stride, position_stride, num_jobs, activation_total, first_job,
        weight_total, fold, of_unit,
    ) = reader_of(readers, first_reader, last_reader, counts)  # fmt: skip
    if INCOMING != 0:
        first_incoming, num_incoming = tl.load(row + B_FIRST_INCOMING), tl.load(row + B_INCOMING)
    if SUMMED and arrives:
        mine = (arrive(counters + r, 1) == needed - 1).to(tl.int32)
    if mine != 0:
        if SUMMED:
            tl.store(counters + r, 0)
        # on their way together with the sums
        maturity, decay, log_decay = tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
        u, a = tl.load(utility + lane, inside, 0), tl.load(ages + lane, inside, 0)
        keys = in_workspace(workspace, keys_at).to(tl.pointer_type(tl.int64))
        least, span = tl.full([], 0.0, U), tl.full([], 1.0, U)
        samples, elements = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
        if MIN_MAX and not SUMMED:
            # y is there
            y = tl.load(keys.to(tl.pointer_type(tl.float64)) + units + j, inside, float("inf"))
            lows = (keys + 2 * units + 2 * blocks).to(tl.pointer_type(tl.float64))
            low, high = tl.full([BLOCK], float("inf"), tl.float64), tl.full([BLOCK], float("-inf"), tl.float64)
            for start in tl.range(0, blocks, BLOCK, loop_unroll_factor=4):
                i = start + tl.arange(0, BLOCK)
                low = tl.minimum(low, tl.load(lows + i, i < blocks, float("inf")))
                high = tl.maximum(high, tl.load(lows + blocks + i, i < blocks, float("-inf")))
            least = tl.min(low, 0).to(U)
            span = tl.max(high, 0).to(U) - least + tl.full([], 1e-8, U)
            for each in range(first_reader, last_reader + 1):
                other = readers + each * READER_ROW
                low_held, high_held = tl.load(other + R_SAMPLES), tl.load(other + R_MORE_SAMPLES)
                samples += samples_of(tl.load(counts + each), low_held, high_held).to(tl.float64)
        else:
            y = tl.zeros([UNITS], tl.float64)
            places = keys.to(tl.pointer_type(tl.float64)) + units
            for nth in range(num_readers):
                count = samples_of(counted, low_held, high_held)
                if per_unit == 1:
                    y += column_terms(
                        j * unit_stride, inside, count, column_, num_jobs, activation_total, first_job, weight_total,
                        fold, jobs, activation, addresses, workspace, decay,
                        ACTIVATION, OUTGOING != 0, INCOMING != 1, MEAN, 1 if MEAN else 4,
                    )  # fmt: skip
                else:
                    for start in range(0, here, FEWER_UNITS):
                        few = first + start + tl.arange(0, FEWER_UNITS)
                        terms = tl.zeros([FEWER_UNITS, POSITIONS], tl.float64)
                        for position in range(0, per_unit, POSITIONS):
                            p = position + tl.arange(0, POSITIONS)
                            column = (few * unit_stride)[:, None] + (p * position_stride)[None, :]
                            mask = (few < first + here)[:, None] & (p < per_unit)[None, :]
                            terms += column_terms(
                                column, mask, count, column_, num_jobs, activation_total, first_job, weight_total,
                                fold, jobs, activation, addresses, workspace, decay,
                                ACTIVATION, OUTGOING != 0, INCOMING != 1, MEAN, 1,
                            )  # fmt: skip
                        earlier = tl.load(places + few, (few < first + here) & (few * 0 + nth > 0), 0)
                        tl.debug_barrier()
                        tl.store(places + few, earlier + tl.sum(terms, 1), few < first + here)
                samples += count.to(tl.float64)
                elements += tl.where(count > 0, of_unit.to(tl.float64), 0.0)
                (
                    counted, low_held, high_held, column_, unit_stride, position_stride, num_jobs, activation_total,
                    first_job, weight_total, fold, of_unit,
                ) = reader_of(readers, first_reader + nth + 1, last_reader, counts)  # fmt: skip
            if per_unit > 1:
                # from one layout in registers to the other by way of memory
                tl.debug_barrier()
                y = tl.load(places + j, inside, 0)
            if INCOMING != 0:
                rows = tl.zeros(j.shape, tl.float64)
                for maker in range(first_incoming, first_incoming + num_incoming):
                    made, of_each = tl.load(incoming + 2 * maker), tl.load(incoming + 2 * maker + 1)
                    for part in range(of_each):
                        sums = in_workspace(workspace, made) + j * of_each + part
                        rows += tl.load(sums, inside, 0, cache_modifier=".cg")
            if INCOMING == 1:
                # clarena has one mean over all readers: sums first, one division at the end
                y = y / samples * tl.where(inside, rows, 1.0)
            else:
                if OUTGOING != 1:
                    y = y / elements
                if INCOMING == 2:
                    y = y / (tl.where(inside, rows, 1.0) / tl.load(row + B_FAN_IN).to(tl.float64))
            # what nothing was seen of holds its units
            y = tl.where(samples > 0, y, float("inf"))
        reached = samples > 0
        if MIN_MAX and SUMMED:
            # `score` goes on when all blocks of the group are there
            tl.store(keys.to(tl.pointer_type(tl.float64)) + units + j, y, inside)
            finite = inside & (tl.abs(y.to(U)) < float("inf"))
            lows = (keys + 2 * units + 2 * blocks).to(tl.pointer_type(tl.float64))
            tl.store(lows + b, tl.min(tl.where(finite, y, float("inf")), 0))
            tl.store(lows + blocks + b, tl.max(tl.where(finite, y, float("-inf")), 0))
        else:
            minima, stats = keys + 2 * units, keys + 2 * units + blocks
            u, a, key, of_block = to_keys(
                y, row, j, inside, u, a, maturity, decay, log_decay, least, span, addresses, keys,
                MIN_MAX, SCORE, WIDE_UTILITY,
            )  # fmt: skip
            tl.store(utility + lane, u, inside)
            tl.store(ages + lane, a, inside)
            is_chosen = field(addresses, A_IS_CHOSEN, tl.int32) + (unit - first)
            tl.store(is_chosen + j, 0, inside)
            tl.store(minima + b, key)
            tl.store(stats + b, of_block)
            # as before: what does not wait for others is under way while they are counted
            pendings = field(addresses, A_PENDING, tl.float64) + g
            totals_replaced = field(addresses, A_NUM_REPLACED, tl.int64) + g
            num_chosen = field(addresses, A_NUM_CHOSEN, tl.int32) + g
            chosen = field(addresses, A_CHOSEN, tl.int32) + (unit - first)
            num_groups, num_blocks = tl.load(addresses + A_NUM_GROUPS), tl.load(addresses + A_NUM_BLOCKS)
            width, ranked, rate = tl.load(row + B_WIDTH), tl.load(row + B_RANKED), tl.load(hyper)
            pending, num_replaced = tl.load(pendings), tl.load(totals_replaced)
            if arrive(counters + num_blocks + g, 1) == blocks - 1:
                tl.store(counters + num_blocks + g, 0)
                key = _least(minima, blocks)
                both = tl.zeros([BLOCK], tl.int64)
                for start in tl.range(0, blocks, BLOCK, loop_unroll_factor=4):
                    i = start + tl.arange(0, BLOCK)
                    both += tl.load(stats + i, i < blocks, 0, cache_modifier=".cg")
                in_all = tl.sum(both, 0)
                mature = (in_all >> 32).to(tl.float64)
                if ACCRUAL == 1:
                    mature = tl.where(mature > 0, units.to(tl.float64), 0.0)
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
                    coin = unit_uniform(units.to(tl.int64), seed, step, tl.load(row + B_STREAM).to(tl.int64)).to(
                        tl.float64
                    )
                    wanted = tl.floor(due) + tl.where(coin < due - tl.floor(due), 1.0, 0.0)
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
                for each in range(first_reader, last_reader + 1):
                    tl.store(counts + each, 0)
                one_by_one = tl.where((ranked != 0) & (k > MANY), 0, k)
                for n in range(one_by_one):
                    least_unit = key & 0x7FFFFFFF
                    tl.store(chosen + n, least_unit.to(tl.int32))
                    tl.store(is_chosen + least_unit, 1)
                    if n + 1 < one_by_one:
                        # the block that it was of is left with its next one
                        of = least_unit // width
                        in_block = of * width + lane
                        others = tl.load(
                            keys + in_block, (lane < width) & (in_block < units), NEVER, cache_modifier=".cg"
                        )
                        left = tl.min(tl.where(others > key, others, NEVER), 0)
                        tl.debug_barrier()
                        tl.store(minima + of, left)
                        tl.debug_barrier()
                        key = _least(minima, blocks)
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
def select(
    tiles, jobs, tensors, blocks, readers, incoming, addresses, workspace_tensor, counters,
    TYPES: tl.constexpr, ACTIVATION: tl.constexpr, OUTGOING: tl.constexpr, INCOMING: tl.constexpr, MEAN: tl.constexpr,
    MIN_MAX: tl.constexpr, SCORE: tl.constexpr, ACCRUAL: tl.constexpr, COUNT: tl.constexpr,
    WIDE_UTILITY: tl.constexpr,
):  # fmt: skip
    """A whole step up to the choice, for all groups.

    y = activation statistic x weight statistic; u = decay * u + (1 - decay) * y; the k least u / (1 - decay^age).
    Each program sums magnitudes of one tile of a weight or an activation. The last one of a block of outputs puts its
    parts together, the last one that a block of units waits for scores them, the last block of a group chooses, the
    last group counts the step. Reads each of those tensors once; the parts and totals are about one in a hundred of
    that. With MIN_MAX it ends with y, and the least and greatest of each block: `score` does the rest.

    Args:
        tiles: int32 [programs, 7], job, block of outputs, split, and the blocks of units whose sums these are: the
            first, how many, and where they go on with the first of the group: after the last, so many before it.
        jobs, addresses: int64 tables of `Job`, `Addresses`.
        blocks, readers: int32 tables of `Block`, `Reader`.
        tensors: int64 [jobs], the address of each job's first element.
        incoming: int32 [-, 2], place in 8 bytes, and outputs a unit, of each producer's sums.
        workspace_tensor: the jobs' and groups' places, in bytes.
        counters: int32, 0 between launches: one a block of units, one a group, one for the groups, one a block of
            outputs.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 7
    number, block, split = tl.load(tile), tl.load(tile + 1).to(tl.int64), tl.load(tile + 2).to(tl.int64)
    job, address = jobs + number * JOB_ROW, tl.load(tensors + number)
    workspace = workspace_tensor.to(tl.int64)
    if sum_block(job, address, block, split, workspace_tensor, workspace, counters, TYPES, MAGNITUDES):
        first, touched = tl.load(tile + 3), tl.load(tile + 4)
        end, back = tl.load(tile + 5), tl.load(tile + 6)
        # counted in for all before the first is finished, which the others need not wait for
        # a bit for each; 128 units, of the least blocks that there are, make 33
        last_of = tl.full([], 0, tl.int64)
        for n in range(first + 1, first + touched):
            r = tl.where(n < end, n, n - back).to(tl.int64)
            needed = tl.load(blocks + r * BLOCK_ROW + B_EXPECTED)
            last_of |= (arrive(counters + r, 1) == needed - 1).to(tl.int64) << (n - first)
        for n in range(first, first + touched):
            r = tl.where(n < end, n, n - back).to(tl.int64)
            mine = (last_of >> (n - first) & 1).to(tl.int32)
            _finish(
                r, n == first, mine, blocks, jobs, readers, incoming, addresses, workspace, counters,
                True, ACTIVATION, OUTGOING, INCOMING, MEAN, MIN_MAX, SCORE, ACCRUAL, COUNT, WIDE_UTILITY,
            )  # fmt: skip


@triton.jit
def score(
    blocks, jobs, readers, incoming, addresses, workspace_tensor, counters,
    MIN_MAX: tl.constexpr, MEAN: tl.constexpr, SCORE: tl.constexpr, ACCRUAL: tl.constexpr, COUNT: tl.constexpr,
    WIDE_UTILITY: tl.constexpr,
):  # fmt: skip
    """A step's choice where y is not final before all of a group's are there, or needs no sums: one block of units.

    MIN_MAX: y = (y - min y) / (max y - min y + 1e-8) over the group. Reads 8 bytes a unit and 16 a block of the group.
    Arguments as of `select`.
    """
    _finish(
        tl.program_id(0).to(tl.int64), False, 1, blocks, jobs, readers, incoming, addresses,
        workspace_tensor.to(tl.int64), counters,
        False, False, 0, 0, MEAN, MIN_MAX, SCORE, ACCRUAL, COUNT, WIDE_UTILITY,
    )  # fmt: skip


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
