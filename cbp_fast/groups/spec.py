"""Unit groups: the layers that make, normalise and read the same hidden units, as given and as resolved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .layers import columns_per_unit, entries_per_unit, is_depthwise, make_width, rows_per_unit, spatial_axes


@dataclass(frozen=True)
class Part:
    """Some indices along a layer's axis: those of unit j are start + j * unit_stride + p * position_stride.

    Attributes:
        layer: The layer or its qualified name.
        start: Index of the first one of unit 0.
        per_unit: How many there are for each unit (p < per_unit).
        unit_stride: From one unit to the next; None is `per_unit`.
        position_stride: From one index of a unit to its next.
    """

    layer: str | nn.Module
    start: int = 0
    per_unit: int = 1
    unit_stride: int | None = None
    position_stride: int = 1


@dataclass(frozen=True)
class UnitGroup:
    """The layers that share one axis of N hidden units.

    A layer is given by its qualified name (``"features.0"``) or as the module itself; lists become tuples. A
    :class:`Part` stands for a layer of which only some rows, columns or entries belong to the group.

    Attributes:
        name: Name of the group, unique in a model.
        incoming: Layers that make the units: a unit is one row of each weight. A depthwise convolution of the units
            is one of them.
        outgoing: Layers that read the units: a unit is one column of each weight, or a block of columns where a
            linear layer reads a flattened convolution.
        norms: Normalisation layers in between.
        num_units: N; needed only where every incoming layer is a `Part`.
    """

    name: str
    incoming: Sequence[str | nn.Module | Part]
    outgoing: Sequence[str | nn.Module | Part]
    norms: Sequence[str | nn.Module | Part] = ()
    num_units: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"UnitGroup: name is {self.name!r}, must be a string")
        for role in ("incoming", "outgoing", "norms"):
            layers = getattr(self, role)
            if not isinstance(layers, (nn.Module, Part, Iterable)):
                raise TypeError(f"UnitGroup: {role} is {layers!r}, must be layers: names, modules or Parts")
            # a lone name would fall apart into its letters
            layers = (layers,) if isinstance(layers, (str, nn.Module, Part)) else tuple(layers)
            object.__setattr__(self, role, layers)


class Block(NamedTuple):
    """The indices along an axis that belong to unit j: start + j * unit_stride + p * position_stride, p < per_unit."""

    start: int
    unit_stride: int
    per_unit: int
    position_stride: int

    def indices(self, num_units: int) -> range | list[int]:
        """All of them, for all units."""
        if self.unit_stride == self.per_unit and self.position_stride == 1:
            return range(self.start, self.start + num_units * self.per_unit)
        return [
            self.start + j * self.unit_stride + p * self.position_stride
            for j in range(num_units)
            for p in range(self.per_unit)
        ]


class Member(NamedTuple):
    """A layer in its role in a group, and which indices along its axis belong to the units."""

    name: str
    module: nn.Module
    block: Block


@dataclass(frozen=True)
class ResolvedGroup:
    """A unit group that was checked, with its modules.

    Attributes:
        name: Name of the group.
        num_units: N, the rows of every incoming weight.
        columns_per_unit: P, the columns of every outgoing weight that read one unit: the number of positions where
            linear layers read a flattened convolution, else 1.
        incoming: The layers that make the units.
        outgoing: The layers that read them.
        norms: The normalisation layers in between.
        preceding: The layers that make the units which the incoming layers read; only a rule that draws
            anew what precedes a unit looks at them, and whoever has all groups sets them.
    """

    name: str
    num_units: int
    columns_per_unit: int
    incoming: tuple[Member, ...]
    outgoing: tuple[Member, ...]
    norms: tuple[Member, ...]
    preceding: tuple[Member, ...] = ()

    def unit_group(self) -> UnitGroup:
        """The group by names, which :func:`resolve` resolves to this one: a `Part` where a name would mean another."""
        n, p = self.num_units, self.columns_per_unit
        spatial = min(spatial_axes(member.module) for member in self.incoming)

        def written(members: Sequence[Member], per_unit: Callable[[str, nn.Module], int]) -> list[str | Part]:
            modules = [member.module for member in members]
            parts: list[str | Part] = []
            for name, module, block in members:
                whole = modules.count(module) == 1 and block == (0, block.per_unit, block.per_unit, 1)
                with contextlib.suppress(ValueError):
                    if whole and per_unit(name, module) == block.per_unit:
                        parts.append(name)
                        continue
                start, unit_stride, each, position_stride = block
                parts.append(Part(name, start, each, unit_stride, position_stride))
            return parts

        def rows(name: str, layer: nn.Module) -> int:
            return rows_per_unit(name, layer, n, name)

        incoming = written(self.incoming, rows)
        named = [m.module for m, part in zip(self.incoming, incoming, strict=True) if isinstance(part, str)]
        if named and make_width(min(named, key=is_depthwise)) != n:
            # they would make other units, as a depthwise convolution with several rows for each by itself does
            incoming = written(self.incoming, lambda *_: 0)
        outgoing = written(self.outgoing, lambda name, layer: columns_per_unit(name, layer, n, spatial))
        norms = written(self.norms, lambda name, norm: entries_per_unit(name, norm, n, p, spatial))
        has_name = any(isinstance(part, str) for part in incoming)
        return UnitGroup(self.name, incoming, outgoing, norms, None if has_name else n)
