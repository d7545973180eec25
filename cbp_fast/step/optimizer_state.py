"""What an optimizer keeps for a parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..hooks.optimizers import is_zero


def entries_of(optimizers: Iterable[Optimizer], parameter: Tensor) -> list[tuple[Any, Tensor]]:
    """The floating-point tensors of the parameter's shape that any of the optimizers keeps for it, with their keys.

    Momentum, exp_avg, square_avg and their like have one entry an element and are returned; a step count or a
    factored second moment has another shape and is not.
    """
    return [
        (key, value)
        for optimizer in optimizers
        for key, value in state_of(optimizer).get(parameter, {}).items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
    ]


def state_of(optimizer: Optimizer) -> Mapping[Any, Any]:
    """What an optimizer of this process keeps for each parameter."""
    # each process keeps the state of the parameters that it updates, in an optimizer of its own
    return optimizer.optim.state if is_zero(optimizer) else optimizer.state  # type: ignore[attr-defined]
