"""Where everything lies that a step reads and writes; no numbers are here."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..groups.layers import out_axis, read_width, spatial_axes
from ..groups.spec import Member, ResolvedGroup
from ..parallel.processes import Processes
from ..rules.rule import Rule
from ..tensors.parts import extent_of
from .layout import Layout, Slot, TensorRef, stream_id, tensor_ref
from .regions import regions_of


class Arrangement:
    """Which units, columns, weights and regions a rule and its groups have, and in which order.

    Attributes:
        rule: what is computed.
        weights: the weights that the rule reads; `modules` are their layers. `reads_outputs` and `reads_inputs` say
            which sums of their magnitudes it needs: by output, and by input.
        slots: the layers that read units, group by group.
        layouts: the groups.
        owners, keys: where each weight is found at every step; see `TensorRef`.
        regions: what is set when a unit is replaced; `regions_of_group` are the numbers of each group's.
        in_parts: whether any of these tensors is a DTensor.
        outputs, inputs: where the sums of each weight stand in `State.flat`: float64 [count of each slot, activation,
            feature, then sums of magnitudes by output and by input of every weight that the rule reads].
        reduced: how many of its entries must be added up over several processes: all but sums of weights that each has
            whole. `splits_sums`: whether sums of weights are among them. flat_size: how many there are.
        previous_mean: whether distances are measured from the mean that the step before left.

    Raises:
        ValueError: two weights of the model have the same Philox tensor id, or a part of a tensor cannot be set.
    """

    def __init__(self, rule: Rule, groups: Sequence[ResolvedGroup], processes: Processes | None) -> None:
        self.rule = rule
        self._processes = processes
        # one process alone can take the mean of a step's samples while they come in
        self.previous_mean = rule.centred and processes is not None
        self.weights: list[TensorRef] = []
        self.modules: list[nn.Module] = []  # the layer of each weight
        self.slots: list[Slot] = []
        self.layouts: list[Layout] = []
        # which sums of each weight's magnitudes the rule needs: by output and by input
        self.reads_outputs: list[bool] = []
        self.reads_inputs: list[bool] = []
        self._place(groups)
        self.owners = [ref.owner for ref in self.weights]
        self.keys = [ref.key for ref in self.weights]
        self.regions = regions_of(rule, groups, self.layouts, self._ref)
        self.regions_of_group: list[list[int]] = [[] for _ in groups]
        for i, region in enumerate(self.regions):
            self.regions_of_group[region.group].append(i)
        self.in_parts = any(ref.extent.is_dtensor for ref in (*self.weights, *(r.ref for r in self.regions)))
        columns = self.slots[-1].columns.stop
        means = columns if rule.keeps_mean else 0
        self._lay_out_sums(len(self.slots) + columns + means)

    def _ref(self, member: Member, key: str) -> TensorRef | None:
        extent = self._processes.extent if self._processes else extent_of
        return tensor_ref(member.name, member.module, key, extent)

    def _weight_ref(self, member: Member) -> TensorRef:
        ref = self._ref(member, "weight")
        assert ref is not None
        return ref

    def _lay_out_sums(self, at: int) -> None:
        """Give the sums of weights their places in `flat`, from `at` on: those of split weights first."""
        self.outputs = [slice(0, 0)] * len(self.weights)
        self.inputs = list(self.outputs)
        self.reduced = at
        for split in (True, False):
            for i, (ref, module) in enumerate(zip(self.weights, self.modules, strict=True)):
                if ref.extent.split != split:
                    continue
                if self.reads_outputs[i]:
                    self.outputs[i] = slice(at, at + ref.shape[out_axis(module)])
                    at = self.outputs[i].stop
                if self.reads_inputs[i]:
                    self.inputs[i] = slice(at, at + read_width(module))
                    at = self.inputs[i].stop
            if split:
                self.splits_sums, self.reduced = at > self.reduced, at
        self.flat_size = at

    def _place(self, groups: Sequence[ResolvedGroup]) -> None:
        """Give every group its units, every reader its columns, every weight its number."""
        arithmetic, index = self.rule.arithmetic, {}

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
            incoming = [(weight(m, arithmetic.incoming is not None, False), m.block) for m in group.incoming]
            first = len(self.slots)
            for member in group.outgoing:
                columns = slice(column, column + group.num_units * group.columns_per_unit)
                i = weight(member, False, arithmetic.outgoing is not None)
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
                    tuple(incoming) if arithmetic.incoming else (),
                    stream_id(group.name, group=True),
                )
            )
            unit += group.num_units
