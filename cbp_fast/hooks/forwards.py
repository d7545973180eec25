"""Forward hooks that copies of a model do not take along."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


class Hook:
    """A forward pre-hook of something that is attached, its owner.

    Copies and pickles of its module are without it (see `hang`). Where the dict that holds it was copied by itself,
    what comes out of a pickle does nothing, and needs no cbp_fast to be loaded.
    """

    __slots__ = ("owner",)

    def __init__(self, owner: Any) -> None:
        self.owner = owner

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
