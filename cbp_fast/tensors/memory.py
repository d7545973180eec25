"""Which bytes a tensor has: whether two have some in common, and whether it has any at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from .native import copy_
from .parts import is_dtensor


def own_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Every parameter and buffer with its name; one that two modules have, twice."""
    return [
        (f"{prefix}.{key}" if prefix else key, tensor)
        for prefix, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    ]


def span(tensor: torch.Tensor) -> tuple[Any, int, int] | None:
    """A tensor's memory: a space of addresses, the first byte and the one after the last; None if it has none.

    Two tensors may share elements only where the bytes between overlap in one space. All real memory of a device is one
    space, so that two storages over the same bytes are seen; on the meta device every storage is its own.
    """
    if is_dtensor(tensor):
        tensor = cast(Any, tensor)._local_tensor
    if isinstance(tensor, nn.parameter.UninitializedParameter) or tensor.layout != torch.strided or not tensor.numel():
        return None
    device, size = tensor.device, tensor.element_size()
    if type(tensor) in (nn.Parameter, torch.Tensor) and device.type != "meta":
        space, first = cast(Any, device), tensor.data_ptr()
        if not first:  # freed, as between the forwards of sharded modules
            return None
    else:
        storage = tensor.untyped_storage()
        if storage.device.type != "meta":  # it is made of other tensors
            return None
        space, first = storage._cdata, int(tensor.storage_offset()) * size
    if tensor.is_contiguous():
        return space, first, first + tensor.numel() * size
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return space, first, first + reach * size


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have memory in common: neighbours in one storage have not, nor columns between columns."""
    pair = [cast(Any, t)._local_tensor if is_dtensor(t) else t for t in (a, b)]
    spans = [span(t) for t in pair]
    if spans[0] is None or spans[1] is None or spans[0][0] != spans[1][0]:
        return False
    (_, start, end), (_, other_start, other_end) = spans[0], spans[1]
    if max(start, other_start) >= min(end, other_end):
        return False
    if all(t.numel() * t.element_size() == s[2] - s[1] for t, s in zip(pair, cast(Any, spans), strict=True)):
        return True
    lowest = min(start, other_start)
    with _disable_current_modes():
        taken = torch.zeros(max(end, other_end) - lowest, dtype=torch.bool, device="cpu")
        for tensor, first in zip(pair, (start, other_start), strict=True):
            size = tensor.element_size()
            strides = (*(stride * size for stride in tensor.stride()), 1)
            place = taken.as_strided((*tensor.shape, size), strides, first - lowest)
            if place.any():
                return True
            place.fill_(True)
    return False


def shared_memory(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """By the names of those that have memory in common with another one of `tensors`, the name of that one."""
    spaces: dict[Any, list[tuple[int, int, int]]] = defaultdict(list)
    entries = list(tensors)
    for i, (_, tensor) in enumerate(entries):
        where = span(tensor)
        if where is not None:
            spaces[where[0]].append((where[1], where[2], i))
    shared: dict[str, str] = {}
    for places in spaces.values():
        places.sort()
        under: list[tuple[int, int, int]] = []
        for place in places:
            under = [other for other in under if other[1] > place[0]]
            for _, _, i in under:
                (name, tensor), (other, its) = entries[i], entries[place[2]]
                if tensor is its or overlap(tensor, its):
                    shared.setdefault(name, other)
                    shared.setdefault(other, name)
            under.append(place)
    return shared


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers."""
    return isinstance(tensor, FakeTensor) or torch._is_functional_tensor(tensor)


def copy_buffer(to: Tensor, source: Tensor) -> None:
    """Copy one buffer to another."""
    if to.is_cpu:
        copy_(to, source)
    else:
        to.copy_(source)


def room_of(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its memory; -1 where that cannot be asked."""
    try:
        return int(tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size())
    except (NotImplementedError, RuntimeError):
        return -1


def extent_of(tensor: Tensor) -> int:
    """Bytes from a dense tensor's first element to the end of its last."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size() if tensor.numel() else 0
