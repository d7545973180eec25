"""What a step works on, as it was last checked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, compress
from operator import attrgetter, is_
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..state.state import State
from ..tensors.native import describe
from .optimizer_state import state_of

_is_trained = attrgetter("requires_grad")


class Known:
    """What a step works on, as it was last checked; as long as nothing of it has changed, it is not checked again."""

    def __init__(
        self, state: State, optimizers: Sequence[Optimizer], numbers: list[int], tensors: list[Tensor]
    ) -> None:
        self.numbers, self.tensors = numbers, tensors
        every = [*state.weights, *(r.ref for r in state.regions), *(r.weight for r in state.regions if r.weight)]
        refs = list({(id(ref.owner), ref.key): ref for ref in every}.values())
        self._owners, self._keys = [ref.owner for ref in refs], [ref.key for ref in refs]
        self._mine = [ref.get() for ref in refs]
        self._parameters = [tensor for ref, tensor in zip(refs, self._mine, strict=True) if ref.is_parameter]
        self._optimizers = list(optimizers)
        # the parameters that have state, and what holds it; then what those of the groups hold
        self._entries = _everything_of(optimizers)
        ids = set(map(id, self._parameters))
        pairs = ((p, kept) for o in optimizers for p, kept in state_of(o).items() if id(p) in ids)
        self._kept = [kept for _, kept in pairs]
        # a mapping of another kind may make its values anew
        self._plain = all(type(kept) is dict for kept in self._kept)
        values = self._values() if self._plain else []
        self._types = list(map(type, values))
        self._are_tensors = [isinstance(value, Tensor) for value in values]
        self._kept_tensors = list(compress(values, self._are_tensors))
        known = set(map(id, self._mine))
        self._watched: list[Any] = [*self._mine, *(t for t in tensors if id(t) not in known)]
        self._layout, _ = describe(self._watched)

    def _values(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._kept)))

    def still(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether every tensor is the one that it was, with the memory layout, type and device that it had."""
        if not self._plain or not _same(optimizers, self._optimizers):
            return False
        values = self._values()
        return (
            _same(list(map(dict.get, self._owners, self._keys)), self._mine)
            and _same(_everything_of(optimizers), self._entries)
            and list(map(type, values)) == self._types
            and _same(list(compress(values, self._are_tensors)), self._kept_tensors)
            and all(map(_is_trained, self._parameters))
            and describe(self._watched)[0] == self._layout
        )


def _everything_of(optimizers: Sequence[Optimizer]) -> list[Any]:
    """All keys and values of the optimizers' states."""
    states = list(map(state_of, optimizers))
    return [*chain.from_iterable(states), *chain.from_iterable(s.values() for s in states)]


def _same(mine: Sequence[object], theirs: Sequence[object]) -> bool:
    """Whether two lists hold the same objects; tensors compare by their values."""
    return len(mine) == len(theirs) and all(map(is_, mine, theirs))
