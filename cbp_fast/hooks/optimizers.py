"""What is asked of an optimizer: whether its step runs hooks, is under way or was skipped, and what it wraps."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

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


def check_runs_hooks(optimizer: Any) -> None:
    """Raises TypeError for a wrapper whose step runs no hooks, and says what to pass instead."""
    runs = isinstance(optimizer, Optimizer) and getattr(type(optimizer).step, "hooked", False)
    if runs and isinstance(vars(optimizer).get("_optimizer_step_post_hooks"), dict):
        return
    inner = [(f"optimizer.{name}", o) for name, o in _inner(optimizer)]
    wraps = " and ".join(f"{path} ({type(o).__name__})" for path, o in inner)
    instead = f"what it wraps, {wraps}" if wraps else "the torch.optim.Optimizer that does the steps"
    raise TypeError(
        f"optimizer is a {type(optimizer).__name__}, whose step runs no hooks as a torch.optim.Optimizer's does; "
        f"pass {instead}, or no optimizer, and call step() after your own update"
    )


def with_inner(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers and those that they step, which keep state too (SAM's base_optimizer)."""
    every = {id(o): o for o in optimizers}
    for optimizer in list(every.values()):
        for _, inner in _inner(optimizer):
            # ZeroRedundancyOptimizer shows the state of its own as its own
            if isinstance(inner, Optimizer) and not is_zero(optimizer):
                every.update({id(o): o for o in with_inner([inner]) if id(o) not in every})
    return list(every.values())


def is_zero(optimizer: Optimizer) -> bool:
    """Whether it is a `ZeroRedundancyOptimizer`, which holds the optimizer of this process's share."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer)


def is_optimizer(value: Any) -> bool:
    """Whether it is an optimizer, or looks like a wrapper of one."""
    if isinstance(value, type):
        return False
    return isinstance(value, Optimizer) or (hasattr(value, "param_groups") and callable(getattr(value, "step", None)))


def _inner(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """The optimizers that it holds, and by which attribute."""
    for name, value in list(getattr(optimizer, "__dict__", {}).items()):
        several = value.values() if type(value) is dict else value if isinstance(value, (list, tuple)) else [value]
        for inner in several:
            if inner is not optimizer and is_optimizer(inner):
                public = name.lstrip("_")
                yield public if getattr(optimizer, public, None) is value else name, inner


def let_go(optimizer: Optimizer, owner: object) -> None:
    """Remove the hooks of an attached object from an optimizer."""
    for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[key]
