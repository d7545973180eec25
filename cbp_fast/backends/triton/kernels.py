"""The Triton kernels, and the one function by which all of them are launched.

`select` computes everything up to the choice for all groups in one launch, `reinit` writes what the choice asks for in
a second one. Some steps take more: `capture` sums activations apart, `hat` is what a centred utility measures them
from, `score` is the second half of `select` where that needs all units of a group at once, `rank` sorts where many are
chosen, `transfer` moves what replaced units gave into biases. `triton_backend` builds the tables that they walk.
Addresses travel as integers in tables, so that one launch can serve any number of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# how element types are numbered in the tables
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = map(tl.constexpr, range(4))
# a tile that sums along its first axis, its outputs neighbours in memory, has outputs x reduced elements of these
# sizes; one that sums along neighbours has them the other way round; of float64, or with an address for each element,
# half as many are reduced
WIDE, NARROW = tl.constexpr(128), tl.constexpr(16)
# units that one program brings from sums to scores; of units of several columns fewer are summed, so many columns at a
# time
UNITS, FEWER_UNITS, POSITIONS = tl.constexpr(128), tl.constexpr(4), tl.constexpr(32)
# units that one program of `rank` compares with all others
RANKED = tl.constexpr(16)
# blocks of units that the last program of a group looks at, and elements that one of `reinit` sets, at once
BLOCK = tl.constexpr(256)
# what `capture` and `select` sum: abs(x), x, or abs(x - hat)
MAGNITUDES, VALUES, DISTANCES = map(tl.constexpr, range(3))
# the key of a unit that cannot be chosen
NEVER = tl.constexpr(0x7FFFFFFFFFFFFFFF)


# with contraction, the same formula would round differently from one compiler to the next; left to itself, ptxas spills
# what the choice needs to have a few more programs beside each other
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, **({} if torch.version.hip else {"maxnreg": 128})}

# arguments that are tables of int32; all others are of int64
INT32 = ("tiles", "counters", "owners", "blocks", "readers", "incoming")
# compiled kernels by what they were compiled for, and the device that they are loaded on
_compiled: dict[tuple[object, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], args: Sequence[torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Run a kernel on the current device; every launch goes through here.

    Args:
        args: tables, all of them at multiples of 16 bytes.
        meta: the kernel's constants, in its order.
    """
    key = (id(kernel), args[0].device.index, *meta.values())
    compiled = _compiled.get(key)
    if compiled is not None:
        # Triton's own way looks at every argument, and at every constant of this file, before each launch
        compiled[(grid[0], 1, 1)](*args, *meta.values())
    else:
        compiled = kernel[grid](*args, **meta, **OPTIONS)
        # the interpreter returns nothing
        if compiled is not None:
            _compiled[key] = compiled


def compile_(kernel: Any, device: torch.device, meta: Mapping[str, Any]) -> None:
    """Compile a kernel for a device, which must be the current one, if that has not been done."""
    key = (id(kernel), device.index, *meta.values())
    if key not in _compiled:
        names = [name for name in kernel.arg_names if name not in meta]
        types = [torch.int32 if name in INT32 else torch.int64 for name in names]
        _compiled[key] = kernel.warmup(*types, grid=(1,), **meta, **OPTIONS)


class Job(NamedTuple):
    """One sum of magnitudes: out[i] = sum over the reduced axes of abs(x[i, ...]), for `outputs` values of i."""

    kind: int  # 4 * element type + 2 * (neighbours in memory are summed) + aligned
    outputs: int
    first: int  # with i + first = a * period + b, output i begins at a * far + b * near
    period: int
    far: int
    near: int
    inner: int  # size and stride of the axis that tiles run along; up to three more, the last one fastest
    inner_stride: int
    outer: int  # all of those together
    size1: int
    size2: int
    stride0: int
    stride1: int
    stride2: int
    splits: int  # programs that share one block of outputs
    steps: int  # tiles that each of them sums
    partial: int  # place of [splits, outputs] partial sums in the workspace, in bytes
    total: int  # place of [outputs] float64 sums
    group: int
    counter: int  # of the job's first block
    column: int  # `capture`: the first column of the state that the sums are added to
    samples: int  # `capture`: to add to the slot's count
    slot: int


(J_KIND, J_OUTPUTS, J_FIRST, J_PERIOD, J_FAR, J_NEAR, J_INNER, J_INNER_STRIDE, J_OUTER, J_SIZE1, J_SIZE2, J_STRIDE0,
 J_STRIDE1, J_STRIDE2, J_SPLITS, J_STEPS, J_PARTIAL, J_TOTAL, J_GROUP, J_COUNTER, J_COLUMN, J_SAMPLES,
 J_SLOT, JOB) = map(tl.constexpr, range(len(Job._fields) + 1))  # fmt: skip


