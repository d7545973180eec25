"""Activations that wait for the step."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor


class Forward(NamedTuple):
    """What one reading layer saw in one forward, held until the step."""

    slot: int
    h: Tensor
    version: int
    storage: torch.UntypedStorage
    size: int  # of the storage, in bytes
    total: int  # bytes of all storages held, up to this one


class Stream(NamedTuple):
    """A CUDA stream, and whether a graph of what it does is captured."""

    stream: int
    capturing: bool


def stream_of(device: torch.device) -> Stream:
    """The current stream of a CUDA device."""
    with torch.cuda.device(device) if torch.cuda.current_device() != device.index else contextlib.nullcontext():
        return Stream(torch._C._cuda_getCurrentRawStream(device.index), torch.cuda.is_current_stream_capturing())
