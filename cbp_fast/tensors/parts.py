"""Tensors of which a process holds a part: where that lies in the whole."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Extent(NamedTuple):
    """The part of a tensor that this process holds.

    Attributes:
        whole, part: the sizes of the tensor and of the part.
        first: index of the part's first element.
        split: whether other processes hold other parts.
        is_dtensor: whether the tensor is a DTensor.
        adds: whether this process, of all that hold the same part, is the one that adds it to a sum.
    """

    whole: torch.Size
    part: torch.Size
    first: tuple[int, ...]
    split: bool = False
    is_dtensor: bool = False
    adds: bool = True


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a `DTensor`."""
    # importing the class takes most of a second, and who has one has imported it
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, in the same memory."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; a collective where processes hold parts of it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def local_activations(h: Tensor, axis: int) -> Tensor:
    """What this process holds of activations whose features lie along `axis`.

    Raises:
        RuntimeError: they are split along another axis, or are partial sums.
    """
    if any(not p.is_replicate() and getattr(p, "dim", None) != axis for p in h.placements):  # type: ignore[attr-defined]
        raise RuntimeError(
            f"a reading layer saw activations laid out as {h.placements}; continual backprop takes "  # type: ignore[attr-defined]
            "DTensors that are replicated, or split by feature"
        )
    h = local(h)
    # the result of a collective that may still be under way
    return h.wait() if hasattr(h, "wait") else h


def extent_of(name: str, tensor: Tensor) -> Extent:
    """Where this process's part of the tensor called `name` lies.

    Raises:
        ValueError: a layout that cannot be re-initialised part by part.
    """
    if not is_dtensor(tensor):
        return Extent(tensor.shape, tensor.shape, (0,) * tensor.dim())
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    part, first = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    here = local(tensor)
    if any(p.is_partial() or getattr(p, "dim", 0) > 1 for p in placements) or tuple(part) != tuple(here.shape):
        raise ValueError(
            f"{name} is laid out as {placements} over {mesh.shape} processes, and this one holds {tuple(here.shape)} "
            f"of {tuple(tensor.shape)}; parameters must be replicated, or split along their first two axes"
        )
    if here.device.type != mesh.device_type:
        raise ValueError(f"{name} is kept on {here.device} for a mesh of {mesh.device_type}; do not offload it")
    split = any(not p.is_replicate() and n > 1 for p, n in zip(placements, mesh.shape, strict=True))
    return Extent(tensor.shape, torch.Size(part), tuple(first), split, True)
