"""What continual backprop asks of an optimizer: the state it keeps for a parameter, and whether it has stepped."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

# looked up here, because at exit a layer may outlive the list of modules
_FILE = sys.modules[Optimizer.__module__].__file__


def skipped(optimizer: Optimizer) -> bool:
    """Whether the step that has just ended was none: a fused optimizer runs its hooks where GradScaler skips, too."""
    # in its own dict, where GradScaler puts it: to look through its classes in vain takes longer than a layer's sums
    found_inf = vars(optimizer).get("found_inf")
    return found_inf is not None and bool(found_inf.item())


# who wants to know of steps that GradScaler skips, for which PyTorch has no hook; and its method, while one is
_watchers: weakref.WeakSet[Any] = weakref.WeakSet()
_step_or_skip = GradScaler._maybe_opt_step


def watch_skips(watcher: Any) -> None:
    """Have `watcher._after_skipped_step(optimizer)` called after a step that GradScaler skips and no hook tells of."""
    _watchers.add(watcher)
    if GradScaler._maybe_opt_step is _step_or_skip:
        GradScaler._maybe_opt_step = _watched_step_or_skip  # type: ignore[method-assign]


def unwatch_skips(watcher: Any) -> None:
    """Take that back."""
    _watchers.discard(watcher)
    if not len(_watchers) and GradScaler._maybe_opt_step is _watched_step_or_skip:
        GradScaler._maybe_opt_step = _step_or_skip  # type: ignore[method-assign]


def _watched_step_or_skip(self: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
    steps: list[Optimizer] = []
    handle = optimizer.register_step_pre_hook(lambda stepping, args, kwargs: steps.append(stepping))
    try:
        result = _step_or_skip(self, optimizer, *args, **kwargs)
    finally:
        handle.remove()
    if not steps:
        for watcher in list(_watchers):
            watcher._after_skipped_step(optimizer)
    return result


def inside_step(optimizer: Optimizer | None = None) -> bool:
    """Whether the caller runs within an optimizer's step, or this one's, as its hooks do: none can be removed then."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        of = frame.f_locals.get("self") if frame.f_code.co_filename == _FILE else None
        if isinstance(of, Optimizer) and (optimizer is None or of is optimizer):
            return True
        frame = frame.f_back
    return False


def slots_of(optimizers: Iterable[Optimizer], parameter: Tensor) -> list[tuple[Any, Tensor]]:
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
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    # each process keeps the state of the parameters that it updates, in an optimizer of its own
    if zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer):
        return optimizer.optim.state
    return optimizer.state
