"""Hooks that copies of a model do not take along, and what happens to it behind an attached object's back."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

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

from .optimizer_state import inside_step

if TYPE_CHECKING:
    from .continual_backprop import ContinualBackprop

# steps of optimizers after which what has done nothing so far is taken to be forgotten
FORGOTTEN = 100
# what is attached, in the order of attaching
_attached: list[weakref.ref[ContinualBackprop]] = []
# optimizers that were looked at since the last change of what is attached, by their ids
_looked_at: dict[int, weakref.ref[Optimizer]] = {}


class Hook:
    """A forward pre-hook of an attached object.

    Copies and pickles of its module are without it (see `hang`). Where the dict that holds it was copied by itself,
    what comes out of a pickle does nothing, and needs no cbp_fast to be loaded.
    """

    __slots__ = ("cbp",)

    def __init__(self, cbp: ContinualBackprop) -> None:
        self.cbp = cbp

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """What is done before the forward."""
        raise NotImplementedError

    def off(self) -> None:
        """Do nothing from now on, wherever else the hook was put."""

    @property
    def __name__(self) -> str:
        # torch.jit.script asks for it, to compile the hook
        raise AttributeError(
            "continual backprop is attached to the model, and TorchScript cannot compile its hooks; call its remove() "
            "first, or script a copy (copy.deepcopy(model))"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # takes any arguments and returns None
        return getattr, (contextlib.nullcontext(), "__exit__")


class _WithoutOurs:
    """`__reduce_ex__` of a module's dict of hooks, or of what belongs to them: copies and pickles are without ours."""

    def __init__(self, entries: Any, hooks: Any) -> None:
        # the dict holds this
        self._entries, self._hooks = weakref.ref(entries), weakref.ref(hooks)

    def __call__(self, protocol: Any) -> tuple[Any, ...]:
        entries, hooks = self._entries(), self._hooks()
        assert entries is not None
        theirs = [(key, value) for key, value in entries.items() if not isinstance((hooks or {}).get(key), Hook)]
        return OrderedDict, (), None, None, iter(theirs)


def hang(module: nn.Module, hook: Hook) -> None:
    """Let a hook run before each forward of a module, which copies and pickles of the module do not take along."""
    hooks = module._forward_pre_hooks
    for entries in (hooks, module._forward_pre_hooks_with_kwargs):
        # an attribute of the dict itself: it stays the one that the user's handles know. A dict that has no attributes
        # is copied with inert hooks
        with contextlib.suppress(AttributeError):
            entries.__reduce_ex__ = _WithoutOurs(entries, hooks)  # type: ignore[method-assign]
    module.register_forward_pre_hook(hook, with_kwargs=True)


def take_off(modules: Iterable[nn.Module], goes: Callable[[Hook], bool]) -> None:
    """Remove the hooks of ours that `goes` says, wherever they hang in the modules."""
    for module in modules:
        hooks, extra = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
        for key, hook in [(k, h) for k, h in hooks.items() if isinstance(h, Hook) and goes(h)]:
            hook.off()
            extra.pop(key, None)
            del hooks[key]
        if not any(isinstance(hook, Hook) for hook in hooks.values()):
            for entries in (hooks, extra):
                getattr(entries, "__dict__", {}).pop("__reduce_ex__", None)


def forget_compiled() -> None:
    """Let what `torch.compile` has compiled be compiled anew when it is next called: it does not look for new hooks."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is not None and frames.input_codes.seen:
        sys.modules["torch._dynamo"].reset_code_caches()


# optimizers


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
            if isinstance(inner, Optimizer) and not _is_zero(optimizer):
                every.update({id(o): o for o in with_inner([inner]) if id(o) not in every})
    return list(every.values())


def _is_zero(optimizer: Optimizer) -> bool:
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


def let_go(optimizer: Optimizer, cbp: ContinualBackprop) -> None:
    """Remove the hooks of an attached object from an optimizer."""
    for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is cbp]:
            del hooks[key]


# what is attached


def attached(model: nn.Module) -> list[ContinualBackprop]:
    """The `ContinualBackprop` objects that are attached to a model, or to a part of it, in the order of attaching.

    Also those that nobody keeps: `for cbp in cbp_fast.attached(model): cbp.remove()` takes everything off.

    Raises:
        TypeError: if the model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, must be a torch.nn.Module")
    modules = set(model.modules())
    return [cbp for cbp in everyone() if not modules.isdisjoint(cbp._followed())]


def everyone() -> list[ContinualBackprop]:
    """All objects that are attached to a model."""
    # of a copy: a garbage collection may come at any time, and what it ends is taken from the list
    return [cbp for ref in list(_attached) if (cbp := ref()) is not None]


def enlist(cbp: ContinualBackprop) -> None:
    """From now on `attached` finds the object, and it is told what happens to its model behind its back."""
    if all(other is not cbp for other in everyone()):
        _attached.append(weakref.ref(cbp))
        weakref.finalize(cbp, _look_away).atexit = False
    _looked_at.clear()
    # torch's hooks for all optimizers and modules, while anything is attached
    for hooks, register, hook in _WATCHING:
        if hook not in hooks.values():
            register(hook)


def strike(cbp: ContinualBackprop) -> None:
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
