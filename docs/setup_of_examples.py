"""Runs ahead of the code of every page: what its blocks may use without setting it up."""

# ruff: noqa: F401
import torch
from torch import nn
from torch.nn import functional as F

import cbp_fast
from cbp_fast import CBPConv, CBPLinear, ContinualBackprop, Part, Rule, UnitGroup, metrics

torch.set_num_threads(1)
torch.manual_seed(0)

model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
# as in a class that has them
self = nn.Module()


def batches(steps, features=784, classes=10, samples=8):
    """A stream of data."""
    for _ in range(steps):
        yield torch.randn(samples, features), torch.randint(classes, (samples,))


stream = list(batches(3))
