"""A tile of a tensor to sums, and the parts of a sum put together by whoever comes last; `Job` says of what."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import (
    DISTANCES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    J_COUNTER,
    J_FAR,
    J_FIRST,
    J_INNER,
    J_INNER_STRIDE,
    J_KIND,
    J_NEAR,
    J_OUTER,
    J_OUTPUTS,
    J_PARTIAL,
    J_PERIOD,
    J_SIZE1,
    J_SIZE2,
    J_SPLITS,
    J_STEPS,
    J_STRIDE0,
    J_STRIDE1,
    J_STRIDE2,
    J_TOTAL,
    NARROW,
    VALUES,
    WIDE,
)
from .memory import arrive, pointer, widened


@triton.jit
def _tile_sums(job, address, block, split, hat, KIND: tl.constexpr, SUM: tl.constexpr):
    """sum over this split's tiles of abs(x[i, ...]) for a block of outputs, float32 or float64 [WIDE or NARROW].

    Reads each element once. Aligned: one matrix whose neighbours, base and other stride allow 16-byte loads.
    """
    TYPE: tl.constexpr = KIND // 4
    ALONG: tl.constexpr = KIND // 2 % 2 == 1
    ALIGNED: tl.constexpr = KIND % 2 == 1
    OUTPUTS: tl.constexpr = NARROW if ALONG else WIDE
    REDUCED: tl.constexpr = (WIDE if ALONG else NARROW) // (2 if TYPE == FLOAT64 or not ALIGNED else 1)
    # tiles on their way at a time, 16 KiB a program; more registers are not left
    AHEAD: tl.constexpr = (2 if TYPE >= FLOAT32 else 4) if ALIGNED and SUM != DISTANCES else 1
    # cast here, since what is said of the result of another function is lost on triton 3.8
    if TYPE == FLOAT64:
        VECTOR: tl.constexpr = 2  # elements of 16 bytes
        x = address.to(tl.pointer_type(tl.float64))
        total = tl.zeros([OUTPUTS, REDUCED] if ALONG else [REDUCED, OUTPUTS], tl.float64)
    else:
        VECTOR: tl.constexpr = 4 if TYPE == FLOAT32 else 8  # type: ignore[no-redef]
        if TYPE == FLOAT32:
            x = address.to(tl.pointer_type(tl.float32))
        elif TYPE == FLOAT16:
            x = address.to(tl.pointer_type(tl.float16))
        else:
            x = address.to(tl.pointer_type(tl.int16))
        total = tl.zeros([OUTPUTS, REDUCED] if ALONG else [REDUCED, OUTPUTS], tl.float32)
    outputs, inner = tl.load(job + J_OUTPUTS), tl.load(job + J_INNER)
    near, inner_stride = tl.load(job + J_NEAR), tl.load(job + J_INNER_STRIDE)
    i = block * OUTPUTS + tl.arange(0, OUTPUTS)
    if ALIGNED:
        x = tl.multiple_of(x, 16)
        if ALONG:
            inner = tl.multiple_of(inner, VECTOR)
            at = i * tl.multiple_of(near, VECTOR)
        else:
            outputs = tl.multiple_of(outputs, VECTOR)
            inner_stride = tl.multiple_of(inner_stride, VECTOR)
            at = i
    else:
        period = tl.load(job + J_PERIOD)
        above = (i + tl.load(job + J_FIRST)) // period
        at = above * tl.load(job + J_FAR) + (i + tl.load(job + J_FIRST) - above * period) * near
    if SUM == DISTANCES:
        # as the tile lies in registers: no change of layouts
        places = tl.zeros(total.shape, tl.int32) + (i[:, None] if ALONG else i[None, :])
        origin = tl.load(hat + places, places < outputs, 0).to(total.dtype)
    blocks = tl.cdiv(inner, REDUCED)
    steps = tl.load(job + J_STEPS)
    last = tl.minimum((split + 1) * steps, tl.load(job + J_OUTER) * blocks)
    for step in tl.range(split * steps, last, loop_unroll_factor=AHEAD):
        if ALIGNED:
            r = step * REDUCED + tl.arange(0, REDUCED)
            along = r if ALONG else r * inner_stride
        else:
            outer = step // blocks
            r = (step - outer * blocks) * REDUCED + tl.arange(0, REDUCED)
            size1, size2 = tl.load(job + J_SIZE1), tl.load(job + J_SIZE2)
            middle = outer // size2
            base = (
                middle // size1 * tl.load(job + J_STRIDE0)
                + middle % size1 * tl.load(job + J_STRIDE1)
                + outer % size2 * tl.load(job + J_STRIDE2)
            )
            along = base + r * inner_stride
        if ALONG:
            mask = (i < outputs)[:, None] & (r < inner)[None, :]
            value = widened(tl.load(x + (at[:, None] + along[None, :]), mask, 0), TYPE)
        else:
            mask = (r < inner)[:, None] & (i < outputs)[None, :]
            value = widened(tl.load(x + (along[:, None] + at[None, :]), mask, 0), TYPE)
        if SUM == DISTANCES:
            value = tl.where(mask, value - origin, 0)
        total += value if SUM == VALUES else tl.abs(value)
    return tl.sum(total, 1 if ALONG else 0)


@triton.jit
def _store_sums(
    job, address, block, split, hat, kind, partial, total,
    TYPES: tl.constexpr, SUM: tl.constexpr, KIND: tl.constexpr, BIT: tl.constexpr,
):  # fmt: skip
    """`_tile_sums` by the run-time kind, bit by bit; a chain of cases would become a table of jumps."""
    if BIT > 0:
        if kind & BIT != 0:
            _store_sums(job, address, block, split, hat, kind, partial, total, TYPES, SUM, KIND + BIT, BIT // 2)
        else:
            _store_sums(job, address, block, split, hat, kind, partial, total, TYPES, SUM, KIND, BIT // 2)
    elif TYPES >> KIND // 4 & 1:
        sums = _tile_sums(job, address, block, split, hat, KIND, SUM)
        i = block * sums.shape[0] + tl.arange(0, sums.shape[0])
        outputs = tl.load(job + J_OUTPUTS)
        if tl.load(job + J_SPLITS) == 1:
            tl.store(pointer(total, tl.float64) + i, sums.to(tl.float64), i < outputs)
        else:
            tl.store(pointer(partial, sums.dtype) + split * outputs + i, sums, i < outputs)


@triton.jit
def sum_block(job, address, block, split, hat, workspace, counters, TYPES: tl.constexpr, SUM: tl.constexpr):
    """Sums of one block of outputs; True for the program that has them all in the workspace, as float64."""
    kind, outputs, splits = tl.load(job + J_KIND), tl.load(job + J_OUTPUTS), tl.load(job + J_SPLITS)
    partial, total = workspace + tl.load(job + J_PARTIAL), workspace + tl.load(job + J_TOTAL)
    width = tl.where(kind // 2 % 2 == 1, NARROW, WIDE)
    _store_sums(job, address, block, split, hat, kind, partial, total, TYPES, SUM, 0, 8)
    complete = splits == 1
    if splits > 1:
        counter = counters + tl.load(job + J_COUNTER) + block
        complete = arrive(counter, 1) == splits - 1
        if complete:
            tl.store(counter, 0)
            i = block * width + tl.arange(0, WIDE)
            mask = (i < outputs) & (tl.arange(0, WIDE) < width)
            sums = tl.zeros([WIDE], tl.float64)
            if kind // 4 == FLOAT64:
                for s in tl.range(0, splits, loop_unroll_factor=4):
                    sums += tl.load(pointer(partial, tl.float64) + s * outputs + i, mask, 0, cache_modifier=".cg")
            else:
                for s in tl.range(0, splits, loop_unroll_factor=4):
                    part = tl.load(pointer(partial, tl.float32) + s * outputs + i, mask, 0, cache_modifier=".cg")
                    sums += part.to(tl.float64)
            tl.store(pointer(total, tl.float64) + i, sums, mask)
    return complete
