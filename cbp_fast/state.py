"""The flat state of all unit groups on one device, and the table by which the kernels walk it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .rules import Rule
from .unit_groups import ResolvedGroup

DRAW, FILL, TRANSFER = range(3)
# the order is part of the table's layout, which csrc/plan.h mirrors
_ACTIVATION = (None, "magnitude", "centred")
_OUTGOING = (None, "sum", "mean")
_INCOMING = (None, "times_sum", "divide")
_DISTRIBUTION = ("uniform", "normal", "unit")
# torch's numbers for the types of tensors that can be read and set
DTYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
MAX_DIMS = 5


class TensorRef(NamedTuple):
    """Where a tensor of the model is found at every step, so that a re-assigned one is seen."""

    owner: dict[str, Tensor | None]  # `_parameters` or `_buffers` of a module: no `__getattr__` on the way
    key: str
    name: str
    shape: torch.Size
    dtype: torch.dtype

    def get(self) -> Tensor | None:
        """The tensor as it is now; None if the module has it no more."""
        return self.owner.get(self.key)

    @property
    def is_parameter(self) -> bool:
        """Whether an optimizer may keep state for it."""
        return self.key in ("weight", "bias")


class Slot(NamedTuple):
    """One layer that reads a group's units: the place where their activations are observed."""

    group: int
    module: nn.Module
    weight: int  # in `State.weights`, -1 where the rule does not read outgoing weights
    columns: slice  # in the column-wise fields of the state, unit-major: columns_per_unit for each unit
    spatial: int  # 0: features are the last axis; d: channels before d spatial axes


class Layout(NamedTuple):
    """Where one group lies in the flat state."""

    name: str
    num_units: int
    columns_per_unit: int
    units: slice
    slots: tuple[int, ...]
    incoming: tuple[int, ...]  # in `State.weights`, empty where the rule does not read incoming weights
    stream: int  # Philox tensor id of the group's own draws


class Region(NamedTuple):
    """The part of one tensor that belongs to each unit of a group, and what re-initialisation puts there.

    Unit j owns `per_unit` entries along `axis`, from j * per_unit on, whole along the other axes; of a grouped
    convolution's axis 1 it owns its column in the rows of its convolution group.
    """

    kind: int  # DRAW from `distribution` with `value` as bound | FILL with `value` | TRANSFER into a bias
    group: int
    ref: TensorRef
    axis: int = 0
    per_unit: int = 1
    conv_groups: int = 1
    stream: int = 0  # Philox tensor id
    distribution: str = "uniform"
    value: float = 0.0
    slot: int = 0  # TRANSFER: the reader
    weight: TensorRef | None = None  # TRANSFER: the reader's weight


