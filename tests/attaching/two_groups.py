"""A network of two groups, one whose forward takes what cannot be guessed, and what trains either."""

import torch
from torch import nn

from cbp_fast import ContinualBackprop, UnitGroup

EAGER = {"replacement_rate": 0.1, "maturity_threshold": 2, "decay_rate": 0.9, "seed": 7}
GROUPS = [UnitGroup("a", "0", "2"), UnitGroup("b", "2", "4")]


def mlp(width=8):
    torch.manual_seed(0)
    layers = [nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)]
    return nn.Sequential(*layers)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def train(model, optimizer, steps=1, inputs=lambda: (torch.randn(4, 6),)):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(*inputs()) - 1).square().mean().backward()
        optimizer.step()


def hooks_of(*objects):
    """Every hook on modules and optimizers, and what is set on the dicts that hold them."""
    owners = [owner for o in objects for owner in (o.modules() if isinstance(o, nn.Module) else [o])]
    return [
        {
            kind: (dict(hooks), dict(vars(hooks)))
            for kind, hooks in vars(owner).items()
            if kind.endswith(("hooks", "kwargs"))
        }
        for owner in owners
    ]


class Net(nn.Module):
    """Its forward takes what cannot be guessed."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x, task):
        return self.head(self.body(x)) * task


def net_inputs():
    return torch.randn(4, 6), 1.0


def attach(**options):
    model = mlp()
    optimizer = sgd(model)
    return model, optimizer, ContinualBackprop(model, optimizer, **{**EAGER, **options})
