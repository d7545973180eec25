"""What an object holds, past whatever its class does, and what of it is in reach, as a part of the model."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict, deque
from typing import Any

import torch

ATOMS = frozenset(
    (
        *(int, float, complex, bool, str, bytes, type(None), type, type(Ellipsis), range, slice, types.ModuleType),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
    )
)
# of the standard library only what merely holds; other objects of it may belong to threads and to the system
_HOLDERS = frozenset(
    (
        *("builtins", "collections", "types", "typing", "abc", "_collections_abc", "dataclasses", "functools"),
        *("weakref", "_weakrefset", "_weakref", "argparse", "random", "array"),
    )
)
_FOREIGN = sys.stdlib_module_names.difference(_HOLDERS)
_TORCH_HOLDERS = ("torch.nn.", "torch.optim", "torch.distributions", "torch.ao.")
# who runs the model is no part of it, though the model may know it
RUNNERS = ("cbp_fast", "lightning", "pytorch_lightning", "lightning_fabric", "accelerate", "deepspeed", "ray", "wandb")
MISSING = object()
# objects beyond so many, the ones farthest from the model, are not looked at
MOST = 500_000


def is_foreign(module: Any) -> bool:
    """Whether what is defined in a module is none of the model's own."""
    root = str(module).partition(".")[0]
    return root in _FOREIGN or root in RUNNERS or (root == "torch" and not str(module).startswith(_TORCH_HOLDERS))


def in_reach(cls: type) -> bool:
    """Whether an object of this class is a part of what holds it."""
    return not any(is_foreign(getattr(base, "__module__", "")) for base in cls.__mro__)


def slots_of(cls: type) -> list[tuple[str, Any]]:
    """The names and descriptors of the slots of a class and its bases."""
    own = (base for base in cls.__mro__ if "__slots__" in base.__dict__)
    return [(k, m) for base in own for k, m in vars(base).items() if type(m) is types.MemberDescriptorType]


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The real `__dict__` of an object, whatever its class answers."""
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return own if isinstance(own, dict) else None


def keys_of(d: dict[Any, Any]) -> list[Any]:
    """The keys of a dict, as its base class gives them."""
    return list(OrderedDict.__iter__(d) if isinstance(d, OrderedDict) else dict.__iter__(d))


def content_of(owner: Any, member: Any) -> Any:
    """What a slot or a cell holds, past whatever the class does."""
    try:
        return member.__get__(owner)
    except (AttributeError, ValueError):  # it is empty
        return MISSING


def entries_of(container: Any) -> list[Any]:
    """Entries of a list, tuple, set, frozenset or deque, as its base class gives them."""
    for base in (list, tuple, set, frozenset, deque):
        if isinstance(container, base):
            return list(base.__iter__(container))  # type: ignore[arg-type]
    return []


def is_array(value: Any) -> bool:
    """Whether it is an array of NumPy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)
