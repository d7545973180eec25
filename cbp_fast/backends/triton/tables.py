"""What the launches of one state have in common, and the tables of all shapes that were seen lately."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...state.state import State
from . import launching, sending
from .forward_plan import ForwardPlan
from .rows import MANY, Addresses, Columns
from .specialising import at_most, meta_of
from .step_plan import StepPlan
from .sum_plan import SumPlan, blocks_of
from .targets import Targets

# tables of so many shapes of activations, of each reader, and of so many lists of tensors, are kept
_KEPT = 16
_NOTHING = nullcontext()
_T = TypeVar("_T")


class Tables:
    """Everything that one state's launches need, but for the tensors of a step."""

    def __init__(self, state: State) -> None:
        if len(state.layouts) >= 2**15:
            raise ValueError(f"backend 'triton' serves less than 32768 unit groups, not {len(state.layouts)}")
        device = self.device = state.buffer.device
        self.address = state.buffer.data_ptr()
        self.is_chosen = torch.zeros(state.age.numel(), dtype=torch.int32, device=device)
        columns = state.activation.numel() if state.rule.centred else 0
        self.hat = torch.empty(columns, dtype=torch.float64, device=device)
        self.num_blocks = sum(blocks.number for blocks in blocks_of(state))
        addresses = Addresses(
            step=state.step.data_ptr(),
            seed=state.seed.data_ptr(),
            hyper=state.hyper.data_ptr(),
            pending=state.pending.data_ptr(),
            num_replaced=state.num_replaced.data_ptr(),
            samples=state.count.data_ptr(),
            activation=state.activation.data_ptr(),
            feature=state.feature.data_ptr(),
            running_mean=state.running_mean.data_ptr(),
            utility=state.utility.data_ptr(),
            age=state.age.data_ptr(),
            num_chosen=state.num_chosen.data_ptr(),
            chosen=state.chosen.data_ptr(),
            is_chosen=self.is_chosen.data_ptr(),
            hat=self.hat.data_ptr(),
            num_groups=len(state.layouts),
            num_blocks=self.num_blocks,
        )
        rows: list[int] = []
        for i, slot in enumerate(state.slots):
            layout = state.layouts[slot.group]
            _, unit_stride, per_unit, position_stride = slot.block
            rows += Columns(
                slot=i,
                column=slot.columns.start,
                first_unit=layout.units.start,
                units=layout.num_units,
                per_unit=per_unit,
                unit_stride=unit_stride,
                position_stride=position_stride,
            )
        self.addresses, self.columns = sending.upload(device, (addresses, 64), (rows, 64))
        self.steps: dict[object, StepPlan] = {}
        # of each list of slots
        self.forwards: dict[tuple[int, ...], dict[object, list[ForwardPlan]]] = {}
        self.targets: dict[object, Targets] = {}
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
                if at_most(state.rule, layout.num_units, self._rate) > max(MANY.value, layout.num_units**2 >> 21)
            )
        return self._ranked

    def on_device(self) -> AbstractContextManager[object]:
        """Triton launches, events and streams are of the current device."""
        if self.device.type == "cpu" or torch.cuda.current_device() == self.device.index:
            return _NOTHING
        return torch.cuda.device(self.device)

    def used(self, tables: object) -> None:
        """What a CUDA graph uses must stay for its replays."""
        if sending.is_capturing(self.device):
            self.captured.append(tables)

    def launch(
        self, plan: SumPlan, kernel: object, programs: int, args: Sequence[Tensor], meta: dict[str, Any]
    ) -> None:
        """Launch a kernel that counts its programs; whatever stops it, the next one finds the counters at zero."""
        self.used(plan)
        if plan.dirty:
            plan.counters.zero_()
        plan.dirty = True
        launching.launch(kernel, (programs,), args, meta)
        plan.dirty = False


def recent(entries: dict[Any, _T], key: object, make: Callable[[], _T]) -> _T:
    """An entry of a table of tables, which forgets the one that was not used for the longest time."""
    entry = entries.pop(key, None)
    if entry is None:
        entry = make()
        if len(entries) >= _KEPT:
            del entries[next(iter(entries))]
    entries[key] = entry
    return entry


_tables: WeakKeyDictionary[State, Tables] = WeakKeyDictionary()


def tables_of(state: State) -> Tables:
    """The tables of a state; new ones once its memory is another."""
    tables = _tables.get(state)
    if tables is None or tables.address != state.buffer.data_ptr() or tables.device != state.buffer.device:
        tables = _tables[state] = Tables(state)
    return tables
