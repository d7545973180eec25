"""Ids of nodes in tensors: which there are, along which axes they vary, and their hashes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DATA, ONE, RANDOM = 1, 2, 3
BASE = 2**31  # ids are below it, so that a pair fits an int64
# of a hash: odd, so that no two ids become one
_FACTORS = (-7046029254386353131, -4658895280553007687)


def scramble(ids: Tensor) -> Tensor:
    """A hash of int64 `ids`, to be summed over a set; 0 stays 0."""
    ids = ids * _FACTORS[0]
    ids = (ids ^ (ids >> 29)) * _FACTORS[1]
    return ids ^ (ids >> 32)


def scrambled(number: int) -> int:
    """The hash of one id, as of `scramble`."""
    number = wrapped(number * _FACTORS[0])
    number = wrapped((number ^ (number >> 29)) * _FACTORS[1])
    return number ^ (number >> 32)


def wrapped(number: int) -> int:
    """A number as an int64 wraps it."""
    return ((number + 2**63) & (2**64 - 1)) - 2**63


def narrow(*ids: Tensor) -> tuple[list[Tensor], torch.Size]:
    """Ids broadcast together, with one entry along every axis where none varies, and the shape to expand to."""
    shape = ids[0].shape
    wide: Sequence[Tensor] = ids
    if any(t.shape != shape for t in ids):
        wide = torch.broadcast_tensors(*ids)
        shape = wide[0].shape
    for axis, size in enumerate(shape):
        if size > 1 and all(same_along(t, axis) for t in wide):
            wide = [t.narrow(axis, 0, 1) for t in wide]
    return list(wide), shape


def same_along(ids: Tensor, axis: int) -> bool:
    """Whether ids are known not to vary along an axis; few of them are not looked at."""
    if ids.stride(axis) == 0:
        return True
    if ids.numel() <= 1024:
        return False
    first = ids.narrow(axis, 0, 1)
    # the second place tells most of those that vary
    return torch.equal(first, ids.narrow(axis, 1, 1)) and torch.equal(first.expand_as(ids), ids)


def kinds_of(ids: Tensor) -> Tensor:
    """The different ids, int64 [n]."""
    (ids,), _ = narrow(ids)
    return torch.unique(ids)


def is_data(ids: Tensor) -> bool:
    """Whether it is plain to see that all of it is data."""
    (thin,), _ = narrow(ids)
    return thin.numel() == 1 and int(thin) == DATA


def sorted_pairs(row: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Different pairs of a row and a leaf, sorted by both."""
    pairs = torch.unique(row * BASE + leaf)
    return pairs // BASE, pairs % BASE
