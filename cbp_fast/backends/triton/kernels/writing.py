"""What the choice asks for is written: `reinit` and `transfer`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import (
    A_AGE,
    A_CHOSEN,
    A_HYPER,
    A_IS_CHOSEN,
    A_NUM_CHOSEN,
    A_RUNNING_MEAN,
    A_SEED,
    A_STEP,
    A_UTILITY,
    BFLOAT16,
    BIAS_ROW,
    BLOCK,
    C_COLUMN,
    C_FIRST_UNIT,
    C_POSITION_STRIDE,
    C_UNIT_STRIDE,
    COLUMNS_ROW,
    D_ADDRESS,
    D_DTYPE,
    D_FIRST,
    D_SIZE,
    D_STRIDE,
    D_TRANSFERS,
    F_ADDRESS,
    F_COLUMN_STRIDE,
    F_COLUMNS,
    F_DTYPE,
    F_GROUP,
    F_INNER,
    F_PER_UNIT,
    F_POSITION_STRIDE,
    F_ROW_STRIDE,
    F_ROWS,
    F_SIZE3,
    F_SIZE4,
    F_START,
    F_STRIDE2,
    F_STRIDE3,
    F_STRIDE4,
    F_UNIT_STRIDE,
    F_WIDTH,
    FILL,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    FORGET,
    FORGET_MEAN,
    M_AXIS,
    M_COLUMNS,
    M_OWNER,
    M_ROWS,
    MASK_ROW,
    NORMAL,
    T_ADDRESS,
    T_AXIS,
    T_COLUMNS,
    T_DTYPE,
    T_ELEMENTS,
    T_FIRST_MASK,
    T_FIRST_UNIT,
    T_GROUP,
    T_INNER,
    T_KIND,
    T_MASKS,
    T_POSITION_STRIDE,
    T_PROGRAMS,
    T_ROWS,
    T_SIZE3,
    T_SIZE4,
    T_START,
    T_STREAM,
    T_STRIDE0,
    T_STRIDE1,
    T_STRIDE2,
    T_STRIDE3,
    T_STRIDE4,
    T_UNIT_STRIDE,
    T_VALUE,
    TARGET_ROW,
    TRANSFER_ROW,
    UNIT,
    UNITS,
)
from .arithmetic import bias_correction
from .drawing import normal, unit_uniform
from .memory import field, pointer, widened


@triton.jit
def _store_as(address, dtype, offset, values, mask):
    """Store finite float32 values as a type known at run time."""
    if dtype >= FLOAT32:
        if dtype == FLOAT32:
            tl.store(pointer(address, tl.float32) + offset, values, mask)
        else:
            tl.store(pointer(address, tl.float64) + offset, values.to(tl.float64), mask)
    elif dtype == FLOAT16:
        tl.store(pointer(address, tl.float16) + offset, values.to(tl.float16), mask)
    else:
        # to the nearest, ties to even
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        tl.store(pointer(address, tl.int16) + offset, bits.to(tl.int16), mask)


@triton.jit
def reinit(tiles, targets, masks, owners, addresses, WIDE_UTILITY: tl.constexpr):
    """Draws, or fills, what belongs to the chosen units, then forgets their utility and age.

    (2 r - 1) * bound with r from Philox at the element's row-major number. Writes the elements of the chosen units
    and reads only their list; an element that a later region sets too is left to it.

    Args:
        tiles: int32 [programs, 2], target and which of its programs.
        targets, masks, addresses: int64 tables of `Target`, `Mask`, `Addresses`.
        owners: int32, see `Mask`.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    target = targets + tl.load(tile) * TARGET_ROW
    kind = tl.load(target + T_KIND)
    num_chosen = tl.load(field(addresses, A_NUM_CHOSEN, tl.int32) + tl.load(target + T_GROUP))
    chosen = field(addresses, A_CHOSEN, tl.int32) + tl.load(target + T_FIRST_UNIT)
    if kind == FORGET:
        U: tl.constexpr = tl.float64 if WIDE_UTILITY else tl.float32
        utility = field(addresses, A_UTILITY, U) + tl.load(target + T_FIRST_UNIT)
        age = field(addresses, A_AGE, tl.int32) + tl.load(target + T_FIRST_UNIT)
        for first in range(0, num_chosen, BLOCK):
            i = first + tl.arange(0, BLOCK)
            j = tl.load(chosen + i, i < num_chosen, 0)
            tl.store(utility + j, 0.0, i < num_chosen)
            tl.store(age + j, 0, i < num_chosen)
    elif kind == FORGET_MEAN:
        mean, elements = field(addresses, A_RUNNING_MEAN, tl.float64), tl.load(target + T_ELEMENTS)
        for first in range(0, num_chosen * elements, BLOCK):
            q = first + tl.arange(0, BLOCK)
            mask = q < num_chosen * elements
            j = tl.load(chosen + q // elements, mask, 0).to(tl.int64)
            column = tl.load(target + T_START) + j * tl.load(target + T_UNIT_STRIDE)
            column += q % elements * tl.load(target + T_POSITION_STRIDE)
            tl.store(mean + column, 0.0, mask)
    else:
        is_chosen = field(addresses, A_IS_CHOSEN, tl.int32)
        seed = tl.load(field(addresses, A_SEED, tl.int64))
        step = tl.load(field(addresses, A_STEP, tl.int64))
        elements = tl.load(target + T_ELEMENTS)
        axis, rows, columns = tl.load(target + T_AXIS), tl.load(target + T_ROWS), tl.load(target + T_COLUMNS)
        inner, size3, size4 = tl.load(target + T_INNER), tl.load(target + T_SIZE3), tl.load(target + T_SIZE4)
        across = tl.where(axis == 0, columns, rows)
        value = tl.load(target + T_VALUE).to(tl.float64, bitcast=True)
        first_mask, last_mask = (
            tl.load(target + T_FIRST_MASK),
            tl.load(target + T_FIRST_MASK) + tl.load(target + T_MASKS),
        )
        start, every = tl.load(tile + 1).to(tl.int64) * BLOCK, tl.load(target + T_PROGRAMS) * BLOCK
        for begin in range(start, num_chosen * elements, every):
            q = begin + tl.arange(0, BLOCK)
            n = q // elements
            mask = n < num_chosen
            # element q of those that are set: of unit j, its position p, entry e of the other axis, place k behind
            j = tl.load(chosen + n, mask, 0).to(tl.int64)
            k = q % inner
            e = q % elements // inner % across
            p = q % elements // inner // across
            index = tl.load(target + T_START) + j * tl.load(target + T_UNIT_STRIDE)
            index = index + p * tl.load(target + T_POSITION_STRIDE)
            # a grouped convolution's column lies in the rows of its group
            row = tl.where(axis == 0, index, index // columns * rows + e)
            column = tl.where(axis == 0, e, index % columns)
            element = (row * columns + column) * inner + k
            offset = (
                row * tl.load(target + T_STRIDE0)
                + column * tl.load(target + T_STRIDE1)
                + k // (size3 * size4) * tl.load(target + T_STRIDE2)
                + k // size4 % size3 * tl.load(target + T_STRIDE3)
                + k % size4 * tl.load(target + T_STRIDE4)
            )
            for m in range(first_mask, last_mask):
                by = masks + m * MASK_ROW
                their_column = row // tl.load(by + M_ROWS) * tl.load(by + M_COLUMNS) + column
                entry = tl.where(tl.load(by + M_AXIS) == 0, row, their_column)
                owner = tl.load(owners + tl.load(by + M_OWNER) + entry, mask, -1)
                mask = mask & (tl.load(is_chosen + owner, mask & (owner >= 0), 0) == 0)
            new = tl.zeros([BLOCK], tl.float32) + value.to(tl.float32)
            if kind == NORMAL:
                new = (normal(element, seed, step, tl.load(target + T_STREAM)) * value).to(tl.float32)
            elif kind != FILL:
                r = unit_uniform(element, seed, step, tl.load(target + T_STREAM))
                new = tl.where(kind == UNIT, r, (2.0 * r - 1.0) * value.to(tl.float32))
            _store_as(tl.load(target + T_ADDRESS), tl.load(target + T_DTYPE), offset, new, mask)


@triton.jit
def _load_as(address, dtype, offset, mask):
    """Values of a type known at run time, float64."""
    if dtype >= FLOAT32:
        if dtype == FLOAT32:
            values = tl.load(pointer(address, tl.float32) + offset, mask, 0).to(tl.float64)
        else:
            values = tl.load(pointer(address, tl.float64) + offset, mask, 0)
    elif dtype == FLOAT16:
        values = tl.load(pointer(address, tl.float16) + offset, mask, 0).to(tl.float64)
    else:
        values = widened(tl.load(pointer(address, tl.int16) + offset, mask, 0), BFLOAT16).to(tl.float64)
    return values


@triton.jit
def _rounded(values, dtype):
    """float64 values as a type known at run time keeps them, by way of float32 where it has 16 bits."""
    single = values.to(tl.float32)
    if dtype == FLOAT64:
        result = values
    elif dtype == FLOAT16:
        result = single.to(tl.float16).to(tl.float64)
    elif dtype == BFLOAT16:
        bits = single.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
        result = tl.where(tl.abs(single) < float("inf"), nearest, single).to(tl.float64)
    else:
        result = single.to(tl.float64)
    return result


@triton.jit
def transfer(tiles, biases, transfers, columns, addresses):
    """bias[o] += sum over the chosen units' columns of weight[o, c] * m[c] / (1 - decay^age), in float64.

    For 128 outputs of one bias; what is not finite is not added. Reads the columns of the chosen units.

    Args:
        tiles: int32 [programs, 2], the bias and which 128 of its entries.
        biases, transfers, columns, addresses: int64 tables of `Bias`, `Transfer`, `Columns`, `Addresses`.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    bias = biases + tl.load(tile) * BIAS_ROW
    o = tl.load(tile + 1).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    inside = o < tl.load(bias + D_SIZE)
    hyper = field(addresses, A_HYPER, tl.float64)
    decay, log_decay = tl.load(hyper + 2), tl.load(hyper + 3)
    address, dtype, offset = tl.load(bias + D_ADDRESS), tl.load(bias + D_DTYPE), o * tl.load(bias + D_STRIDE)
    value = _load_as(address, dtype, offset, inside)
    before = value
    first = tl.load(bias + D_FIRST)
    for t in range(first, first + tl.load(bias + D_TRANSFERS)):
        row = transfers + t * TRANSFER_ROW
        unit_columns = columns + tl.load(row + F_COLUMNS) * COLUMNS_ROW
        first_unit = tl.load(unit_columns + C_FIRST_UNIT)
        num_chosen = tl.load(field(addresses, A_NUM_CHOSEN, tl.int32) + tl.load(row + F_GROUP))
        chosen = field(addresses, A_CHOSEN, tl.int32) + first_unit
        ages = field(addresses, A_AGE, tl.int32) + first_unit
        means = field(addresses, A_RUNNING_MEAN, tl.float64) + tl.load(unit_columns + C_COLUMN)
        per_unit, width, rows = tl.load(row + F_PER_UNIT), tl.load(row + F_WIDTH), tl.load(row + F_ROWS)
        size3, size4 = tl.load(row + F_SIZE3), tl.load(row + F_SIZE4)
        total = tl.zeros([UNITS], tl.float64)
        for n in range(num_chosen):
            j = tl.load(chosen + n).to(tl.int64)
            correction = tl.where(decay > 0, bias_correction(tl.load(ages + j), log_decay), 1.0)
            for p in range(per_unit):
                at = j * tl.load(unit_columns + C_UNIT_STRIDE) + p * tl.load(unit_columns + C_POSITION_STRIDE)
                mean = tl.load(means + at) / correction
                index = tl.load(row + F_START) + j * tl.load(row + F_UNIT_STRIDE)
                index += p * tl.load(row + F_POSITION_STRIDE)
                # a grouped convolution's column reaches the outputs of its group
                mine = inside & (o // rows == index // width)
                place = o * tl.load(row + F_ROW_STRIDE) + index % width * tl.load(row + F_COLUMN_STRIDE)
                for e in range(tl.load(row + F_INNER)):
                    inner = e // (size3 * size4) * tl.load(row + F_STRIDE2)
                    inner += e // size4 % size3 * tl.load(row + F_STRIDE3) + e % size4 * tl.load(row + F_STRIDE4)
                    gain = _load_as(tl.load(row + F_ADDRESS), tl.load(row + F_DTYPE), place + inner, mine) * mean
                    total += tl.where(mine, gain, 0.0)
        moved = _rounded(value + total, dtype)
        value = tl.where((num_chosen > 0) & (tl.abs(moved) < float("inf")), moved, value)
    # no warp may write what another has still to read
    tl.debug_barrier()
    changed = inside & (value != before) & (tl.abs(value) < float("inf"))
    if dtype == FLOAT64:
        tl.store(pointer(address, tl.float64) + offset, value, changed)
    else:
        _store_as(address, dtype, offset, value.to(tl.float32), changed)