def stream_id(name: str, group: bool = False) -> int:
    """Philox tensor id: the first 31 bits of the name's SHA-256; a group's own stream has the top bit set."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1 | (group << 31)


def tensor_ref(name: str, module: nn.Module, key: str) -> TensorRef | None:
    """Where `key` of the module called `name` is found; None if the module has no such tensor."""
    owners: tuple[Any, ...] = (module._parameters, module._buffers)
    for owner in owners:
        tensor = owner.get(key)
        if tensor is not None:
            return TensorRef(owner, key, f"{name}.{key}" if name else key, tensor.shape, tensor.dtype)
    return None


class State:
    """One byte buffer with everything that persists from step to step, seen through typed views.

    Views, with G groups, S slots (reading layers), T units and C columns:
        step, seed: int64 [1]. hyper: float64 [3], replacement_rate, maturity_threshold, decay_rate.
        pending: float64 [G]. num_replaced, count: int64 [G], [S]; count is samples seen since the last step.
        activation: float64 [C], sum over those samples of abs(h), or of abs(h - h_hat) for a centred rule.
        feature, running_mean: float64 [C], sum of h and its decayed mean; empty unless the rule keeps a mean.
        utility: float32 [T] (float64 if a group's weights are float64). age: int32 [T].
        num_chosen: int32 [G] and chosen: int32 [T], the units replaced in the last step, group g's from its
        first unit's place on, least score first.

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

    def __init__(self, rule: Rule, groups: Sequence[ResolvedGroup], *, seed: int, device: torch.device) -> None:
        self.rule = rule
        self.weights: list[TensorRef] = []
        self.slots: list[Slot] = []
        self.layouts: list[Layout] = []
        self.regions: list[Region] = []
        self.reads_rows: list[bool] = []
        self.reads_columns: list[bool] = []
        self._place(groups)
        self._add_regions(groups)
        self._check_streams()

        total, columns = self.layouts[-1].units.stop, self.slots[-1].columns.stop
        means = columns if rule.keeps_mean else 0
        double = any(ref.dtype == torch.float64 for ref in self._group_weights(groups))
        f64, i64, i32 = torch.float64, torch.int64, torch.int32
        # 8-byte fields first, so that every view is aligned
        self._fields: list[tuple[str, torch.dtype, int]] = [
            ("step", i64, 1),
            ("seed", i64, 1),
            ("hyper", f64, 3),
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
        self._view(torch.zeros(size, dtype=torch.uint8, device=device))
        self.seed.fill_(seed if seed < 2**63 else seed - 2**64)
        self.plan = self._pack(double)

    @staticmethod
    def _group_weights(groups: Iterable[ResolvedGroup]) -> Iterable[TensorRef]:
        for group in groups:
            for name, module in (*group.incoming, *group.outgoing):
                ref = tensor_ref(name, module, "weight")
                assert ref is not None
                yield ref

    def _place(self, groups: Sequence[ResolvedGroup]) -> None:
        """Give every group its units, every reader its columns, every weight its number."""
        rule, index = self.rule, {}

        def weight(name: str, module: nn.Module, rows: bool, columns: bool) -> int:
            if not (rows or columns):
                return -1
            if module not in index:
                index[module] = len(self.weights)
                self.weights.append(tensor_ref(name, module, "weight"))  # type: ignore[arg-type]
                self.reads_rows.append(False)
                self.reads_columns.append(False)
            i = index[module]
            self.reads_rows[i] |= rows
            self.reads_columns[i] |= columns
            return i

        unit = column = 0
        for g, group in enumerate(groups):
            incoming = tuple(weight(n, m, rule.incoming is not None, False) for n, m in group.incoming)
            first = len(self.slots)
            for name, module in group.outgoing:
                width = group.num_units * group.columns_per_unit
                i = weight(name, module, False, rule.outgoing is not None)
                spatial = 0 if isinstance(module, nn.Linear) else cast(Tensor, module.weight).dim() - 2
                self.slots.append(Slot(g, module, i, slice(column, column + width), spatial))
                column += width
            self.layouts.append(
                Layout(
                    group.name,
                    group.num_units,
                    group.columns_per_unit,
                    slice(unit, unit + group.num_units),
                    tuple(range(first, len(self.slots))),
                    incoming if rule.incoming else (),
                    stream_id(group.name, group=True),
                )
            )
            unit += group.num_units

    def _add_regions(self, groups: Sequence[ResolvedGroup]) -> None:
        """List what is set when a unit is replaced, in the order of setting."""
        rule = self.rule
        for g, group in enumerate(groups):
            if rule.name == "clarena":
                # its first step is column j of the layer before, whatever that column means there
                for name, module in group.preceding:
                    self._add_draw(g, name, module, axis=1)
                for name, module in group.incoming:
                    self._add_draw(g, name, module, axis=0)
                continue
            for name, module in group.incoming:
                self._add_draw(g, name, module, axis=0)
                self._add_fill(g, name, module, "bias", 0.0)
            for name, module in group.norms:
                for key, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                    ref = tensor_ref(name, module, key)
                    if ref is not None:
                        self._add_fill(g, name, module, key, value, per_unit=ref.shape[0] // group.num_units)
            if rule.transfer_bias:
                for (name, module), slot in zip(group.outgoing, self.layouts[g].slots, strict=True):
                    bias, weight = tensor_ref(name, module, "bias"), tensor_ref(name, module, "weight")
                    if bias is not None:
                        groups_ = getattr(module, "groups", 1)
                        per_unit = group.columns_per_unit
                        self.regions.append(Region(TRANSFER, g, bias, 1, per_unit, groups_, slot=slot, weight=weight))
            for name, module in group.outgoing:
                self._add_fill(
                    g,
                    name,
                    module,
                    "weight",
                    0.0,
                    axis=1,
                    per_unit=group.columns_per_unit,
                    conv_groups=getattr(module, "groups", 1),
                )

    def _add_draw(self, group: int, name: str, module: nn.Module, axis: int) -> None:
        ref = tensor_ref(name, module, "weight")
        assert ref is not None
        rows, fan_in = ref.shape[0], ref.shape[1:].numel()
        bound = self.rule.bound(fan_in, rows, convolution=len(ref.shape) > 2)
        self.regions.append(
            Region(
                DRAW,
                group,
                ref,
                axis,
                stream=stream_id(ref.name),
                distribution=self.rule.distribution,
                value=bound,
            )
        )

    def _add_fill(self, group: int, name: str, module: nn.Module, key: str, value: float, **place: Any) -> None:
        ref = tensor_ref(name, module, key)
        if ref is not None:
            self.regions.append(Region(FILL, group, ref, value=value, **place))

    def _check_streams(self) -> None:
        seen: dict[int, str] = {}
        for region in self.regions:
            if region.kind == DRAW:
                other = seen.setdefault(region.stream, region.ref.name)
                if other != region.ref.name:
                    raise ValueError(
                        f"{other} and {region.ref.name} hash to the same random stream; rename one of them, "
                        "or leave its group out with exclude="
                    )
        names: dict[int, str] = {}
        for layout in self.layouts:
            if names.setdefault(layout.stream, layout.name) != layout.name:
                raise ValueError(
                    f"groups {names[layout.stream]} and {layout.name} hash to the same random stream; rename one"
                )

    def _view(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.backup = torch.empty_like(buffer)
        self.offsets = []
        offset = 0
        for name, dtype, n in self._fields:
            size = n * dtype.itemsize
            self.offsets.append(offset)
            setattr(self, name, buffer[offset : offset + size].view(dtype))
            offset += size

    def columns_of(self, layout: Layout) -> slice:
        """The columns of all readers of a group."""
        return slice(self.slots[layout.slots[0]].columns.start, self.slots[layout.slots[-1]].columns.stop)

    def set_hyper(self, replacement_rate: float, maturity_threshold: float, decay_rate: float) -> None:
        """Put the rates where the kernels read them."""
        self.replacement_rate = replacement_rate
        for i, value in enumerate((replacement_rate, maturity_threshold, decay_rate)):
            self.hyper[i].fill_(value)

    def forget_forwards(self) -> None:
        """Zero the sums over activations since the last step."""
        for field in (self.count, self.activation, self.feature):
            field.zero_()

    def __getstate__(self) -> dict[str, Any]:
        # the views share the buffer's memory with other types, which a file cannot say; they are made anew
        views = {"backup", *(name for name, _, _ in self._fields)}
        return {key: value for key, value in self.__dict__.items() if key not in views}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._view(self.buffer)

    def to(self, device: torch.device) -> None:
        """Move everything to `device`; the views are new tensors afterwards."""
        self._view(self.buffer.to(device))

    def _pack(self, double: bool) -> Tensor:
        """The int64 table that the kernels walk; csrc/plan.h mirrors its order."""
        rule = self.rule
        score = 2 if rule.utility == "random" else 1 if rule.name == "clarena" else 0
        accrual = 2 if rule.name == "clarena" else 1 if rule.accrual == "all" else 0
        count = 2 if rule.name == "clarena" else 0 if rule.accumulate else 1
        table = [
            len(self.layouts),
            len(self.slots),
            len(self.weights),
            len(self.regions),
            sum(len(layout.incoming) for layout in self.layouts),
            self.layouts[-1].units.stop,
            self.slots[-1].columns.stop,
            8 if double else 4,
            _ACTIVATION.index(rule.activation),
            int(rule.keeps_mean),
            _OUTGOING.index(rule.outgoing),
            _INCOMING.index(rule.incoming),
            int(rule.name == "clarena"),  # min-max normalisation
            score,
            accrual,
            count,
            *self.offsets,
            self.buffer.numel(),
        ]
        first = 0
        for layout in self.layouts:
            incoming = len(layout.incoming)
            units = layout.units.start
            table += [units, layout.num_units, layout.columns_per_unit, layout.slots[0], len(layout.slots)]
            table += [first, incoming, layout.stream]
            first += incoming
        for slot in self.slots:
            table += [slot.group, slot.columns.start, slot.columns.stop - slot.columns.start, slot.weight, slot.spatial]
        for layout in self.layouts:
            table += layout.incoming
        dims = lambda shape: [len(shape), *shape, *(1,) * (MAX_DIMS - len(shape))]  # noqa: E731
        groups = {slot.weight: getattr(slot.module, "groups", 1) for slot in self.slots}
        for i, ref in enumerate(self.weights):
            table += [DTYPES[ref.dtype], *dims(ref.shape), groups.get(i, 1)]
            table += [int(self.reads_rows[i]), int(self.reads_columns[i])]
        for r in self.regions:
            (value,) = struct.unpack("q", struct.pack("d", r.value))
            table += [r.kind, r.group, r.axis, r.per_unit, r.conv_groups, r.stream]
            table += [_DISTRIBUTION.index(r.distribution), value, r.slot, *dims(r.ref.shape)]
        return torch.tensor(table, dtype=torch.int64)
