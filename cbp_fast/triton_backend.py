"""The Triton backend: the tables that the kernels walk, and their launches; `reference` says what its functions do.

Two launches a step, whatever the number of layers; in several processes one more, and a few small copies. Tables are
built when shapes or strides change, and kept; addresses of tensors are sent when one has changed.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor
from torch.compiler import is_compiling

from . import reference, triton_kernels
from .rules import Rule
from .state import DRAW, Region, Slot, State
from .triton_kernels import Addresses, Group, Job, Mask, Reader, Target
from .unit_groups import out_axis

_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_WIDE, _NARROW, _BLOCK = (c.value for c in (triton_kernels.WIDE, triton_kernels.NARROW, triton_kernels.BLOCK))
_TILE = _WIDE * _NARROW
# tables of so many shapes of activations, and of so many lists of tensors, are kept
_KEPT = 16

_T = TypeVar("_T")


class Axis(NamedTuple):
    """One axis of a tensor as it lies in memory."""

    size: int
    stride: int  # in elements


def why_not(rule: Rule, device: torch.device, split: bool) -> str | None:
    """Why this backend cannot serve a rule on a device, with `split` parameters or whole ones; None if it can."""
    if split:
        return "does not serve parameters that are split among processes"
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        return "serves CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type == "cuda" and triton.knobs.runtime.interpret:
        return "cannot reach a GPU's memory from Triton's interpreter (unset TRITON_INTERPRET)"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs a GPU of compute capability 8.0 and {torch.cuda.get_device_name(device)} has less"
    if rule.keeps_mean or rule.utility == "random":
        return f"has no kernel for a rule with {'transfer_bias' if rule.transfer_bias else f'utility {rule.utility!r}'}"
    return None


def _merged(axes: Sequence[Axis]) -> list[Axis]:
    """The same elements with fewer axes, the greatest stride first."""
    merged: list[Axis] = []
    for axis in sorted((a for a in axes if a.size != 1), key=lambda a: -a.stride):
        if merged and merged[-1].stride == axis.size * axis.stride:
            merged[-1] = Axis(merged[-1].size * axis.size, axis.stride)
        else:
            merged.append(axis)
    return merged


class _Sum(NamedTuple):
    """A sum of magnitudes over `reduced` axes of a tensor, for outputs as in `Job`."""

    tensor: int  # its number among the weights and activations of a step
    offset: int  # of its first element, in elements
    dtype: torch.dtype
    outputs: int
    first: int
    period: int
    far: int
    near: int
    reduced: list[Axis]
    group: int
    column: int = 0
    samples: int = 0
    slot: int = 0


def _split_axes(s: _Sum) -> tuple[list[Axis], Axis, bool]:
    """Outer axes, the axis that tiles run along, and whether its elements are nearer than the outputs."""
    axes = list(s.reduced)
    if not axes:
        return [], Axis(1, 0), False
    along = s.near != 1 and axes[-1].stride < s.near
    inner = axes.pop() if along else axes.pop(max(range(len(axes)), key=lambda i: axes[i].size))
    return axes, inner, along


def _peeled(s: _Sum) -> list[_Sum]:
    """A job has three outer axes; what has more becomes several sums."""
    outer, _, _ = _split_axes(s)
    if len(outer) <= 3:
        return [s]
    axis = outer[0]
    rest = [a for a in s.reduced if a is not axis]
    parts = [s._replace(offset=s.offset + i * axis.stride, reduced=rest) for i in range(axis.size)]
    return [p for part in parts for p in _peeled(part)]


class _Plan:
    """The tables of one step: which sums there are, and which program takes which tile of them."""

    def __init__(self, sums: Sequence[_Sum], aligned: Sequence[int], num_groups: int, device: torch.device) -> None:
        work = sum(s.outputs * math.prod(a.size for a in s.reduced) for s in sums)
        # enough programs for any GPU, each with enough to do
        share = max(1, min(max(work // 1024, 2**14), 2**16) // _TILE)
        self.totals: list[int] = []
        self.blocks = [0] * num_groups
        self.kinds = 0
        jobs, tiles, place = [], [], 0
        # one for each group and one for the groups come first
        counter = num_groups + 1
        for number, s in enumerate(sums):
            outer, inner, along = _split_axes(s)
            size, item = (_NARROW, s.dtype.itemsize) if along else (_WIDE, s.dtype.itemsize)
            blocks = -(-s.outputs // size)
            outer_size = math.prod(a.size for a in outer)
            tiles_of_block = outer_size * -(-inner.size // (_TILE // size))
            # the parts of a split sum are read again: few, beside what was summed
            steps = max(share, 32 // item, -(-tiles_of_block // 128))
            splits = max(1, -(-tiles_of_block // steps))
            steps = -(-tiles_of_block // splits)
            splits = max(1, -(-tiles_of_block // steps)) if steps else 1
            apart = (s.near, inner.stride) if along else (inner.stride, s.near)
            is_aligned = (
                not outer
                and s.period >= s.outputs + s.first
                and apart[1] == 1
                and (apart[0] * item % 16 == 0 or (s.outputs if along else inner.size) == 1)
                and (inner.size if along else s.outputs) * item % 16 == 0
                and (aligned[s.tensor] + s.offset * item) % 16 == 0
            )
            kind = 4 * _TYPES[s.dtype] + 2 * along + is_aligned
            self.kinds |= 1 << kind
            three = [Axis(1, 0)] * (3 - len(outer)) + outer
            partial = place
            place += splits * s.outputs * 8 if splits > 1 else 0
            jobs.append(
                Job(
                    kind,
                    s.outputs,
                    s.first,
                    s.period,
                    s.far,
                    s.near,
                    inner.size,
                    inner.stride,
                    outer_size,
                    three[1].size,
                    three[2].size,
                    three[0].stride,
                    three[1].stride,
                    three[2].stride,
                    splits,
                    steps,
                    partial,
                    place,
                    s.group,
                    counter,
                    s.column,
                    s.samples,
                    s.slot,
                )
            )
            self.totals.append(place)
            place += s.outputs * 8
            counter += blocks if splits > 1 else 0
            self.blocks[s.group] += blocks
            tiles += [(number, block, split) for block in range(blocks) for split in range(splits)]
        self.jobs = torch.tensor(jobs, dtype=torch.int64).to(device)
        self.tiles = torch.tensor(tiles, dtype=torch.int32).to(device)
        self.counters = torch.zeros(counter, dtype=torch.int32, device=device)
        self.place = place
        # which of a step's tensors a job reads, and from which byte
        self.sources = [(s.tensor, s.offset * s.dtype.itemsize) for s in sums]
        self.sender = _Sender(len(sums), device)
        self.dirty = False

    def allocate(self, scratch: int) -> None:
        """Make the workspace, with so many more bytes."""
        self.workspace = torch.empty((self.place + scratch) // 8, dtype=torch.int64, device=self.counters.device)


def _activation_sums(state: State, held: Sequence[Tensor], slots: Sequence[int]) -> list[_Sum]:
    """abs(h) over all samples, for each column of the slot that h belongs to."""
    sums = []
    for number, (h, s) in enumerate(zip(held, slots, strict=True)):
        slot = state.slots[s]
        axis = h.dim() - 1 - slot.spatial
        axes = [Axis(*a) for a in zip(h.shape, h.stride(), strict=True)]
        feature = axes.pop(axis)
        columns = slot.columns.stop - slot.columns.start
        samples = math.prod(a.size for a in axes)
        one = _Sum(
            number,
            slot.block.start * feature.stride,
            h.dtype,
            columns,
            0,
            columns,
            0,
            feature.stride,
            _merged(axes),
            slot.group,
            slot.columns.start,
            samples,
            s,
        )
        sums += _peeled(one) if samples else []
    return sums


def _input_sum(weight: Tensor, number: int, slot: Slot, groups: int, out: int) -> tuple[_Sum, int]:
    """abs(W_out) by column, with the number of neighbouring outputs that make up a column."""
    shape, stride, columns = weight.shape, weight.stride(), slot.columns.stop - slot.columns.start
    kernel = _merged([Axis(*a) for a in zip(shape[2:], stride[2:], strict=True)])
    inputs, outputs = Axis(shape[1 - out], stride[1 - out]), Axis(shape[out] // groups, stride[out])
    fold, near, reduced = 1, inputs.stride, [outputs, *kernel]
    # rows dense in memory are read along it, and the kernel's positions put together afterwards
    if len(kernel) == 1 and inputs.stride == kernel[0].size * kernel[0].stride:
        (fold, near), reduced = kernel[0], [outputs]
    first, period, far, offset = 0, columns * fold, 0, slot.block.start * inputs.stride
    if groups > 1:
        first, period, far, offset = slot.block.start * fold, inputs.size * fold, outputs.size * outputs.stride, 0
    return _Sum(
        number, offset, weight.dtype, columns * fold, first, period, far, near, _merged(reduced), slot.group
    ), fold


def _output_sum(weight: Tensor, number: int, group: int, units: int, block: Sequence[int], out: int) -> _Sum:
    """abs(W_in) by row of each unit."""
    start, unit_stride, per_unit, position_stride = block
    axes = [Axis(*a) for a in zip(weight.shape, weight.stride(), strict=True)]
    stride = axes.pop(out).stride
    outputs, near = units * per_unit, position_stride * stride
    period, far = per_unit, unit_stride * stride
    if per_unit == 1 or unit_stride == per_unit * position_stride:
        period, far, near = outputs, 0, far if per_unit == 1 else near
    return _Sum(number, start * stride, weight.dtype, outputs, 0, period, far, near, _merged(axes), group)


class _Sender:
    """A small int64 table that changes from step to step, on its way to the device without waiting for it."""

    _RING = 4

    def __init__(self, length: int, device: torch.device) -> None:
        self._length = length
        self._device = device
        self._last: list[int] = []
        self._ring: list[tuple[Tensor, torch.cuda.Event]] = []
        self._next = 0
        self._target = torch.empty(0, dtype=torch.int64)
        # a CUDA graph reads its own pinned buffer at every replay; none can be had while a stream is captured
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def _pinned(self) -> Tensor:
        return torch.empty(self._length, dtype=torch.int64, pin_memory=True)

    def send(self, values: list[int]) -> Tensor:
        """A device tensor of these values, for kernels launched after this call.

        Raises:
            RuntimeError: a graph is captured before a step of this shape has run.
        """
        if self._device.type == "cpu":
            return torch.tensor(values, dtype=torch.int64)
        if torch.cuda.is_current_stream_capturing():
            if self._spare is None:
                raise RuntimeError("run a step with inputs of the same shape before each capture of a CUDA graph")
            pinned, self._spare = self._spare, None
            target = torch.empty(self._length, dtype=torch.int64, device=self._device)
            self._captured += [pinned, target]
            pinned.copy_(torch.tensor(values, dtype=torch.int64))
            return target.copy_(pinned, non_blocking=True)
        if self._spare is None:
            self._spare = self._pinned()
        if values == self._last:
            return self._target
        if not self._ring:
            self._target = torch.empty(self._length, dtype=torch.int64, device=self._device)
            self._ring = [(self._pinned(), torch.cuda.Event()) for _ in range(self._RING)]
        pinned, sent = self._ring[self._next]
        self._next = (self._next + 1) % self._RING
        # the copy of four sends ago has long been made
        sent.synchronize()
        pinned.copy_(torch.tensor(values, dtype=torch.int64))
        self._target.copy_(pinned, non_blocking=True)
        sent.record()
        self._last = values
        return self._target


def meta_of(rule: Rule, wide: bool, flattened: bool) -> dict[str, Any]:
    """What `select` is compiled for, besides the kinds of sums: a rule, float64 utilities, several columns a unit."""
    return {
        "ACTIVATION": rule.activation is not None,
        "OUTGOING": (None, "sum", "mean").index(rule.outgoing),
        "INCOMING": (None, "times_sum", "divide").index(rule.incoming),
        "MIN_MAX": rule.name == "clarena",
        "SCORE": int(rule.name == "clarena"),
        "ACCRUAL": 2 if rule.name == "clarena" else int(rule.accrual == "all"),
        "COUNT": 2 if rule.name == "clarena" else int(not rule.accumulate),
        "WIDE_UTILITY": wide,
        # tiles of units times positions: a single position would waste all but one of a tile's lanes
        "POSITIONS": 32 if flattened else 1,
    }


class _Tables:
    """Everything that one state's launches need, but for the tensors of a step."""

    def __init__(self, state: State) -> None:
        device = self.device = state.buffer.device
        self.address = state.buffer.data_ptr()
        self.is_chosen = torch.zeros(state.age.numel(), dtype=torch.int32, device=device)
        fields = (
            state.step,
            state.seed,
            state.hyper,
            state.pending,
            state.num_replaced,
            state.count,
            state.activation,
            state.utility,
            state.age,
            state.num_chosen,
            state.chosen,
            self.is_chosen,
        )
        addresses = Addresses._make([*(f.data_ptr() for f in fields), len(state.layouts)])
        self.addresses = torch.tensor(addresses, dtype=torch.int64).to(device)
        self.plans: dict[object, _Step] = {}
        self.captures: dict[object, list[_Plan]] = {}
        self.targets: dict[object, _Targets] = {}
        self.captured: list[object] = []
        self.wide = state.utility.dtype == torch.float64
        self.meta = meta_of(state.rule, self.wide, any(layout.columns_per_unit > 1 for layout in state.layouts))

    def on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def used(self, tables: _T) -> _T:
        """What a CUDA graph uses must stay for its replays."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.captured.append(tables)
        return tables


def _keep(entries: dict[object, _T], key: object, value: _T) -> None:
    """Put an entry into a table of tables, which forgets the oldest."""
    if len(entries) >= _KEPT:
        entries.pop(next(iter(entries)))
    entries[key] = value


_tables: WeakKeyDictionary[State, _Tables] = WeakKeyDictionary()


def _tables_of(state: State) -> _Tables:
    tables = _tables.get(state)
    if tables is None or tables.address != state.buffer.data_ptr() or tables.device != state.buffer.device:
        tables = _tables[state] = _Tables(state)
    return tables


def _launch(tables: _Tables, plan: _Plan, kernel: object, args: Sequence[Tensor], meta: dict[str, Any]) -> None:
    """Launch a kernel that counts its programs; whatever stops it, the next one finds the counters at zero."""
    tables.used(plan)
    if plan.dirty:
        plan.counters.zero_()
    plan.dirty = True
    with tables.on_device():
        triton_kernels.launch(kernel, (len(plan.tiles),), args, meta)
    plan.dirty = False


def _layout_of(tensors: Sequence[Tensor]) -> tuple[object, ...]:
    """What a plan depends on; the same for the same memory layout and alignment."""
    return tuple((t.shape, t.stride(), t.dtype, t.data_ptr() % 16) for t in tensors)


def capture_(state: State, slot: int, h: Tensor) -> None:
    """See `reference.capture_`."""
    if not state.rule.activation or is_compiling():
        # a compiler makes a kernel of its own from this
        reference.capture_(state, slot, h)
    else:
        _capture(state, [h], [slot])


def _capture(state: State, held: Sequence[Tensor], slots: Sequence[int]) -> None:
    """Add forwards' activations to their sums, in one launch where each slot was seen in one forward."""
    full = [i for i, h in enumerate(held) if h.numel()]
    held, slots = [held[i] for i in full], [slots[i] for i in full]
    tables = _tables_of(state)
    key = (tuple(slots), _layout_of(held))
    plans = tables.captures.get(key)
    if plans is None:
        plans = []
        for sums in _apart(_activation_sums(state, held, slots)):
            plans.append(_Plan(sums, [h.data_ptr() % 16 for h in held], len(state.layouts), tables.device))
            plans[-1].allocate(0)
        _keep(tables.captures, key, plans)
    for plan in plans:
        tensors = plan.sender.send([held[tensor].data_ptr() + offset for tensor, offset in plan.sources])
        args = (plan.tiles, plan.jobs, tensors, tables.addresses, plan.workspace, plan.counters)
        _launch(tables, plan, triton_kernels.capture, args, {"KINDS": plan.kinds})


