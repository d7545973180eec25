"""Online permuted digits: the same 1,797 real images in every task, their pixels in a new order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .problem import Problem


def stream(seed: int, tasks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """scikit-learn's 8x8 digits, standardised: a new permutation of the pixels and a new order of the images a task.

    Yields:
        images float32 `[1797, 64]` and labels int64 `[1797]`.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float(), torch.from_numpy(labels).long()
    x = (x - x.mean()) / x.std()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tasks):
        pixels = torch.randperm(x.shape[1], generator=generator)
        order = torch.randperm(x.shape[0], generator=generator)
        yield x[order][:, pixels], y[order]


def accuracy(output: Tensor, y: Tensor) -> Tensor:
    """Share of the labels y `[n]` that are the largest entry of output `[n, 10]`."""
    return (output.argmax(1) == y).double().mean()


def problem(rule: str) -> Problem:
    """Permuted digits with the settings for one rule."""
    # clarena re-draws column j of the layer before for unit j, so no layer may be wider than the input; and it
    # truncates rate * mature units to a whole number, so below a rate of 1 / width it replaces nothing
    width, rate = (64, 1 / 64) if rule == "clarena" else (100, 1e-3)
    return Problem(
        title="Online permuted digits",
        score="online accuracy",
        higher_is_better=True,
        widths=(64, width, width, width, 10),
        optimizer="Adam",
        step_sizes=(0.0005, 0.001, 0.002),
        examples=1797,
        batch_size=16,
        tasks=120,
        seeds=3,
        replacement_rate=rate,
        maturity_threshold=100,
        stream=stream,
        loss=torch.nn.functional.cross_entropy,
        measure=accuracy,
    )
