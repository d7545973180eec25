"""Three layers, of which one or two are found, and what several test files keep their units in."""

from __future__ import annotations

import dataclasses

import torch
from networks import Net
from torch import nn

from cbp_fast.discovery import find_unit_groups

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def names(model, inputs=X, **options):
    return [group.name for group in find_unit_groups(model, inputs, **options)]


def three(forward):
    """Layers a, b and c; `forward(h)`, of what a makes, may use it and gives what is added to the output, or None."""

    def run(m, x):
        h = m.a(x).relu()
        extra = forward(h)
        y = m.c(m.b(h).relu())
        return y if extra is None else y + extra

    torch.manual_seed(0)
    return Net(run, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))


class Loud(list):
    """A list that counts what is done to it."""

    done = 0

    def append(self, value):
        self.done += 1
        super().append(value)

    def clear(self):
        raise RuntimeError("never cleared")

    extend = clear


@dataclasses.dataclass(slots=True)
class Pair:
    y: object
    h: object
