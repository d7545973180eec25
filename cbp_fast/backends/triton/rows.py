"""The rows of the tables that the host fills and the kernels walk, the offsets into them, and what both count in.

A row is a `NamedTuple` of integers to the host, and to the kernels the offset of each field and the size of the row.
Each says who fills it and who reads it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

# how element types are numbered in the tables
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = map(tl.constexpr, range(4))
TYPE_NUMBERS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
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
# up to so many units are chosen one after the other
MANY = tl.constexpr(8)
# what `capture` and `select` sum: abs(x), x, or abs(x - hat)
MAGNITUDES, VALUES, DISTANCES = map(tl.constexpr, range(3))


class Job(NamedTuple):
    """One sum of magnitudes: out[i] = sum over the reduced axes of abs(x[i, ...]), for `outputs` values of i.

    Filled by `plan`, read by `kernels.summing` and `kernels.capturing`.
    """

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
 J_SLOT, JOB_ROW) = map(tl.constexpr, range(len(Job._fields) + 1))  # fmt: skip


class Reader(NamedTuple):
    """One slot as `select` walks it: column (j, p) is at j * unit_stride + p * position_stride.

    Of 32 bits, as is `UnitBlock`: they wait in registers for their use. Places in the workspace are counted in 8 bytes.
    Filled by `step_plan`, read by `kernels.scoring`.
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
 R_WEIGHT_TOTAL, R_FOLD, R_ELEMENTS, READER_ROW) = map(tl.constexpr, range(len(Reader._fields) + 1))  # fmt: skip


class UnitBlock(NamedTuple):
    """Some units of a group, with all that is to know of the group.

    In the workspace a group has a key and a y of each unit, and of each block the least key, how many units are mature
    and how many of those can be chosen, and the least and the greatest y: 8 bytes each, from `keys` on.
    Filled by `step_plan`, read by `kernels.scoring` and `kernels.choosing`.
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


(B_GROUP, B_NUMBER, B_FIRST, B_HERE, B_UNIT, B_EXPECTED, B_BLOCKS, B_WIDTH, B_UNITS, B_KEYS, B_COLUMNS_PER_UNIT,
 B_FIRST_READER, B_READERS, B_FIRST_INCOMING, B_INCOMING, B_FAN_IN, B_STREAM, B_RANKED, BLOCK_ROW) = map(
    tl.constexpr, range(len(UnitBlock._fields) + 1))  # fmt: skip


class Addresses(NamedTuple):
    """Where the fields of the state are; `is_chosen` is int32, one a unit, written by `select` for `reinit`.

    Filled by `tables`, read by all kernels, by `kernels.memory.field`.
    """

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


(A_STEP, A_SEED, A_HYPER, A_PENDING, A_NUM_REPLACED, A_SAMPLES, A_ACTIVATION, A_FEATURE, A_RUNNING_MEAN, A_UTILITY,
 A_AGE, A_NUM_CHOSEN, A_CHOSEN, A_IS_CHOSEN, A_HAT, A_NUM_GROUPS, A_NUM_BLOCKS) = map(
    tl.constexpr, range(len(Addresses._fields)))  # fmt: skip


class Columns(NamedTuple):
    """The columns of one slot, as `hat` and `transfer` walk them. Filled by `tables`."""

    slot: int
    column: int
    first_unit: int
    units: int
    per_unit: int
    unit_stride: int
    position_stride: int


(C_SLOT, C_COLUMN, C_FIRST_UNIT, C_UNITS, C_PER_UNIT, C_UNIT_STRIDE, C_POSITION_STRIDE,
 COLUMNS_ROW) = map(tl.constexpr, range(len(Columns._fields) + 1))  # fmt: skip


# what `reinit` does with a target
UNIFORM, NORMAL, UNIT, FILL, FORGET, FORGET_MEAN = map(tl.constexpr, range(6))


class Target(NamedTuple):
    """One tensor to re-initialise: unit j owns entries start + j * unit_stride + p * position_stride of an axis.

    The axis is 0, or 1 of a tensor whose `rows` rows at a time belong to one group of a convolution.
    Filled by `targets`, read by `reinit` in `kernels.writing`.
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
 T_STRIDE4, T_STREAM, T_FIRST_MASK, T_MASKS, TARGET_ROW) = map(
    tl.constexpr, range(len(Target._fields) + 1))  # fmt: skip


class Mask(NamedTuple):
    """What a later region sets of a tensor stays its own: `owner` [axis] is the unit of each of its entries, or -1.

    Filled by `targets`, read by `reinit`.
    """

    owner: int  # place in `owners`
    axis: int
    rows: int
    columns: int


M_OWNER, M_AXIS, M_ROWS, M_COLUMNS, MASK_ROW = map(tl.constexpr, range(len(Mask._fields) + 1))


class Transfer(NamedTuple):
    """What the replaced units of one slot give to a bias: weight[o, column] * mean of the column, for output o.

    The weight's units lie as in `Target`; `columns` is the slot's row of `Columns`.
    Filled by `targets`, read by `transfer` in `kernels.writing`.
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
 TRANSFER_ROW) = map(tl.constexpr, range(len(Transfer._fields) + 1))  # fmt: skip


class Bias(NamedTuple):
    """One bias, and which transfers it gets, one after the other. Filled by `targets`, read by `transfer`."""

    address: int
    dtype: int
    size: int
    stride: int
    first: int
    transfers: int


D_ADDRESS, D_DTYPE, D_SIZE, D_STRIDE, D_FIRST, D_TRANSFERS, BIAS_ROW = map(tl.constexpr, range(len(Bias._fields) + 1))
