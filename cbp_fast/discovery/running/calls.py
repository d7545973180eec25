"""What is asked at every operation: which tensors it is given, and whether it only looks at them in another way."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_PLAIN = frozenset([int, float, bool, complex, str, type(None), torch.dtype, torch.device, Tensor, nn.Parameter])


def leaves_of(*values: Any) -> list[Any]:
    """As PyTorch's `tree_leaves` of the values, quicker: for what is asked at every operation."""
    found: list[Any] = []
    for value in values:
        cls = type(value)
        if cls in _PLAIN:
            found.append(value)
        elif cls is tuple or cls is list:
            found += leaves_of(*value)
        elif cls is dict:
            found += leaves_of(*value.values())
        else:
            found += tree_leaves(value)
    return found


@functools.cache
def _gives_views(func: torch._ops.OpOverload) -> bool:
    """Whether an operation does nothing but look at the memory of its first argument in another way."""
    schema = func._schema
    returns = [r.alias_info for r in schema.returns]
    return (
        not schema.is_mutable
        and bool(returns)
        and all(alias is not None and not alias.is_write for alias in returns)
        and isinstance(schema.arguments[0].type, torch.TensorType)
        and not any(isinstance(a.type, torch.TensorType) for a in schema.arguments[1:])
        and func._overloadpacket.__name__ != "lift_fresh"
        # what is made of others may copy, and is seen whole in inference mode
        and torch._C._dispatch_has_kernel(func.name())
        and not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


def is_view(func: Any, args: Any) -> bool:
    """Whether an operation gives views of its first argument, and nothing else."""
    if not isinstance(func, torch._ops.OpOverload) or not _gives_views(func) or not args:
        return False
    return type(args[0]) in (Tensor, nn.Parameter) and args[0].layout == torch.strided and not args[0].is_nested
