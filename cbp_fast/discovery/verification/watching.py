"""Runs a model on other inputs than it is given, and with norms over features that couple no units."""

from __future__ import annotations

import copy
import sys
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from ..running.calls import leaves_of
from ..running.memory import storage_key
from ..running.preserving import Preserving

_NORMS: dict[Any, tuple[str, ...]] = dict.fromkeys(
    (F.layer_norm, F.group_norm, torch.layer_norm, torch.group_norm), ("input", "", "weight", "bias")
)
_NORMS |= dict.fromkeys((F.rms_norm, torch.rms_norm), ("input", "", "weight", "eps"))
# what those become, where they are called past Python's functions
_NORM_OPS = ("native_layer_norm", "native_group_norm", "_fused_rms_norm")


class Watch(Preserving):
    """Varies what comes into the model from outside, and not what its own modules pass on.

    Outside of all modules, where a function runs a model by its parts, every tensor that is made of the model's is its
    own too.

    Attributes:
        own: keys of the storages that the model made, and of its parameters and buffers.
        eps, inputs, varied: as of `Seen`.
    """

    def __init__(self, model: nn.Module, vary: Any) -> None:
        super().__init__()
        self.vary = vary
        self.own = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
        self.depth = 0
        self.eps = 0.0
        self.inputs = self.varied = False

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A hook before a module: the outermost one gets other inputs."""
        self.depth += 1
        if self.depth > 1:
            return None
        with _disable_current_modes():
            return self._others((args, kwargs), {})

    def leave(self, *_: Any) -> None:
        """A hook after a module."""
        self.depth -= 1

    def _others(self, value: Any, seen: dict[int, Any]) -> Any:
        """The value with other tensors for those from outside, in containers and in copies of objects."""

        def other(leaf: Any) -> Any:
            if id(leaf) in seen:
                return seen[id(leaf)]
            seen[id(leaf)] = leaf
            if isinstance(leaf, Tensor):
                if _key(leaf) not in self.own:
                    self.inputs |= leaf.dim() > 0 and leaf.numel() > 0
                    if self.vary is not None:
                        seen[id(leaf)] = self.vary(leaf)
                        self.varied |= seen[id(leaf)] is not leaf
            elif hasattr(leaf, "__dict__") and not callable(leaf) and not isinstance(leaf, type(sys)):
                state = self._others(vars(leaf), seen)
                if any(state[key] is not child for key, child in vars(leaf).items()):
                    seen[id(leaf)] = copy.copy(leaf)
                    vars(seen[id(leaf)]).update(state)
            return seen[id(leaf)]

        return tree_map(other, value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        keys = {_key(t) for t in leaves_of(args, kwargs) if isinstance(t, Tensor)}
        own = self.depth > 0 or not keys.isdisjoint(self.own)
        if own and not self.depth and isinstance(func, torch._ops.OpOverload) and not func._schema.is_mutable:
            # data that joins what the model made; indices say where, and stay
            with _disable_current_modes():
                args, kwargs = tree_map(self._joining, (args, kwargs))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if getattr(func, "_overloadpacket", func).__name__ in _NORM_OPS:
            with _disable_current_modes():
                names = (a.name for a in func._schema.arguments)
                channels = func is torch.ops.aten.native_group_norm.default
                out[0].copy_(_scaled({**dict(zip(names, args, strict=False)), **kwargs}, channels))
        for t in leaves_of(out):
            if isinstance(t, Tensor):
                if t.is_floating_point():
                    self.eps = max(self.eps, torch.finfo(t.dtype).eps)
                if own:
                    self.own.add(_key(t))
                elif _key(t) not in keys:
                    self.own.discard(_key(t))
        return out

    def _joining(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or _key(value) in self.made:
            return value
        return self._others(value, {})


def _key(tensor: Tensor) -> int:
    try:
        return storage_key(tensor)
    except (RuntimeError, NotImplementedError):  # inside vmap
        return -id(tensor)


class Uncoupled(TorchFunctionMode):
    """Norms over features become their scale and shift, in the memory layout and dtype of the norm's own result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _NORMS:
            return func(*args, **kwargs)
        with torch.no_grad():
            result = func(*args, **kwargs)
        # the result, and not the input, may be written to
        given = {**dict(zip(_NORMS[func], args, strict=False)), **kwargs}
        return torch.empty_like(result).copy_(_scaled(given, func in (F.group_norm, torch.group_norm)))


def _scaled(given: dict[str, Any], channels: bool) -> Tensor:
    """The input of a norm, scaled and shifted along its channels or its last axes."""
    x = given["input"]
    weight, bias = given.get("weight"), given.get("bias")
    if channels:
        weight, bias = (t if t is None else t.reshape(-1, *(1,) * (x.dim() - 2)) for t in (weight, bias))
    x = x if weight is None else x * weight
    return cast(Tensor, x if bias is None else x + bias)
