"""Whether forwards of this thread are observed, and whether they run with the model's own parameters."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from torch.nn.utils import stateless


class _Thread(threading.local):
    unobserved = False


this_thread = _Thread()


def is_observed() -> bool:
    """Whether forwards of this thread are recorded."""
    return not this_thread.unobserved


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """Forwards of this thread are not recorded: they only look at a model."""
    before, this_thread.unobserved = this_thread.unobserved, True
    try:
        yield
    finally:
        this_thread.unobserved = before


def in_functional_call() -> bool:
    """Whether the caller runs within `torch.func.functional_call`, whose parameters may not be the model's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is stateless._functional_call.__code__:
            return True
        frame = frame.f_back
    return False
