"""No unit belongs to two of what is attached."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..groups.resolving import shared_layer
from ..groups.spec import ResolvedGroup
from ..hooks.registry import everyone
from ..step.engine import Engine
from .layered import observed


def check_not_attached(groups: Iterable[ResolvedGroup], own: Any, modules: Iterable[nn.Module]) -> None:
    """No unit belongs to two of what is attached, layers or objects.

    Args:
        groups: the units that are asked for.
        own: the engine that asks.
        modules: of the model, some of which may do the same.

    Raises:
        ValueError: one does.
    """
    call = "cbp_fast.attached(model) lists what is attached: call remove() of it first, or exclude= the group"
    engines = {cbp._engine: call for cbp in everyone()}
    layers = (getattr(layer, "_engine", None) for layer in (*modules, *observed()))
    engines |= {engine: "take the layer out" for engine in layers if isinstance(engine, Engine)}
    for engine, mend in engines.items():
        for theirs in engine.groups if isinstance(engine, Engine) and engine is not own else ():
            for group in groups:
                if both := shared_layer(theirs, group):
                    whose = f"group '{group.name}'" if engine.layer else f"its group '{theirs.name}'"
                    by = engine.layer and f"by {engine.layer}, "
                    raise ValueError(
                        f"the model has continual backprop attached already ({by}with {both} of {whose}); {mend}"
                    )
