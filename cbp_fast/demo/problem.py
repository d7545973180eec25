"""What a demo problem consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A stream of tasks, a network to learn it online, and the settings of both methods.

    Attributes:
        title: the problem and its network, for the table and the picture.
        score: what `measure` returns, in words.
        higher_is_better: whether a larger score is a better one.
        widths: of the network's layers, the input's first; hidden layers are relu.
        optimizer: name in `torch.optim`.
        step_sizes: all that are tried, for both methods.
        examples: of one task.
        batch_size: examples a step.
        tasks, seeds: how many, unless the user says otherwise.
        replacement_rate, maturity_threshold: of `ContinualBackprop`.
        stream: (seed, tasks) -> the examples x `[n, widths[0]]` and targets y `[n, ...]` of one task after another.
        loss: (output, y) of a batch -> scalar.
        measure: (output, y) of a whole task, each output from before the update on its example -> scalar.
    """

    title: str
    score: str
    higher_is_better: bool
    widths: tuple[int, ...]
    optimizer: str
    step_sizes: tuple[float, ...]
    examples: int
    batch_size: int
    tasks: int
    seeds: int
    replacement_rate: float
    maturity_threshold: int
    stream: Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]
    loss: Callable[[Tensor, Tensor], Tensor]
    measure: Callable[[Tensor, Tensor], Tensor]

    def network(self, seed: int) -> torch.nn.Sequential:
        """A relu network with the initialisation that continual backprop draws from later, so that both start alike."""
        generator = torch.Generator().manual_seed(seed)
        layers: list[torch.nn.Module] = []
        for fan_in, fan_out in zip(self.widths, self.widths[1:], strict=False):
            layer = torch.nn.Linear(fan_in, fan_out)
            torch.nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
            torch.nn.init.zeros_(layer.bias)
            layers += [layer, torch.nn.ReLU()]
        return torch.nn.Sequential(*layers[:-1])
