"""The Triton kernels, and the one function by which all of them are launched.

`select` computes everything up to the choice for all groups in one launch, `reinit` writes what the choice asks for in
a second one, `capture` sums one forward's activations where they are not held until the step. `triton_backend` builds
the tables that they walk. Addresses travel as integers in tables, so that one launch can serve any number of tensors.
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
# sizes; one that sums along neighbours has them the other way round
WIDE, NARROW = tl.constexpr(128), tl.constexpr(16)
# elements that one program of `reinit` sets at once; units that are chosen from at once
BLOCK = tl.constexpr(256)
# up to this many units are chosen one by one, more of them by a radix select
FEW = tl.constexpr(8)


# with contraction, the same formula would round differently from one compiler to the next; left to itself, ptxas spills
# what the choice needs to have a few more programs beside each other
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, **({} if torch.version.hip else {"maxnreg": 128})}


def launch(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], meta: Mapping[str, Any]) -> None:
    """Run a kernel; every launch goes through here."""
    kernel[grid](*args, **meta, **OPTIONS)


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
    """One slot as `select` walks it: column (j, p) is at j * unit_stride + p * position_stride."""

    column: int
    columns_per_unit: int
    unit_stride: int
    position_stride: int
    samples: int  # held until the step
    first_job: int  # of those that sum its activations
    jobs: int
    weight_total: int  # sums of its weight, `fold` neighbouring ones for each column
    fold: int
    elements: int  # of the weight, a unit


(R_COLUMN, R_PER_UNIT, R_UNIT_STRIDE, R_POSITION_STRIDE, R_SAMPLES, R_FIRST_JOB, R_JOBS, R_WEIGHT_TOTAL, R_FOLD,
 R_ELEMENTS, READER) = map(tl.constexpr, range(len(Reader._fields) + 1))  # fmt: skip


class Group(NamedTuple):
    """One group: `incoming` entries from `first_incoming` on are its producers' sums."""

    first_unit: int
    units: int
    first_reader: int
    readers: int
    first_incoming: int
    incoming: int
    fan_in: int
    stream: int
    blocks: int  # of all its sums together
    scratch: int  # place of 4 * units int64 in the workspace


(G_FIRST_UNIT, G_UNITS, G_FIRST_READER, G_READERS, G_FIRST_INCOMING, G_INCOMING, G_FAN_IN, G_STREAM, G_BLOCKS,
 G_SCRATCH, GROUP) = map(tl.constexpr, range(len(Group._fields) + 1))  # fmt: skip


class Addresses(NamedTuple):
    """Where the fields of the state are; `is_chosen` is int32, one a unit, written by `select` for `reinit`."""

    step: int
    seed: int
    hyper: int
    pending: int
    num_replaced: int
    samples: int  # `State.count`
    activation: int
    utility: int
    age: int
    num_chosen: int
    chosen: int
    is_chosen: int
    num_groups: int  # itself, not an address


(A_STEP, A_SEED, A_HYPER, A_PENDING, A_NUM_REPLACED, A_COUNT, A_ACTIVATION, A_UTILITY, A_AGE, A_NUM_CHOSEN, A_CHOSEN,
 A_IS_CHOSEN, A_NUM_GROUPS) = map(tl.constexpr, range(len(Addresses._fields)))  # fmt: skip


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
def _magnitude(bits, TYPE: tl.constexpr):
    """abs of what was loaded, in the type that sums run in; bfloat16 comes as int16."""
    if TYPE == BFLOAT16:
        return ((bits.to(tl.int32) & 0x7FFF) << 16).to(tl.float32, bitcast=True)
    elif TYPE == FLOAT16:
        return tl.abs(bits.to(tl.float32))
    else:
        return tl.abs(bits)


