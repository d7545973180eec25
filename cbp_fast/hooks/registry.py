"""What is attached to models, and is told what happens to them behind its back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules.module import (
    _global_module_registration_hooks,
    _global_parameter_registration_hooks,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook

from .optimizers import inside_step


class Attached(Protocol):
    """What is attached to a model: a `ContinualBackprop`."""

    _engine: Any
    enabled: bool

    def _overheard(self, optimizer: Optimizer) -> bool:
        """An optimizer has stepped; whether that is of no interest, as long as nothing else is attached."""

    def _registered(self, module: nn.Module, key: str, value: Any) -> None:
        """A module was given a module or a parameter."""


# steps of optimizers after which what has done nothing so far is taken to be forgotten
FORGOTTEN = 100
# what is attached, in the order of attaching
_attached: list[weakref.ref[Attached]] = []
# optimizers that were looked at since the last change of what is attached, by their ids
_looked_at: dict[int, weakref.ref[Optimizer]] = {}


def everyone() -> list[Attached]:
    """All objects that are attached to a model."""
    # of a copy: a garbage collection may come at any time, and what it ends is taken from the list
    return [cbp for ref in list(_attached) if (cbp := ref()) is not None]


def enlist(cbp: Attached) -> None:
    """From now on `attached` finds the object, and it is told what happens to its model behind its back."""
    if all(other is not cbp for other in everyone()):
        _attached.append(weakref.ref(cbp))
        weakref.finalize(cbp, _look_away).atexit = False
    _looked_at.clear()
    # torch's hooks for all optimizers and modules, while anything is attached
    for hooks, register, hook in _WATCHING:
        if hook not in hooks.values():
            register(hook)


def strike(cbp: Attached) -> None:
    """The opposite."""
    _attached[:] = [ref for ref in list(_attached) if ref() is not cbp]
    _looked_at.clear()
    _look_away()


def _look_away() -> None:
    # a hook that goes while torch loops over the hooks breaks the loop; the next one that is struck takes it off
    _attached[:] = [ref for ref in list(_attached) if ref() is not None]
    if not _attached and not inside_step():
        for hooks, _, hook in _WATCHING:
            for key in [key for key, other in hooks.items() if other is hook]:
                del hooks[key]


def _after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if is_compiling() or id(optimizer) in _looked_at:
        return
    # every one is to hear of it
    if all([cbp._overheard(optimizer) for cbp in everyone()]):  # noqa: C419
        number = id(optimizer)
        _looked_at[number] = weakref.ref(optimizer, lambda _: _looked_at.pop(number, None))


def _after_registration(module: nn.Module, name: str, value: Any) -> None:
    for cbp in everyone():
        cbp._registered(module, name, value)


_WATCHING: tuple[tuple[dict[int, Any], Callable[..., Any], Callable[..., None]], ...] = (
    (_global_optimizer_post_hooks, register_optimizer_step_post_hook, _after_any_step),
    (_global_module_registration_hooks, register_module_module_registration_hook, _after_registration),
    (_global_parameter_registration_hooks, register_module_parameter_registration_hook, _after_registration),
)
