"""The flat state of all unit groups on one device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..groups.spec import ResolvedGroup
from ..parallel.processes import Processes
from ..rules.rule import Rule
from .arrangement import Arrangement
from .layout import Layout
from .regions import DRAW, with_deviations
from .table import pack


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Tensors made here are ordinary ones, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class State(Arrangement):
    """One byte buffer with everything that persists from step to step, seen through typed views.

    Views, with G groups, S slots (reading layers), T units and C columns:
        step, seed: int64 [1]. hyper: float64 [4], replacement_rate, maturity_threshold, decay_rate, and its
            logarithm (0 of 0).
        pending: float64 [G]. num_replaced, count: int64 [G], [S]; count is samples seen since the last step.
        activation: float64 [C], sum over those samples of abs(h), or of abs(h - h_hat) for a centred rule.
        feature, running_mean: float64 [C], sum of h and its decayed mean; empty unless the rule keeps a mean.
        utility: float32 [T] (float64 if a group's weights are float64). age: int32 [T]; stays at 2**31 - 1.
        num_chosen: int32 [G] and chosen: int32 [T], the units replaced in the last step, group g's from its
        first unit's place on, least score first.

    Limits: `step` and `num_replaced` stay at 2**63 - 1. Draws repeat after 2**48 steps, 4,000 years of 2,000 a second,
    and are of their own for the first 2**50 elements of a tensor: see `reference.philox`.

    `redo` is a dict while what is written must be the same a second time, of which a backend keeps there what it needs.

    What a step sums stands in one tensor more, `flat`: see `Arrangement`.

    Raises:
        ValueError: two weights of the model have the same Philox tensor id.
    """

    step: Tensor
    seed: Tensor
    hyper: Tensor
    pending: Tensor
    num_replaced: Tensor
    count: Tensor
    activation: Tensor
    feature: Tensor
    running_mean: Tensor
    utility: Tensor
    age: Tensor
    num_chosen: Tensor
    chosen: Tensor

    def __init__(
        self,
        rule: Rule,
        groups: Sequence[ResolvedGroup],
        *,
        seed: int,
        device: torch.device,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(rule, groups, processes)
        total, columns = self.layouts[-1].units.stop, self.slots[-1].columns.stop
        means = columns if rule.keeps_mean else 0
        members = [member for group in groups for member in (*group.incoming, *group.outgoing)]
        double = any(member.module.get_parameter("weight").dtype == torch.float64 for member in members)
        f64, i64, i32 = torch.float64, torch.int64, torch.int32
        # 8-byte fields first, so that every view is aligned; count, activation and feature are neighbours, zeroed at
        # once. `Header` and `Fields` of csrc/plan.h have the same fields in the same order
        self._fields: list[tuple[str, torch.dtype, int]] = [
            ("step", i64, 1),
            ("seed", i64, 1),
            ("hyper", f64, 4),
            ("pending", f64, len(groups)),
            ("num_replaced", i64, len(groups)),
            ("count", i64, len(self.slots)),
            ("activation", f64, columns),
            ("feature", f64, means),
            ("running_mean", f64, means),
            ("utility", f64 if double else torch.float32, total),
            ("age", i32, total),
            ("num_chosen", i32, len(groups)),
            ("chosen", i32, total),
        ]
        size = sum(dtype.itemsize * n for _, dtype, n in self._fields)
        self.redo: dict[Any, Any] | None = None
        with _plainly():
            self._view(torch.zeros(size, dtype=torch.uint8, device=device))
            self.seed.fill_(seed if seed < 2**63 else seed - 2**64)
        self.plan = self._packed()

    @property
    def deviations(self) -> dict[str, float]:
        """By name, the standard deviation with which each weight is drawn anew, where that was measured at attach."""
        if self.rule.init != "as_attached":
            return {}
        return {region.ref.name: region.value for region in self.regions if region.kind == DRAW}

    @deviations.setter
    def deviations(self, values: Mapping[str, float]) -> None:
        self.regions = with_deviations(self.regions, values)
        self.plan = self._packed()

    def _packed(self) -> Tensor:
        with _plainly():
            return pack(self, self.offsets, self.buffer.numel(), self.utility.element_size())

    def _index(self, name: str) -> int:
        return [field for field, _, _ in self._fields].index(name)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The fields by name as they lie in `buffer`, a copy of the state's perhaps."""
        sizes = [n * dtype.itemsize for _, dtype, n in self._fields]
        places = zip(self._fields, self.offsets, sizes, strict=True)
        return {name: buffer[at : at + size].view(dtype) for (name, dtype, _), at, size in places}

    def _view(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.backup = torch.empty_like(buffer)
        self.flat = torch.zeros(self.flat_size, dtype=torch.float64, device=buffer.device)
        self.offsets = [0, *accumulate(n * dtype.itemsize for _, dtype, n in self._fields)][:-1]
        for name, view in self.views(buffer).items():
            setattr(self, name, view)

    def columns_of(self, layout: Layout) -> slice:
        """The columns of all readers of a group."""
        return slice(self.slots[layout.slots[0]].columns.start, self.slots[layout.slots[-1]].columns.stop)

    def set_hyper(self, replacement_rate: float, maturity_threshold: float, decay_rate: float) -> None:
        """Put the rates where the kernels read them."""
        self.replacement_rate = replacement_rate
        log_decay = math.log(decay_rate) if decay_rate else 0.0
        values = (replacement_rate, maturity_threshold, decay_rate, log_decay)
        with _plainly():
            self.hyper.copy_(torch.tensor(values, dtype=torch.float64, device="cpu"))

    def forget_forwards(self) -> None:
        """Zero the sums over activations since the last step."""
        # neighbours in the buffer, zeroed by one call
        first = self.offsets[self._index("count")]
        self.buffer[first : self.offsets[self._index("running_mean")]].zero_()

    def __getstate__(self) -> dict[str, Any]:
        # the views share the buffer's memory with other types, which a file cannot say; they are made anew
        views = {"backup", "flat", *(name for name, _, _ in self._fields)}
        return {key: value for key, value in self.__dict__.items() if key not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        with _plainly():
            self._view(self.buffer)

    def to(self, device: torch.device) -> None:
        """Move everything to `device`; the views are new tensors afterwards."""
        with _plainly():
            self._view(self.buffer.to(device))
