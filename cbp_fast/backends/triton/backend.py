"""The Triton backend: the tables that the kernels walk, and their launches; `reference` says what its functions do.

Two launches a step, whatever the number of layers; in several processes one more, and a few small copies. Tables are
built when shapes or strides change, and kept; addresses of tensors are sent when one has changed.
"""

from __future__ import annotations

import logging
import math
import struct
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from threading import Timer
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor
from torch.compiler import is_compiling

from ...groups.layers import out_axis
from ...rules.rule import Rule
from ...state.layout import Slot
from ...state.regions import DRAW, TRANSFER, Region
from ...state.state import State
from ...tensors.native import describe
from .. import reference
from . import kernels as triton_kernels
from .kernels import Addresses, Bias, Block, Columns, Job, Mask, Reader, Target, Transfer
from .specialising import at_most, kernels_of, meta_of, score_meta

_log = logging.getLogger("cbp_fast")
_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_WIDE, _NARROW, _BLOCK = (c.value for c in (triton_kernels.WIDE, triton_kernels.NARROW, triton_kernels.BLOCK))
_UNITS, _FEWER_UNITS, _MANY = (c.value for c in (triton_kernels.UNITS, triton_kernels.FEWER_UNITS, triton_kernels.MANY))
_TILE = _WIDE * _NARROW
# tables of so many shapes of activations, of each reader, and of so many lists of tensors, are kept
_KEPT = 16
_BEFORE_CAPTURE = "run a step with inputs of the same shape before each capture of a CUDA graph"
_NOTHING = nullcontext()
# seconds after which it is said that kernels are compiled
_QUICK = 1.0
_COMPILING = "compiling %s for %s, once; they are kept in %s"

_T = TypeVar("_T")


class Axis(NamedTuple):
    """One axis of a tensor as it lies in memory."""

    size: int
    stride: int  # in elements


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def why_not(rule: Rule, device: torch.device, split: bool) -> str | None:
    """Why this backend cannot serve a rule on a device, with `split` parameters or whole ones; None if it can."""
    if split:
        return "does not serve parameters that are split among processes"
    if device.type == "cpu" and not is_interpreted():
        return "serves CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type == "cuda" and is_interpreted():
        return "cannot reach a GPU's memory from Triton's interpreter (unset TRITON_INTERPRET)"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs a GPU of compute capability 8.0 and {torch.cuda.get_device_name(device)} has less"
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
    fold: int = 1  # neighbouring outputs that make up a column
    per_unit: int = 1  # columns of a unit, and whether they lie position by position; rows have been put together
    by_position: bool = False
    column: int = 0
    samples: int = 0
    slot: int = -1

    def units(self, first: int, end: int, num_units: int) -> tuple[int, int]:
        """First unit of a run of outputs, and the one after its last; past the last unit it goes on with the first."""
        low, high = first // self.fold, -(-end // self.fold)
        if not self.by_position:
            return low // self.per_unit, -(-high // self.per_unit)
        return low % num_units, low % num_units + min(high - low, num_units)


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