class Reader(NamedTuple):
    """One slot as `select` walks it: column (j, p) is at j * unit_stride + p * position_stride.

    Of 32 bits, as is `Block`: they wait in registers for their use. Places in the workspace are counted in 8 bytes.
    """

    column: int
    unit_stride: int
    position_stride: int
    samples: int  # held until the step, the lower 31 bits
    more_samples: int  # the others
    jobs: int  # how many sums of its activations there are
    activation_total: int  # place of the first of those in the workspace; the others are of the jobs that follow
    first_job: int
    weight_total: int  # sums of its weight, `fold` neighbouring ones for each column
    fold: int
    elements: int  # of the weight, a unit


(R_COLUMN, R_UNIT_STRIDE, R_POSITION_STRIDE, R_SAMPLES, R_MORE_SAMPLES, R_JOBS, R_ACTIVATION_TOTAL, R_FIRST_JOB,
 R_WEIGHT_TOTAL, R_FOLD, R_ELEMENTS, READER) = map(tl.constexpr, range(len(Reader._fields) + 1))  # fmt: skip


class Block(NamedTuple):
    """Some units of a group, with all that is to know of the group.

    In the workspace a group has a key and a y of each unit, and of each block the least key, how many units are mature
    and how many of those can be chosen, and the least and the greatest y: 8 bytes each, from `keys` on.
    """

    group: int
    number: int  # of the block, in the group
    first: int  # of its units, in the group
    here: int  # how many units it has
    unit: int  # the first of them in the numbering of all groups
    expected: int  # blocks of outputs that it waits for
    blocks: int  # of the group
    width: int  # units of each block but the last
    units: int
    keys: int
    columns_per_unit: int
    first_reader: int
    readers: int
    first_incoming: int
    incoming: int
    fan_in: int
    stream: int
    ranked: int  # whether `rank` comes after, for more than MANY units


(B_GROUP, B_NUMBER, B_FIRST, B_HERE, B_UNIT, B_EXPECTED, B_BLOCKS, B_WIDTH, B_UNITS, B_KEYS, B_PER_UNIT, B_FIRST_READER,
 B_READERS, B_FIRST_INCOMING, B_INCOMING, B_FAN_IN, B_STREAM, B_RANKED, BLOCK_ROW) = map(
    tl.constexpr, range(len(Block._fields) + 1))  # fmt: skip
# up to so many units are chosen one after the other
MANY = tl.constexpr(8)


class Addresses(NamedTuple):
    """Where the fields of the state are; `is_chosen` is int32, one a unit, written by `select` for `reinit`."""

    step: int
    seed: int
    hyper: int
    pending: int
    num_replaced: int
    samples: int  # `State.count`
    activation: int
    feature: int
    running_mean: int
    utility: int
    age: int
    num_chosen: int
    chosen: int
    is_chosen: int
    hat: int  # float64, one a column: what `capture` measures distances from
    num_groups: int  # itself, not an address
    num_blocks: int  # of units


(A_STEP, A_SEED, A_HYPER, A_PENDING, A_NUM_REPLACED, A_COUNT, A_ACTIVATION, A_FEATURE, A_RUNNING_MEAN, A_UTILITY,
 A_AGE, A_NUM_CHOSEN, A_CHOSEN, A_IS_CHOSEN, A_HAT, A_NUM_GROUPS, A_NUM_BLOCKS) = map(
    tl.constexpr, range(len(Addresses._fields)))  # fmt: skip


@triton.jit
def _pointer(address, dtype: tl.constexpr):
    return address.to(tl.pointer_type(dtype))


