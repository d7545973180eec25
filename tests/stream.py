"""A small network with a batch norm, what trains it on the same batches every time, and what was done to it."""

import warnings

import torch
from torch import nn

EAGER = {"replacement_rate": 0.1, "maturity_threshold": 2, "decay_rate": 0.9, "seed": 7}


def mlp(dtype=torch.float32, width=16):
    torch.manual_seed(0)
    layers = [nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 3)).to(dtype)


def momentum(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


class Stream:
    """The same batches every time; sizes differ."""

    def __init__(self, model, optimizer, dtype=torch.float32):
        self.model, self.optimizer, self.dtype = model, optimizer, dtype
        self.generator = torch.Generator().manual_seed(3)

    def batch(self, size=8):
        return torch.randn(size, 6, generator=self.generator).to(self.dtype)

    def loss(self, size=8):
        return (self.model(self.batch(size)) - 1).square().mean()

    def train(self, steps=1):
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()


def hooks_of(*objects):
    """Every hook on modules and optimizers, by owner and kind."""
    owners = [owner for o in objects for owner in (o.modules() if isinstance(o, nn.Module) else [o])]
    return [{kind: dict(hooks) for kind, hooks in vars(owner).items() if "hooks" in kind} for owner in owners]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def observed(cbp):
    """Whether a forward was seen since the last step."""
    before = cbp.state_dict()["step"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no training forward")
        cbp.step()
    return cbp.state_dict()["step"] > before
