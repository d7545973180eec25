"""Whether forwards of this thread are observed, and whether they run with the model's own parameters."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from torch.nn.utils import stateless


class _Here(threading.local):
    unobserved = False


_here = _Here()


def is_observed() -> bool:
    """Whether forwards of this thread are recorded."""
    return not _here.unobserved


@contextlib.contextmanager
def unobserved() -> Iterator[None]:
    """Forwards of this thread are not recorded: they only look at a model."""
    before, _here.unobserved = _here.unobserved, True
    try:
        yield
    finally:
        _here.unobserved = before


def in_functional_call() -> bool:
    """Whether the caller runs within `torch.func.functional_call`, whose parameters may not be the model's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is stateless._functional_call.__code__:
            return True
        frame = frame.f_back
    return False
