"""Other ways to do continual backprop, for comparison: each layer by itself, in eager PyTorch.

`PerLayerGnt` and `PerLayerClarena` are written anew from the arithmetic of the authors' generate-and-test code and of
clarena 1.1.0, with the calls a layer and the questions to the device that those make, and none of their overheads.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..groups.resolving import resolve
from ..groups.spec import UnitGroup


class PerLayer(ABC):
    """Groups of one producer and one reader, each with tensors of its own, observed by forward pre-hooks.

    Args:
        groups: each with one incoming and one outgoing layer.
        optimizer: whose state of re-initialised entries is zeroed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        groups: Sequence[UnitGroup],
        *,
        replacement_rate: float,
        maturity_threshold: float,
        decay_rate: float = 0.99,
    ) -> None:
        self.optimizer = optimizer
        self.rate, self.maturity, self.decay = replacement_rate, maturity_threshold, decay_rate
        resolved = [resolve(model, group) for group in groups]
        self.layers: list[tuple[Any, Any, list[Any]]] = [
            (g.incoming[0].module, g.outgoing[0].module, [n.module for n in g.norms]) for g in resolved
        ]
        self.per_unit = [g.columns_per_unit for g in resolved]
        self.utility = [torch.zeros(g.num_units, device=next(model.parameters()).device) for g in resolved]
        self.age = [torch.zeros_like(u) for u in self.utility]
        self.pending = [0.0] * len(resolved)
        self.seen: list[Tensor | None] = [None] * len(resolved)
        for i, (_, reader, _) in enumerate(self.layers):
            reader.register_forward_pre_hook(self._hook(i))

    def _hook(self, i: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.observe(i, args[0])

        return observe

    def observe(self, i: int, h: Tensor) -> None:
        """Keeps what the reader of group i saw."""
        self.seen[i] = h.detach()

    @abstractmethod
    def step(self) -> None:
        """Does what follows the optimizer's step."""


class PerLayerGnt(PerLayer):
    """The authors' generate-and-test: utility `contribution`, accumulated counts, a reset layer by layer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mean = [torch.zeros_like(u) for u in self.utility]
        self.bound = [
            math.sqrt(1 / make.weight[0].numel()) if make.weight.dim() > 2 else math.sqrt(6 / make.weight.shape[1])
            for make, _, _ in self.layers
        ]

    @torch.no_grad()
    def step(self) -> None:
        """Chooses in every layer, then resets in every layer."""
        for i, chosen in enumerate([self._choose(i) for i in range(len(self.layers))]):
            if chosen is not None:
                self._reset(i, chosen)

    def _choose(self, i: int) -> Tensor | None:
        h, weight = self.seen[i], self.layers[i][1].weight
        assert h is not None
        spatial = tuple(range(2, weight.dim()))
        samples = (0, *spatial) if spatial else tuple(range(h.dim() - 1))
        self.age[i] += 1
        self.utility[i] *= self.decay
        mean, magnitude = h.mean(samples), h.abs().mean(samples)
        y = magnitude * weight.abs().mean((0, *spatial))
        if self.per_unit[i] > 1:
            mean, y = (t.view(-1, self.per_unit[i]).mean(1) for t in (mean, y))
        self.mean[i] *= self.decay
        self.mean[i] += (1 - self.decay) * mean
        self.utility[i] += (1 - self.decay) * y
        score = self.utility[i] / (1 - self.decay ** self.age[i])
        # a question to the device
        eligible = (self.age[i] > self.maturity).nonzero()[:, 0]
        if len(eligible) == 0:
            return None
        self.pending[i] += self.rate * len(eligible)
        count = int(self.pending[i])
        if count == 0:
            return None
        self.pending[i] -= count
        chosen = eligible[torch.topk(-score[eligible], count)[1]]
        self.utility[i][chosen] = 0
        self.mean[i][chosen] = 0
        self.age[i][chosen] = 0
        return chosen

    def _reset(self, i: int, chosen: Tensor) -> None:
        make, read, norms = self.layers[i]
        p = self.per_unit[i]
        columns = chosen if p == 1 else (chosen[:, None] * p + torch.arange(p, device=chosen.device)).flatten()
        rows = make.weight[chosen]
        make.weight[chosen] = rows.uniform_(-self.bound[i], self.bound[i])
        for norm in norms:
            norm.weight[chosen], norm.bias[chosen] = 1.0, 0.0
            if isinstance(norm.running_mean, Tensor):
                norm.running_mean[chosen], norm.running_var[chosen] = 0.0, 1.0
        entries = [(norm.weight, chosen) for norm in norms] + [(norm.bias, chosen) for norm in norms]
        if make.bias is not None:
            make.bias[chosen] = 0
            entries.append((make.bias, chosen))
        read.weight[:, columns] = 0
        for parameter, units in [(make.weight, chosen), *entries]:
            for slot in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[parameter][slot][units] = 0
        for slot in ("exp_avg", "exp_avg_sq"):
            self.optimizer.state[read.weight][slot][:, columns] = 0


class PerLayerClarena(PerLayer):
    """clarena's rule on linear layers: incoming weights, min-max normalised, at most one unit a layer and step."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, groups: Sequence[UnitGroup], **options: Any) -> None:
        super().__init__(model, optimizer, groups, **options)
        if any(read.weight.dim() > 2 for _, read, _ in self.layers) or max(self.per_unit) > 1:
            raise ValueError("clarena's rule is for linear layers")

    @torch.no_grad()
    def step(self) -> None:
        """Chooses and resets layer by layer."""
        for i, (make, _, _) in enumerate(self.layers):
            h = self.seen[i]
            assert h is not None
            y = h.abs().mean(tuple(range(h.dim() - 1))) * make.weight.abs().sum(1)
            low, high = y.min(), y.max()
            y = (y - low) / (high - low + 1e-8)
            self.utility[i] = self.decay * self.utility[i] + (1 - self.decay) * y
            self.age[i] += 1
            eligible = self.age[i] > self.maturity
            # a question to the device
            self.pending[i] += int(self.rate * eligible.sum())
            if self.pending[i] <= 1 or not eligible.any():
                continue
            score = torch.where(eligible, self.utility[i] / self.age[i], torch.inf)
            chosen = int(score.argmin())
            if i:
                before = self.layers[i - 1][0].weight
                before[:, chosen] = torch.rand_like(before[:, chosen])
            make.weight[chosen] = torch.rand_like(make.weight[chosen])
            self.utility[i][chosen] = 0
            self.age[i][chosen] = 0
            self.pending[i] -= 1


def ccbp_pytorch(
    model: nn.Module, optimizer: Optimizer, groups: Sequence[UnitGroup], *, replacement_rate: float, every: int
) -> Any:
    """The optimizer of the package ccbp-pytorch round another one; None where the package is not installed.

    Args:
        groups: each with one incoming and one outgoing layer; it cannot serve the reader after a flatten.
        every: steps from one reset to the next; 1 is continual backprop, its own default is 1000.
    """
    if importlib.util.find_spec("ccbp_pytorch") is None:
        return None
    from ccbp_pytorch import CCBP, NeuronConfig

    configs = []
    for group in groups:
        resolved = resolve(model, group)
        make, read = resolved.incoming[0].module, resolved.outgoing[0].module
        outgoing = read.weight if resolved.columns_per_unit == 1 else None
        configs.append(NeuronConfig(param=make.weight, bias=make.bias, outgoing_param=outgoing))
    return CCBP(
        optimizer,
        neuron_configs=configs,
        continuous=False,
        replacement_rate=replacement_rate,
        reset_interval=every,
        maturity_steps=1,
    )
