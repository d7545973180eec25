"""Which layers of a model make, normalise and read the same units: unit groups, and whether their layers fit."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from .dtensors import is_dtensor

# number of spatial axes after the units of a layer; 0: the units are the last axis
_HF_CONV1D = "transformers.Conv1D"
LAYERS = {"Linear": 0, "Conv1d": 1, "Conv2d": 2, "Conv3d": 3}
LAYERS |= {"ConvTranspose1d": 1, "ConvTranspose2d": 2, "ConvTranspose3d": 3, "Embedding": 0, _HF_CONV1D: 0}
_FEATURE_NORMS = ("LayerNorm", "RMSNorm")
NORMS = (
    *(f"{kind}Norm{d}d" for kind in ("Batch", "Instance") for d in (1, 2, 3)),
    *("SyncBatchNorm", "GroupNorm", *_FEATURE_NORMS),
)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
        for role in ("incoming", "outgoing", "norms"):
            layers = getattr(self, role)
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
        preceding: The layers that make the units which the incoming layers read; only the rule "clarena" looks at
            them, and whoever has all groups sets them.
    """

    name: str
    num_units: int
    columns_per_unit: int
    incoming: tuple[Member, ...]
    outgoing: tuple[Member, ...]
    norms: tuple[Member, ...]
    preceding: tuple[Member, ...] = ()

    def unit_group(self) -> UnitGroup:
        """The group by names."""
        parts: list[list[str | Part]] = []
        for members in (self.incoming, self.outgoing, self.norms):
            parts.append([])
            for name, module, block in members:
                width = (make_width, read_width, lambda norm: norm_shape(norm)[0])[len(parts) - 1](module)
                start, unit_stride, per_unit, position_stride = block
                whole = block == (0, per_unit, per_unit, 1) and width == self.num_units * per_unit
                parts[-1].append(name if whole else Part(name, start, per_unit, unit_stride, position_stride))
        named = any(isinstance(part, str) for part in parts[0])
        incoming, outgoing, norms = parts
        return UnitGroup(self.name, incoming, outgoing, norms, None if named else self.num_units)


def resolve(model: nn.Module, group: UnitGroup) -> ResolvedGroup:
    """Looks up the modules of a unit group and checks that they fit together.

    Args:
        model: The model that holds the layers.
        group: A group, found or given by hand.

    Raises:
        TypeError: If a layer is of a kind that is not supported in its role.
        ValueError: If a layer is not in the model, is frozen, tied, lazy or computed, or if widths do not match.
    """
    if not isinstance(group, UnitGroup):
        raise TypeError(f"a unit group must be a UnitGroup, not {type(group).__name__}")
    check_model(model)
    try:
        return _resolve(model, group)
    except (TypeError, ValueError) as error:
        raise type(error)(f"unit group '{group.name}': {error}") from None


def check_disjoint(groups: Iterable[ResolvedGroup]) -> None:
    """Checks that group names are unique and that no part of a layer has the same role in two groups.

    Raises:
        ValueError: If not; the message names the layer and both groups.
    """
    names: set[str] = set()
    owners: dict[tuple[str, nn.Module], list[tuple[ResolvedGroup, Block]]] = defaultdict(list)
    for group in groups:
        if group.name in names:
            raise ValueError(f"two unit groups are called '{group.name}'")
        names.add(group.name)
        for role in ("incoming", "outgoing", "norms"):
            for layer, module, block in getattr(group, role):
                for other, theirs in owners[role, module]:
                    if not set(block.indices(group.num_units)).isdisjoint(theirs.indices(other.num_units)):
                        raise ValueError(
                            f"'{layer}' is in `{role}` of two unit groups, '{other.name}' and '{group.name}'"
                            if other is not group
                            else f"'{layer}' is named twice in `{role}` of unit group '{group.name}' for the same units"
                        )
                owners[role, module].append((group, block))


