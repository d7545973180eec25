"""Groups of a few units with given weights, so small that a step of theirs can be worked out by hand."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cbp_fast import ContinualBackprop, UnitGroup

NAN, INF = math.nan, math.inf
SEED = 2**63 + 12345


def linear(weight, bias=None, dtype=torch.float64):
    """A layer with these numbers; of three axes or more a convolution."""
    weight = torch.tensor(weight, dtype=dtype)
    if weight.dim() == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    else:
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.dim() - 3]
        layer = conv(weight.shape[1], weight.shape[0], weight.shape[2:], bias=bias is not None)
    layer.to(dtype).weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(torch.tensor(bias))
    return layer


def attach(backend, *groups, optimizer=None, **options):
    """A ContinualBackprop on groups "0", "1", ... of (incoming, outgoing, norms), each a layer or several."""
    groups = [UnitGroup(str(i), *group) for i, group in enumerate(groups)]
    model = nn.ModuleList(dict.fromkeys(m for g in groups for m in (*g.incoming, *g.norms, *g.outgoing)))
    options = {"maturity_threshold": 0, "decay_rate": 0.5, "replacement_rate": 0.0, "seed": SEED, **options}
    return ContinualBackprop(model, optimizer, groups=groups, backend=backend, **options)


def feed(layer, h):
    layer(torch.as_tensor(h, dtype=layer.weight.dtype))


def near(*numbers):
    """These numbers, to a few roundings of float64."""
    return pytest.approx(np.array(numbers), rel=1e-14, abs=1e-300, nan_ok=True)


class Units:
    """N units whose y is the h fed: one reader with one row of ones, decay 0, all of them mature after one step."""

    def __init__(self, backend, n, dtype=torch.float64, **options):
        self.incoming, self.reader = linear([[1.0]] * n, [0.0] * n, dtype), linear([[1.0] * n], None, dtype)
        self.cbp = attach(backend, (self.incoming, self.reader), **{"decay_rate": 0.0, **options})

    def step(self, *h):
        """One step with one sample: which units it replaces."""
        with torch.no_grad():
            self.reader.weight.fill_(1.0)
        feed(self.reader, [h])
        self.cbp.step()
        return self.cbp.last_replaced["0"].tolist()

    @property
    def pending(self):
        return self.cbp.state_dict()["groups"]["0"]["pending"]
