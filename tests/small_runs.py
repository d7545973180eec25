"""A small network in training under the attached object or under layers, and all that a step of it may change."""

import torch
from torch import nn

from cbp_fast import CBPLinear, ContinualBackprop, Rule
from cbp_fast.step.together import step_together

RATES = {"replacement_rate": 0.4, "maturity_threshold": 0, "decay_rate": 0.9}
RULES = {
    "nature": Rule.nature(),
    "transfer": Rule.nature(transfer_bias=True),
    "centred": Rule.gnt("adaptable_contribution", transfer_bias=True),
    "random": Rule.gnt("random", accumulate=False),
}


class Run:
    """A small network, its optimizer and what trains them."""

    def __init__(self, backend, rule="nature", capture="deferred", optimizers=1, steps=3):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
        parts = [list(self.model.parameters())[i::optimizers] for i in range(optimizers)]
        self.optimizers = [torch.optim.Adam(part, 0.01) for part in parts]
        self.cbp = ContinualBackprop(
            self.model, self.optimizers, rule=RULES[rule], backend=backend, capture=capture, seed=3, **RATES
        )
        self.engines = [self.cbp._engine]
        self.train(range(steps))

    def forward(self, number):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        self.model(x).square().mean().backward()

    def train(self, numbers):
        for number in numbers:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.forward(number)
            for optimizer in self.optimizers:
                optimizer.step()

    def step(self):
        self.cbp.step()

    def tensors(self):
        """All that a step may change."""
        slots = [
            value for o in self.optimizers for kept in o.state.values() for value in kept.values() if value.dim() > 0
        ]
        return [*self.model.parameters(), *slots, *(engine.state.buffer for engine in self.engines)]

    def everything(self):
        return [t.detach().clone() for t in self.tensors()]


class Layers(Run):
    """The same with two layers of our own, whose engines step together."""

    def __init__(self, backend, rule="nature", capture="deferred", optimizers=1, steps=3):
        torch.manual_seed(1)
        a, b, c = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)
        rates = {**RATES, "decay_rate": 0.5}
        self.layers = [CBPLinear(a, b, **rates), CBPLinear(b, c, **rates)]
        self.model = nn.Sequential(a, nn.Tanh(), self.layers[0], b, nn.Tanh(), self.layers[1], c)
        self.optimizers = [torch.optim.Adam([*a.parameters(), *b.parameters(), *c.parameters()], 0.01)]
        self.engines = [layer._engine for layer in self.layers]
        for i, engine in enumerate(self.engines):
            engine.use(backend)
            engine.state.seed.fill_(i)
        self.train(range(steps))

    def step(self):
        step_together(self.engines, self.optimizers)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
