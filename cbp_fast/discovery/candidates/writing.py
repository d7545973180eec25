"""Writes the rows, columns and entries of units as a `UnitGroup`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...groups.layers import LAYERS, kind, label, norm_kind, norm_shape, out_axis
from ...groups.resolving import resolve
from ...groups.spec import Part, ResolvedGroup, UnitGroup
from ..trace.trace import Trace, join_name

# what makes, reads, normalises or passes units on (a parameter and its axis, or the name of a norm), and where along it
# each unit is, int64 [units, entries]
Place = tuple[Any, Tensor]
IRREGULAR = " in no regular order"


def write_group(
    model: nn.Module, trace: Trace, n: int, makes: Sequence[Place], places: Mapping[str, Sequence[Place]]
) -> tuple[UnitGroup, ResolvedGroup] | str:
    """The unit group of `n` units at some places, by role, and as it resolves; or why it cannot be written.

    Its makers come in the order of `makes`.
    """
    incoming: list[Part] = []
    outgoing: list[Part] = []
    norms: list[Part] = []
    for parts, role, entries in (
        (incoming, "make", makes),
        (incoming, "pass", places["pass"]),
        (outgoing, "read", places["read"]),
        (norms, "norm", places["norm"]),
    ):
        for key, at in entries:
            if role == "norm":
                owner, module = key, trace.modules[key]
                at = _norm_entries(module, at)
            else:
                owner, module = trace.owners[key[0]]
                axis = key[1]
                if key[0] != join_name(owner, "weight"):
                    return f"'{key[0]}' is not the weight of one of {', '.join(LAYERS)}"
                if kind(module) in LAYERS and axis != (1 - out_axis(module) if role == "read" else out_axis(module)):
                    return f"'{key[0]}' is not used as {label(owner, module)} would"
            fitted = _fit(at, role in ("make", "pass"))
            if fitted is None:
                verb = {"make": "makes", "pass": "passes on", "read": "reads", "norm": "normalises"}[role]
                return f"'{owner}' {verb} its units{IRREGULAR}"
            parts += [Part(owner, *block) for block in fitted]
    first, at = makes[0]
    name = trace.owners[first[0]][0]
    if at.numel() != trace.nodes.sources[first[2]].size:
        name = f"{name}:{int(at.min())}-{int(at.max())}"
    group = UnitGroup(name, incoming, outgoing, norms, n)
    try:
        resolved = resolve(model, group, trace.tied, trace.names)
        short = resolved.unit_group()
        with contextlib.suppress(TypeError, ValueError):
            if resolve(model, short, trace.tied, trace.names) == resolved:
                group = short
    except (TypeError, ValueError) as error:
        return str(error).removeprefix(f"unit group '{name}': ")
    return group, resolved


def _norm_entries(norm: nn.Module, at: Tensor) -> Tensor:
    """Positions in a norm's flattened entries [N, r] as positions along its first axis."""
    if not norm_kind(norm):
        return at
    rest = torch.Size(norm_shape(norm)[1:]).numel()
    whole = (
        (at % rest == torch.arange(rest, device="cpu").repeat(at.shape[1] // rest)).all()
        if at.shape[1] % rest == 0
        else False
    )
    return at[:, ::rest] // rest if whole else at


def _fit(at: Tensor, split: bool) -> list[tuple[int, int, int, int]] | None:
    """Positions [N, r] as parts (start, per_unit, unit_stride, position_stride); `split` allows several."""
    n, r = at.shape
    unit = int(at[1, 0] - at[0, 0]) if n > 1 else r
    position = int(at[0, 1] - at[0, 0]) if r > 1 else 1
    rows, columns = torch.arange(n, device="cpu"), torch.arange(r, device="cpu")
    steps = rows[:, None] * unit + columns * position
    affine = unit > 0 and bool((at == at[0, 0] + steps).all())
    if affine and (not split or r == 1 or (unit, position) == (r, 1)):
        return [(int(at[0, 0]), r, unit, position)]
    if not split or r == 1:
        return None
    parts = [_fit(column[:, None], True) for column in at.unbind(1)]
    return None if None in parts else [block for part in parts for block in part or ()]
