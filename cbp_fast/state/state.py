"""The flat state of all unit groups on one device, and the table by which the kernels walk it."""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..groups.layers import make_width, out_axis, read_width, spatial_axes
from ..groups.spec import Block, Member, ResolvedGroup
from ..parallel.processes import Processes
from ..rules.rule import Rule
from ..tensors.native import DTYPES
from ..tensors.parts import place_of, whole
from .layout import (
    DRAW,
    FILL,
    TRANSFER,
    Layout,
    Region,
    Slot,
    TensorRef,
    conv_groups_here,
    input_axis,
    stream_id,
    tensor_ref,
)

# the order is part of the table's layout, which csrc/plan.h mirrors
_ACTIVATION = (None, "magnitude", "centred")
_OUTGOING = (None, "sum", "mean")
_INCOMING = (None, "times_sum", "divide")
_DISTRIBUTION = ("uniform", "normal", "unit")
MAX_DIMS = 5


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Tensors made here are ordinary ones, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class State:
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

    What a step sums stands in one tensor more, `flat`: float64 [count of each slot, activation, feature, then sums of
    magnitudes by output and by input of every weight that the rule reads]. `outputs` and `inputs` say where those are.
    Its first `reduced` entries must be added up over several processes: all but sums of weights that each has whole.
    `splits_sums`: whether sums of weights are among them.

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
        self.rule = rule
        self._processes = processes
        # one process alone can take the mean of a step's samples while they come in
        self.previous_mean = rule.centred and processes is not None
        self.weights: list[TensorRef] = []
        self.modules: list[nn.Module] = []  # the layer of each weight
        self.slots: list[Slot] = []
        self.layouts: list[Layout] = []
        self.regions: list[Region] = []
        # which sums of each weight's magnitudes the rule needs: by output and by input
        self.reads_outputs: list[bool] = []
        self.reads_inputs: list[bool] = []
        self._place(groups)
        self._add_regions(groups)
        self._check_streams()
        self._check_parts()

        total, columns = self.layouts[-1].units.stop, self.slots[-1].columns.stop
        means = columns if rule.keeps_mean else 0
        double = any(ref.dtype == torch.float64 for ref in self._group_weights(groups))
        f64, i64, i32 = torch.float64, torch.int64, torch.int32
        # 8-byte fields first, so that every view is aligned
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
        self._lay_out_sums(len(self.slots) + columns + means)
        size = sum(dtype.itemsize * n for _, dtype, n in self._fields)
        self.redo: dict[Any, Any] | None = None
        with _plainly():
            self._view(torch.zeros(size, dtype=torch.uint8, device=device))
            self.seed.fill_(seed if seed < 2**63 else seed - 2**64)
        self.plan = self._pack()

    def _ref(self, member: Member, key: str) -> TensorRef | None:
        place = self._processes.place if self._processes else place_of
        return tensor_ref(member.name, member.module, key, place)

    def _weight_ref(self, member: Member) -> TensorRef:
        ref = self._ref(member, "weight")
        assert ref is not None
        return ref

    def _group_weights(self, groups: Iterable[ResolvedGroup]) -> Iterable[TensorRef]:
        for group in groups:
            for member in (*group.incoming, *group.outgoing):
                yield self._weight_ref(member)

    def _lay_out_sums(self, at: int) -> None:
        """Give the sums of weights their places in `flat`, from `at` on: those of split weights first."""
        self.outputs = [slice(0, 0)] * len(self.weights)
        self.inputs = list(self.outputs)
        self.reduced = at
        for split in (True, False):
            for i, (ref, module) in enumerate(zip(self.weights, self.modules, strict=True)):
                if ref.place.split != split:
                    continue
                if self.reads_outputs[i]:
                    self.outputs[i] = slice(at, at + ref.shape[out_axis(module)])
                    at = self.outputs[i].stop
                if self.reads_inputs[i]:
                    self.inputs[i] = slice(at, at + read_width(module))
                    at = self.inputs[i].stop
            if split:
                self.splits_sums, self.reduced = at > self.reduced, at
        self._flat_size = at

    def _place(self, groups: Sequence[ResolvedGroup]) -> None:
        """Give every group its units, every reader its columns, every weight its number."""
        rule, index = self.rule, {}

        def weight(member: Member, outputs: bool, inputs: bool) -> int:
            if not (outputs or inputs):
                return -1
            if member.module not in index:
                index[member.module] = len(self.weights)
                self.weights.append(self._weight_ref(member))
                self.modules.append(member.module)
                self.reads_outputs.append(False)
                self.reads_inputs.append(False)
            i = index[member.module]
            self.reads_outputs[i] |= outputs
            self.reads_inputs[i] |= inputs
            return i

        unit = column = 0
        for g, group in enumerate(groups):
            incoming = [(weight(m, rule.incoming is not None, False), m.block) for m in group.incoming]
            first = len(self.slots)
            for member in group.outgoing:
                columns = slice(column, column + group.num_units * group.columns_per_unit)
                i = weight(member, False, rule.outgoing is not None)
                module, width = member.module, read_width(member.module)
                seen = self._processes.seen(member) if self._processes else range(width)
                counts = self._processes is None or self._processes.counts
                self.slots.append(Slot(g, module, i, columns, spatial_axes(module), member.block, width, seen, counts))
                column = columns.stop
            self.layouts.append(
                Layout(
                    group.name,
                    group.num_units,
                    group.columns_per_unit,
                    slice(unit, unit + group.num_units),
                    tuple(range(first, len(self.slots))),
                    tuple(incoming) if rule.incoming else (),
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
                for member in group.preceding:
                    self._add_draw(g, member._replace(block=Block(0, 1, 1, 1)), axis=1)
                for member in group.incoming:
                    self._add_draw(g, member, axis=0)
                continue
            for member in group.incoming:
                self._add_draw(g, member, out_axis(member.module))
                self._add_fill(g, member, "bias", 0.0)
            for member in group.norms:
                for key, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                    self._add_fill(g, member, key, value)
            if rule.transfer_bias:
                for member, slot in zip(group.outgoing, self.layouts[g].slots, strict=True):
                    bias = self._ref(member, "bias")
                    if bias is not None:
                        axis, conv_groups = input_axis(member)
                        weight = self._weight_ref(member)
                        self.regions.append(
                            Region(TRANSFER, g, bias, axis, member.block, conv_groups, slot=slot, weight=weight)
                        )
            for member in group.outgoing:
                axis, conv_groups = input_axis(member)
                self._add_fill(g, member, "weight", 0.0, axis=axis, conv_groups=conv_groups)

    def _add_draw(self, group: int, member: Member, axis: int) -> None:
        ref, module, rule = self._weight_ref(member), member.module, self.rule
        distribution = rule.distribution
        if rule.init == "as_attached":
            tensor = ref.get()
            assert tensor is not None
            value = float(whole(tensor.detach()).double().std(correction=0))
            if not math.isfinite(value):
                raise ValueError(
                    f"init='as_attached' draws with the deviation of {ref.name}, which has entries that are not finite"
                )
        elif isinstance(module, nn.Embedding):
            # as PyTorch draws it
            distribution, value = "normal", 1.0
        else:
            # as PyTorch counts it: a transposed convolution's weight is [in, out, ...], and still axis 1 is taken
            fan_in = ref.shape[1:].numel() if spatial_axes(module) else read_width(module)
            value = rule.bound(fan_in, make_width(module), convolution=spatial_axes(module) > 0)
        stream = stream_id(ref.name)
        self.regions.append(
            Region(DRAW, group, ref, axis, member.block, stream=stream, distribution=distribution, value=value)
        )

    @property
    def deviations(self) -> dict[str, float]:
        """By name, the standard deviation with which each weight is drawn anew, where that was measured at attach."""
        if self.rule.init != "as_attached":
            return {}
        return {region.ref.name: region.value for region in self.regions if region.kind == DRAW}

    @deviations.setter
    def deviations(self, values: Mapping[str, float]) -> None:
        self.regions = [
            region._replace(value=values[region.ref.name])
            if region.kind == DRAW and region.ref.name in values
            else region
            for region in self.regions
        ]
        self.plan = self._pack()

    def _add_fill(
        self, group: int, member: Member, key: str, value: float, axis: int = 0, conv_groups: int = 1
    ) -> None:
        ref = self._ref(member, key)
        if ref is not None:
            self.regions.append(Region(FILL, group, ref, axis, member.block, conv_groups, value=value))

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

    def _check_parts(self) -> None:
        for region in self.regions:
            for ref in (region.ref, region.weight):
                if region.kind == TRANSFER and ref is not None and ref.place.split:
                    raise ValueError(f"transfer_bias needs {ref.name} whole in every process, and it is split")
            place = region.ref.place
            rows = place.whole[0] // region.conv_groups
            if region.conv_groups > 1 and place.split and (place.first[0] % rows or place.part[0] % rows):
                raise ValueError(
                    f"{region.ref.name} is split inside a convolution group of {rows} rows; split it between groups, "
                    "or exclude= its group"
                )

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
        self.flat = torch.zeros(self._flat_size, dtype=torch.float64, device=buffer.device)
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

    def _pack(self) -> Tensor:
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
            self.utility.element_size(),
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
            self._flat_size,
            int(self.previous_mean),
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
            table += [slot.features, *slot.block, len(slot.seen), slot.first_seen, slot.here.start]
            table += [slot.here.stop - slot.here.start, int(slot.counts), int(slot.adds)]
        for layout in self.layouts:
            for number, block in layout.incoming:
                table += [number, *block]

        def padded(sizes: Sequence[int], filler: int = 1) -> list[int]:
            return [*sizes, *(filler,) * (MAX_DIMS - len(sizes))]

        for i, (ref, module) in enumerate(zip(self.weights, self.modules, strict=True)):
            axis = out_axis(module)
            # a grouped convolution that only makes units has its rows summed like any other
            conv_groups = getattr(module, "groups", 1) if self.reads_inputs[i] else 1
            table += [DTYPES[ref.dtype], len(ref.shape), *padded(ref.shape), conv_groups, axis]
            reads = (int(self.reads_outputs[i]), int(self.reads_inputs[i]))
            places = (self.outputs[i].start, self.inputs[i].start)
            table += [reads[axis], reads[1 - axis], places[axis], places[1 - axis]]
            groups_here, group = conv_groups_here(ref, conv_groups)
            table += [*padded(ref.place.part), groups_here, ref.place.first[0]]
            table += [ref.place.first[1] + group * ref.shape[1], int(ref.place.adds)]
        for r in self.regions:
            (value,) = struct.unpack("q", struct.pack("d", r.value))
            table += [r.kind, r.group, r.axis, *r.block, r.conv_groups, r.stream]
            table += [_DISTRIBUTION.index(r.distribution), value, r.slot, len(r.ref.shape), *padded(r.ref.shape)]
            table += [*padded(r.ref.place.part), *padded(r.ref.place.first, 0)]
        with _plainly():
            return torch.tensor(table, dtype=torch.int64, device="cpu")
