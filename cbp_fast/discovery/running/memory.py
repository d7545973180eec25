"""The memory of tensors: which storage, which bytes of it, whose, and all that there is."""

from __future__ import annotations

import contextlib
import gc

import torch
from torch import Tensor, nn


def storage_key(tensor: Tensor) -> int:
    """Identifies the memory of a tensor, which its views share."""
    # sparse ones have none
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else -id(tensor)


def bytes_of(tensor: Tensor) -> range:
    """The bytes of its storage that a tensor reaches."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first, size = tensor.storage_offset(), tensor.element_size()
    return range(first * size, (first + last + 1) * size)


def is_plain(t: Tensor) -> bool:
    """Whether a tensor is an ordinary one, whose elements lie in a storage."""
    return type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not t.is_nested


def is_lent(tensor: Tensor) -> bool:
    """Whether its memory is not PyTorch's own but that of NumPy or of another library."""
    return not tensor.untyped_storage().resizable()


def alive() -> set[int]:
    """Keys of the storages of all tensors that Python knows."""
    things = gc.get_objects()
    kinds = {cls for cls in set(map(type, things)) if issubclass(cls, Tensor)}
    keys = set()
    for tensor in [thing for thing in things if type(thing) in kinds]:
        with contextlib.suppress(Exception):  # some have no memory
            keys.add(storage_key(tensor))
    return keys


def constants(model: nn.Module) -> set[int]:
    """Keys of the storages that scripted modules hold in their code."""
    keys = set()
    for module in model.modules():
        graph = getattr(module, "inlined_graph", None) if isinstance(module, torch.jit.ScriptModule) else None
        for node in graph.findAllNodes("prim::Constant", recurse=True) if graph is not None else ():
            if node.output().type().kind() == "TensorType" and node.hasAttribute("value"):
                keys.add(storage_key(node.t("value")))
    return keys
