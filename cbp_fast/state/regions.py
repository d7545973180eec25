"""What is set when a unit is replaced: which part of which tensor belongs to it, and what comes there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from ..groups.layers import make_width, out_axis, read_width, spatial_axes
from ..groups.spec import Block, Member, ResolvedGroup
from ..rules.rule import Rule
from ..tensors.parts import whole
from .layout import Layout, TensorRef, input_axis, stream_id

DRAW, FILL, TRANSFER = range(3)


class Region(NamedTuple):
    """The part of one tensor that belongs to each unit of a group, and what re-initialisation puts there.

    Unit j owns the indices of `block` along `axis`, whole along the other axes; of a grouped convolution's axis 1 it
    owns its column in the rows of its convolution group.
    """

    kind: int  # DRAW from `distribution` with `value` as bound | FILL with `value` | TRANSFER into a bias
    group: int
    ref: TensorRef
    axis: int
    block: Block
    conv_groups: int = 1
    stream: int = 0  # Philox tensor id
    distribution: str = "uniform"
    value: float = 0.0
    slot: int = 0  # TRANSFER: the reader
    weight: TensorRef | None = None  # TRANSFER: the reader's weight


# where a tensor of a layer is found, by the layer and the tensor's key; None if the layer has no such tensor
FindTensor = Callable[[Member, str], TensorRef | None]


def regions_of(
    rule: Rule, groups: Sequence[ResolvedGroup], layouts: Sequence[Layout], find: FindTensor
) -> list[Region]:
    """Everything that is set when a unit is replaced, in the order of setting.

    Raises:
        ValueError: two weights of the model have the same Philox tensor id, or parts of tensors lie where they cannot
            be set.
    """
    lister = _Lister(rule, find)
    for g, (group, layout) in enumerate(zip(groups, layouts, strict=True)):
        lister.list_group(g, group, layout)
    _check_streams(lister.regions, layouts)
    _check_parts(lister.regions)
    return lister.regions


class _Lister:
    """Lists the regions of one group after the other."""

    def __init__(self, rule: Rule, find: FindTensor) -> None:
        self.regions: list[Region] = []
        self._rule, self._find = rule, find

    def list_group(self, g: int, group: ResolvedGroup, layout: Layout) -> None:
        """Add those of a group."""
        arithmetic = self._rule.arithmetic
        if arithmetic.draws_preceding:
            # column j, whatever that column means there
            for member in group.preceding:
                self._draw(g, member._replace(block=Block(0, 1, 1, 1)), axis=1)
        for member in group.incoming:
            self._draw(g, member, out_axis(member.module))
            if "bias" in arithmetic.resets:
                self._fill(g, member, "bias", 0.0)
        for member in group.norms if "norms" in arithmetic.resets else ():
            for key, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                self._fill(g, member, key, value)
        if self._rule.transfer_bias:
            for member, slot in zip(group.outgoing, layout.slots, strict=True):
                self._transfer(g, member, slot)
        for member in group.outgoing if "outgoing" in arithmetic.resets else ():
            axis, conv_groups = input_axis(member)
            self._fill(g, member, "weight", 0.0, axis=axis, conv_groups=conv_groups)

    def _weight(self, member: Member) -> TensorRef:
        ref = self._find(member, "weight")
        assert ref is not None
        return ref

    def _draw(self, group: int, member: Member, axis: int) -> None:
        ref, module, rule = self._weight(member), member.module, self._rule
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

    def _transfer(self, group: int, member: Member, slot: int) -> None:
        bias = self._find(member, "bias")
        if bias is not None:
            axis, conv_groups = input_axis(member)
            weight = self._weight(member)
            self.regions.append(
                Region(TRANSFER, group, bias, axis, member.block, conv_groups, slot=slot, weight=weight)
            )

    def _fill(self, group: int, member: Member, key: str, value: float, axis: int = 0, conv_groups: int = 1) -> None:
        ref = self._find(member, key)
        if ref is not None:
            self.regions.append(Region(FILL, group, ref, axis, member.block, conv_groups, value=value))


def with_deviations(regions: Iterable[Region], values: Mapping[str, float]) -> list[Region]:
    """The regions, with other standard deviations to draw with, by the names of weights."""
    return [
        region._replace(value=values[region.ref.name]) if region.kind == DRAW and region.ref.name in values else region
        for region in regions
    ]


def _check_streams(regions: Iterable[Region], layouts: Iterable[Layout]) -> None:
    seen: dict[int, str] = {}
    for region in regions:
        if region.kind == DRAW:
            other = seen.setdefault(region.stream, region.ref.name)
            if other != region.ref.name:
                raise ValueError(
                    f"{other} and {region.ref.name} hash to the same random stream; rename one of them, "
                    "or leave its group out with exclude="
                )
    names: dict[int, str] = {}
    for layout in layouts:
        if names.setdefault(layout.stream, layout.name) != layout.name:
            raise ValueError(
                f"groups {names[layout.stream]} and {layout.name} hash to the same random stream; rename one"
            )


def _check_parts(regions: Iterable[Region]) -> None:
    for region in regions:
        for ref in (region.ref, region.weight):
            if region.kind == TRANSFER and ref is not None and ref.extent.split:
                raise ValueError(f"transfer_bias needs {ref.name} whole in every process, and it is split")
        extent = region.ref.extent
        rows = extent.whole[0] // region.conv_groups
        if region.conv_groups > 1 and extent.split and (extent.first[0] % rows or extent.part[0] % rows):
            raise ValueError(
                f"{region.ref.name} is split inside a convolution group of {rows} rows; split it between groups, "
                "or exclude= its group"
            )


def check_served(rule: Rule, groups: Iterable[ResolvedGroup]) -> None:
    """Raises ValueError for a group that a rule is not defined for."""
    for group in groups:
        members = (*group.incoming, *group.outgoing)
        linear = all(isinstance(member.module, nn.Linear) for member in members) and group.columns_per_unit == 1
        if rule.arithmetic.only_linear and not linear:
            raise ValueError(
                f"rule {rule.name!r} is defined for linear layers only, and group '{group.name}' has convolutions; "
                "use rule='nature', or exclude= the group"
            )
        for name, module, _ in group.preceding if rule.arithmetic.draws_preceding else ():
            inputs = module.get_parameter("weight").shape[1]
            if inputs < group.num_units:
                raise ValueError(
                    f"rule {rule.name!r} re-draws column j of the preceding layer for unit j, but '{name}' has "
                    f"{inputs} inputs and group '{group.name}' has {group.num_units} units"
                )
