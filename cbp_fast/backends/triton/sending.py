"""Tables and addresses on their way to a device, without a wait, and into CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BEFORE_CAPTURE = "run a step with inputs of the same shape before each capture of a CUDA graph"


def upload(device: torch.device, *tables: tuple[Sequence[int], int]) -> list[Tensor]:
    """Integers of 32 or 64 bits each as tensors on a device, in one copy that nobody waits for.

    Raises:
        RuntimeError: a CUDA graph is captured, in which the copy would be made at every replay and not now.
    """
    if is_capturing(device):
        raise RuntimeError(_BEFORE_CAPTURE)
    parts = []
    for numbers, bits in tables:
        part = torch.tensor(numbers, dtype=torch.int64 if bits == 64 else torch.int32).view(torch.uint8)
        # so that each begins where 16 bytes can be read at once
        parts.append(torch.nn.functional.pad(part, (0, -len(part) % 16)))
    together = torch.cat(parts)
    if device.type != "cpu":
        together = together.pin_memory().to(device, non_blocking=True)
    placed, at = [], 0
    for (numbers, bits), part in zip(tables, parts, strict=True):
        dtype = torch.int64 if bits == 64 else torch.int32
        placed.append(together[at : at + len(numbers) * bits // 8].view(dtype))
        at += len(part)
    return placed


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph of the device's current stream is captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Sender:
    """The addresses of a launch's sums, which change from step to step, on their way to the device without a wait.

    Whoever launches on several streams orders them as the state asks for anyway.
    """

    _RING = 4

    def __init__(self, sources: Sequence[tuple[int, int]], device: torch.device) -> None:
        self._sources = sources
        self._device = device
        self._last: list[int] | None = None
        self._ring: list[tuple[Tensor, torch.cuda.Event]] = []
        self._next = 0
        self._target = torch.empty(len(sources), dtype=torch.int64, device=device)
        # a CUDA graph reads its own pinned buffer at every replay; none can be had while a stream is captured
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def _pinned(self) -> Tensor:
        return torch.empty(len(self._sources), dtype=torch.int64, pin_memory=True)

    def send(self, addresses: list[int]) -> Tensor:
        """Where each sum begins, by the addresses of the tensors: for kernels launched on this stream after this call.

        Raises:
            RuntimeError: a graph is captured before a step of this shape has run.
        """
        if is_capturing(self._device):
            if self._spare is None:
                raise RuntimeError(_BEFORE_CAPTURE)
            pinned, self._spare = self._spare, None
            target = torch.empty_like(self._target)
            self._captured += [pinned, target]
            pinned.copy_(self._values(addresses))
            return target.copy_(pinned, non_blocking=True)
        if addresses == self._last:
            return self._target
        if self._device.type == "cpu":
            self._target.copy_(self._values(addresses))
        else:
            if not self._ring:
                self._ring = [(self._pinned(), torch.cuda.Event()) for _ in range(self._RING)]
            if self._spare is None:
                self._spare = self._pinned()
            pinned, sent = self._ring[self._next]
            self._next = (self._next + 1) % self._RING
            # the copy of four sends ago has long been made
            sent.synchronize()
            pinned.copy_(self._values(addresses))
            self._target.copy_(pinned, non_blocking=True)
            sent.record()
        self._last = addresses
        return self._target

    def _values(self, addresses: list[int]) -> Tensor:
        return torch.tensor([addresses[tensor] + offset for tensor, offset in self._sources], dtype=torch.int64)
