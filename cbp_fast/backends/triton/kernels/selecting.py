"""Everything up to the choice: `select`, and `score` where y needs all of a group."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import (
    A_ACTIVATION,
    A_AGE,
    A_HYPER,
    A_SAMPLES,
    A_UTILITY,
    B_EXPECTED,
    B_FIRST_INCOMING,
    B_INCOMING,
    BLOCK_ROW,
    JOB_ROW,
    MAGNITUDES,
    UNITS,
)
from .choosing import choose
from .memory import arrive, field
from .scoring import Given, block_of, contributions, extremes, keep_extremes, reader_of, to_keys
from .summing import sum_block


@triton.jit
def _finish(
    r, arrives, mine, blocks_table, given,
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
    addresses, lane = given.addresses, tl.arange(0, UNITS)
    block = block_of(row, given.workspace)
    needed = tl.load(row + B_EXPECTED)
    counts = field(addresses, A_SAMPLES, tl.int64)
    activation = field(addresses, A_ACTIVATION, tl.float64)
    utility = field(addresses, A_UTILITY, U) + block.unit
    ages = field(addresses, A_AGE, tl.int32) + block.unit
    hyper = field(addresses, A_HYPER, tl.float64)
    reader = reader_of(given.readers, block.first_reader, block.first_reader + block.readers - 1, counts)
    first_incoming, num_incoming = tl.load(row + B_FIRST_INCOMING), tl.load(row + B_INCOMING)
    if SUMMED and arrives:
        mine = (arrive(given.counters + r, 1) == needed - 1).to(tl.int32)
    if mine != 0:
        if SUMMED:
            tl.store(given.counters + r, 0)
        # on their way together with the sums
        maturity, decay, log_decay = tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
        u, a = tl.load(utility + lane, block.inside, 0), tl.load(ages + lane, block.inside, 0)
        least, span = tl.full([], 0.0, U), tl.full([], 1.0, U)
        if MIN_MAX and not SUMMED:
            y, least, span, samples = extremes(block, counts, given.readers, U)
        else:
            y, samples = contributions(
                block, reader, counts, activation, first_incoming, num_incoming, given, decay,
                ACTIVATION, OUTGOING, INCOMING, MEAN,
            )  # fmt: skip
        if MIN_MAX and SUMMED:
            # `score` goes on when all blocks of the group are there
            keep_extremes(block, y, U)
        else:
            u, a, key, of_block = to_keys(
                block, y, u, a, maturity, decay, log_decay, least, span, addresses, MIN_MAX, SCORE, WIDE_UTILITY
            )
            tl.store(utility + lane, u, block.inside)
            tl.store(ages + lane, a, block.inside)
            choose(block, key, of_block, samples > 0, hyper, counts, addresses, given.counters, ACCRUAL, COUNT)


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
        blocks, readers: int32 tables of `UnitBlock`, `Reader`.
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
    given = Given(jobs, readers, incoming, addresses, workspace, counters)
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
                r, n == first, mine, blocks, given,
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
    given = Given(jobs, readers, incoming, addresses, workspace_tensor.to(tl.int64), counters)
    _finish(
        tl.program_id(0).to(tl.int64), False, 1, blocks, given,
        False, False, 0, 0, MEAN, MIN_MAX, SCORE, ACCRUAL, COUNT, WIDE_UTILITY,
    )  # fmt: skip
