"""Slowly-changing regression (bit flipping): a fixed random network to imitate, whose input drifts a bit at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .problem import Problem

_BITS = 20  # and one that is always 1
_FLIPPING = 15
_TARGET_UNITS = 100
_BETA = 0.7
_EXAMPLES = 1000


def stream(seed: int, tasks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Bit flipping, from Dohare et al., Nature 632 (2024), Extended Data Fig. 2, with a flip ten times as often.

    The first 15 bits stand still within a task and one of them, chosen at random, flips before the next; five are
    drawn anew for every example; the last is 1. The target is a network of 100 linear threshold units with weights of
    -1 and 1: sum_i v_i [w_i x > 0.7 * 21 - (number of -1 in w_i)].

    Yields:
        bits float32 `[1000, 21]` and targets float32 `[1000, 1]`.
    """
    generator = torch.Generator().manual_seed(seed)

    def coins(*shape: int) -> Tensor:
        return torch.randint(2, shape, generator=generator).float()

    w = coins(_BITS + 1, _TARGET_UNITS) * 2 - 1
    v = coins(_TARGET_UNITS, 1) * 2 - 1
    threshold = _BETA * (_BITS + 1) - (w < 0).sum(0)
    slow = coins(_FLIPPING)
    for _ in range(tasks):
        fast = coins(_EXAMPLES, _BITS - _FLIPPING)
        x = torch.cat([slow.expand(_EXAMPLES, -1), fast, torch.ones(_EXAMPLES, 1)], dim=1)
        yield x, (x @ w > threshold).float() @ v
        flip = torch.randint(_FLIPPING, (), generator=generator)
        slow[flip] = 1 - slow[flip]


def problem(rule: str) -> Problem:
    """Slowly-changing regression with the settings for one rule; the step size is the paper's."""
    # clarena truncates rate * 5 to a whole number; its threshold then sets the pace, one unit in 2,000 steps too
    rate, threshold = (1 / 5, 2000) if rule == "clarena" else (1e-4, 100)
    return Problem(
        title="Slowly-changing regression",
        score="mean squared error",
        higher_is_better=False,
        widths=(_BITS + 1, 5, 1),
        optimizer="SGD",
        step_sizes=(0.01,),
        examples=_EXAMPLES,
        batch_size=1,
        tasks=100,
        seeds=3,
        replacement_rate=rate,
        maturity_threshold=threshold,
        stream=stream,
        loss=torch.nn.functional.mse_loss,
        measure=torch.nn.functional.mse_loss,
    )
