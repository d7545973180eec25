"""Where the layers of groups hang in a model, to see whether one was replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from ..groups.spec import ResolvedGroup


class Place(NamedTuple):
    """A module among the children of another."""

    children: dict[str, nn.Module | None]
    key: str
    name: str
    module: nn.Module


def compared(places: list[Place]) -> dict[str, Any]:
    """Attributes for the places of layers; apart, as each step compares them at once."""
    return {
        "_places": places,
        "_parents": [place.children for place in places],
        "_keys": [place.key for place in places],
        "_modules": [place.module for place in places],
    }


def places_of(model: nn.Module, groups: Sequence[ResolvedGroup]) -> list[Place]:
    """Where every layer of the groups, and every module that holds one, hangs in the model."""
    places: dict[str, Place] = {}
    for group in groups:
        for member in (*group.incoming, *group.norms, *group.outgoing):
            parent, path = model, ""
            for key in member.name.split(".") if member.name else ():
                path = f"{path}.{key}" if path else key
                child = parent._modules[key]
                assert child is not None
                places[path] = Place(parent._modules, key, path, child)
                parent = child
    return list(places.values())