@triton.jit
def _tile_sums(job, address, block, split, KIND: tl.constexpr):
    """sum over this split's tiles of abs(x[i, ...]) for a block of outputs, float32 or float64 [WIDE or NARROW].

    Reads each element once. Aligned: one matrix whose neighbours, base and other stride allow 16-byte loads.
    """
    TYPE: tl.constexpr = KIND // 4
    ALONG: tl.constexpr = KIND // 2 % 2 == 1
    ALIGNED: tl.constexpr = KIND % 2 == 1
    OUTPUTS: tl.constexpr = NARROW if ALONG else WIDE
    REDUCED: tl.constexpr = WIDE if ALONG else NARROW
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
    blocks = tl.cdiv(inner, REDUCED)
    steps = tl.load(job + J_STEPS)
    last = tl.minimum((split + 1) * steps, tl.load(job + J_OUTER) * blocks)
    for step in range(split * steps, last):
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
            total += _magnitude(tl.load(x + (at[:, None] + along[None, :]), mask, 0), TYPE)
        else:
            mask = (r < inner)[:, None] & (i < outputs)[None, :]
            total += _magnitude(tl.load(x + (along[:, None] + at[None, :]), mask, 0), TYPE)
    return tl.sum(total, 1 if ALONG else 0)


@triton.jit
def _store_sums(
    job, address, block, split, kind, partial, total, KINDS: tl.constexpr, KIND: tl.constexpr, BIT: tl.constexpr
):
    """`_tile_sums` by the run-time kind, bit by bit; a chain of cases would become a table of jumps."""
    if BIT > 0:
        if kind & BIT != 0:
            _store_sums(job, address, block, split, kind, partial, total, KINDS, KIND + BIT, BIT // 2)
        else:
            _store_sums(job, address, block, split, kind, partial, total, KINDS, KIND, BIT // 2)
    elif KINDS >> KIND & 1:
        sums = _tile_sums(job, address, block, split, KIND)
        i = block * sums.shape[0] + tl.arange(0, sums.shape[0])
        outputs = tl.load(job + J_OUTPUTS)
        if tl.load(job + J_SPLITS) == 1:
            tl.store(_pointer(total, tl.float64) + i, sums.to(tl.float64), i < outputs)
        else:
            tl.store(_pointer(partial, sums.dtype) + split * outputs + i, sums, i < outputs)


@triton.jit
def _sum_block(job, address, block, split, workspace, counters, KINDS: tl.constexpr):
    """Sums of one block of outputs; True for the program that has them all in the workspace, as float64."""
    kind, outputs, splits = tl.load(job + J_KIND), tl.load(job + J_OUTPUTS), tl.load(job + J_SPLITS)
    partial, total = workspace + tl.load(job + J_PARTIAL), workspace + tl.load(job + J_TOTAL)
    width = tl.where(kind // 2 % 2 == 1, NARROW, WIDE)
    _store_sums(job, address, block, split, kind, partial, total, KINDS, 0, 8)
    complete = splits == 1
    if splits > 1:
        counter = counters + tl.load(job + J_COUNTER) + block
        complete = _arrive(counter, 1) == splits - 1
        if complete:
            tl.store(counter, 0)
            i = block * width + tl.arange(0, WIDE)
            mask = (i < outputs) & (tl.arange(0, WIDE) < width)
            sums = tl.zeros([WIDE], tl.float64)
            for s in range(splits):
                part = partial + (s * outputs + i) * tl.where(kind // 4 == FLOAT64, 8, 4)
                if kind // 4 == FLOAT64:
                    sums += tl.load(_pointer(part, tl.float64), mask, 0, cache_modifier=".cg")
                else:
                    sums += tl.load(_pointer(part, tl.float32), mask, 0, cache_modifier=".cg").to(tl.float64)
            tl.store(_pointer(total, tl.float64) + i, sums, mask)
    return complete


@triton.jit
def _word(element, seed, step, stream):
    """The random words of `element`, uint32: Philox4x32-10, key = seed, counter = (element // 4, step, stream)."""
    quad = element >> 2
    low, high = (quad & 0xFFFFFFFF).to(tl.uint32), (quad >> 32).to(tl.uint32)
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
def _choose_few(keys, units, k, chosen, is_chosen):
    """chosen[0 ... k - 1] = the units of the k least keys, by k passes over them."""
    previous = tl.full([], -0x8000000000000000, tl.int64)
    for n in range(k):
        least = tl.full([BLOCK], 0x7FFFFFFFFFFFFFFF, tl.int64)
        for first in range(0, units, BLOCK):
            j = first + tl.arange(0, BLOCK)
            key = tl.load(keys + j, j < units, 0x7FFFFFFFFFFFFFFF)
            least = tl.minimum(least, tl.where(key > previous, key, 0x7FFFFFFFFFFFFFFF))
        previous = tl.min(least, 0)
        tl.store(chosen + n, previous.to(tl.int32))
        tl.store(is_chosen + (previous & 0x7FFFFFFF), 1)


@triton.jit
def _choose_many(keys, units, k, chosen, is_chosen):
    """chosen[0 ... k - 1] = the units of the k least keys: a radix select, then a stable radix sort of those k."""
    # the k-th least score, eight bits at a time, the highest first; `rest` of those equal to it are taken
    prefix, rest = tl.full([], 0, tl.int64), k
    for shift in tl.static_range(24, -1, -8):
        count = tl.zeros([256], tl.int32)
        for first in range(0, units, BLOCK):
            j = first + tl.arange(0, BLOCK)
            key = tl.load(keys + j, j < units, 0x7FFFFFFFFFFFFFFF)
            score = (key >> 32) + 0x80000000
            same = (j < units) & (score >> (shift + 8) == prefix)
            count += tl.histogram((score >> shift & 255).to(tl.int32), 256, same)
        # the bin in which the k-th one is comes after those that end before it
        before = tl.cumsum(count, 0) < rest
        rest -= tl.sum(tl.where(before, count, 0), 0)
        prefix = prefix * 256 + tl.sum(before.to(tl.int32), 0)
    # those k in the order of their units
    source, target = keys + units, keys + 2 * units
    taken, equal = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for first in range(0, units, BLOCK):
        j = first + tl.arange(0, BLOCK)
        key = tl.load(keys + j, j < units, 0x7FFFFFFFFFFFFFFF)
        score = (key >> 32) + 0x80000000
        ties = ((j < units) & (score == prefix)).to(tl.int32)
        take = (j < units) & ((score < prefix) | ((ties > 0) & (equal + tl.cumsum(ties, 0) <= rest)))
        tl.store(source + taken + tl.cumsum(take.to(tl.int32), 0) - 1, key, take)
        tl.store(is_chosen + j, 1, take)
        taken += tl.sum(take.to(tl.int32), 0)
        equal += tl.sum(ties, 0)
    # in the order of their scores, bit by bit; equal ones keep their order
    for bit in range(32):
        tl.debug_barrier()
        zeros = tl.full([], 0, tl.int32)
        for start in range(0, k, BLOCK):
            j = start + tl.arange(0, BLOCK)
            one = (tl.load(source + j, j < k, 0) >> 32) + 0x80000000 >> bit & 1
            zeros += tl.sum(((j < k) & (one == 0)).to(tl.int32), 0)
        if (zeros > 0) & (zeros < k):
            low, high = tl.full([], 0, tl.int32), zeros
            for start in range(0, k, BLOCK):
                j = start + tl.arange(0, BLOCK)
                key = tl.load(source + j, j < k, 0)
                one = ((key >> 32) + 0x80000000 >> bit & 1) == 1
                is_low, is_high = ((j < k) & ~one).to(tl.int32), ((j < k) & one).to(tl.int32)
                place = tl.where(one, high + tl.cumsum(is_high, 0), low + tl.cumsum(is_low, 0)) - 1
                tl.store(target + place, key, j < k)
                low += tl.sum(is_low, 0)
                high += tl.sum(is_high, 0)
            source, target = target, source
    tl.debug_barrier()
    for start in range(0, k, BLOCK):
        j = start + tl.arange(0, BLOCK)
        tl.store(chosen + j, tl.load(source + j, j < k, 0).to(tl.int32), j < k)


@triton.jit
def _utility_now(
    j, group, readers, incoming, jobs, addresses, workspace, samples, elements,
    ACTIVATION: tl.constexpr, OUTGOING: tl.constexpr, INCOMING: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """y[j] in float64: activation statistic x weight statistic of a block of units."""
    mask = j < tl.load(group + G_UNITS)
    y = tl.zeros(j.shape, tl.float64)
    first_reader = tl.load(group + G_FIRST_READER)
    for r in range(first_reader, first_reader + tl.load(group + G_READERS)):
        reader = readers + r * READER
        count = tl.load(_pointer(tl.load(addresses + A_COUNT), tl.int64) + r) + tl.load(reader + R_SAMPLES)
        if count > 0:
            first_job, last_job = (
                tl.load(reader + R_FIRST_JOB),
                tl.load(reader + R_FIRST_JOB) + tl.load(reader + R_JOBS),
            )
            terms = tl.zeros([j.shape[0], POSITIONS], tl.float64)
            per_unit = tl.load(reader + R_PER_UNIT)
            for first in range(0, per_unit, POSITIONS):
                p = first + tl.arange(0, POSITIONS)
                column = (j * tl.load(reader + R_UNIT_STRIDE))[:, None]
                column += (p * tl.load(reader + R_POSITION_STRIDE))[None, :]
                inside = mask[:, None] & (p < per_unit)[None, :]
                term = tl.full(column.shape, 1.0, tl.float64)
                if ACTIVATION:
                    sums = _pointer(tl.load(addresses + A_ACTIVATION), tl.float64) + tl.load(reader + R_COLUMN)
                    term = tl.load(sums + column, inside, 0)
                    for job in range(first_job, last_job):
                        sums = _pointer(workspace + tl.load(jobs + job * JOB + J_TOTAL), tl.float64)
                        term += tl.load(sums + column, inside, 0, cache_modifier=".cg")
                    # clarena has one mean over all readers: sums first, one division at the end
                    if INCOMING != 1:
                        term /= count.to(tl.float64)
                if OUTGOING != 0:
                    sums = _pointer(workspace + tl.load(reader + R_WEIGHT_TOTAL), tl.float64)
                    fold = tl.load(reader + R_FOLD)
                    weight = tl.zeros(column.shape, tl.float64)
                    for f in range(fold):
                        weight += tl.load(sums + column * fold + f, inside, 0, cache_modifier=".cg")
                    term *= weight
                terms += tl.where(inside, term, 0.0)
            y += tl.sum(terms, 1)
    if INCOMING != 0:
        rows = tl.zeros(j.shape, tl.float64)
        first_incoming = tl.load(group + G_FIRST_INCOMING)
        for n in range(first_incoming, first_incoming + tl.load(group + G_INCOMING)):
            job = jobs + tl.load(incoming + 2 * n) * JOB
            per_unit = tl.load(incoming + 2 * n + 1)
            for p in range(per_unit):
                sums = _pointer(workspace + tl.load(job + J_TOTAL), tl.float64)
                rows += tl.load(sums + j * per_unit + p, mask, 0, cache_modifier=".cg")
    if INCOMING == 1:
        return y / samples * tl.where(mask, rows, 1.0)
    if OUTGOING != 1:
        y = y / elements
    if INCOMING == 2:
        y = y / (tl.where(mask, rows, 1.0) / tl.load(group + G_FAN_IN).to(tl.float64))
    return y


@triton.jit
def _choose(
    g, group, readers, incoming, jobs, addresses, workspace,
    ACTIVATION: tl.constexpr, OUTGOING: tl.constexpr, INCOMING: tl.constexpr, MIN_MAX: tl.constexpr,
    SCORE: tl.constexpr, ACCRUAL: tl.constexpr, COUNT: tl.constexpr, WIDE_UTILITY: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    """One group from its sums to its choice, by one program.

    u = decay * u + (1 - decay) * y and age + 1 where y is finite; score = u / (1 - decay^age), or u / age; the least k
    of the finite scores of mature units are chosen, the lower unit first.
    """
    U: tl.constexpr = tl.float64 if WIDE_UTILITY else tl.float32
    units, first_unit = tl.load(group + G_UNITS), tl.load(group + G_FIRST_UNIT)
    now = _pointer(workspace + tl.load(group + G_SCRATCH), tl.float64)
    keys = _pointer(workspace + tl.load(group + G_SCRATCH), tl.int64) + units
    utility = _pointer(tl.load(addresses + A_UTILITY), U) + first_unit
    age = _pointer(tl.load(addresses + A_AGE), tl.int32) + first_unit
    chosen = _pointer(tl.load(addresses + A_CHOSEN), tl.int32) + first_unit
    is_chosen = _pointer(tl.load(addresses + A_IS_CHOSEN), tl.int32) + first_unit
    counts = _pointer(tl.load(addresses + A_COUNT), tl.int64)
    hyper = _pointer(tl.load(addresses + A_HYPER), tl.float64)
    rate, maturity, decay = tl.load(hyper), tl.load(hyper + 1), tl.load(hyper + 2)
    pending = tl.load(_pointer(tl.load(addresses + A_PENDING), tl.float64) + g)
    num_replaced = tl.load(_pointer(tl.load(addresses + A_NUM_REPLACED), tl.int64) + g)

    first_reader = tl.load(group + G_FIRST_READER)
    last_reader = first_reader + tl.load(group + G_READERS)
    samples, elements = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    for r in range(first_reader, last_reader):
        count = tl.load(counts + r) + tl.load(readers + r * READER + R_SAMPLES)
        if count > 0:
            samples += count.to(tl.float64)
            elements += tl.load(readers + r * READER + R_ELEMENTS).to(tl.float64)
    reached = samples > 0

    low, high = tl.full([BLOCK], float("inf"), U), tl.full([BLOCK], float("-inf"), U)
    if reached:
        for first in range(0, units, BLOCK // POSITIONS):
            j = first + tl.arange(0, BLOCK // POSITIONS)
            y = _utility_now(
                j, group, readers, incoming, jobs, addresses, workspace, samples, elements,
                ACTIVATION, OUTGOING, INCOMING, POSITIONS,
            )  # fmt: skip
            tl.store(now + j, y, j < units)
    else:
        # what is not finite holds its unit
        for first in range(0, units, BLOCK):
            j = first + tl.arange(0, BLOCK)
            tl.store(now + j, float("inf"), j < units)
    tl.debug_barrier()
    if MIN_MAX:
        for first in range(0, units, BLOCK):
            j = first + tl.arange(0, BLOCK)
            y = tl.load(now + j, j < units, float("inf")).to(U)
            finite = tl.abs(y) < float("inf")
            low = tl.minimum(low, tl.where(finite, y, float("inf")))
            high = tl.maximum(high, tl.where(finite, y, float("-inf")))
    least, span = tl.min(low, 0), tl.max(high, 0) - tl.min(low, 0) + tl.full([], 1e-8, U)

    log_decay = _log(tl.where(decay > 0, decay, 1.0))
    eligible, candidates = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for first in range(0, units, BLOCK):
        j = first + tl.arange(0, BLOCK)
        y = tl.load(now + j, j < units, float("inf")).to(U)
        finite = tl.abs(y) < float("inf")
        if MIN_MAX:
            y = tl.where(finite, y - least, 0.0)
            y = y / span if WIDE_UTILITY else tl.div_rn(y, tl.zeros_like(y) + span)
        u = tl.load(utility + j, j < units, 0)
        u = tl.where(finite, decay.to(U) * u + (1.0 - decay).to(U) * y, u)
        a = tl.load(age + j, j < units, 0) + finite.to(tl.int32)
        tl.store(utility + j, u, j < units)
        tl.store(age + j, a, j < units)
        tl.store(is_chosen + j, 0, j < units)
        mature = (j < units) & (a.to(tl.float64) > maturity)
        divisor = a.to(tl.float64) if SCORE == 1 else tl.where(decay > 0, _bias_correction(a, log_decay), 1.0)
        score = (u.to(tl.float64) / tl.where(a > 0, divisor, 1.0)).to(U)
        candidate = mature & (tl.abs(score) < float("inf"))
        # a float64 score beyond float32 stays a candidate, after all others
        score = tl.minimum(tl.where(candidate, score, 0.0).to(tl.float32), 3.4028234663852886e38)
        key = (_ordered(score).to(tl.int64) << 32) | j
        tl.store(keys + j, tl.where(candidate, key, 0x7FFFFFFFFFFFFFFF), j < units)
        eligible += mature.to(tl.int32)
        candidates += candidate.to(tl.int32)

    mature_units = tl.sum(eligible, 0).to(tl.float64)
    if ACCRUAL == 1:
        mature_units = tl.where(mature_units > 0, units.to(tl.float64), 0.0)
    due = rate * mature_units
    if ACCRUAL == 2:
        due = tl.floor(due)
    pending += due
    if COUNT == 2:
        wanted = tl.where(pending > 1, 1.0, 0.0)
    elif COUNT == 0:
        wanted = tl.floor(pending)
    else:
        # the coin's element follows those of the random scores; a step in which the group was reached counts
        step = tl.load(_pointer(tl.load(addresses + A_STEP), tl.int64)) + 1
        seed = tl.load(_pointer(tl.load(addresses + A_SEED), tl.int64))
        coin = _unit_uniform(units, seed, step, tl.load(group + G_STREAM)).to(tl.float64)
        wanted = tl.floor(due) + tl.where(coin < due - tl.floor(due), 1.0, 0.0)
    k = tl.minimum(wanted, tl.sum(candidates, 0).to(tl.float64)).to(tl.int32)
    # what was loaded above must be there for all warps before it changes
    tl.debug_barrier()
    if reached:
        if k > FEW:
            _choose_many(keys, units, k, chosen, is_chosen)
        else:
            _choose_few(keys, units, k, chosen, is_chosen)
        if COUNT != 1:
            tl.store(_pointer(tl.load(addresses + A_PENDING), tl.float64) + g, pending - k.to(tl.float64))
        tl.store(_pointer(tl.load(addresses + A_NUM_REPLACED), tl.int64) + g, num_replaced + k)
    tl.store(_pointer(tl.load(addresses + A_NUM_CHOSEN), tl.int32) + g, tl.where(reached, k, 0))
    for r in range(first_reader, last_reader):
        reader = readers + r * READER
        tl.store(counts + r, 0)
        sums = _pointer(tl.load(addresses + A_ACTIVATION), tl.float64) + tl.load(reader + R_COLUMN)
        columns = units * tl.load(reader + R_PER_UNIT)
        for start in range(0, columns, BLOCK):
            c = start + tl.arange(0, BLOCK)
            tl.store(sums + c, 0.0, c < columns)
    return reached


@triton.jit
def select(
    tiles, jobs, tensors, groups, readers, incoming, addresses, workspace_tensor, counters,
    KINDS: tl.constexpr, ACTIVATION: tl.constexpr, OUTGOING: tl.constexpr, INCOMING: tl.constexpr,
    MIN_MAX: tl.constexpr, SCORE: tl.constexpr, ACCRUAL: tl.constexpr, COUNT: tl.constexpr,
    WIDE_UTILITY: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """A whole step up to the choice, for all groups.

    y = activation statistic x weight statistic; u = decay * u + (1 - decay) * y; the k least u / (1 - decay^age).
    Each program sums magnitudes of one tile of a weight or an activation. The last one of a block of outputs puts its
    parts together, the last block of a group chooses, the last group counts the step. Reads each of those tensors
    once; the parts and totals are about one in a hundred of that.

    Args:
        tiles: int32 [programs, 3], job, block of outputs, split.
        jobs, groups, readers, addresses: int64 tables of `Job`, `Group`, `Reader`, `Addresses`.
        tensors: int64 [jobs], the address of each job's first element.
        incoming: int64 [-, 2], job and outputs a unit of each producer's sums.
        workspace_tensor: the jobs' and groups' places, in bytes.
        counters: int32, 0 between launches: one a group, one for the groups, one a block of outputs.
    """
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    number, block, split = tl.load(tile), tl.load(tile + 1).to(tl.int64), tl.load(tile + 2).to(tl.int64)
    job, address = jobs + number * JOB, tl.load(tensors + number)
    workspace = workspace_tensor.to(tl.int64)
    if _sum_block(job, address, block, split, workspace, counters, KINDS):
        g = tl.load(job + J_GROUP)
        group = groups + g * GROUP
        if _arrive(counters + g, 1) == tl.load(group + G_BLOCKS) - 1:
            tl.store(counters + g, 0)
            reached = _choose(
                g, group, readers, incoming, jobs, addresses, workspace,
                ACTIVATION, OUTGOING, INCOMING, MIN_MAX, SCORE, ACCRUAL, COUNT, WIDE_UTILITY, POSITIONS,
            )  # fmt: skip
            num_groups = tl.load(addresses + A_NUM_GROUPS).to(tl.int32)
            # groups in the lower half, those that were reached in the upper one
            arrived = _arrive(counters + num_groups, 1 + (reached.to(tl.int32) << 16))
            if (arrived & 0xFFFF) == num_groups - 1:
                step = _pointer(tl.load(addresses + A_STEP), tl.int64)
                before = tl.load(step)
                # every warp has read before one writes
                tl.debug_barrier()
                tl.store(step, before + (((arrived >> 16) > 0) | reached).to(tl.int64))
                tl.store(counters + num_groups, 0)


@triton.jit
def capture(tiles, jobs, tensors, addresses, workspace_tensor, counters, KINDS: tl.constexpr):
    """activation[c] += sum over samples of abs(h[s, c]); count += samples. Reads h once; arguments as of `select`."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    number, block, split = tl.load(tile), tl.load(tile + 1).to(tl.int64), tl.load(tile + 2).to(tl.int64)
    job, address = jobs + number * JOB, tl.load(tensors + number)
    workspace = workspace_tensor.to(tl.int64)
    if _sum_block(job, address, block, split, workspace, counters, KINDS):
        # the sums were written by this program, perhaps by other warps
        tl.debug_barrier()
        width = tl.where(tl.load(job + J_KIND) // 2 % 2 == 1, NARROW, WIDE)
        i = block * width + tl.arange(0, WIDE)
        mask = (i < tl.load(job + J_OUTPUTS)) & (tl.arange(0, WIDE) < width)
        sums = tl.load(_pointer(workspace + tl.load(job + J_TOTAL), tl.float64) + i, mask, 0)
        at = _pointer(tl.load(addresses + A_ACTIVATION), tl.float64) + tl.load(job + J_COLUMN) + i
        tl.store(at, tl.load(at, mask, 0) + sums, mask)
        if block == 0:
            count = _pointer(tl.load(addresses + A_COUNT), tl.int64) + tl.load(job + J_SLOT)
            before = tl.load(count)
            tl.debug_barrier()
            tl.store(count, before + tl.load(job + J_SAMPLES))


UNIFORM, NORMAL, UNIT, FILL, FORGET = map(tl.constexpr, range(5))


class Target(NamedTuple):
    """One tensor to re-initialise: unit j owns entries start + j * unit_stride + p * position_stride of an axis.

    The axis is 0, or 1 of a tensor whose `rows` rows at a time belong to one group of a convolution.
    """

    address: int
    dtype: int
    kind: int  # UNIFORM in [-value, value) | NORMAL with deviation value | UNIT: in [0, 1) | FILL with value | FORGET
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
def reinit(tiles, targets, masks, owners, addresses, WIDE_UTILITY: tl.constexpr, DISTRIBUTION: tl.constexpr):
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
    num_chosen = tl.load(_pointer(tl.load(addresses + A_NUM_CHOSEN), tl.int32) + tl.load(target + T_GROUP))
    chosen = _pointer(tl.load(addresses + A_CHOSEN), tl.int32) + tl.load(target + T_FIRST_UNIT)
    if kind == FORGET:
        U: tl.constexpr = tl.float64 if WIDE_UTILITY else tl.float32
        utility = _pointer(tl.load(addresses + A_UTILITY), U) + tl.load(target + T_FIRST_UNIT)
        age = _pointer(tl.load(addresses + A_AGE), tl.int32) + tl.load(target + T_FIRST_UNIT)
        for first in range(0, num_chosen, BLOCK):
            i = first + tl.arange(0, BLOCK)
            j = tl.load(chosen + i, i < num_chosen, 0)
            tl.store(utility + j, 0.0, i < num_chosen)
            tl.store(age + j, 0, i < num_chosen)
    else:
        is_chosen = _pointer(tl.load(addresses + A_IS_CHOSEN), tl.int32)
        seed = tl.load(_pointer(tl.load(addresses + A_SEED), tl.int64))
        step = tl.load(_pointer(tl.load(addresses + A_STEP), tl.int64))
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
                if DISTRIBUTION == NORMAL:
                    new = (_normal(element, seed, step, tl.load(target + T_STREAM)) * value).to(tl.float32)
            elif kind != FILL:
                r = _unit_uniform(element, seed, step, tl.load(target + T_STREAM))
                new = tl.where(kind == UNIT, r, (2.0 * r - 1.0) * value.to(tl.float32))
            at = tl.load(target + T_ADDRESS)
            dtype = tl.load(target + T_DTYPE)
            if dtype >= FLOAT32:
                if dtype == FLOAT32:
                    tl.store(_pointer(at, tl.float32) + offset, new, mask)
                else:
                    tl.store(_pointer(at, tl.float64) + offset, new.to(tl.float64), mask)
            elif dtype == FLOAT16:
                tl.store(_pointer(at, tl.float16) + offset, new.to(tl.float16), mask)
            else:
                # to the nearest, ties to even; what is drawn is finite
                bits = new.to(tl.int32, bitcast=True)
                bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
                tl.store(_pointer(at, tl.int16) + offset, bits.to(tl.int16), mask)
