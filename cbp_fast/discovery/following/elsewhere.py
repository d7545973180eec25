"""What a forward hands to other threads, so that it can be seen there."""

from __future__ import annotations

import _thread
import concurrent.futures
import concurrent.futures.thread
import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..running.preserving import Preserving

_WHY = "it is used in another thread, where it cannot be followed"
_lock = threading.Lock()
# what to enter in the threads that a thread hands work to
_followers: dict[int, Callable[[], AbstractContextManager[Any]]] = {}
_originals: list[tuple[Any, str, Any]] = []


class Elsewhere(TorchDispatchMode):
    """For other threads: what operations take and make there is open to code that is not followed."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self, looking: Preserving) -> None:
        super().__init__()
        self.looking: Preserving | None = looking

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # a thread may live longer than the look at the model
        if self.looking is not None:
            for t in tree_leaves((args, kwargs, out)):
                if isinstance(t, Tensor):
                    self.looking.open(t, _WHY)
        return out


@contextlib.contextmanager
def followed(enter: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """While it lasts, what this thread starts in other threads, or gives to pools of threads, runs under `enter()`.

    Threads that wait at a queue are not reached.
    """
    me = threading.get_ident()
    with _lock:
        if not _followers:
            _patch()
        _followers[me] = enter
    try:
        yield
    finally:
        with _lock:
            del _followers[me]
            if not _followers:
                for owner, name, original in reversed(_originals):
                    if original is None:
                        delattr(owner, name)
                    else:
                        setattr(owner, name, original)
                _originals.clear()


def _under(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it must run in another thread."""
    enter = _followers.get(threading.get_ident())
    if enter is None:
        return function

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with enter():
            return function(*args, **kwargs)

    return run


def _patch() -> None:
    start, submit, start_new = (
        threading.Thread.start,
        concurrent.futures.ThreadPoolExecutor.submit,
        _thread.start_new_thread,
    )

    def start_followed(self: threading.Thread) -> None:
        # the workers of an executor are reached by what is submitted to them
        worker = getattr(self, "_target", None) is concurrent.futures.thread._worker
        if threading.get_ident() in _followers and not worker:
            self.run = _once(self, _under(self.run))  # type: ignore[method-assign]
        start(self)

    def submit_followed(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return submit(self, _under(fn), *args, **kwargs)

    def start_new_followed(function: Any, *args: Any) -> int:
        return start_new(_under(function), *args)

    _set(threading.Thread, "start", start_followed)
    _set(concurrent.futures.ThreadPoolExecutor, "submit", submit_followed)
    _set(_thread, "start_new_thread", start_new_followed)
    pools = sys.modules.get("multiprocessing.pool")
    for name in ("apply_async", "_map_async", "imap", "imap_unordered") if pools else ():
        _set(pools.ThreadPool, name, _given(getattr(pools.ThreadPool, name)))  # type: ignore[union-attr]


def _set(owner: Any, name: str, value: Any) -> None:
    _originals.append((owner, name, vars(owner).get(name)))
    setattr(owner, name, value)


def _given(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, _under(func), *args, **kwargs)

    return call


def _once(thread: threading.Thread, run: Callable[[], Any]) -> Callable[[], Any]:
    """The `run` of a thread, which is its own again afterwards."""
    before = vars(thread).get("run")

    def once() -> None:
        try:
            run()
        finally:
            vars(thread).pop("run", None)
            if before is not None:
                vars(thread)["run"] = before

    return once