def check_model(model: nn.Module) -> None:
    """Checks that a model is a module, and not wrapped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = "module" if parallel else "_orig_mod" if hasattr(model, "_orig_mod") else None
    if inner:
        raise ValueError(f"{type(model).__name__} wraps the model: pass the model itself, model.{inner}")


def label(name: str, module: nn.Module) -> str:
    """A module as messages call it."""
    return f"'{name}' ({type(module).__name__})"


def kind(module: nn.Module) -> str:
    """Name of the torch.nn class whose forward() the module runs unchanged, or an empty string."""
    forward = getattr(module.forward, "__func__", None)
    for cls in type(module).__mro__:
        name: str = cls.__name__
        if getattr(nn, name, None) is cls and getattr(cls, "forward", None) is forward:
            return name.removeprefix("Lazy")
        # a linear layer whose weight is [in, out]; not imported, since few have it
        if (cls.__module__, name) == ("transformers.pytorch_utils", "Conv1D") and vars(cls).get("forward") is forward:
            return _HF_CONV1D
    return ""


def norm_kind(module: nn.Module | None) -> str:
    """Name of the norm of torch.nn that a module is, also where its forward() adds something; or an empty string."""
    names = (cls.__name__ for cls in type(module).__mro__ if getattr(nn, cls.__name__, None) is cls)
    return next((name for name in names if name in NORMS), "")


def _resolve(model: nn.Module, group: UnitGroup) -> ResolvedGroup:
    names = {module: name for name, module in model.named_modules()}
    members = {
        role: [(part, _look_up(model, names, part.layer if isinstance(part, Part) else part)) for part in parts]
        for role, parts in (("incoming", group.incoming), ("outgoing", group.outgoing), ("norms", group.norms))
    }
    for role in ("incoming", "outgoing"):
        if not members[role]:
            raise ValueError(f"`{role}` names no layer")
    roles: dict[str, str] = {}
    for role, layers in members.items():
        for part, module in layers:
            name = names[module]
            if roles.setdefault(name, role) != role or (
                not isinstance(part, Part) and [m for _, m in layers].count(module) > 1
            ):
                raise ValueError(f"'{name}' is named twice; a layer has one role in a group")
            if role == "norms":
                if not norm_kind(module):
                    raise TypeError(
                        f"{label(name, module)} is not supported as a norm: it must be one of {', '.join(NORMS)}"
                    )
            else:
                _check_layer(name, module, role)
            _check_parameters(name, module, names)
            if role != "norms" and not cast(torch.Tensor, module.weight).numel():
                raise ValueError(f"{label(name, module)} has a weight without elements")

    n = _num_units(group, members["incoming"], names)
    spatial = min(spatial_axes(module) for _, module in members["incoming"])
    first = names[members["incoming"][0][1]]
    incoming = _members(
        members["incoming"], names, n, make_width, lambda name, module: _rows_per_unit(name, module, n, first)
    )
    outgoing = _members(
        members["outgoing"], names, n, read_width, lambda name, module: _columns_per_unit(name, module, n, spatial)
    )
    first, p = outgoing[0].name, outgoing[0].block.per_unit
    for name, module, block in outgoing:
        if block.per_unit != p:
            raise ValueError(f"'{first}' reads {p} columns of each unit but '{name}' reads {block.per_unit}")
        if block[1:] != (p, p, 1) and block[1:] != (1, p, n):
            raise ValueError(
                f"the features of {label(name, module)} that read the group must lie side by side, unit by unit or "
                "position by position"
            )
    norms = _members(
        members["norms"],
        names,
        n,
        lambda module: norm_shape(module)[0],
        lambda name, module: _entries_per_unit(name, module, n, p, spatial),
    )
    return ResolvedGroup(group.name, n, p, incoming, outgoing, norms)


def _num_units(
    group: UnitGroup, incoming: Sequence[tuple[str | nn.Module | Part, nn.Module]], names: dict[nn.Module, str]
) -> int:
    """N, by the first incoming layer that is given whole, and is not depthwise if another one is not."""
    whole = [module for part, module in incoming if not isinstance(part, Part)]
    whole.sort(key=is_depthwise)
    n = make_width(whole[0]) if whole else group.num_units
    if n is None:
        raise ValueError("num_units must be given where every incoming layer is a Part")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"num_units is {n!r}, must be a positive integer")
    if group.num_units not in (None, n):
        raise ValueError(f"num_units is {group.num_units} but '{names[whole[0]]}' makes {n} units")
    return n


def _members(
    layers: Sequence[tuple[str | nn.Module | Part, nn.Module]],
    names: dict[nn.Module, str],
    n: int,
    width: Callable[[nn.Module], int],
    per_unit: Callable[[str, nn.Module], int],
) -> tuple[Member, ...]:
    """Every layer with its block along an axis of `width`; `per_unit` checks a layer that is given whole."""
    members = []
    for part, module in layers:
        name = names[module]
        if not isinstance(part, Part):
            own = per_unit(name, module)
            members.append(Member(name, module, Block(0, own, own, 1)))
            continue
        unit_stride = part.per_unit if part.unit_stride is None else part.unit_stride
        block = Block(part.start, unit_stride, part.per_unit, part.position_stride)
        if any(not isinstance(x, int) or isinstance(x, bool) for x in block) or min(block[1:]) < 1 or block.start < 0:
            raise ValueError(f"{part} must have whole numbers, start at least 0 and the others at least 1")
        indices = block.indices(n)
        if max(indices) >= width(module):
            raise ValueError(
                f"the part of {label(name, module)} reaches index {max(indices)} of an axis of {width(module)}"
            )
        if len(set(indices)) < len(indices):
            raise ValueError(f"the part of {label(name, module)} gives one index to two units")
        members.append(Member(name, module, block))
    return tuple(members)


def _look_up(model: nn.Module, names: dict[nn.Module, str], layer: str | nn.Module) -> nn.Module:
    if isinstance(layer, nn.Module):
        if layer not in names:
            raise ValueError(f"the {type(layer).__name__} given is not a module of the model")
        return layer
    if not isinstance(layer, str):
        raise TypeError(f"a layer must be given as a module or its name, not as {type(layer).__name__}")
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if layer not in modules:
        close = difflib.get_close_matches(layer, modules, n=1)
        raise ValueError(f"the model has no module '{layer}'" + (f"; did you mean '{close[0]}'?" if close else ""))
    return modules[layer]


def _check_layer(name: str, module: nn.Module, role: str) -> None:
    layer_kind = kind(module)
    if layer_kind == "Embedding" and role == "outgoing":
        raise TypeError(f"{label(name, module)} reads indices, not units; an embedding can only be incoming")
    if layer_kind.startswith("ConvTranspose") and cast(Any, module).groups > 1:
        raise TypeError(f"{label(name, module)}: transposed convolutions with groups are not supported")
    if layer_kind in LAYERS:
        return
    if isinstance(module, tuple(getattr(nn, layer, ()) for layer in LAYERS)):
        raise TypeError(f"{label(name, module)} overrides forward(), so what its weight means is not known")
    raise TypeError(f"{label(name, module)} is not supported as a layer: it must be one of {', '.join(LAYERS)}")


def _check_parameters(name: str, module: nn.Module, modules: Iterable[nn.Module]) -> None:
    if "weight" not in module._parameters:
        raise ValueError(f"the weight of {label(name, module)} is computed (parametrized, pruned), not a parameter")
    for key, parameter in module._parameters.items():
        if parameter is None:
            continue
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{label(name, module)} is lazy and has no {key} yet: run the model once")
        if type(parameter) is not nn.Parameter and not is_dtensor(parameter):
            raise ValueError(f"'{name}.{key}' is a {type(parameter).__name__}, not a plain nn.Parameter")
        if parameter.dtype not in _DTYPES:
            raise ValueError(f"'{name}.{key}' is {parameter.dtype}, not float32, float64, bfloat16 or float16")
        if not parameter.requires_grad:
            raise ValueError(f"'{name}.{key}' is frozen (requires_grad is False)")
        if sum(parameter is other for owner in modules for other in owner._parameters.values()) > 1:
            raise ValueError(f"'{name}.{key}' is tied: two modules of the model share it")


def out_axis(layer: nn.Module) -> int:
    """The axis of a layer's weight along which its outputs lie; its inputs lie along the other one of the first two."""
    layer_kind = kind(layer)
    return int(layer_kind in ("Embedding", _HF_CONV1D) or layer_kind.startswith("ConvTranspose"))


