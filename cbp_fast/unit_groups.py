"""Which layers of a model make, normalise and read the same units: unit groups, and whether their layers fit."""

from __future__ import annotations

import contextlib
import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from .dtensors import is_dtensor

# number of spatial axes after the units of a layer; 0: the units are the last axis
_HF_CONV1D = "transformers.Conv1D"
LAYERS = {"Linear": 0, "Conv1d": 1, "Conv2d": 2, "Conv3d": 3}
LAYERS |= {"ConvTranspose1d": 1, "ConvTranspose2d": 2, "ConvTranspose3d": 3, "Embedding": 0, _HF_CONV1D: 0}
# layers of other packages, not imported, since few have them; transformers' is linear with a weight [in, out]
_FOREIGN = {
    ("transformers.pytorch_utils", "Conv1D"): _HF_CONV1D,
    ("torch_geometric.nn.dense.linear", "Linear"): "Linear",
}
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
            return _rows_per_unit(name, layer, n, name)

        incoming = written(self.incoming, rows)
        named = [m.module for m, part in zip(self.incoming, incoming, strict=True) if isinstance(part, str)]
        if named and make_width(min(named, key=is_depthwise)) != n:
            # they would make other units, as a depthwise convolution with several rows for each by itself does
            incoming = written(self.incoming, lambda *_: 0)
        outgoing = written(self.outgoing, lambda name, layer: _columns_per_unit(name, layer, n, spatial))
        norms = written(self.norms, lambda name, norm: _entries_per_unit(name, norm, n, p, spatial))
        has_name = any(isinstance(part, str) for part in incoming)
        return UnitGroup(self.name, incoming, outgoing, norms, None if has_name else n)


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """The modules of a model with their names."""
    return {module: name for name, module in model.named_modules()}


def resolve(
    model: nn.Module,
    group: UnitGroup,
    tied: dict[str, str] | None = None,
    names: dict[nn.Module, str] | None = None,
) -> ResolvedGroup:
    """Looks up the modules of a unit group and checks that they fit together.

    Args:
        model: The model that holds the layers.
        group: A group, found or given by hand.
        tied: What :func:`shared_memory` says of the model's :func:`own_tensors`, for whoever asks about many groups.
        names: What :func:`names_of` says of it, likewise.

    Raises:
        TypeError: If a layer is of a kind that is not supported in its role.
        ValueError: If a layer is not in the model, is frozen, lazy or computed, shares its memory with another one,
            is an embedding with a padding row or a norm to keep, or if widths do not match.
    """
    if not isinstance(group, UnitGroup):
        raise TypeError(f"a unit group must be a UnitGroup, not {type(group).__name__}")
    check_model(model)
    try:
        tied = shared_memory(own_tensors(model)) if tied is None else tied
        return _resolve(model, names_of(model) if names is None else names, group, tied)
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


def shared_layer(one: ResolvedGroup, other: ResolvedGroup) -> str:
    """The first layer of which both groups have the same part in the same role, as messages say it; or nothing."""
    for role in ("incoming", "outgoing", "norms"):
        for layer, module, block in getattr(other, role):
            mine = set(block.indices(other.num_units))
            for _, theirs, taken in getattr(one, role):
                if theirs is module and not mine.isdisjoint(taken.indices(one.num_units)):
                    return f"'{layer}' in `{role}`"
    return ""


def strings(option: str, given: Any, what: str) -> tuple[str, ...]:
    """One string or several, as an argument has them."""
    several = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    for one in several:
        if not isinstance(one, str):
            raise TypeError(f"{option} {'is' if one is given else 'holds'} {one!r}, must be {what}")
    return several


