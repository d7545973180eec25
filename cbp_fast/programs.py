"""What the programs have in common: Ctrl-C goes to every process of a terminal, and some must not hear it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ignored() -> Iterator[None]:
    """Nothing is interrupted from the keyboard: neither what is written here, nor ever the processes started here."""
    # handlers belong to the main thread
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