def _blocks_of(state: State) -> list[tuple[int, int]]:
    """Units that a block of each group has, and how many blocks there are.

    One program may have to finish all blocks whose sums are in one block of outputs: of units with several columns, as
    many as those are of, and no more than pays.
    """
    found = []
    for layout in state.layouts:
        per_unit, unit_stride = layout.columns_per_unit, state.slots[layout.slots[0]].block.unit_stride
        width = _UNITS
        if per_unit > 1:
            width = 32 if unit_stride == 1 else max(_FEWER_UNITS, min(32, _WIDE // per_unit))
        found.append((width, -(-layout.num_units // width)))
    return found


class _Plan:
    """The tables of one launch over sums: which there are, and which program takes which tile of them."""

    def __init__(self, state: State, sums: Sequence[_Sum], aligned: Sequence[int]) -> None:
        work = sum(s.outputs * math.prod(a.size for a in s.reduced) for s in sums)
        # programs for every multiprocessor of a large GPU, of two tiles and more; for all GPUs the same, since sums
        # that are split in another way would round in another way
        share = min(max(work // 512, 2**12), 2**16) // _TILE
        self.totals: list[int] = []
        types = 0
        jobs: list[int] = []
        tiles: list[int] = []
        place = 0
        blocks_of = _blocks_of(state)
        first_block = [0, *accumulate(blocks for _, blocks in blocks_of)]
        expected = [0] * first_block[-1]
        # one for each block of units, one for each group and one for the groups come first
        counter = len(expected) + len(blocks_of) + 1
        for number, s in enumerate(sums):
            outer, inner, along = _split_axes(s)
            size, item = (_NARROW, s.dtype.itemsize) if along else (_WIDE, s.dtype.itemsize)
            blocks = -(-s.outputs // size)
            apart = (s.near, inner.stride) if along else (inner.stride, s.near)
            is_aligned = (
                not outer
                and s.first == 0
                and s.period >= s.outputs
                and apart[1] == 1
                and (apart[0] * item % 16 == 0 or (s.outputs if along else inner.size) == 1)
                and (inner.size if along else s.outputs) * item % 16 == 0
                and (aligned[s.tensor] + s.offset * item) % 16 == 0
            )
            outer_size = math.prod(a.size for a in outer)
            reduced = _TILE // size // (1 if is_aligned and item < 8 else 2)
            tiles_of_block = outer_size * -(-inner.size // reduced)
            # the parts of a split sum are read again: few, beside what was summed
            steps = max(share, 8 // item, -(-tiles_of_block // 128))
            splits = max(1, -(-tiles_of_block // steps))
            steps = -(-tiles_of_block // splits)
            splits = max(1, -(-tiles_of_block // steps)) if steps else 1
            kind = 4 * _TYPES[s.dtype] + 2 * along + is_aligned
            types |= 1 << _TYPES[s.dtype]
            three = [Axis(1, 0)] * (3 - len(outer)) + outer
            partial = place
            place += splits * s.outputs * 8 if splits > 1 else 0
            jobs += Job(
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
            self.totals.append(place)
            place += s.outputs * 8
            counter += blocks if splits > 1 else 0
            (width, group_blocks), layout = blocks_of[s.group], state.layouts[s.group]
            for i in range(blocks):
                unit, end = s.units(i * size, min((i + 1) * size, s.outputs), layout.num_units)
                first, last = unit // width, (end - 1) // width
                if end > layout.num_units:
                    # from the last block on to the first ones
                    last = group_blocks + (end - layout.num_units - 1) // width
                touched = min(last - first + 1, group_blocks)
                for b in range(first, first + touched):
                    expected[first_block[s.group] + b % group_blocks] += 1
                first += first_block[s.group]
                for split in range(splits):
                    tiles += (number, i, split, first, touched, first_block[s.group + 1], group_blocks)
        self.programs, self.expected, self.types = len(tiles) // 7, expected, types
        self.jobs, self.tiles, self.counters = upload(
            state.buffer.device, (jobs or [0], 64), (tiles or [0], 32), ([0] * counter, 32)
        )
        self.place = place
        # which of a step's tensors a job reads, and from which byte
        self.sources = [(s.tensor, s.offset * s.dtype.itemsize) for s in sums]
        self.sender = _Sender(self.sources, state.buffer.device)
        self.dirty = False

    def allocate(self, scratch: int) -> None:
        """Make the workspace, with so many more bytes."""
        self.workspace = torch.empty((self.place + scratch) // 8, dtype=torch.int64, device=self.counters.device)


def upload(device: torch.device, *tables: tuple[Sequence[int], int]) -> list[Tensor]:
    """Integers of 32 or 64 bits each as tensors on a device, in one copy that nobody waits for.

    Raises:
        RuntimeError: a CUDA graph is captured, in which the copy would be made at every replay and not now.
    """
    if is_capturing(device):
        raise RuntimeError(_BEFORE_CAPTURE)
    parts = []
    for numbers, bits in tables:
        part = torch.tensor(numbers, dtype=torch.int64 if bits == 64 else torch.int32).view(torch.uint8)
        # so that each begins where 16 bytes can be read at once
        parts.append(torch.nn.functional.pad(part, (0, -len(part) % 16)))
    together = torch.cat(parts)
    if device.type != "cpu":
        together = together.pin_memory().to(device, non_blocking=True)
    placed, at = [], 0
    for (numbers, bits), part in zip(tables, parts, strict=True):
        dtype = torch.int64 if bits == 64 else torch.int32
        placed.append(together[at : at + len(numbers) * bits // 8].view(dtype))
        at += len(part)
    return placed


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph of the device's current stream is captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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
            column=slot.columns.start,
            samples=samples,
            slot=s,
            **_arranged(slot),
        )
        sums += _peeled(one) if samples else []
    return sums


def _input_sum(weight: Tensor, number: int, slot: Slot, groups: int, out: int) -> _Sum:
    """abs(W_out) by column, or by several neighbouring outputs for each column."""
    shape, stride, columns = weight.shape, weight.stride(), slot.columns.stop - slot.columns.start
    kernel = _merged([Axis(*a) for a in zip(shape[2:], stride[2:], strict=True)])
    inputs, outputs = Axis(shape[1 - out], stride[1 - out]), Axis(shape[out] // groups, stride[out])
    fold, near, reduced = 1, inputs.stride, [outputs, *kernel]
    # rows dense in memory are read along it, and the kernel's positions put together afterwards
    if len(kernel) == 1 and inputs.stride == kernel[0].size * kernel[0].stride:
        (fold, near), reduced = kernel[0], [outputs]
    # of a grouped convolution, whose columns lie in the rows of their group, from the first group on that is read
    above, start = divmod(slot.block.start, inputs.size) if groups > 1 else (0, slot.block.start)
    group_stride = outputs.size * outputs.stride
    first, period, far, offset = start * fold, inputs.size * fold, group_stride, above * group_stride
    if groups == 1 or start + columns <= inputs.size:
        first, period, far, offset = 0, columns * fold, 0, offset + start * inputs.stride
    reduced = _merged(reduced)
    arranged, count = _arranged(slot), columns * fold
    return _Sum(number, offset, weight.dtype, count, first, period, far, near, reduced, slot.group, fold, **arranged)


def _arranged(slot: Slot) -> dict[str, Any]:
    """How the columns of a reader belong to the units: readers of one group may differ in it."""
    return {"per_unit": slot.block.per_unit, "by_position": slot.block.per_unit > 1 and slot.block.unit_stride == 1}


def _output_sum(weight: Tensor, number: int, group: int, units: int, block: Sequence[int], out: int) -> _Sum:
    """abs(W_in) by row of each unit."""
    start, unit_stride, per_unit, position_stride = block
    axes = [Axis(*a) for a in zip(weight.shape, weight.stride(), strict=True)]
    stride = axes.pop(out).stride
    outputs, near = units * per_unit, position_stride * stride
    period, far = per_unit, unit_stride * stride
    if per_unit == 1 or unit_stride == per_unit * position_stride:
        period, far, near = outputs, 0, far if per_unit == 1 else near
    reduced = _merged(axes)
    return _Sum(number, start * stride, weight.dtype, outputs, 0, period, far, near, reduced, group, per_unit)


class _Sender:
    """The addresses of a launch's sums, which change from step to step, on their way to the device without a wait.

    Whoever launches on several streams orders them as the state asks for anyway.
    """

    _RING = 4

    def __init__(self, sources: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._sources = sources
        self._device = device
        self._last: list[int] | None = None
        self._ring: list[tuple[Tensor, torch.cuda.Event]] = []
        self._next = 0
        self._target = torch.empty(len(sources), dtype=torch.int64, device=device)
        # a CUDA graph reads its own pinned buffer at every replay; none can be had while a stream is captured
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def _pinned(self) -> Tensor:
        return torch.empty(len(self._sources), dtype=torch.int64, pin_memory=True)

    def send(self, addresses: list[int]) -> Tensor:
        """Where each sum begins, by the addresses of the tensors: for kernels launched on this stream after this call.

        Raises:
            RuntimeError: a graph is captured before a step of this shape has run.
        """
        if is_capturing(self._device):
            if self._spare is None:
                raise RuntimeError(_BEFORE_CAPTURE)
            pinned, self._spare = self._spare, None
            target = torch.empty_like(self._target)
            self._captured += [pinned, target]
            pinned.copy_(self._values(addresses))
            return target.copy_(pinned, non_blocking=True)
        if addresses == self._last:
            return self._target
        if self._device.type == "cpu":
            self._target.copy_(self._values(addresses))
        else:
            if not self._ring:
                self._ring = [(self._pinned(), torch.cuda.Event()) for _ in range(self._RING)]
            if self._spare is None:
                self._spare = self._pinned()
            pinned, sent = self._ring[self._next]
            self._next = (self._next + 1) % self._RING
            # the copy of four sends ago has long been made
            sent.synchronize()
            pinned.copy_(self._values(addresses))
            self._target.copy_(pinned, non_blocking=True)
            sent.record()
        self._last = addresses
        return self._target

    def _values(self, addresses: list[int]) -> Tensor:
        return torch.tensor([addresses[tensor] + offset for tensor, offset in self._sources], dtype=torch.int64)


class _Tables:
    """Everything that one state's launches need, but for the tensors of a step."""

    def __init__(self, state: State) -> None:
        device = self.device = state.buffer.device
        self.address = state.buffer.data_ptr()
        self.is_chosen = torch.zeros(state.age.numel(), dtype=torch.int32, device=device)
        columns = state.activation.numel() if state.rule.centred else 0
        self.hat = torch.empty(columns, dtype=torch.float64, device=device)
        fields = (
            state.step,
            state.seed,
            state.hyper,
            state.pending,
            state.num_replaced,
            state.count,
            state.activation,
            state.feature,
            state.running_mean,
            state.utility,
            state.age,
            state.num_chosen,
            state.chosen,
            self.is_chosen,
            self.hat,
        )
        if len(state.layouts) >= 2**15:
            raise ValueError(f"backend 'triton' serves less than 32768 unit groups, not {len(state.layouts)}")
        rows: list[int] = []
        for i, slot in enumerate(state.slots):
            layout = state.layouts[slot.group]
            _, unit_stride, per_unit, position_stride = slot.block
            rows += Columns(
                i, slot.columns.start, layout.units.start, layout.num_units, per_unit, unit_stride, position_stride
            )
        self.num_blocks = sum(blocks for _, blocks in _blocks_of(state))
        addresses = [*(f.data_ptr() for f in fields), len(state.layouts), self.num_blocks]
        self.addresses, self.columns = upload(device, (Addresses._make(addresses), 64), (rows, 64))
        self.plans: dict[object, _Step] = {}
        # of each list of slots
        self.captures: dict[tuple[int, ...], dict[object, list[_Round]]] = {}
        self.targets: dict[object, _Targets] = {}
        self.captured: list[object] = []
        self.wide = state.utility.dtype == torch.float64
        self.meta = meta_of(state.rule, self.wide)
        self._rate = -1.0
        self._ranked: tuple[int, ...] = ()

    def ranked(self, state: State) -> tuple[int, ...]:
        """The groups of which so many units may be chosen that comparing all with all is quicker than one by one."""
        if state.replacement_rate != self._rate:
            self._rate = state.replacement_rate
            self._ranked = tuple(
                g
                for g, layout in enumerate(state.layouts)
                if at_most(state.rule, layout.num_units, self._rate) > max(_MANY, layout.num_units**2 >> 21)
            )
        return self._ranked

    def on_device(self) -> AbstractContextManager[object]:
        """Triton launches, events and streams are of the current device."""
        if self.device.type == "cpu" or torch.cuda.current_device() == self.device.index:
            return _NOTHING
        return torch.cuda.device(self.device)

    def used(self, tables: object) -> None:
        """What a CUDA graph uses must stay for its replays."""
        if is_capturing(self.device):
            self.captured.append(tables)


def _recent(entries: dict[Any, _T], key: object, make: Callable[[], _T]) -> _T:
    """An entry of a table of tables, which forgets the one that was not used for the longest time."""
    entry = entries.pop(key, None)
    if entry is None:
        entry = make()
        if len(entries) >= _KEPT:
            del entries[next(iter(entries))]
    entries[key] = entry
    return entry


_tables: WeakKeyDictionary[State, _Tables] = WeakKeyDictionary()


def _tables_of(state: State) -> _Tables:
    tables = _tables.get(state)
    if tables is None or tables.address != state.buffer.data_ptr() or tables.device != state.buffer.device:
        tables = _tables[state] = _Tables(state)
    return tables


def prepare(state: State, inline: bool) -> None:
    """Compile, for activations of the weights' types, what the steps of a state will launch on its device.

    Args:
        inline: whether activations may be summed in the forward.
    """
    device = state.buffer.device
    if is_interpreted():
        return
    types = 0
    for ref in (*state.weights, *(region.ref for region in state.regions if region.kind == DRAW)):
        types |= 1 << _TYPES[ref.dtype]
    wide = state.utility.dtype == torch.float64
    wanted = kernels_of(state.rule, wide, types, state.previous_mean, inline)
    if any(at_most(state.rule, layout.num_units, state.replacement_rate) > _MANY for layout in state.layouts):
        wanted.append((triton_kernels.rank, {}))
    names = ", ".join(dict.fromkeys(kernel.fn.__name__ for kernel, _ in wanted))
    # said only where it takes long: what is in the cache is loaded at once
    said = Timer(_QUICK, _log.warning, (_COMPILING, names, device, triton.knobs.cache.dir))
    said.daemon = True
    said.start()
    try:
        with torch.cuda.device(device):
            for kernel, meta in wanted:
                triton_kernels.compile_(kernel, device, meta)
    finally:
        said.cancel()


def _launch(
    tables: _Tables, plan: _Plan, kernel: object, programs: int, args: Sequence[Tensor], meta: dict[str, Any]
) -> None:
    """Launch a kernel that counts its programs; whatever stops it, the next one finds the counters at zero."""
    tables.used(plan)
    if plan.dirty:
        plan.counters.zero_()
    plan.dirty = True
    triton_kernels.launch(kernel, (programs,), args, meta)
    plan.dirty = False


def capture_(state: State, slot: int, h: Tensor) -> None:
    """See `reference.capture_`."""
    if is_compiling():
        # a compiler makes a kernel of its own from this
        reference.capture_(state, slot, h)
    elif state.rule.arithmetic.activation or state.rule.keeps_mean:
        tables = _tables_of(state)
        with tables.on_device():
            _run_captures(state, tables, *_captures(state, tables, [h], [slot]))
    else:
        reference.capture_(state, slot, h)


class _Round:
    """One forward of each of some slots: sums, in several launches where an activation has too many axes for one."""

    def __init__(self, state: State, parts: Sequence[Sequence[_Sum]], aligned: Sequence[int]) -> None:
        self.plans = [_Plan(state, sums, aligned) for sums in parts]
        for plan in self.plans:
            plan.allocate(0)
        blocks: list[int] = []
        for s in parts[0] if state.rule.centred else ():
            units = state.layouts[s.group].num_units
            blocks += [n for b in range(-(-units // _UNITS)) for n in (s.slot, b)]
        self.hats = len(blocks) // 2
        (self.hat_blocks,) = upload(state.buffer.device, (blocks or [0], 32))


def _rounds(sums: Sequence[_Sum]) -> list[list[list[_Sum]]]:
    """By forward of a slot and by part of an activation: no two sums of a list are of the same columns."""
    rounds: list[list[list[_Sum]]] = []
    seen: dict[int, list[int]] = {}
    parts: Counter[int] = Counter()
    for s in sums:
        forwards = seen.setdefault(s.slot, [])
        if s.tensor not in forwards:
            forwards.append(s.tensor)
        n, part = forwards.index(s.tensor), parts[s.tensor]
        parts[s.tensor] += 1
        if n == len(rounds):
            rounds.append([])
        if part == len(rounds[n]):
            rounds[n].append([])
        # only the first part counts samples
        rounds[n][part].append(s if part == 0 else s._replace(samples=0))
    return rounds


def _captures(
    state: State, tables: _Tables, held: Sequence[Tensor], slots: Sequence[int]
) -> tuple[list[_Round], list[int]]:
    """What adds forwards' activations to their sums, and the addresses that it takes."""
    held = [*held]
    layout, addresses = describe(held)

    def make() -> list[_Round]:
        aligned = [a % 16 for a in addresses]
        return [_Round(state, parts, aligned) for parts in _rounds(_activation_sums(state, held, slots))]

    return _recent(tables.captures.setdefault(tuple(slots), {}), layout, make), addresses


def _run_captures(state: State, tables: _Tables, rounds: Sequence[_Round], addresses: list[int]) -> None:
    k, rule = triton_kernels, state.rule

    def add_up(plans: Sequence[_Plan], what: int, counts: bool) -> None:
        for plan in plans:
            args = (plan.tiles, plan.jobs, plan.sender.send(addresses), tables.addresses, plan.workspace, plan.counters)
            meta = {"TYPES": plan.types, "SUM": what, "COUNTS": counts}
            _launch(tables, plan, k.capture, plan.programs, args, meta)

    for one in rounds:
        if rule.keeps_mean:
            add_up(one.plans, k.VALUES.value, True)
        if rule.centred:
            tables.used(one)
            hats = (one.hat_blocks, tables.columns, tables.addresses)
            k.launch(k.hat, (one.hats,), hats, {"PREVIOUS": state.previous_mean})
            add_up(one.plans, k.DISTANCES.value, False)
        elif rule.arithmetic.activation:
            add_up(one.plans, k.MAGNITUDES.value, not rule.keeps_mean)


@torch.no_grad()
def sum_(state: State, weights: Sequence[Tensor], held: Sequence[Tensor], slots: Sequence[int]) -> None:
    """See `reference.sum_`; of processes that have all weights, which `choose_` reads."""
    assert not weights
    if state.rule.arithmetic.activation or state.rule.keeps_mean:
        tables = _tables_of(state)
        with tables.on_device():
            _run_captures(state, tables, *_captures(state, tables, held, slots))
    else:
        for number, h in zip(slots, held, strict=True):
            reference.capture_(state, number, h)
    for total, mine in zip(reference.totals(state), (state.count, state.activation, state.feature), strict=True):
        total.copy_(mine)


@torch.no_grad()
def choose_(state: State, weights: Sequence[Tensor]) -> int:
    """See `reference.choose_`."""
    for mine, total in zip((state.count, state.activation, state.feature), reference.totals(state), strict=True):
        mine.copy_(total)
    return select_(state, weights, [], [])


class _Step(_Plan):
    """The plan of a whole step: sums over held activations and weights, then every group's choice."""

    def __init__(
        self,
        state: State,
        weights: Sequence[Tensor],
        held: Sequence[Tensor],
        slots: Sequence[int],
        aligned: Sequence[int],
        ranked: Sequence[int],
    ) -> None:
        # activations by slot, so that a slot's sums are neighbours
        arithmetic = state.rule.arithmetic
        activations = sorted(
            _activation_sums(state, held, slots) if arithmetic.activation else [], key=lambda s: s.slot
        )
        sums = list(activations)
        of_slot = [s.slot for s in activations]
        # only the first part of a divided activation brings its samples
        samples = [0] * len(state.slots)
        for h, s in zip(held, slots, strict=True):
            slot = state.slots[s]
            samples[s] += h.numel() // h.shape[h.dim() - 1 - slot.spatial]
        sum_of_slot = [0] * len(state.slots)
        for i, slot in enumerate(state.slots):
            if arithmetic.outgoing:
                module, number = state.modules[slot.weight], len(held) + slot.weight
                sum_of_slot[i] = len(sums)
                weight = weights[slot.weight]
                sums.append(_input_sum(weight, number, slot, getattr(module, "groups", 1), out_axis(module)))
        incoming: list[tuple[int, int]] = []
        for g, layout in enumerate(state.layouts):
            for i, block in layout.incoming:
                incoming.append((len(sums), block.per_unit))
                out = out_axis(state.modules[i])
                sums.append(_output_sum(weights[i], len(held) + i, g, layout.num_units, block, out))
        super().__init__(state, sums, aligned)
        readers: list[int] = []
        for i, slot in enumerate(state.slots):
            _, unit_stride, per_unit, position_stride = slot.block
            elements = per_unit
            if arithmetic.outgoing:
                elements = per_unit * (weights[slot.weight].numel() // slot.features)
            first, last = bisect_left(of_slot, i), bisect_right(of_slot, i)
            readers += Reader(
                slot.columns.start,
                unit_stride,
                position_stride,
                samples[i] & 0x7FFFFFFF,
                samples[i] >> 31,
                last - first,
                self.totals[first] // 8 if last > first else 0,
                first,
                self.totals[sum_of_slot[i]] // 8 if arithmetic.outgoing else 0,
                sums[sum_of_slot[i]].fold if arithmetic.outgoing else 1,
                elements,
            )
        rows: list[int] = []
        several: list[int] = []
        expected = iter(self.expected)
        first_incoming, scratch = 0, self.place
        for g, (layout, (width, blocks)) in enumerate(zip(state.layouts, _blocks_of(state), strict=True)):
            fan_in = 0
            for i, block in layout.incoming:
                fan_in += block.per_unit * (weights[i].numel() // weights[i].shape[out_axis(state.modules[i])])
            if g in ranked:
                first_row = len(rows) // len(Block._fields)
                parts = -(-layout.num_units // triton_kernels.RANKED.value)
                several += [n for part in range(parts) for n in (first_row, part)]
            for b in range(blocks):
                rows += Block(
                    g,
                    b,
                    b * width,
                    min(width, layout.num_units - b * width),
                    layout.units.start + b * width,
                    next(expected),
                    blocks,
                    width,
                    layout.num_units,
                    scratch // 8,
                    layout.columns_per_unit,
                    layout.slots[0],
                    len(layout.slots),
                    first_incoming,
                    len(layout.incoming),
                    fan_in,
                    # as a signed number of 32 bits
                    layout.stream - (layout.stream >> 31 << 32),
                    int(g in ranked),
                )
            first_incoming += len(layout.incoming)
            scratch += 8 * (2 * layout.num_units + 4 * blocks)
        places = [n for number, per_unit in incoming for n in (self.totals[number] // 8, per_unit)]
        self.readers, self.blocks, self.incoming, self.ranked_tiles = upload(
            state.buffer.device, (readers, 32), (rows, 32), (places or [0], 32), (several or [0], 32)
        )
        self.ranked = len(several) // 2
        self.allocate(scratch - self.place)


@torch.no_grad()
def select_(state: State, weights: Sequence[Tensor], held: Sequence[Tensor], slots: Sequence[int]) -> int:
    """See `reference.select_`."""
    if state.buffer.is_cpu and not held and not state.count.any():
        state.num_chosen.zero_()
        return 0
    tables, k = _tables_of(state), triton_kernels
    with tables.on_device():
        captures = None
        # a mean must be there before distances from it, and its samples twice
        if state.rule.keeps_mean and held:
            captures = _captures(state, tables, held, slots)
            held, slots = [], []
        tensors = [*held, *weights]
        layout, addresses = describe(tensors)
        ranked = tables.ranked(state)

        def make() -> _Step:
            return _Step(state, weights, held, slots, [a % 16 for a in addresses], ranked)

        plan = _recent(tables.plans, (layout, tuple(slots), ranked), make)
        # all tables are there before the first launch
        sent = plan.sender.send(addresses)
        if captures:
            _run_captures(state, tables, *captures)
        meta, places = tables.meta, (tables.addresses, plan.workspace, plan.counters)
        if plan.programs:
            args = (plan.tiles, plan.jobs, sent, plan.blocks, plan.readers, plan.incoming, *places)
            _launch(tables, plan, k.select, plan.programs, args, {"TYPES": plan.types, **meta})
        if meta["MIN_MAX"] or not plan.programs:
            rest = (plan.blocks, plan.jobs, plan.readers, plan.incoming, *places)
            _launch(tables, plan, k.score, tables.num_blocks, rest, score_meta(meta))
        if plan.ranked:
            k.launch(k.rank, (plan.ranked,), (plan.ranked_tiles, plan.blocks, tables.addresses, plan.workspace), {})
    return chosen_of(state)


def chosen_of(state: State) -> int:
    """How many units were chosen, which nobody waits for on a device: -1 there."""
    return int(state.num_chosen.sum()) if state.buffer.is_cpu else -1


class _Targets:
    """The tables of one re-initialisation: transfers and then the rest, all of each at once."""

    def __init__(self, state: State, regions: Sequence[int], tensors: Sequence[Tensor]) -> None:
        rest = iter(tensors)
        transfers: list[list[tuple[Region, Tensor, Tensor]]] = [[]]
        others: list[list[tuple[Region, bool, Tensor]]] = [[]]
        # layers that are drawn anew: where such a one is read, in a circle of layers, what is new is read
        drawn: set[int] = set()
        for number in regions:
            region, is_slot, tensor = state.regions[number >> 1], bool(number & 1), next(rest)
            if region.kind == TRANSFER:
                if id(region.ref.owner) in drawn:
                    transfers.append([])
                    others.append([])
                    drawn.clear()
                transfers[-1].append((region, tensor, next(rest)))
                continue
            if not is_slot and (region.kind == DRAW or region.ref.key == "bias"):
                drawn.add(id(region.ref.owner))
            others[-1].append((region, is_slot, tensor))
        self.rounds = [
            (_transfers_of(state, first), _writes_of(state, then, last=then is others[-1]))
            for first, then in zip(transfers, others, strict=True)
        ]


def _transfers_of(state: State, transfers: Sequence[tuple[Region, Tensor, Tensor]]) -> tuple[int, list[Tensor]]:
    """Programs and tables of `transfer`."""
    of_bias: dict[int, list[tuple[Region, Tensor, Tensor]]] = {}
    for one in transfers:
        of_bias.setdefault(id(one[1]), []).append(one)
    tiles: list[int] = []
    biases: list[int] = []
    rows: list[int] = []
    for number, found in enumerate(of_bias.values()):
        bias = found[0][1]
        first = len(rows) // len(Transfer._fields)
        biases += Bias(bias.data_ptr(), _TYPES[bias.dtype], len(bias), bias.stride(0), first, len(found))
        tiles += [n for b in range(-(-len(bias) // _UNITS)) for n in (number, b)]
        for region, _, weight in found:
            inner_shape = (*weight.shape[2:], *(1,) * (5 - weight.dim()))
            strides = (*weight.stride()[2:], *(0,) * (5 - weight.dim()))
            start, unit_stride, per_unit, position_stride = region.block
            rows += Transfer(
                weight.data_ptr(),
                _TYPES[weight.dtype],
                region.group,
                region.slot,
                start,
                unit_stride,
                position_stride,
                per_unit,
                weight.shape[1 - region.axis] // region.conv_groups,
                weight.shape[region.axis],
                math.prod(inner_shape),
                inner_shape[1],
                inner_shape[2],
                weight.stride(1 - region.axis),
                weight.stride(region.axis),
                *strides,
            )
    tables = upload(state.buffer.device, (tiles or [0], 32), (biases or [0], 64), (rows or [0], 64))
    return len(tiles) // 2, tables


def _writes_of(state: State, writes: Sequence[tuple[Region, bool, Tensor]], last: bool) -> tuple[int, list[Tensor]]:
    """Programs and tables of `reinit`; the last one forgets what was known of the units."""
    # what is written, so that regions which write the same may do so in any order
    what = [
        (r.kind == DRAW and not is_slot, r.stream, r.distribution, 0.0 if is_slot else r.value)
        for r, is_slot, _ in writes
    ]
    targets: list[int] = []
    masks: list[int] = []
    owners: list[int] = []
    tiles: list[int] = []
    for i, (region, _, tensor) in enumerate(writes):
        draws, _, distribution, value = what[i]
        first_mask = len(masks) // len(Mask._fields)
        for j in range(i + 1, len(writes)):
            later, _, other = writes[j]
            if other is tensor and what[j] != what[i] and later.axis != region.axis:
                masks += Mask(len(owners), later.axis, tensor.shape[0] // later.conv_groups, tensor.shape[1])
                owners += _owners(state, later, tensor.shape)
        shape = (*tensor.shape, *(1,) * (5 - tensor.dim()))
        strides = (*tensor.stride(), *(0,) * (5 - tensor.dim()))
        inner = math.prod(shape[2:])
        start, unit_stride, per_unit, position_stride = region.block
        rows = shape[0] // region.conv_groups
        elements = per_unit * inner * (rows if region.axis else shape[1])
        (bits,) = struct.unpack("q", struct.pack("d", value))
        programs = min(-(-elements // _BLOCK), 1024)
        tiles += [n for program in range(programs) for n in (len(targets) // len(Target._fields), program)]
        targets += Target(  # type: ignore[call-arg]
            tensor.data_ptr(),
            _TYPES[tensor.dtype],
            ("uniform", "normal", "unit").index(distribution) if draws else triton_kernels.FILL.value,
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
            len(masks) // len(Mask._fields) - first_mask,
        )
    nothing = Target._make([0] * len(Target._fields))
    for g, layout in enumerate(state.layouts if last else ()):
        units = nothing._replace(kind=triton_kernels.FORGET.value, group=g, first_unit=layout.units.start)
        tiles += (len(targets) // len(Target._fields), 0)
        targets += units
        for slot in (state.slots[s] for s in layout.slots if state.rule.keeps_mean):
            _, unit_stride, per_unit, position_stride = slot.block
            tiles += (len(targets) // len(Target._fields), 0)
            targets += units._replace(
                kind=triton_kernels.FORGET_MEAN.value,
                start=slot.columns.start,
                unit_stride=unit_stride,
                position_stride=position_stride,
                elements=per_unit,
            )
    tables = ((tiles, 32), (targets or [0], 64), (masks or [0], 64), (owners or [0], 32))
    return len(tiles) // 2, upload(state.buffer.device, *tables)


def _owners(state: State, region: Region, shape: Sequence[int]) -> list[int]:
    """Which unit owns each index of a region's axis, in the numbering of all groups; -1 for none."""
    units = state.layouts[region.group].units
    size = shape[0] if region.axis == 0 else shape[1] * region.conv_groups
    start, unit_stride, per_unit, position_stride = region.block
    owners = torch.full((size,), -1, dtype=torch.int32)
    places = owners[start:].as_strided((units.stop - units.start, per_unit), (unit_stride, position_stride))
    places.copy_(torch.arange(units.start, units.stop, dtype=torch.int32)[:, None].expand_as(places))
    return owners.tolist()


def _biases(state: State, regions: Sequence[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that transfers add to."""
    rest, found = iter(tensors), {}
    for number in regions:
        tensor = next(rest)
        if state.regions[number >> 1].kind == TRANSFER:
            next(rest)
            found[id(tensor)] = tensor
    return list(found.values())


@torch.no_grad()
def reinit_(state: State, regions: list[int], tensors: list[Tensor]) -> None:
    """See `reference.reinit_`."""
    tables, k = _tables_of(state), triton_kernels
    layout, addresses = describe(tensors)
    with tables.on_device():
        key = (layout, tuple(addresses), tuple(regions))
        targets = _recent(tables.targets, key, lambda: _Targets(state, regions, tensors))
        tables.used(targets)
        # of each round, what was there before its transfers, or None after them
        redo = {} if state.redo is None else state.redo
        for i, ((outputs, transfers), (programs, writes)) in enumerate(targets.rounds):
            if i + 1 in redo:
                continue
            if outputs and redo.get(i, ()) is not None:
                tiles, biases, rows = transfers
                if state.redo is not None and i in redo:
                    for bias, before in redo[i]:
                        bias.copy_(before)
                elif state.redo is not None:
                    redo[i] = [(bias, bias.clone()) for bias in _biases(state, regions, tensors)]
                k.launch(k.transfer, (outputs,), (tiles, biases, rows, tables.columns, tables.addresses), {})
            redo[i] = None
            if programs:
                k.launch(k.reinit, (programs,), (*writes, tables.addresses), {"WIDE_UTILITY": tables.wide})
