"""What continual backprop asks of an optimizer: the state it keeps for a parameter, and whether it has stepped."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# looked up here, because at exit a layer may outlive the list of modules
_FILE = sys.modules[Optimizer.__module__].__file__


def skipped(optimizer: Optimizer) -> bool:
    """Whether the step that has just ended was none: a fused optimizer runs its hooks where GradScaler skips, too."""
    # in its own dict, where GradScaler puts it: to look through its classes in vain takes longer than a layer's sums
    found_inf = vars(optimizer).get("found_inf")
    return found_inf is not None and bool(found_inf.item())


def inside_step(optimizer: Optimizer | None = None) -> bool:
    """Whether the caller runs within an optimizer's step, or this one's, as its hooks do: none can be removed then."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        of = frame.f_locals.get("self") if frame.f_code.co_filename == _FILE else None
        if isinstance(of, Optimizer) and (optimizer is None or of is optimizer):
            return True
        frame = frame.f_back
    return False


def slots_of(optimizers: Iterable[Optimizer], parameter: Tensor) -> list[Tensor]:
    """The floating-point tensors of the parameter's shape that any of the optimizers keeps for it.

    Momentum, exp_avg, square_avg and their like have one entry an element and are returned; a step count or a
    factored second moment has another shape and is not.
    """
    return [
        value
        for optimizer in optimizers
        for value in state_of(optimizer).get(parameter, {}).values()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
    ]


def state_of(optimizer: Optimizer) -> Mapping[Any, Any]:
    """What an optimizer of this process keeps for each parameter."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    # each process keeps the state of the parameters that it updates, in an optimizer of its own
    if zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer):
        return optimizer.optim.state
    return optimizer.state