def inside(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DistributedDataParallel."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


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
        foreign = _FOREIGN.get((cls.__module__, name))
        if foreign and vars(cls).get("forward") is forward:
            return foreign
    return ""


def norm_kind(module: nn.Module | None) -> str:
    """Name of the norm of torch.nn that a module is, also where its forward() adds something; or an empty string."""
    names = (cls.__name__ for cls in type(module).__mro__ if getattr(nn, cls.__name__, None) is cls)
    return next((name for name in names if name in NORMS), "")


def _resolve(model: nn.Module, names: dict[nn.Module, str], group: UnitGroup, tied: dict[str, str]) -> ResolvedGroup:
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
            _check_parameters(name, module, tied)
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
        raise ValueError(f"num_units is {group.num_units!r} but '{names[whole[0]]}' makes {n} units")
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
    try:
        return model.get_submodule(layer)
    except AttributeError:
        close = difflib.get_close_matches(layer, [name for name, _ in model.named_modules()], n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"the model has no module '{layer}'{hint}") from None


def _check_layer(name: str, module: nn.Module, role: str) -> None:
    layer_kind = kind(module)
    if layer_kind == "Embedding" and role == "outgoing":
        raise TypeError(f"{label(name, module)} reads indices, not units; an embedding can only be incoming")
    if layer_kind.startswith("ConvTranspose") and cast(Any, module).groups > 1:
        raise TypeError(f"{label(name, module)}: transposed convolutions with groups are not supported")
    if layer_kind == "Embedding" and (module.padding_idx is not None or module.max_norm is not None):
        raise ValueError(f"{label(name, module)} has padding_idx or max_norm, which a re-drawn unit would not keep")
    if layer_kind in LAYERS:
        return
    if isinstance(module, tuple(getattr(nn, layer, ()) for layer in LAYERS)):
        raise TypeError(f"{label(name, module)} overrides forward(), so what its weight means is not known")
    of = f" of {type(module).__module__}" if type(module).__name__ in LAYERS else ""
    raise TypeError(f"{label(name, module)}{of} is not supported as a layer: it must be one of {', '.join(LAYERS)}")


def _check_parameters(name: str, module: nn.Module, tied: dict[str, str]) -> None:
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
        own = f"{name}.{key}" if name else key
        if own in tied:
            raise ValueError(f"'{own}' is tied: it shares its memory with '{tied[own]}'")


def own_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every parameter and buffer with its name; one that two modules have, twice."""
    return [
        (f"{prefix}.{key}" if prefix else key, tensor)
        for prefix, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    ]


def span(tensor: torch.Tensor) -> tuple[Any, int, int] | None:
    """A tensor's memory: a space of addresses, the first byte and the one after the last; None if it has none.

    Two tensors may share elements only where the bytes between overlap in one space. All real memory of a device is one
    space, so that two storages over the same bytes are seen; on the meta device every storage is its own.
    """
    if is_dtensor(tensor):
        tensor = cast(Any, tensor)._local_tensor
    if isinstance(tensor, nn.parameter.UninitializedParameter) or tensor.layout != torch.strided or not tensor.numel():
        return None
    device, size = tensor.device, tensor.element_size()
    if type(tensor) in (nn.Parameter, torch.Tensor) and device.type != "meta":
        space, first = cast(Any, device), tensor.data_ptr()
        if not first:  # freed, as between the forwards of sharded modules
            return None
    else:
        storage = tensor.untyped_storage()
        if storage.device.type != "meta":  # it is made of other tensors
            return None
        space, first = storage._cdata, int(tensor.storage_offset()) * size
    if tensor.is_contiguous():
        return space, first, first + tensor.numel() * size
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return space, first, first + reach * size


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have memory in common: neighbours in one storage have not, nor columns between columns."""
    pair = [cast(Any, t)._local_tensor if is_dtensor(t) else t for t in (a, b)]
    spans = [span(t) for t in pair]
    if spans[0] is None or spans[1] is None or spans[0][0] != spans[1][0]:
        return False
    (_, start, end), (_, other_start, other_end) = spans[0], spans[1]
    if max(start, other_start) >= min(end, other_end):
        return False
    if all(t.numel() * t.element_size() == s[2] - s[1] for t, s in zip(pair, cast(Any, spans), strict=True)):
        return True
    lowest = min(start, other_start)
    with _disable_current_modes():
        taken = torch.zeros(max(end, other_end) - lowest, dtype=torch.bool, device="cpu")
        for tensor, first in zip(pair, (start, other_start), strict=True):
            size = tensor.element_size()
            strides = (*(stride * size for stride in tensor.stride()), 1)
            place = taken.as_strided((*tensor.shape, size), strides, first - lowest)
            if place.any():
                return True
            place.fill_(True)
    return False


def shared_memory(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """By the names of those that have memory in common with another one of `tensors`, the name of that one."""
    spaces: dict[Any, list[tuple[int, int, int]]] = defaultdict(list)
    entries = list(tensors)
    for i, (_, tensor) in enumerate(entries):
        where = span(tensor)
        if where is not None:
            spaces[where[0]].append((where[1], where[2], i))
    shared: dict[str, str] = {}
    for places in spaces.values():
        places.sort()
        under: list[tuple[int, int, int]] = []
        for place in places:
            under = [other for other in under if other[1] > place[0]]
            for _, _, i in under:
                (name, tensor), (other, its) = entries[i], entries[place[2]]
                if tensor is its or overlap(tensor, its):
                    shared.setdefault(name, other)
                    shared.setdefault(other, name)
            under.append(place)
    return shared


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
