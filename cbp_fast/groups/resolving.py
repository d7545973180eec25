"""Looks up the layers of a unit group in a model, and checks that they fit together."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..tensors.memory import own_tensors, shared_memory
from ..tensors.parts import is_dtensor
from .layers import (
    LAYERS,
    NORMS,
    check_model,
    columns_per_unit,
    entries_per_unit,
    is_depthwise,
    kind,
    label,
    make_width,
    names_of,
    norm_kind,
    norm_shape,
    read_width,
    rows_per_unit,
    spatial_axes,
)
from .spec import Block, Member, Part, ResolvedGroup, UnitGroup

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
        members["incoming"], names, n, make_width, lambda name, module: rows_per_unit(name, module, n, first)
    )
    outgoing = _members(
        members["outgoing"], names, n, read_width, lambda name, module: columns_per_unit(name, module, n, spatial)
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
        lambda name, module: entries_per_unit(name, module, n, p, spatial),
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
