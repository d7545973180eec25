"""A block of units from sums to scores, and to keys, by which the choice sorts."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rows import (
    A_FEATURE,
    A_RUNNING_MEAN,
    A_SEED,
    A_STEP,
    B_BLOCKS,
    B_COLUMNS_PER_UNIT,
    B_FAN_IN,
    B_FIRST,
    B_FIRST_READER,
    B_GROUP,
    B_HERE,
    B_KEYS,
    B_NUMBER,
    B_READERS,
    B_STREAM,
    B_UNIT,
    B_UNITS,
    BLOCK,
    FEWER_UNITS,
    J_TOTAL,
    JOB_ROW,
    POSITIONS,
    R_ACTIVATION_TOTAL,
    R_COLUMN,
    R_ELEMENTS,
    R_FIRST_JOB,
    R_FOLD,
    R_JOBS,
    R_MORE_SAMPLES,
    R_POSITION_STRIDE,
    R_SAMPLES,
    R_UNIT_STRIDE,
    R_WEIGHT_TOTAL,
    READER_ROW,
    UNITS,
)
from .arithmetic import bias_correction
from .drawing import unit_uniform
from .memory import field, in_workspace, pointer

# the key of a unit that cannot be chosen
NEVER = tl.constexpr(0x7FFFFFFFFFFFFFFF)


class Given(NamedTuple):
    """The tables of a launch, as `select` explains them."""

    jobs: Any
    readers: Any
    incoming: Any
    addresses: Any
    workspace: Any
    counters: Any


class _UnitBlock(NamedTuple):
    """What of a row of `UnitBlock` waits in registers, by its names there."""

    row: Any
    group: Any
    number: Any
    first: Any
    here: Any
    unit: Any
    blocks: Any
    units: Any
    keys: Any  # a pointer
    columns_per_unit: Any
    first_reader: Any
    readers: Any
    j: Any  # [UNITS], its units in the group, and which of them there are
    inside: Any


class _Reader(NamedTuple):
    """A row of `Reader` in registers, and the samples that the state has of it."""

    counted: Any
    samples: Any
    more_samples: Any
    column: Any
    unit_stride: Any
    position_stride: Any
    jobs: Any
    activation_total: Any
    first_job: Any
    weight_total: Any
    fold: Any
    elements: Any


@triton.jit
def _ordered(score):
    """A float32's bits in an order of their own, int32: less as a float is less as an integer, and -0 is +0."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def block_of(row, workspace):
    """A block of units."""
    first, here, lane = tl.load(row + B_FIRST), tl.load(row + B_HERE), tl.arange(0, UNITS)
    return _UnitBlock(
        row=row,
        group=tl.load(row + B_GROUP),
        number=tl.load(row + B_NUMBER),
        first=first,
        here=here,
        unit=tl.load(row + B_UNIT),
        blocks=tl.load(row + B_BLOCKS),
        units=tl.load(row + B_UNITS),
        keys=in_workspace(workspace, tl.load(row + B_KEYS)).to(tl.pointer_type(tl.int64)),
        columns_per_unit=tl.load(row + B_COLUMNS_PER_UNIT),
        first_reader=tl.load(row + B_FIRST_READER),
        readers=tl.load(row + B_READERS),
        j=first + lane,
        inside=lane < here,
    )


@triton.jit
def reader_of(readers, r, last, counts):
    """A reader, or the last one."""
    r = tl.minimum(r, last)
    row = readers + r * READER_ROW
    return _Reader(
        counted=tl.load(counts + r),
        samples=tl.load(row + R_SAMPLES),
        more_samples=tl.load(row + R_MORE_SAMPLES),
        column=tl.load(row + R_COLUMN),
        unit_stride=tl.load(row + R_UNIT_STRIDE),
        position_stride=tl.load(row + R_POSITION_STRIDE),
        jobs=tl.load(row + R_JOBS),
        activation_total=tl.load(row + R_ACTIVATION_TOTAL),
        first_job=tl.load(row + R_FIRST_JOB),
        weight_total=tl.load(row + R_WEIGHT_TOTAL),
        fold=tl.load(row + R_FOLD),
        elements=tl.load(row + R_ELEMENTS),
    )


@triton.jit
def _samples(counted, low, high):
    """Samples in the state, and those held until the step, of two halves."""
    return counted + (high.to(tl.int64) << 31) + low.to(tl.int64)