def _apart(sums: Sequence[_Sum]) -> list[list[_Sum]]:
    """Lists in which no two sums belong to the same columns; only the first part of an activation counts samples."""
    apart: list[list[_Sum]] = []
    seen: set[int] = set()
    for s in sums:
        s = s._replace(samples=0) if s.tensor in seen else s
        seen.add(s.tensor)
        place = next((a for a in apart if all(other.slot != s.slot for other in a)), None)
        if place is None:
            apart.append([s])
        else:
            place.append(s)
    return apart


@torch.no_grad()
def sum_(state: State, weights: Sequence[Tensor], held: Sequence[Tensor], slots: Sequence[int]) -> None:
    """See `reference.sum_`; of processes that have all weights, which `choose_` reads."""
    assert not weights
    if state.rule.activation:
        _capture(state, held, slots)
    else:
        for number, h in zip(slots, held, strict=True):
            reference.capture_(state, number, h)
    for total, mine in zip(reference.totals(state), (state.count, state.activation), strict=False):
        total.copy_(mine)


@torch.no_grad()
def choose_(state: State, weights: Sequence[Tensor]) -> int:
    """See `reference.choose_`."""
    for mine, total in zip((state.count, state.activation), reference.totals(state), strict=False):
        mine.copy_(total)
    return select_(state, weights, [], [])


