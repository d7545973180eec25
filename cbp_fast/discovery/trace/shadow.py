"""The ids of the elements of one storage, in which those of its views are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..nodes.ids import narrow


class Shadow(NamedTuple):
    """What the elements of a storage are made of: one period of them, where they repeat.

    Attributes:
        ids: int64 [period]; element i of the storage has ``ids[i // run % period]``.
        elements: number of the storage's elements, of `itemsize` bytes each.
        whole: whether no element is known to be a constant.
    """

    ids: Tensor
    run: int
    elements: int
    itemsize: int
    whole: bool = False

    def unrolled(self, elements: int | None = None) -> Shadow:
        """The same element by element: of one period, or of so many elements."""
        ids = self.ids.repeat_interleave(self.run) if self.run > 1 else self.ids
        if elements is not None:
            ids = ids.repeat(-(-elements // len(ids)))[:elements]
        return self._replace(ids=ids, run=1)

    def seen_through(self, tensor: Tensor) -> Tensor | None:
        """The ids of a view of the storage as a view of these; None if they do not repeat as the view does."""
        run, period = self.run, len(self.ids)
        offset = tensor.storage_offset()
        inner, reach, strides = offset % run, offset // run % period, []
        first = reach
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if size == 1 or stride % (run * period) == 0:
                strides.append(0)
            elif stride % run == 0:
                strides.append(stride // run)
                reach += (size - 1) * strides[-1]
            else:
                strides.append(0)
                inner += (size - 1) * stride
        if inner >= run or reach >= period:
            return None
        return self.ids.as_strided(tensor.shape, strides, first)


def written(shadow: Shadow | None, tensor: Tensor, ids: Tensor | None) -> Shadow | None:
    """The shadow of a tensor's storage once the tensor has these ids; None where all of the storage is constant."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    order = sorted((i for i in range(tensor.dim()) if tensor.shape[i] > 1), key=tensor.stride, reverse=True)
    if tensor.numel() == elements and all(tensor.stride(i) for i in order):
        return None if ids is None else _filled(tensor, ids, order)
    if shadow is None:
        zeros = torch.zeros(1, dtype=torch.int64, device="cpu")
        shadow = Shadow(zeros, 1, elements, tensor.element_size())
    # the view may write into any part of it
    shadow = shadow.unrolled(elements)
    # an expanded tensor writes one element many times
    shape = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    place = shadow.ids.as_strided(shape, tensor.stride(), tensor.storage_offset())
    ids = torch.zeros((), dtype=torch.int64, device="cpu") if ids is None else ids
    place.copy_(ids.expand(tensor.shape)[tuple(slice(0, n) for n in shape)])
    return shadow._replace(whole=False)


def _filled(tensor: Tensor, ids: Tensor, order: Sequence[int]) -> Shadow:
    """The shadow of a storage that one tensor fills, of which `order` are the axes from the widest stride on."""
    (ids,), _ = narrow(ids.expand(tensor.shape))
    axes, run = list(order), 1
    while axes and ids.shape[axes[0]] == 1:
        axes.pop(0)
    while axes and ids.shape[axes[-1]] == 1:
        run *= tensor.shape[axes.pop()]
    wide = ids.expand([n if i in axes else 1 for i, n in enumerate(tensor.shape)])
    flat = torch.empty(wide.numel(), dtype=torch.int64, device="cpu")
    strides = [stride // run if i in axes else 0 for i, stride in enumerate(tensor.stride())]
    flat.as_strided(wide.shape, strides).copy_(wide)
    return Shadow(flat, run, tensor.numel(), tensor.element_size(), bool(flat.all()))