@triton.jit
def _column_terms(
    column, mask, count, reader, given, activation, decay,
    ACTIVATION: tl.constexpr, OUTGOING: tl.constexpr, DIVIDE: tl.constexpr, MEAN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Activation statistic x weight statistic of some columns of a reader, float64; the sums are zeroed.

    MEAN: each column's running mean m becomes decay * m + (1 - decay) * feature / count, where that is finite.
    """
    term = tl.full(column.shape, 1.0, tl.float64)
    at = activation + reader.column + column
    if ACTIVATION:
        term = tl.load(at, mask, 0)
        if reader.jobs > 0:
            sums = in_workspace(given.workspace, reader.activation_total)
            term += tl.load(sums + column, mask, 0, cache_modifier=".cg")
        # of an activation seen in several forwards, or with more axes than one sum has
        for job in range(reader.first_job + 1, reader.first_job + reader.jobs):
            sums = pointer(given.workspace + tl.load(given.jobs + job * JOB_ROW + J_TOTAL), tl.float64)
            term += tl.load(sums + column, mask, 0, cache_modifier=".cg")
        if DIVIDE:
            term /= count.to(tl.float64)
    if OUTGOING:
        weight = tl.zeros(column.shape, tl.float64)
        totals = in_workspace(given.workspace, reader.weight_total)
        for f in tl.range(0, reader.fold, loop_unroll_factor=AHEAD):
            weight += tl.load(totals + column.to(tl.int64) * reader.fold + f, mask, 0, cache_modifier=".cg")
        term *= weight
    if MEAN:
        feature = field(given.addresses, A_FEATURE, tl.float64) + reader.column + column
        running = field(given.addresses, A_RUNNING_MEAN, tl.float64) + reader.column + column
        mean, before = tl.load(feature, mask, 0) / count.to(tl.float64), tl.load(running, mask, 0)
        # no warp may write what another has still to read
        tl.debug_barrier()
        now = tl.where(tl.abs(mean) < float("inf"), decay * before + (1.0 - decay) * mean, before)
        tl.store(running, now, mask)
        tl.store(feature, 0.0, mask)
    if ACTIVATION:
        tl.debug_barrier()
        tl.store(at, 0.0, mask)
    return tl.where(mask, tl.where(count > 0, term, 0.0), 0.0)


@triton.jit
def contributions(
    block, reader, counts, activation, first_incoming, num_incoming, given, decay,
    ACTIVATION: tl.constexpr, OUTGOING: tl.constexpr, INCOMING: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """y of a block of units by their sums, infinite where nothing was seen; and how many samples there are.

    Args:
        reader: the first one.
    """
    j, inside = block.j, block.inside
    end = block.first + block.here
    samples, elements = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    y = tl.zeros([UNITS], tl.float64)
    places = block.keys.to(tl.pointer_type(tl.float64)) + block.units
    for nth in range(block.readers):
        count = _samples(reader.counted, reader.samples, reader.more_samples)
        if block.columns_per_unit == 1:
            y += _column_terms(
                j * reader.unit_stride, inside, count, reader, given, activation, decay,
                ACTIVATION, OUTGOING != 0, INCOMING != 1, MEAN, 1 if MEAN else 4,
            )  # fmt: skip
        else:
            for start in range(0, block.here, FEWER_UNITS):
                few = block.first + start + tl.arange(0, FEWER_UNITS)
                terms = tl.zeros([FEWER_UNITS, POSITIONS], tl.float64)
                for position in range(0, block.columns_per_unit, POSITIONS):
                    p = position + tl.arange(0, POSITIONS)
                    column = (few * reader.unit_stride)[:, None] + (p * reader.position_stride)[None, :]
                    mask = (few < end)[:, None] & (p < block.columns_per_unit)[None, :]
                    terms += _column_terms(
                        column, mask, count, reader, given, activation, decay,
                        ACTIVATION, OUTGOING != 0, INCOMING != 1, MEAN, 1,
                    )  # fmt: skip
                earlier = tl.load(places + few, (few < end) & (few * 0 + nth > 0), 0)
                tl.debug_barrier()
                tl.store(places + few, earlier + tl.sum(terms, 1), few < end)
        samples += count.to(tl.float64)
        elements += tl.where(count > 0, reader.elements.to(tl.float64), 0.0)
        last = block.first_reader + block.readers - 1
        reader = reader_of(given.readers, block.first_reader + nth + 1, last, counts)
    if block.columns_per_unit > 1:
        # from one layout in registers to the other by way of memory
        tl.debug_barrier()
        y = tl.load(places + j, inside, 0)
    if INCOMING != 0:
        rows = tl.zeros(j.shape, tl.float64)
        for maker in range(first_incoming, first_incoming + num_incoming):
            made, of_each = tl.load(given.incoming + 2 * maker), tl.load(given.incoming + 2 * maker + 1)
            for part in range(of_each):
                sums = in_workspace(given.workspace, made) + j * of_each + part
                rows += tl.load(sums, inside, 0, cache_modifier=".cg")
    if INCOMING == 1:
        # one mean over all readers: sums first, one division at the end
        y = y / samples * tl.where(inside, rows, 1.0)
    else:
        if OUTGOING != 1:
            y = y / elements
        if INCOMING == 2:
            y = y / (tl.where(inside, rows, 1.0) / tl.load(block.row + B_FAN_IN).to(tl.float64))
    # what nothing was seen of holds its units
    return tl.where(samples > 0, y, float("inf")), samples


@triton.jit
def keep_extremes(block, y, U: tl.constexpr):
    """Leave y of a block of units, and the least and the greatest of it, for `extremes` of a later launch."""
    tl.store(block.keys.to(tl.pointer_type(tl.float64)) + block.units + block.j, y, block.inside)
    finite = block.inside & (tl.abs(y.to(U)) < float("inf"))
    lows = (block.keys + 2 * block.units + 2 * block.blocks).to(tl.pointer_type(tl.float64))
    tl.store(lows + block.number, tl.min(tl.where(finite, y, float("inf")), 0))
    tl.store(lows + block.blocks + block.number, tl.max(tl.where(finite, y, float("-inf")), 0))


@triton.jit
def extremes(block, counts, readers, U: tl.constexpr):
    """y of a block of units, the least y of the group, the greatest one less that and 1e-8 more; and the samples."""
    y = tl.load(block.keys.to(tl.pointer_type(tl.float64)) + block.units + block.j, block.inside, float("inf"))
    lows = (block.keys + 2 * block.units + 2 * block.blocks).to(tl.pointer_type(tl.float64))
    low, high = tl.full([BLOCK], float("inf"), tl.float64), tl.full([BLOCK], float("-inf"), tl.float64)
    for start in tl.range(0, block.blocks, BLOCK, loop_unroll_factor=4):
        i = start + tl.arange(0, BLOCK)
        low = tl.minimum(low, tl.load(lows + i, i < block.blocks, float("inf")))
        high = tl.maximum(high, tl.load(lows + block.blocks + i, i < block.blocks, float("-inf")))
    least = tl.min(low, 0).to(U)
    span = tl.max(high, 0).to(U) - least + tl.full([], 1e-8, U)
    samples = tl.full([], 0.0, tl.float64)
    for each in range(block.first_reader, block.first_reader + block.readers):
        row = readers + each * READER_ROW
        held, more_held = tl.load(row + R_SAMPLES), tl.load(row + R_MORE_SAMPLES)
        samples += _samples(tl.load(counts + each), held, more_held).to(tl.float64)
    return y, least, span, samples


@triton.jit
def to_keys(
    block, y, u, a, maturity, decay, log_decay, least, span, addresses,
    MIN_MAX: tl.constexpr, SCORE: tl.constexpr, WIDE_UTILITY: tl.constexpr,
):  # fmt: skip
    """A block of units from y to keys: what is less is chosen first, the lower unit of equals.

    u = decay * u + (1 - decay) * y and age + 1 where y is finite; score = u / (1 - decay^age), or u / age, or random.
    Only the finite scores of mature units are candidates.
    """
    U: tl.constexpr = tl.float64 if WIDE_UTILITY else tl.float32
    y = y.to(U)
    finite = tl.abs(y) < float("inf")
    if MIN_MAX:
        y = tl.where(finite, y - least, 0.0)
        y = y / span if WIDE_UTILITY else tl.div_rn(y, tl.zeros_like(y) + span)
    if SCORE == 2:
        y = tl.zeros_like(y)
    u = tl.where(finite, decay.to(U) * u + (1.0 - decay).to(U) * y, u)
    a += (finite & (a < 2147483647)).to(tl.int32)
    mature = block.inside & (a.to(tl.float64) > maturity)
    if SCORE == 2:
        step = tl.load(field(addresses, A_STEP, tl.int64)) + 1
        seed = tl.load(field(addresses, A_SEED, tl.int64))
        score = unit_uniform(block.j.to(tl.int64), seed, step, tl.load(block.row + B_STREAM).to(tl.int64)).to(U)
    else:
        divisor = a.to(tl.float64) if SCORE == 1 else tl.where(decay > 0, bias_correction(a, log_decay), 1.0)
        score = (u.to(tl.float64) / tl.where(a > 0, divisor, 1.0)).to(U)
    candidate = mature & (tl.abs(score) < float("inf"))
    # a float64 score beyond float32 stays a candidate, after all others
    score = tl.minimum(tl.where(candidate, score, 0.0).to(tl.float32), 3.4028234663852886e38)
    key = tl.where(candidate, (_ordered(score).to(tl.int64) << 32) | block.j, NEVER)
    tl.store(block.keys + block.j, key, block.inside)
    # both counts in one
    stats = tl.sum(mature.to(tl.int32), 0).to(tl.int64) << 32 | tl.sum(candidate.to(tl.int32), 0).to(tl.int64)
    return u, a, tl.min(key, 0), stats