def spatial_axes(layer: nn.Module) -> int:
    """Number of axes after the features in a layer's input; 0: the features are the last axis."""
    return LAYERS[kind(layer)]


def make_width(layer: nn.Module) -> int:
    """How many features a layer makes."""
    return layer.get_parameter("weight").shape[out_axis(layer)]


def read_width(layer: nn.Module) -> int:
    """How many features a layer reads."""
    return layer.get_parameter("weight").shape[1 - out_axis(layer)] * getattr(layer, "groups", 1)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of every channel by itself."""
    return getattr(layer, "groups", 1) == read_width(layer) > 1


def norm_shape(norm: Any) -> tuple[int, ...]:
    """The shape of a norm's entries."""
    if hasattr(norm, "normalized_shape"):
        return tuple(norm.normalized_shape)
    return (norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features,)


def _rows_per_unit(name: str, layer: nn.Module, n: int, first: str) -> int:
    """Rows of a producer for each of the n units that `first` makes: several only for a depthwise convolution."""
    width = make_width(layer)
    if width != n and not (is_depthwise(layer) and width % n == 0):
        raise ValueError(f"'{first}' makes {n} units but '{name}' makes {width}")
    return width // n


def _columns_per_unit(name: str, reader: nn.Module, n: int, spatial: int) -> int:
    """Columns of a reader for each of n units that have `spatial` axes."""
    width, where = read_width(reader), label(name, reader)
    if is_depthwise(reader):
        raise ValueError(f"{where} is a depthwise convolution: it does not mix units, and belongs to `incoming`")
    flattens = spatial > 0 and spatial_axes(reader) == 0
    if width != n and not (flattens and width % n == 0):
        multiple = ", of which that is no multiple" if flattens else ""
        raise ValueError(f"{where} reads {width} features but the group has {n} units{multiple}")
    return width // n


def _entries_per_unit(name: str, norm: nn.Module, n: int, p: int, spatial: int) -> int:
    """Entries of a norm for each of n units with p columns each."""
    shape = norm_shape(norm)
    of_features = norm_kind(norm) in _FEATURE_NORMS
    if shape != (n,) and not (of_features and (shape == (n * p,) or (shape[0] == n and len(shape) == 1 + spatial))):
        size = shape[0] if len(shape) == 1 else shape
        raise ValueError(f"{label(name, norm)} normalises {size} features but the group has {n} units")
    return shape[0] // n
