"""A step that happens whole or not at all, whatever ends it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from ..state.state import State


class Kept(Protocol):
    """What a journal asks of an engine."""

    _state: State
    _journal: Any
    _captured: bool

    def keep(self) -> None:
        """Keep the state as it is, for `restore`."""

    def restore(self) -> None:
        """Take back what was done since the state was kept."""

    def reinit(self, numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Re-initialise everything that belongs to the chosen units."""

    def reinit_again(self, numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Re-initialise what was interrupted somewhere in `reinit`."""

    def finish(self) -> None:
        """Forget what is held."""


_Engine = TypeVar("_Engine", bound=Kept)


class Journal(Generic[_Engine]):
    """How far a step has come, or the adding of forwards to the sums: what is cut short is taken back or finished.

    Until all that is to be written is known, and is known to be writable, the engines can be put back to what they
    were before. From then on it goes forward only: what was chosen is in the state, so that writing it again writes
    the same. Each mark is one assignment, after what it stands for, so that any exception finds one of the two. The
    engines are settled before the exception goes on; if that is cut short as well, by the next use of one of them.
    """

    def __init__(self, engines: Sequence[_Engine]) -> None:
        self._engines = engines
        self._kept: list[_Engine] = []
        self._due: Mapping[_Engine, tuple[list[int], list[Tensor]]] | None = None
        self._captured = False
        self._done = False
        self._thread = threading.get_ident()
        self._is_cut = False

    def keep(self, engine: _Engine) -> None:
        """Before an engine's state is changed."""
        engine._journal = self
        engine.keep()
        self._kept.append(engine)

    def finish(self, due: Mapping[_Engine, tuple[list[int], list[Tensor]]], captured: bool = False) -> None:
        """Write everything that is due, and forget what is held.

        Args:
            captured: whether the sums have something that no process has added up.
        """
        if self._done:
            # a signal's handler looked at the state meanwhile and found it as it was before
            for engine in self._kept:
                engine.restore()
            return
        for engine in due:
            engine._state.redo = {}
        self._captured = captured
        self._due = due
        for engine, what in due.items():
            engine.reinit(*what)
        self._end()

    def settle(self) -> None:
        """Take back or finish what was cut short."""
        if self._thread != threading.get_ident() and not self._is_cut:
            # another thread is at it
            return
        self._is_cut = True
        if self._done:
            pass
        elif self._due is None:
            for engine in self._kept:
                engine.restore()
        else:
            for engine, what in self._due.items():
                engine.reinit_again(*what)
        self._end()

    def _end(self) -> None:
        for engine in self._engines if self._due is not None and not self._done else ():
            engine.finish()
            engine._captured = self._captured
        self._done = True
        for engine in self._engines:
            engine._state.redo = None
            if engine._journal is self:
                engine._journal = None
