"""Activations that are summed apart from the step, and what they are measured from: `capture` and `hat`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import (
    A_ACTIVATION,
    A_AGE,
    A_FEATURE,
    A_HAT,
    A_HYPER,
    A_RUNNING_MEAN,
    A_SAMPLES,
    C_COLUMN,
    C_FIRST_UNIT,
    C_PER_UNIT,
    C_POSITION_STRIDE,
    C_SLOT,
    C_UNIT_STRIDE,
    C_UNITS,
    COLUMNS_ROW,
    J_COLUMN,
    J_KIND,
    J_OUTPUTS,
    J_SAMPLES,
    J_SLOT,
    J_TOTAL,
    JOB_ROW,
    NARROW,
    UNITS,
    VALUES,
    WIDE,
)
from .arithmetic import bias_correction
from .memory import field, pointer
from .summing import sum_block


@triton.jit
def capture(tiles, jobs, tensors, addresses, workspace_tensor, counters, TYPES: tl.constexpr, SUM: tl.constexpr,
            COUNTS: tl.constexpr):  # fmt: skip
    """activation[c] += sum over samples of abs(h[s, c]); count += samples. Reads h once; arguments as of `select`.

    SUM: VALUES adds up h itself, in `feature`; DISTANCES is of abs(h - hat).
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 7
    number, block, split = tl.load(tile), tl.load(tile + 1).to(tl.int64), tl.load(tile + 2).to(tl.int64)
    job, address = jobs + number * JOB_ROW, tl.load(tensors + number)
    workspace = workspace_tensor.to(tl.int64)
    column = tl.load(job + J_COLUMN)
    hat_of = field(addresses, A_HAT, tl.float64) + column
    if sum_block(job, address, block, split, hat_of, workspace, counters, TYPES, SUM):
        # the sums were written by this program, perhaps by other warps
        tl.debug_barrier()
        width = tl.where(tl.load(job + J_KIND) // 2 % 2 == 1, NARROW, WIDE)
        i = block * width + tl.arange(0, WIDE)
        mask = (i < tl.load(job + J_OUTPUTS)) & (tl.arange(0, WIDE) < width)
        sums = tl.load(pointer(workspace + tl.load(job + J_TOTAL), tl.float64) + i, mask, 0)
        at = field(addresses, A_FEATURE if SUM == VALUES else A_ACTIVATION, tl.float64) + column + i
        before = tl.load(at, mask, 0)
        tl.debug_barrier()
        tl.store(at, before + sums, mask)
        if COUNTS and block == 0:
            count = field(addresses, A_SAMPLES, tl.int64) + tl.load(job + J_SLOT)
            before_it = tl.load(count)
            tl.debug_barrier()
            tl.store(count, before_it + tl.load(job + J_SAMPLES))


@triton.jit
def hat(tiles, columns, addresses, PREVIOUS: tl.constexpr):
    """hat[c] = mean over a unit's columns of m / (1 - decay^age), of 128 units of a slot.

    m is the running mean as it will be after the step, by what was seen so far; PREVIOUS: as the last step left it.

    Args:
        tiles: int32 [programs, 2], the slot and which 128 of its units.
        columns, addresses: int64 tables of `Columns`, `Addresses`.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    row = columns + tl.load(tile) * COLUMNS_ROW
    per_unit, first_column = tl.load(row + C_PER_UNIT), tl.load(row + C_COLUMN)
    unit_stride, position_stride = tl.load(row + C_UNIT_STRIDE), tl.load(row + C_POSITION_STRIDE)
    j = tl.load(tile + 1).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    inside = j < tl.load(row + C_UNITS)
    hyper = field(addresses, A_HYPER, tl.float64)
    decay, log_decay = tl.load(hyper + 2), tl.load(hyper + 3)
    running = field(addresses, A_RUNNING_MEAN, tl.float64) + first_column
    feature = field(addresses, A_FEATURE, tl.float64) + first_column
    count = tl.load(field(addresses, A_SAMPLES, tl.int64) + tl.load(row + C_SLOT)).to(tl.float64)
    age = tl.load(field(addresses, A_AGE, tl.int32) + tl.load(row + C_FIRST_UNIT) + j, inside, 1)
    if not PREVIOUS:
        age = age.to(tl.int64) + 1
    # a unit that has no mean yet has one of 0
    correction = tl.where(age > 0, tl.where(decay > 0, bias_correction(age, log_decay), 1.0), 1.0)
    total = tl.zeros([UNITS], tl.float64)
    for p in tl.range(0, per_unit, loop_unroll_factor=4):
        column = j * unit_stride + p * position_stride
        mean = tl.load(running + column, inside, 0)
        if not PREVIOUS:
            mean = decay * mean + (1.0 - decay) * (tl.load(feature + column, inside, 0) / count)
        total += mean / correction
    origin = total / per_unit.to(tl.float64)
    hats = field(addresses, A_HAT, tl.float64) + first_column
    for p in tl.range(0, per_unit, loop_unroll_factor=4):
        tl.store(hats + j * unit_stride + p * position_stride, origin, inside)
