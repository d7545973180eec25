"""A block of units from sums to scores, and to keys, by which the choice sorts."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import (
    A_FEATURE,
    A_RUNNING_MEAN,
    A_SEED,
    A_STEP,
    B_STREAM,
    J_TOTAL,
    JOB_ROW,
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
)
from .arithmetic import bias_correction
from .drawing import unit_uniform
from .memory import field, in_workspace, pointer

# the key of a unit that cannot be chosen
NEVER = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def _ordered(score):
    """A float32's bits in an order of their own, int32: less as a float is less as an integer, and -0 is +0."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def reader_of(readers, r, last, counts):
    """Samples that the state has of a reader_of, or of the last one, and the reader's fields."""
    r = tl.minimum(r, last)
    row = readers + r * READER_ROW
    return (
        tl.load(counts + r),
        tl.load(row + R_SAMPLES),
        tl.load(row + R_MORE_SAMPLES),
        tl.load(row + R_COLUMN),
        tl.load(row + R_UNIT_STRIDE),
        tl.load(row + R_POSITION_STRIDE),
        tl.load(row + R_JOBS),
        tl.load(row + R_ACTIVATION_TOTAL),
        tl.load(row + R_FIRST_JOB),
        tl.load(row + R_WEIGHT_TOTAL),
        tl.load(row + R_FOLD),
        tl.load(row + R_ELEMENTS),
    )


@triton.jit
def samples_of(counted, low, high):
    """Samples in the state, and those held until the step, of two halves."""
    return counted + (high.to(tl.int64) << 31) + low.to(tl.int64)


@triton.jit
def column_terms(
    column, mask, count, first_column, num_jobs, activation_total, first_job, weight_total, fold, jobs, activation,
    addresses, workspace, decay,
    ACTIVATION: tl.constexpr, OUTGOING: tl.constexpr, DIVIDE: tl.constexpr, MEAN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Activation statistic x weight statistic of some columns of a reader_of, float64; the sums are zeroed.

    MEAN: each column's running mean m becomes decay * m + (1 - decay) * feature / count, where that is finite.
    """
    term = tl.full(column.shape, 1.0, tl.float64)
    at = activation + first_column + column
    if ACTIVATION:
        term = tl.load(at, mask, 0)
        if num_jobs > 0:
            sums = in_workspace(workspace, activation_total)
            term += tl.load(sums + column, mask, 0, cache_modifier=".cg")
        # of an activation seen in several forwards, or with more axes than one sum has
        for job in range(first_job + 1, first_job + num_jobs):
            sums = pointer(workspace + tl.load(jobs + job * JOB_ROW + J_TOTAL), tl.float64)
            term += tl.load(sums + column, mask, 0, cache_modifier=".cg")
        if DIVIDE:
            term /= count.to(tl.float64)
    if OUTGOING:
        weight = tl.zeros(column.shape, tl.float64)
        totals = in_workspace(workspace, weight_total)
        for f in tl.range(0, fold, loop_unroll_factor=AHEAD):
            weight += tl.load(totals + column.to(tl.int64) * fold + f, mask, 0, cache_modifier=".cg")
        term *= weight
    if MEAN:
        feature = field(addresses, A_FEATURE, tl.float64) + first_column + column
        running = field(addresses, A_RUNNING_MEAN, tl.float64) + first_column + column
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
def to_keys(
    y, row, j, inside, u, a, maturity, decay, log_decay, least, span, addresses, keys,
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
    mature = inside & (a.to(tl.float64) > maturity)
    if SCORE == 2:
        step = tl.load(field(addresses, A_STEP, tl.int64)) + 1
        seed = tl.load(field(addresses, A_SEED, tl.int64))
        score = unit_uniform(j.to(tl.int64), seed, step, tl.load(row + B_STREAM).to(tl.int64)).to(U)
    else:
        divisor = a.to(tl.float64) if SCORE == 1 else tl.where(decay > 0, bias_correction(a, log_decay), 1.0)
        score = (u.to(tl.float64) / tl.where(a > 0, divisor, 1.0)).to(U)
    candidate = mature & (tl.abs(score) < float("inf"))
    # a float64 score beyond float32 stays a candidate, after all others
    score = tl.minimum(tl.where(candidate, score, 0.0).to(tl.float32), 3.4028234663852886e38)
    key = tl.where(candidate, (_ordered(score).to(tl.int64) << 32) | j, NEVER)
    tl.store(keys + j, key, inside)
    # both counts in one
    stats = tl.sum(mature.to(tl.int32), 0).to(tl.int64) << 32 | tl.sum(candidate.to(tl.int32), 0).to(tl.int64)
    return u, a, tl.min(key, 0), stats
