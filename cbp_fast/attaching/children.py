"""Which modules the layers of groups hang in, to see whether one was replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ..groups.spec import ResolvedGroup


class Child(NamedTuple):
    """A module among the children of another.

    Attributes:
        siblings: the children of its parent, by their names there.
        key: its name there; `name`: from the model on.
    """

    siblings: dict[str, nn.Module | None]
    key: str
    name: str
    module: nn.Module


def compared(children: list[Child]) -> dict[str, Any]:
    """Attributes for the layers' places in the model; apart, as each step compares them at once."""
    return {
        "_children": children,
        "_siblings": [child.siblings for child in children],
        "_keys": [child.key for child in children],
        "_modules": [child.module for child in children],
    }


def children_of(model: nn.Module, groups: Sequence[ResolvedGroup]) -> list[Child]:
    """Every layer of the groups, and every module that holds one, as the child that it is in the model."""
    children: dict[str, Child] = {}
    for group in groups:
        for member in (*group.incoming, *group.norms, *group.outgoing):
            parent, path = model, ""
            for key in member.name.split(".") if member.name else ():
                path = f"{path}.{key}" if path else key
                module = parent._modules[key]
                assert module is not None
                children[path] = Child(parent._modules, key, path, module)
                parent = module
    return list(children.values())
