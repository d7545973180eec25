"""Remembers what the operations of a forward change, to put it back, and which path they took."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as same_version
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from .calls import is_view, leaves_of
from .memory import storage_key


class Preserving(TorchDispatchMode):
    """Remembers what operations change that was there before, to put it back.

    Args:
        known: tensors that are there before.

    Attributes:
        known: keys of their storages.
        made: by their keys, the storages that were made under this mode, held so that no other gets the address.
        opened: storages whose content code that is not followed may read and write, and which code.
        path: operations, with the integers among their arguments and results.
        drawn: whether Python read a value that depends on random numbers; `hidden`: and one that `path` does not tell.
    """

    # they may change anything
    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # it would import the compiler
        return False

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.known = set(map(storage_key, known))
        self.forget()

    def forget(self) -> None:
        """As at the start."""
        self.made: dict[int, StorageWeakRef | None] = {}
        self.opened: dict[int, str] = {}
        self.path: list[tuple[Any, tuple[int, ...]]] = []
        self.drawn = self.hidden = False
        self._random: set[int] = set()
        self._held: dict[int, Any] = {}
        self._adopted: set[int] = set()
        self._saved: dict[int, tuple[Tensor, Tensor, Any, Tensor | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_view(func, args):
            out = func(*args, **kwargs)
            self._take_path(func, leaves_of(args, kwargs), leaves_of(out))
            return out
        plain = isinstance(func, torch._ops.OpOverload)
        leaves = leaves_of(args, kwargs)
        taken = [t for t in leaves if isinstance(t, Tensor)]
        # batch norms do not say that they change statistics
        if not plain or func._schema.is_mutable or "batch_norm" in func._overloadpacket.__name__:
            with _disable_current_modes():
                self._save(func, args, kwargs, taken)
        out = func(*args, **kwargs)
        results = leaves_of(out)
        outs = [t for t in results if isinstance(t, Tensor)]
        keys = {storage_key(t) for t in taken}
        if plain and func._overloadpacket.__name__ == "set_":
            # memory that nothing seen made, and that may be given away unseen (`share_memory_`, copies)
            self._adopted.update(key for t in outs if (key := storage_key(t)) not in self.known)
        fresh = plain and func._overloadpacket.__name__ == "lift_fresh"
        for t in outs:
            key = storage_key(t)
            if fresh or key not in keys:
                self.made.setdefault(key, StorageWeakRef(t.untyped_storage()) if key >= 0 else None)
        if not self._random.isdisjoint(keys) or (plain and torch.Tag.nondeterministic_seeded in func.tags):
            self._random.update(map(storage_key, outs))
            read = not outs or (plain and torch.Tag.dynamic_output_shape in func.tags)
            self.drawn |= read
            self.hidden |= read and not all(isinstance(result, (bool, int, Tensor)) for result in results)
        self._take_path(func, leaves, results)
        return out

    def appeared(self, tensor: Tensor) -> bool:
        """Whether its numbers were neither there before nor made by an operation that was seen.

        Indices do not count: they are made past the dispatcher.
        """
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            return False
        key = storage_key(tensor)
        return key not in self.known and key not in self.made

    def _take_path(self, func: Any, leaves: Sequence[Any], results: Sequence[Any]) -> None:
        numbers = [n for n in leaves if type(n) is int]
        for result in results:
            numbers += result.shape if isinstance(result, Tensor) and not result.is_nested else ()
            numbers += (result,) if isinstance(result, (bool, int)) else ()
        self.path.append((func, tuple(numbers)))

    def open(self, tensor: Tensor, why: str) -> None:
        """From now on code that is not followed may read and write its memory."""
        key = storage_key(tensor)
        self.drawn |= key in self._random
        self.hidden |= key in self._random
        if key not in self.opened:
            self._held[key] = StorageWeakRef(tensor.untyped_storage()) if key >= 0 else tensor
            self.opened[key] = why

    def _save(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> None:
        """Remembers what an operation is about to change, unless it was made under this mode."""
        written: Sequence[Any] = tensors
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            values = [*args, *(kwargs.get(a.name) for a in func._schema.arguments[len(args) :])]
            marked = zip(func._schema.arguments, values, strict=False)
            written = tree_leaves([v for a, v in marked if a.alias_info is not None and a.alias_info.is_write])
        for tensor in written:
            if not isinstance(tensor, Tensor) or not tensor.numel():
                continue
            if storage_key(tensor) not in self.made and storage_key(tensor) not in self._adopted:
                whole = tensor.detach()
                if tensor.device.type != "meta":
                    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                    whole = whole.as_strided((elements,), (1,), 0)
                version = contextlib.nullcontext() if tensor.is_inference() else same_version(tensor)
                leaf = tensor if tensor._base is None else tensor._base
                self._saved.setdefault(
                    storage_key(tensor), (whole, whole.clone(), version, leaf if leaf.grad_fn is None else None)
                )

    def restore(self) -> None:
        """Puts back every tensor that was changed but not made under this mode."""
        with torch.no_grad():
            for tensor, before, version, leaf in self._saved.values():
                with version:
                    tensor.copy_(before)
                if leaf is not None and leaf.grad_fn is not None:
                    # it was written to with a history
                    leaf.detach_()
        self._saved.clear()
