"""Networks with `CBPLinear` and `CBPConv` in them, and what trains them."""

import torch
from torch import nn

from cbp_fast import CBPConv, CBPLinear

EAGER = {"replacement_rate": 0.05, "maturity_threshold": 5}


ALL = {"replacement_rate": 1.0, "maturity_threshold": 0}


class Net(nn.Module):
    """The authors' placement: each layer where the next one reads, the last convolution's before the flatten."""

    def __init__(self, **options):
        super().__init__()
        options = EAGER | options
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc1, self.norm3 = nn.Linear(32, 16), nn.LayerNorm(16)
        self.fc2 = nn.Linear(16, 3)
        self.cbp1 = CBPConv(self.conv1, self.conv2, bn_layer=self.norm1, **options)
        self.cbp2 = CBPConv(self.conv2, self.fc1, num_last_filter_outputs=4, **options)
        self.cbp3 = CBPLinear(self.fc1, self.fc2, ln_layer=self.norm3, **options)

    def forward(self, x):
        x = self.cbp1(self.norm1(self.conv1(x)).relu())
        x = self.cbp2(nn.functional.max_pool2d(self.conv2(x).relu(), 2)).flatten(1)
        return self.fc2(self.cbp3(self.norm3(self.fc1(x)).relu()))


def two_layers(**options):
    fc1, fc2, fc3 = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
    one, two = CBPLinear(fc1, fc2, **options), CBPLinear(fc2, fc3, **options)
    return nn.Sequential(fc1, nn.ReLU(), one, fc2, nn.ReLU(), two, fc3)


def layers(model):
    return [model.cbp1, model.cbp2, model.cbp3]


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss = (model(torch.randn(4, 3, 8, 8, generator=generator)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def drawn(model, *optimizers):
    """All weights after a step that draws every one of them anew."""
    optimizers = optimizers or (torch.optim.SGD(model.parameters(), lr=0.1),)
    model(torch.randn(5, 4)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]
