"""One step of one state: what is chosen, what belongs to it, and what is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends import cpp
from ..backends.registry import backend_for
from ..state.layout import TensorRef
from ..state.regions import TRANSFER
from ..tensors.parts import local
from .checkpoint import carry_over, checked_state, load, saved
from .checks import check_entry, check_memory, checked
from .journal import Journal
from .known import Known
from .observer import Observer
from .optimizer_state import entries_of


class Engine(Observer):
    """Performs the steps of its groups; used by the attached object and the layers.

    A step is whole or nothing, whatever ends it: see `Journal`.
    """

    def use(self, backend: str) -> None:
        """Take the functions of a backend, which has to serve the rule and the device."""
        super().use(backend)
        self._known: Known | None = None

    def select(self) -> int:
        """Average utilities, age units and choose; returns how many were chosen, -1 if only the device knows.

        To be taken back, the state must have been kept.

        Raises:
            RuntimeError: a tensor is not what it was at attach.
        """
        if self.processes is not None:
            self.await_sums()
            return self._attempt(self._functions.choose_, not self._state.splits_sums)
        slots, held = self._intact()
        return self._attempt(self._functions.select_, True, held, slots)

    def add_up(self) -> None:
        """Let the processes add up what they saw, if they are several and do not so already."""
        if self.processes is not None and not self.begun:
            self.await_sums()
            self._add_up(self._state.splits_sums)

    def begin(self) -> None:
        """Let the processes add up what they saw, while the optimizer works; no weight may be needed for that."""
        self.await_sums()
        self._add_up(with_weights=False)

    @property
    def begun(self) -> bool:
        """Whether the processes are adding up all that this one saw."""
        return self._sums is not None and not self._forwards and not self._captured

    def _add_up(self, with_weights: bool) -> None:
        assert self.processes is not None
        slots, held = self._intact()
        journal = Journal([self])
        try:
            journal.keep(self)
            self._attempt(self._functions.sum_, with_weights, held, slots)
            # they are in the state now
            journal.finish({})
        except BaseException:
            journal.settle()
            raise
        self._sums = self.processes.reduce_(self._state.flat[: self._state.reduced])

    def _attempt(self, function: Callable[..., Any], with_weights: bool, *forwards: Any) -> Any:
        """What a function of the backend returns; what it cannot read is left out, or named.

        Args:
            forwards: the held activations and their slots, if the function takes them.
        """
        if self._backend == "reference" and with_weights:
            self.check_tensors()
        weights: list[Tensor] = []
        try:
            weights = self._weights() if with_weights else []
            return function(self._state, weights, *forwards)
        except Exception:
            self.restore()
            try:
                self.check_tensors()
                check_memory(list(weights), [ref.name for ref in self._state.weights], self.layer)
            except RuntimeError as named:
                raise named from None
            whys = [self._why_unreadable(slot, h) for h, slot in zip(*forwards, strict=True)]
            if not any(whys):
                raise
            held, slots = forwards
            self._leave_out([(slot, why) for slot, why in zip(slots, whys, strict=True) if why])
            good = [why is None for why in whys]
            return function(self._state, weights, list(compress(held, good)), list(compress(slots, good)))

    def _weights(self) -> list[Tensor]:
        """The weights that the rule reads, or this process's parts."""
        weights: list[Any] = list(map(getitem, self._state.owners, self._state.keys))
        return [local(w) for w in weights] if self._state.in_parts else weights

    def collect(self, optimizers: Sequence[Optimizer]) -> tuple[list[int], list[Tensor]]:
        """Regions of the chosen units and their tensors, with their entries in the optimizers' state.

        Raises:
            RuntimeError: one of them is not what it was at attach, or cannot be reset.
        """
        if not self.chooses_alone:
            return self._collected(optimizers)
        if self._known is None or not self._known.still(optimizers):
            self.check_tensors()
            numbers, tensors = self._collected(optimizers)
            self._known = None if self._state.in_parts else Known(self._state, optimizers, numbers, tensors)
            return numbers, tensors
        return self._known.numbers, self._known.tensors

    def _collected(self, optimizers: Sequence[Optimizer]) -> tuple[list[int], list[Tensor]]:
        state = self._state
        reset = state.rule.arithmetic.resets_optimizer
        chosen = [1] * len(state.layouts) if self.chooses_alone else state.num_chosen.tolist()
        numbers: list[int] = []
        tensors: list[Tensor] = []
        names: list[str] = []
        for count, regions in zip(chosen, state.regions_of_group, strict=True):
            for number in regions if count else ():
                region = state.regions[number]
                tensor = self._checked(region.ref)
                numbers.append(2 * number)
                tensors.append(tensor)
                names.append(region.ref.name)
                if region.kind == TRANSFER:
                    assert region.weight is not None
                    tensors.append(self._checked(region.weight))
                    names.append(region.weight.name)
                elif reset and region.ref.is_parameter:
                    for key, entry in entries_of(optimizers, tensor):
                        check_entry(key, region.ref.name, tensor, entry)
                        numbers.append(2 * number + 1)
                        tensors.append(entry)
                        names.append(f"{key} of '{region.ref.name}'")
        parts = [local(tensor) for tensor in tensors] if self._state.in_parts else tensors
        check_memory(parts, names, self.layer)
        if self._backend == "cpp":
            cpp.check_reinit(state, numbers, parts)
        return numbers, tensors

    def reinit(self, numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Re-initialise everything that belongs to the chosen units."""
        parts = [local(tensor) for tensor in tensors] if self._state.in_parts else tensors
        self._functions.reinit_(self._state, numbers, parts)
        # neither a compiled kernel nor a library implementation tells autograd that it wrote
        torch.autograd.graph.increment_version(tensors)

    def reinit_again(self, numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Re-initialise what was interrupted somewhere in `reinit`."""
        # the compiled function does it in one call, at whose end no chosen unit has an age
        if self._backend != "cpp" or self._has_chosen():
            self.reinit(numbers, tensors)
        else:
            torch.autograd.graph.increment_version(tensors)

    def _has_chosen(self) -> bool:
        """Whether a unit was chosen that is not re-initialised yet."""
        state = self._state
        chosen = (
            state.age[layout.units][state.chosen[layout.units][:n].long()]
            for layout, n in zip(state.layouts, state.num_chosen.tolist(), strict=True)
        )
        return any(bool(ages.any()) for ages in chosen)

    def check_tensors(self) -> None:
        """Raises RuntimeError for a tensor that is not what it was at attach."""
        for region in self._state.regions:
            self._checked(region.ref)
        for ref in self._state.weights:
            self._checked(ref)

    def _checked(self, ref: TensorRef) -> Tensor:
        return checked(ref, self._state.buffer.device, self.layer)

    def to(self, device: torch.device) -> None:
        """Follow the model to another device. Forwards since the last step are forgotten."""
        backend = backend_for(device, self._wanted, self.state.rule, self._split)
        self._state.to(device)
        self._device = self._state.buffer.device
        self.use(backend)
        self.forget_forwards()
        self._prepare()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as copies, by group name."""
        return saved(self.state, self._hyper)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; see `ContinualBackprop.load_state_dict`."""
        theirs = checked_state(state_dict, self.state_dict())
        self.await_sums()
        load(self._state, theirs)
        self.set_hyper(**{key: theirs[key] for key in self._hyper})
        self.finish()

    def adopt(self, other: Engine) -> None:
        """Go on where another engine of the model and rule is: groups of the same name and width keep their state."""
        carry_over(other.state, self.state)