class _Step(_Plan):
    """The plan of a whole step: sums over held activations and weights, then every group's choice."""

    def __init__(self, state: State, weights: Sequence[Tensor], held: Sequence[Tensor], slots: Sequence[int]) -> None:
        tensors = [*held, *weights]
        order = sorted(range(len(held)), key=lambda i: slots[i])
        held, slots = [held[i] for i in order], [slots[i] for i in order]
        tensors[: len(held)] = held
        sums = _activation_sums(state, held, slots)
        activations = [s.slot for s in sums]
        # only the first part of a divided activation brings its samples
        samples = [0] * len(state.slots)
        for h, s in zip(held, slots, strict=True):
            slot = state.slots[s]
            samples[s] += h.numel() // h.shape[h.dim() - 1 - slot.spatial]
        folds, sum_of_slot = [1] * len(state.slots), [0] * len(state.slots)
        for i, slot in enumerate(state.slots):
            if state.rule.outgoing:
                module, number = state.modules[slot.weight], len(held) + slot.weight
                groups_, out = getattr(module, "groups", 1), out_axis(module)
                one, folds[i] = _input_sum(tensors[number], number, slot, groups_, out)
                sum_of_slot[i] = len(sums)
                sums.append(one)
        incoming = []
        for g, layout in enumerate(state.layouts):
            for i, block in layout.incoming:
                number = len(held) + i
                one = _output_sum(tensors[number], number, g, layout.num_units, block, out_axis(state.modules[i]))
                incoming += [len(sums), block.per_unit]
                sums.append(one)
        device = state.buffer.device
        super().__init__(sums, [t.data_ptr() % 16 for t in tensors], len(state.layouts), device)
        self.order = order
        readers, groups, first_incoming, scratch = [], [], 0, self.place
        for i, slot in enumerate(state.slots):
            _, unit_stride, per_unit, position_stride = slot.block
            elements = per_unit
            if state.rule.outgoing:
                elements = per_unit * (weights[slot.weight].numel() // slot.features)
            first = bisect_left(activations, i)
            readers.append(
                Reader(
                    slot.columns.start,
                    per_unit,
                    unit_stride,
                    position_stride,
                    samples[i],
                    first,
                    bisect_right(activations, i) - first,
                    self.totals[sum_of_slot[i]] if state.rule.outgoing else 0,
                    folds[i],
                    elements,
                )
            )
        for g, layout in enumerate(state.layouts):
            fan_in = 0
            for i, block in layout.incoming:
                fan_in += block.per_unit * (weights[i].numel() // weights[i].shape[out_axis(state.modules[i])])
            groups.append(
                Group(
                    layout.units.start,
                    layout.num_units,
                    layout.slots[0],
                    len(layout.slots),
                    first_incoming,
                    len(layout.incoming),
                    fan_in,
                    layout.stream,
                    self.blocks[g],
                    scratch,
                )
            )
            first_incoming += len(layout.incoming)
            scratch += 4 * 8 * layout.num_units
        self.readers = torch.tensor(readers, dtype=torch.int64).to(device)
        self.groups = torch.tensor(groups, dtype=torch.int64).to(device)
        self.incoming = torch.tensor(incoming or [0], dtype=torch.int64).to(device)
        self.allocate(scratch - self.place)


@torch.no_grad()
def select_(state: State, weights: Sequence[Tensor], held: Sequence[Tensor], slots: Sequence[int]) -> int:
    """See `reference.select_`."""
    full = [i for i, h in enumerate(held) if h.numel()]
    held, slots = [held[i] for i in full], [slots[i] for i in full]
    if state.buffer.is_cpu and not held and not state.count.any():
        return 0
    tables = _tables_of(state)
    key = (tuple(slots), _layout_of([*held, *weights]))
    plan = tables.plans.get(key)
    if plan is None:
        plan = _Step(state, weights, held, slots)
        _keep(tables.plans, key, plan)
    addresses = [held[i].data_ptr() for i in plan.order] + [w.data_ptr() for w in weights]
    tensors = plan.sender.send([addresses[tensor] + offset for tensor, offset in plan.sources])
    args = (plan.tiles, plan.jobs, tensors, plan.groups, plan.readers, plan.incoming, tables.addresses)
    _launch(
        tables,
        plan,
        triton_kernels.select,
        (*args, plan.workspace, plan.counters),
        {"KINDS": plan.kinds, **tables.meta},
    )
    return int(state.num_chosen.sum()) if state.buffer.is_cpu else -1


class _Targets:
    """The tables of one re-initialisation."""

    def __init__(self, state: State, numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
        device = state.buffer.device
        regions = [state.regions[n >> 1] for n in numbers]
        # what is written, so that regions which write the same may do so in any order
        writes = [
            (r.kind == DRAW and not n & 1, r.stream, r.distribution, 0.0 if n & 1 else r.value)
            for n, r in zip(numbers, regions, strict=True)
        ]
        targets: list[Target] = []
        masks: list[Mask] = []
        owners: list[Tensor] = []
        tiles = []
        for i, (region, tensor) in enumerate(zip(regions, tensors, strict=True)):
            draws, _, distribution, value = writes[i]
            first_mask = len(masks)
            for j in range(i + 1, len(regions)):
                later = regions[j]
                if tensors[j] is tensor and writes[j] != writes[i] and later.axis != region.axis:
                    rows, columns = (tensor.shape[0] // later.conv_groups, tensor.shape[1])
                    masks.append(Mask(sum(map(len, owners)), later.axis, rows, columns))
                    owners.append(_owners(state, later, tensor.shape))
            shape = (*tensor.shape, *(1,) * (5 - tensor.dim()))
            strides = (*tensor.stride(), *(0,) * (5 - tensor.dim()))
            inner = math.prod(shape[2:])
            start, unit_stride, per_unit, position_stride = region.block
            rows = shape[0] // region.conv_groups
            elements = per_unit * inner * (rows if region.axis else shape[1])
            (bits,) = struct.unpack("q", struct.pack("d", value))
            kind = ("uniform", "normal", "unit").index(distribution) if draws else 3
            programs = min(-(-elements // _BLOCK), 1024)
            tiles += [(len(targets), program) for program in range(programs)]
            targets.append(
                Target(  # type: ignore[call-arg]
                    tensor.data_ptr(),
                    _TYPES[tensor.dtype],
                    kind,
                    bits,
                    region.group,
                    state.layouts[region.group].units.start,
                    elements,
                    programs,
                    start,
                    unit_stride,
                    position_stride,
                    region.axis,
                    rows,
                    shape[1],
                    inner,
                    shape[3],
                    shape[4],
                    *strides,
                    region.stream,
                    first_mask,
                    len(masks) - first_mask,
                )
            )
        for g, layout in enumerate(state.layouts):
            tiles.append((len(targets), 0))
            targets.append(Target._make([0, 0, 4, 0, g, layout.units.start, *[0] * (len(Target._fields) - 6)]))
        self.tiles = torch.tensor(tiles, dtype=torch.int32).to(device)
        self.targets = torch.tensor(targets, dtype=torch.int64).to(device)
        self.masks = torch.tensor(masks or [[0]], dtype=torch.int64).to(device)
        self.owners = torch.cat(owners).to(device) if owners else torch.zeros(1, dtype=torch.int32, device=device)


def _owners(state: State, region: Region, shape: Sequence[int]) -> Tensor:
    """Which unit owns each index of a region's axis, in the numbering of all groups; -1 for none."""
    units = state.layouts[region.group].units
    size = shape[0] if region.axis == 0 else shape[1] * region.conv_groups
    start, unit_stride, per_unit, position_stride = region.block
    owners = torch.full((size,), -1, dtype=torch.int32)
    places = owners[start:].as_strided((units.stop - units.start, per_unit), (unit_stride, position_stride))
    places.copy_(torch.arange(units.start, units.stop, dtype=torch.int32)[:, None].expand_as(places))
    return owners


@torch.no_grad()
def reinit_(state: State, regions: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """See `reference.reinit_`."""
    tables = _tables_of(state)
    key = (tuple(regions), tuple((t.data_ptr(), t.stride(), t.dtype) for t in tensors))
    targets = tables.targets.get(key)
    if targets is None:
        targets = _Targets(state, regions, tensors)
        _keep(tables.targets, key, targets)
    args = (targets.tiles, targets.targets, targets.masks, targets.owners, tables.addresses)
    meta = {"WIDE_UTILITY": tables.wide, "DISTRIBUTION": ("uniform", "normal", "unit").index(state.rule.distribution)}
    tables.used(targets)
    with tables.on_device():
        triton_kernels.launch(triton_kernels.reinit, (len(targets.tiles),), args, meta)