@triton.jit
def _arrive(counter, amount):
    """What the programs that came here before this one have added; it sees what they stored until then."""
    # triton up to 3.8 puts no barrier round an atomic: the other warps' stores must be over before this program counts
    # itself in, and none of its warps may read before it has
    tl.debug_barrier()
    before = tl.atomic_add(counter, amount, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return before


@triton.jit
def _field(addresses, number, dtype: tl.constexpr):
    """A field of the state."""
    return _pointer(tl.load(addresses + number), dtype)


@triton.jit
def _value(bits, TYPE: tl.constexpr):
    """What was loaded, in the type that sums run in; bfloat16 comes as int16."""
    if TYPE == BFLOAT16:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif TYPE == FLOAT16:
        return bits.to(tl.float32)
    else:
        return bits


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
            value = _value(tl.load(x + (at[:, None] + along[None, :]), mask, 0), TYPE)
        else:
            mask = (r < inner)[:, None] & (i < outputs)[None, :]
            value = _value(tl.load(x + (along[:, None] + at[None, :]), mask, 0), TYPE)
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
            tl.store(_pointer(total, tl.float64) + i, sums.to(tl.float64), i < outputs)
        else:
            tl.store(_pointer(partial, sums.dtype) + split * outputs + i, sums, i < outputs)


@triton.jit
def _sum_block(job, address, block, split, hat, workspace, counters, TYPES: tl.constexpr, SUM: tl.constexpr):
    """Sums of one block of outputs; True for the program that has them all in the workspace, as float64."""
    kind, outputs, splits = tl.load(job + J_KIND), tl.load(job + J_OUTPUTS), tl.load(job + J_SPLITS)
    partial, total = workspace + tl.load(job + J_PARTIAL), workspace + tl.load(job + J_TOTAL)
    width = tl.where(kind // 2 % 2 == 1, NARROW, WIDE)
    _store_sums(job, address, block, split, hat, kind, partial, total, TYPES, SUM, 0, 8)
    complete = splits == 1
    if splits > 1:
        counter = counters + tl.load(job + J_COUNTER) + block
        complete = _arrive(counter, 1) == splits - 1
        if complete:
            tl.store(counter, 0)
            i = block * width + tl.arange(0, WIDE)
            mask = (i < outputs) & (tl.arange(0, WIDE) < width)
            sums = tl.zeros([WIDE], tl.float64)
            if kind // 4 == FLOAT64:
                for s in tl.range(0, splits, loop_unroll_factor=4):
                    sums += tl.load(_pointer(partial, tl.float64) + s * outputs + i, mask, 0, cache_modifier=".cg")
            else:
                for s in tl.range(0, splits, loop_unroll_factor=4):
                    part = tl.load(_pointer(partial, tl.float32) + s * outputs + i, mask, 0, cache_modifier=".cg")
                    sums += part.to(tl.float64)
            tl.store(_pointer(total, tl.float64) + i, sums, mask)
    return complete


@triton.jit
def _word(element, seed, step, stream):
    """The random words of `element`, uint32: Philox4x32-10, as `reference.philox` says, `step` an int64."""
    quad = element >> 2
    low, high = (quad & 0xFFFFFFFF).to(tl.uint32), (((quad >> 32) ^ (step >> 32 << 16)) & 0xFFFFFFFF).to(tl.uint32)
    step = low * 0 + (step & 0xFFFFFFFF).to(tl.uint32)
    stream = low * 0 + (stream & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, step, stream)
    word = element & 3
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@triton.jit
def _unit_uniform(element, seed, step, stream):
    """U[0, 1) with 24 bits, float32 exactly."""
    return (_word(element, seed, step, stream) >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def _log(x):
    """Natural logarithm of a float64 in (0, 1], to a few roundings of the result.

    Of its own, as the compiler's libraries differ from one GPU to the next.
    """
    bits = x.to(tl.int64, bitcast=True)
    # x = m * 2^exponent with m in [sqrt(1/2), sqrt(2))
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    # 2 artanh(s); s is at most 0.172
    s = (m - 1.0) / (m + 1.0)
    series = s * 0.0
    for n in tl.static_range(23, 0, -2):
        series = 1.0 / n + s * s * series
    return exponent.to(tl.float64) * 0.6931471805599453 + 2.0 * s * series


@triton.jit
def _bias_correction(age, log_decay):
    """1 - exp(age * log_decay) for age >= 0 and log_decay <= 0, float64, to a few roundings of the result."""
    # what is below is 1 in float64
    x = tl.maximum(age.to(tl.float64) * log_decay, -50.0)
    # exp(x) = 2^n * (1 + r * series(r)) with r within log(2) / 2 of zero
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.69314718036912382) - n * 1.9082149292705877e-10
    series = r * 0.0 + 1.0
    for i in tl.static_range(15, 1, -1):
        series = 1.0 + r * (1.0 / i) * series
    power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    # nothing cancels: 1 - 2^n is exact, and 0 where the result is small
    return (1.0 - power) - power * (r * series)


@triton.jit
def _ordered(score):
    """A float32's bits in an order of their own, int32: less as a float is less as an integer, and -0 is +0."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _place(workspace, place):
    """Where a place in the workspace is that is counted in 8 bytes."""
    return _pointer(workspace + place.to(tl.int64) * 8, tl.float64)


@triton.jit
def _reader(readers, r, last, counts):
    """Samples that the state has of a reader, or of the last one, and the reader's fields."""
    r = tl.minimum(r, last)
    row = readers + r * READER
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
def _samples(counted, low, high):
    """Samples in the state, and those held until the step, of two halves."""
    return counted + (high.to(tl.int64) << 31) + low.to(tl.int64)


@triton.jit
def _column_terms(
    column, mask, count, first_column, num_jobs, activation_total, first_job, weight_total, fold, jobs, activation,
    addresses, workspace, decay,
    ACTIVATION: tl.constexpr, OUTGOING: tl.constexpr, DIVIDE: tl.constexpr, MEAN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Activation statistic x weight statistic of some columns of a reader, float64; the sums are zeroed.

    MEAN: each column's running mean m becomes decay * m + (1 - decay) * feature / count, where that is finite.
    """
    term = tl.full(column.shape, 1.0, tl.float64)
    at = activation + first_column + column
    if ACTIVATION:
        term = tl.load(at, mask, 0)
        if num_jobs > 0:
            sums = _place(workspace, activation_total)
            term += tl.load(sums + column, mask, 0, cache_modifier=".cg")
        # of an activation seen in several forwards, or with more axes than one sum has
        for job in range(first_job + 1, first_job + num_jobs):
            sums = _pointer(workspace + tl.load(jobs + job * JOB + J_TOTAL), tl.float64)
            term += tl.load(sums + column, mask, 0, cache_modifier=".cg")
        if DIVIDE:
            term /= count.to(tl.float64)
    if OUTGOING:
        weight = tl.zeros(column.shape, tl.float64)
        totals = _place(workspace, weight_total)
        for f in tl.range(0, fold, loop_unroll_factor=AHEAD):
            weight += tl.load(totals + column.to(tl.int64) * fold + f, mask, 0, cache_modifier=".cg")
        term *= weight
    if MEAN:
        feature = _field(addresses, A_FEATURE, tl.float64) + first_column + column
        running = _field(addresses, A_RUNNING_MEAN, tl.float64) + first_column + column
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
def _score(
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
        step = tl.load(_field(addresses, A_STEP, tl.int64)) + 1
        seed = tl.load(_field(addresses, A_SEED, tl.int64))
        score = _unit_uniform(j.to(tl.int64), seed, step, tl.load(row + B_STREAM).to(tl.int64)).to(U)
    else:
        divisor = a.to(tl.float64) if SCORE == 1 else tl.where(decay > 0, _bias_correction(a, log_decay), 1.0)
        score = (u.to(tl.float64) / tl.where(a > 0, divisor, 1.0)).to(U)
    candidate = mature & (tl.abs(score) < float("inf"))
    # a float64 score beyond float32 stays a candidate, after all others
    score = tl.minimum(tl.where(candidate, score, 0.0).to(tl.float32), 3.4028234663852886e38)
    key = tl.where(candidate, (_ordered(score).to(tl.int64) << 32) | j, NEVER)
    tl.store(keys + j, key, inside)
    # both counts in one
    stats = tl.sum(mature.to(tl.int32), 0).to(tl.int64) << 32 | tl.sum(candidate.to(tl.int32), 0).to(tl.int64)
    return u, a, tl.min(key, 0), stats


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
    counts = _field(addresses, A_COUNT, tl.int64)
    activation = _field(addresses, A_ACTIVATION, tl.float64)
    utility = _field(addresses, A_UTILITY, U) + unit
    ages = _field(addresses, A_AGE, tl.int32) + unit
    hyper = _field(addresses, A_HYPER, tl.float64)
    lane = tl.arange(0, UNITS)
    inside, j = lane < here, first + lane
    last_reader = first_reader + num_readers - 1
    (
        counted, low_held, high_held, column_, unit_stride, position_stride, num_jobs, activation_total, first_job,
        weight_total, fold, of_unit,
    ) = _reader(readers, first_reader, last_reader, counts)  # fmt: skip
    if INCOMING != 0:
        first_incoming, num_incoming = tl.load(row + B_FIRST_INCOMING), tl.load(row + B_INCOMING)
    if SUMMED and arrives:
        mine = (_arrive(counters + r, 1) == needed - 1).to(tl.int32)
    if mine != 0:
        if SUMMED:
            tl.store(counters + r, 0)
        # on their way together with the sums
        maturity, decay, log_decay = tl.load(hyper + 1), tl.load(hyper + 2), tl.load(hyper + 3)
        u, a = tl.load(utility + lane, inside, 0), tl.load(ages + lane, inside, 0)
        keys = _place(workspace, keys_at).to(tl.pointer_type(tl.int64))
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
                other = readers + each * READER
                low_held, high_held = tl.load(other + R_SAMPLES), tl.load(other + R_MORE_SAMPLES)
                samples += _samples(tl.load(counts + each), low_held, high_held).to(tl.float64)
        else:
            y = tl.zeros([UNITS], tl.float64)
            places = keys.to(tl.pointer_type(tl.float64)) + units
            for nth in range(num_readers):
                count = _samples(counted, low_held, high_held)
                if per_unit == 1:
                    y += _column_terms(
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
                            terms += _column_terms(
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
                ) = _reader(readers, first_reader + nth + 1, last_reader, counts)  # fmt: skip
            if per_unit > 1:
                # from one layout in registers to the other by way of memory
                tl.debug_barrier()
                y = tl.load(places + j, inside, 0)
            if INCOMING != 0:
                rows = tl.zeros(j.shape, tl.float64)
                for maker in range(first_incoming, first_incoming + num_incoming):
                    made, of_each = tl.load(incoming + 2 * maker), tl.load(incoming + 2 * maker + 1)
                    for part in range(of_each):
                        sums = _place(workspace, made) + j * of_each + part
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
            u, a, key, of_block = _score(
                y, row, j, inside, u, a, maturity, decay, log_decay, least, span, addresses, keys,
                MIN_MAX, SCORE, WIDE_UTILITY,
            )  # fmt: skip
            tl.store(utility + lane, u, inside)
            tl.store(ages + lane, a, inside)
            is_chosen = _field(addresses, A_IS_CHOSEN, tl.int32) + (unit - first)
            tl.store(is_chosen + j, 0, inside)
            tl.store(minima + b, key)
            tl.store(stats + b, of_block)
            # as before: what does not wait for others is under way while they are counted
            pendings = _field(addresses, A_PENDING, tl.float64) + g
            totals_replaced = _field(addresses, A_NUM_REPLACED, tl.int64) + g
            num_chosen = _field(addresses, A_NUM_CHOSEN, tl.int32) + g
            chosen = _field(addresses, A_CHOSEN, tl.int32) + (unit - first)
            num_groups, num_blocks = tl.load(addresses + A_NUM_GROUPS), tl.load(addresses + A_NUM_BLOCKS)
            width, ranked, rate = tl.load(row + B_WIDTH), tl.load(row + B_RANKED), tl.load(hyper)
            pending, num_replaced = tl.load(pendings), tl.load(totals_replaced)
            if _arrive(counters + num_blocks + g, 1) == blocks - 1:
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
                    step = tl.load(_field(addresses, A_STEP, tl.int64)) + 1
                    seed = tl.load(_field(addresses, A_SEED, tl.int64))
                    coin = _unit_uniform(units.to(tl.int64), seed, step, tl.load(row + B_STREAM).to(tl.int64)).to(
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
                arrived = _arrive(groups_here, 1 + (reached.to(tl.int32) << 16))
                if (arrived & 0xFFFF) == num_groups - 1:
                    steps = _field(addresses, A_STEP, tl.int64)
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
    job, address = jobs + number * JOB, tl.load(tensors + number)
    workspace = workspace_tensor.to(tl.int64)
    if _sum_block(job, address, block, split, workspace_tensor, workspace, counters, TYPES, MAGNITUDES):
        first, touched = tl.load(tile + 3), tl.load(tile + 4)
        end, back = tl.load(tile + 5), tl.load(tile + 6)
        # counted in for all before the first is finished, which the others need not wait for
        # a bit for each; 128 units, of the least blocks that there are, make 33
        last_of = tl.full([], 0, tl.int64)
        for n in range(first + 1, first + touched):
            r = tl.where(n < end, n, n - back).to(tl.int64)
            needed = tl.load(blocks + r * BLOCK_ROW + B_EXPECTED)
            last_of |= (_arrive(counters + r, 1) == needed - 1).to(tl.int64) << (n - first)
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
    k = tl.load(_field(addresses, A_NUM_CHOSEN, tl.int32) + tl.load(row + B_GROUP))
    if k > MANY:
        units, first_unit = tl.load(row + B_UNITS), tl.load(row + B_UNIT)
        keys = _place(workspace_tensor.to(tl.int64), tl.load(row + B_KEYS)).to(tl.pointer_type(tl.int64))
        j = part * RANKED + tl.arange(0, RANKED)
        key = tl.load(keys + j, j < units, NEVER)
        lesser = tl.zeros([RANKED, UNITS], tl.int32)
        for first in tl.range(0, units, UNITS, loop_unroll_factor=4):
            i = first + tl.arange(0, UNITS)
            other = tl.load(keys + i, i < units, NEVER)
            lesser += (other[None, :] < key[:, None]).to(tl.int32)
        place = tl.sum(lesser, 1)
        take = (key != NEVER) & (place < k)
        tl.store(_field(addresses, A_CHOSEN, tl.int32) + first_unit + place, j.to(tl.int32), take)
        tl.store(_field(addresses, A_IS_CHOSEN, tl.int32) + first_unit + j, 1, take)


@triton.jit
def capture(tiles, jobs, tensors, addresses, workspace_tensor, counters, TYPES: tl.constexpr, SUM: tl.constexpr,
            COUNTS: tl.constexpr):  # fmt: skip
    """activation[c] += sum over samples of abs(h[s, c]); count += samples. Reads h once; arguments as of `select`.

    SUM: VALUES adds up h itself, in `feature`; DISTANCES is of abs(h - hat).
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 7
    number, block, split = tl.load(tile), tl.load(tile + 1).to(tl.int64), tl.load(tile + 2).to(tl.int64)
    job, address = jobs + number * JOB, tl.load(tensors + number)
    workspace = workspace_tensor.to(tl.int64)
    column = tl.load(job + J_COLUMN)
    hat_of = _field(addresses, A_HAT, tl.float64) + column
    if _sum_block(job, address, block, split, hat_of, workspace, counters, TYPES, SUM):
        # the sums were written by this program, perhaps by other warps
        tl.debug_barrier()
        width = tl.where(tl.load(job + J_KIND) // 2 % 2 == 1, NARROW, WIDE)
        i = block * width + tl.arange(0, WIDE)
        mask = (i < tl.load(job + J_OUTPUTS)) & (tl.arange(0, WIDE) < width)
        sums = tl.load(_pointer(workspace + tl.load(job + J_TOTAL), tl.float64) + i, mask, 0)
        at = _field(addresses, A_FEATURE if SUM == VALUES else A_ACTIVATION, tl.float64) + column + i
        before = tl.load(at, mask, 0)
        tl.debug_barrier()
        tl.store(at, before + sums, mask)
        if COUNTS and block == 0:
            count = _field(addresses, A_COUNT, tl.int64) + tl.load(job + J_SLOT)
            before_it = tl.load(count)
            tl.debug_barrier()
            tl.store(count, before_it + tl.load(job + J_SAMPLES))


class Columns(NamedTuple):
    """The columns of one slot, as `hat` and `transfer` walk them."""

    slot: int
    column: int
    first_unit: int
    units: int
    per_unit: int
    unit_stride: int
    position_stride: int


(C_SLOT, C_COLUMN, C_FIRST_UNIT, C_UNITS, C_PER_UNIT, C_UNIT_STRIDE, C_POSITION_STRIDE,
 COLUMNS) = map(tl.constexpr, range(len(Columns._fields) + 1))  # fmt: skip


@triton.jit
def hat(tiles, columns, addresses, PREVIOUS: tl.constexpr):
    """hat[c] = mean over a unit's columns of m / (1 - decay^age), of 128 units of a slot.

    m is the running mean as it will be after the step, by what was seen so far; PREVIOUS: as the last step left it.

    Args:
        tiles: int32 [programs, 2], the slot and which 128 of its units.
        columns, addresses: int64 tables of `Columns`, `Addresses`.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    row = columns + tl.load(tile) * COLUMNS
    per_unit, first_column = tl.load(row + C_PER_UNIT), tl.load(row + C_COLUMN)
    unit_stride, position_stride = tl.load(row + C_UNIT_STRIDE), tl.load(row + C_POSITION_STRIDE)
    j = tl.load(tile + 1).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    inside = j < tl.load(row + C_UNITS)
    hyper = _field(addresses, A_HYPER, tl.float64)
    decay, log_decay = tl.load(hyper + 2), tl.load(hyper + 3)
    running = _field(addresses, A_RUNNING_MEAN, tl.float64) + first_column
    feature = _field(addresses, A_FEATURE, tl.float64) + first_column
    count = tl.load(_field(addresses, A_COUNT, tl.int64) + tl.load(row + C_SLOT)).to(tl.float64)
    age = tl.load(_field(addresses, A_AGE, tl.int32) + tl.load(row + C_FIRST_UNIT) + j, inside, 1)
    if not PREVIOUS:
        age = age.to(tl.int64) + 1
    # a unit that has no mean yet has one of 0
    correction = tl.where(age > 0, tl.where(decay > 0, _bias_correction(age, log_decay), 1.0), 1.0)
    total = tl.zeros([UNITS], tl.float64)
    for p in tl.range(0, per_unit, loop_unroll_factor=4):
        column = j * unit_stride + p * position_stride
        mean = tl.load(running + column, inside, 0)
        if not PREVIOUS:
            mean = decay * mean + (1.0 - decay) * (tl.load(feature + column, inside, 0) / count)
        total += mean / correction
    origin = total / per_unit.to(tl.float64)
    hats = _field(addresses, A_HAT, tl.float64) + first_column
    for p in tl.range(0, per_unit, loop_unroll_factor=4):
        tl.store(hats + j * unit_stride + p * position_stride, origin, inside)


UNIFORM, NORMAL, UNIT, FILL, FORGET, FORGET_MEAN = map(tl.constexpr, range(6))


class Target(NamedTuple):
    """One tensor to re-initialise: unit j owns entries start + j * unit_stride + p * position_stride of an axis.

    The axis is 0, or 1 of a tensor whose `rows` rows at a time belong to one group of a convolution.
    """

    address: int
    dtype: int
    # UNIFORM in [-value, value) | NORMAL with deviation value | UNIT: in [0, 1) | FILL with value
    # FORGET utility and age | FORGET_MEAN of a slot's columns
    kind: int
    value: int  # bits of a float64
    group: int
    first_unit: int
    elements: int  # a unit
    programs: int
    start: int
    unit_stride: int
    position_stride: int
    axis: int
    rows: int
    columns: int  # size of axis 1
    inner: int  # elements of the axes after it, the last two of them of these sizes
    size3: int
    size4: int
    stride0: int
    stride1: int
    stride2: int
    stride3: int
    stride4: int
    stream: int
    first_mask: int
    masks: int


(T_ADDRESS, T_DTYPE, T_KIND, T_VALUE, T_GROUP, T_FIRST_UNIT, T_ELEMENTS, T_PROGRAMS, T_START, T_UNIT_STRIDE,
 T_POSITION_STRIDE, T_AXIS, T_ROWS, T_COLUMNS, T_INNER, T_SIZE3, T_SIZE4, T_STRIDE0, T_STRIDE1, T_STRIDE2, T_STRIDE3,
 T_STRIDE4, T_STREAM, T_FIRST_MASK, T_MASKS, TARGET) = map(tl.constexpr, range(len(Target._fields) + 1))  # fmt: skip


class Mask(NamedTuple):
    """What a later region sets of a tensor stays its own: `owner` [axis] is the unit of each of its entries, or -1."""

    owner: int  # place in `owners`
    axis: int
    rows: int
    columns: int


M_OWNER, M_AXIS, M_ROWS, M_COLUMNS, MASK = map(tl.constexpr, range(len(Mask._fields) + 1))


@triton.jit
def _normal(element, seed, step, stream):
    """Box-Muller on the words of a pair, float64: the even element takes the cosine, the odd one the sine."""
    radius = _unit_uniform(element & -2, seed, step, stream).to(tl.float64)
    turns = _unit_uniform(element | 1, seed, step, stream).to(tl.float64)
    # 1 - r is exact
    radius = tl.sqrt(-2.0 * _log(1.0 - radius))
    # the nearest quarter turn, and Taylor's series of sine and cosine within an eighth of a turn from it
    quarter = tl.floor(4.0 * turns + 0.5)
    x = (4.0 * turns - quarter) * tl.full([], 1.5707963267948966, tl.float64)
    sine, cosine = tl.full(x.shape, 1.0, tl.float64), tl.full(x.shape, 1.0, tl.float64)
    for n in tl.static_range(16, 0, -2):
        cosine = 1.0 - x * x * (1.0 / (n * (n - 1))) * cosine
        sine = 1.0 - x * x * (1.0 / (n * (n + 1))) * sine
    # a sine is the cosine of a quarter turn less
    turn = quarter.to(tl.int64) - (element & 1)
    value = tl.where(turn & 1 == 0, cosine, -sine * x)
    return radius * tl.where(turn & 2 == 0, value, -value)


@triton.jit
def _store_as(address, dtype, offset, values, mask):
    """Store finite float32 values as a type known at run time."""
    if dtype >= FLOAT32:
        if dtype == FLOAT32:
            tl.store(_pointer(address, tl.float32) + offset, values, mask)
        else:
            tl.store(_pointer(address, tl.float64) + offset, values.to(tl.float64), mask)
    elif dtype == FLOAT16:
        tl.store(_pointer(address, tl.float16) + offset, values.to(tl.float16), mask)
    else:
        # to the nearest, ties to even
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        tl.store(_pointer(address, tl.int16) + offset, bits.to(tl.int16), mask)


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
    target = targets + tl.load(tile) * TARGET
    kind = tl.load(target + T_KIND)
    num_chosen = tl.load(_field(addresses, A_NUM_CHOSEN, tl.int32) + tl.load(target + T_GROUP))
    chosen = _field(addresses, A_CHOSEN, tl.int32) + tl.load(target + T_FIRST_UNIT)
    if kind == FORGET:
        U: tl.constexpr = tl.float64 if WIDE_UTILITY else tl.float32
        utility = _field(addresses, A_UTILITY, U) + tl.load(target + T_FIRST_UNIT)
        age = _field(addresses, A_AGE, tl.int32) + tl.load(target + T_FIRST_UNIT)
        for first in range(0, num_chosen, BLOCK):
            i = first + tl.arange(0, BLOCK)
            j = tl.load(chosen + i, i < num_chosen, 0)
            tl.store(utility + j, 0.0, i < num_chosen)
            tl.store(age + j, 0, i < num_chosen)
    elif kind == FORGET_MEAN:
        mean, elements = _field(addresses, A_RUNNING_MEAN, tl.float64), tl.load(target + T_ELEMENTS)
        for first in range(0, num_chosen * elements, BLOCK):
            q = first + tl.arange(0, BLOCK)
            mask = q < num_chosen * elements
            j = tl.load(chosen + q // elements, mask, 0).to(tl.int64)
            column = tl.load(target + T_START) + j * tl.load(target + T_UNIT_STRIDE)
            column += q % elements * tl.load(target + T_POSITION_STRIDE)
            tl.store(mean + column, 0.0, mask)
    else:
        is_chosen = _field(addresses, A_IS_CHOSEN, tl.int32)
        seed = tl.load(_field(addresses, A_SEED, tl.int64))
        step = tl.load(_field(addresses, A_STEP, tl.int64))
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
                by = masks + m * MASK
                their_column = row // tl.load(by + M_ROWS) * tl.load(by + M_COLUMNS) + column
                entry = tl.where(tl.load(by + M_AXIS) == 0, row, their_column)
                owner = tl.load(owners + tl.load(by + M_OWNER) + entry, mask, -1)
                mask = mask & (tl.load(is_chosen + owner, mask & (owner >= 0), 0) == 0)
            new = tl.zeros([BLOCK], tl.float32) + value.to(tl.float32)
            if kind == NORMAL:
                new = (_normal(element, seed, step, tl.load(target + T_STREAM)) * value).to(tl.float32)
            elif kind != FILL:
                r = _unit_uniform(element, seed, step, tl.load(target + T_STREAM))
                new = tl.where(kind == UNIT, r, (2.0 * r - 1.0) * value.to(tl.float32))
            _store_as(tl.load(target + T_ADDRESS), tl.load(target + T_DTYPE), offset, new, mask)


class Transfer(NamedTuple):
    """What the replaced units of one slot give to a bias: weight[o, column] * mean of the column, for output o.

    The weight's units lie as in `Target`; `columns` is the slot's row of `Columns`.
    """

    address: int
    dtype: int
    group: int
    columns: int
    start: int
    unit_stride: int
    position_stride: int
    per_unit: int
    rows: int  # outputs that one column reaches: those of its group of a convolution
    width: int  # columns that have the same outputs
    inner: int
    size3: int
    size4: int
    row_stride: int
    column_stride: int
    stride2: int
    stride3: int
    stride4: int


(F_ADDRESS, F_DTYPE, F_GROUP, F_COLUMNS, F_START, F_UNIT_STRIDE, F_POSITION_STRIDE, F_PER_UNIT, F_ROWS, F_WIDTH,
 F_INNER, F_SIZE3, F_SIZE4, F_ROW_STRIDE, F_COLUMN_STRIDE, F_STRIDE2, F_STRIDE3, F_STRIDE4,
 TRANSFER) = map(tl.constexpr, range(len(Transfer._fields) + 1))  # fmt: skip


class Bias(NamedTuple):
    """One bias, and which transfers it gets, one after the other."""

    address: int
    dtype: int
    size: int
    stride: int
    first: int
    transfers: int


D_ADDRESS, D_DTYPE, D_SIZE, D_STRIDE, D_FIRST, D_TRANSFERS, BIAS = map(tl.constexpr, range(len(Bias._fields) + 1))


@triton.jit
def _load_as(address, dtype, offset, mask):
    """Values of a type known at run time, float64."""
    if dtype >= FLOAT32:
        if dtype == FLOAT32:
            values = tl.load(_pointer(address, tl.float32) + offset, mask, 0).to(tl.float64)
        else:
            values = tl.load(_pointer(address, tl.float64) + offset, mask, 0)
    elif dtype == FLOAT16:
        values = tl.load(_pointer(address, tl.float16) + offset, mask, 0).to(tl.float64)
    else:
        values = _value(tl.load(_pointer(address, tl.int16) + offset, mask, 0), BFLOAT16).to(tl.float64)
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
    bias = biases + tl.load(tile) * BIAS
    o = tl.load(tile + 1).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    inside = o < tl.load(bias + D_SIZE)
    hyper = _field(addresses, A_HYPER, tl.float64)
    decay, log_decay = tl.load(hyper + 2), tl.load(hyper + 3)
    address, dtype, offset = tl.load(bias + D_ADDRESS), tl.load(bias + D_DTYPE), o * tl.load(bias + D_STRIDE)
    value = _load_as(address, dtype, offset, inside)
    before = value
    first = tl.load(bias + D_FIRST)
    for t in range(first, first + tl.load(bias + D_TRANSFERS)):
        row = transfers + t * TRANSFER
        unit_columns = columns + tl.load(row + F_COLUMNS) * COLUMNS
        first_unit = tl.load(unit_columns + C_FIRST_UNIT)
        num_chosen = tl.load(_field(addresses, A_NUM_CHOSEN, tl.int32) + tl.load(row + F_GROUP))
        chosen = _field(addresses, A_CHOSEN, tl.int32) + first_unit
        ages = _field(addresses, A_AGE, tl.int32) + first_unit
        means = _field(addresses, A_RUNNING_MEAN, tl.float64) + tl.load(unit_columns + C_COLUMN)
        per_unit, width, rows = tl.load(row + F_PER_UNIT), tl.load(row + F_WIDTH), tl.load(row + F_ROWS)
        size3, size4 = tl.load(row + F_SIZE3), tl.load(row + F_SIZE4)
        total = tl.zeros([UNITS], tl.float64)
        for n in range(num_chosen):
            j = tl.load(chosen + n).to(tl.int64)
            correction = tl.where(decay > 0, _bias_correction(tl.load(ages + j), log_decay), 1.0)
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
        tl.store(_pointer(address, tl.float64) + offset, value, changed)
    else:
        _store_as(address, dtype, offset, value.to(tl.float32), changed)
