"""Layers that no forward reached, which may make or read the units of a group all the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ...groups.layers import LAYERS, kind, label, make_width, read_width
from ...groups.spec import ResolvedGroup
from ..trace.trace import Trace, join_name


def unreached_by(model: nn.Module, trace: Trace) -> list[tuple[str, set[int]]]:
    """The modules with parameters that no forward reached, and the sizes along which each may touch units."""
    modules = (
        (n, m, [join_name(n, k) for k, p in m._parameters.items() if p is not None]) for n, m in model.named_modules()
    )
    return [(label(n, m), set(_widths(m))) for n, m, own in modules if own and not trace.seen.intersection(own)]


def may_share(unreached: Sequence[tuple[str, set[int]]], group: ResolvedGroup) -> str:
    """That a layer which no forward reached may make or read the units of a group, or an empty string."""
    sizes = {group.num_units, group.num_units * group.columns_per_unit}
    sizes |= {read_width(member.module) for member in group.outgoing}
    for name, widths in unreached:
        if sizes & widths:
            return (
                f"{name} is not reached but has its width, and may share its units elsewhere: give example_inputs that "
                "reach it too, or unreached_ok=True if it reads none of them"
            )
    return ""


def _widths(module: nn.Module) -> Iterator[int]:
    """Sizes along which a module may touch units."""
    # of a computed weight (parametrized, pruned) there is no parameter of this module
    if kind(module) in LAYERS and module._parameters.get("weight") is not None:
        yield make_width(module)
        yield read_width(module)
        return
    for parameter in module._parameters.values():
        if parameter is not None:
            yield from parameter.shape
