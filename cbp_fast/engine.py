"""One state and its backend: what forwards leave behind, and a step that happens whole or not at all."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import chain, compress
from operator import attrgetter, getitem, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling
from torch.optim import Optimizer

from . import cpp
from .distributed import Processes
from .dtensors import is_dtensor, local, local_activations
from .ops import backend_for, functions_of, prepare_triton, why_not_triton
from .optimizer_state import slots_of, state_of
from .rules import Rule
from .state import DTYPES, TRANSFER, State, TensorRef
from .unit_groups import ResolvedGroup

# what "auto" may hold of activations beyond their backward pass; what comes after is summed at once
_HELD_BYTES = {"auto": 4 * 2**20, "deferred": 2**62, "inline": -1}


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


_version_of = attrgetter("_version")
_is_trained = attrgetter("requires_grad")


class Engine:
    """Collects activations of the groups' readers and performs their steps; used by the attached object and layers.

    Args:
        capture: "deferred" holds activations until the step, which then reads everything in one pass; "inline" sums
            them in the forward; "auto" defers while little is held.
        processes: those that train the model together, if they are several.
        layer: the layer that it works for, for messages; empty for an attached object.
    """

    _held_bytes: int

    def __init__(
        self,
        rule: Rule,
        groups: Sequence[ResolvedGroup],
        *,
        replacement_rate: float,
        maturity_threshold: float,
        decay_rate: float,
        backend: str | None,
        capture: str,
        seed: int | None,
        processes: Processes | None = None,
        layer: str = "",
    ) -> None:
        check_options(capture, seed)
        seed = torch.initial_seed() if seed is None else seed
        device = self._device = _one_device(groups)
        self._wanted = backend
        self.layer = layer
        self.capture = capture
        self.enabled = True
        self._room = _HELD_BYTES[capture]
        self._split = processes is not None and processes.split
        self.use(backend_for(device, backend, rule, self._split))
        self.groups = list(groups)
        self.processes = processes
        # of all processes, under way
        self._sums: Any = None
        self.state = State(rule, groups, seed=seed & (2**64 - 1), device=device, processes=processes)
        if processes is not None and self.state.deviations:
            # copies of the model may only be made equal after this
            self.state.deviations = processes.of_first(self.state.deviations)
        self._hyper = {"replacement_rate": 0.0, "maturity_threshold": 0.0, "decay_rate": 0.0}
        self.set_hyper(replacement_rate=replacement_rate, maturity_threshold=maturity_threshold, decay_rate=decay_rate)
        self._owners = [ref.owner for ref in self.state.weights]
        self._keys = [ref.key for ref in self.state.weights]
        self._in_parts = any(ref.place.is_dtensor for ref in self.state.weights) or any(
            region.ref.place.is_dtensor for region in self.state.regions
        )
        self._regions: list[list[int]] = [[] for _ in groups]
        for i, region in enumerate(self.state.regions):
            self._regions[region.group].append(i)
        # a slot whose activations were once changed in place after the forward is summed inline from then on
        self._inline = [False] * len(self.state.slots)
        self.forget_forwards()
        self._prepare()

    def _prepare(self) -> None:
        """Let the backend compile what it will run, where that takes long."""
        if self._backend == "triton":
            prepare_triton(self.state, self.capture != "deferred")

    def use(self, backend: str) -> None:
        """Take the functions of a backend, which has to serve the rule and the device."""
        self._backend = backend
        self._functions = functions_of(backend)
        self._nbytes = cpp.nbytes if backend == "cpp" else partial(_nbytes, self._device)
        # nothing is read back from a device: all is checked, and gathered, before anything runs there
        self.chooses_alone = backend == "triton" or self._device.type != "cpu"
        self._known: _Known | None = None

    @property
    def backend(self) -> str:
        """The backend in use."""
        return self._backend

    @property
    def hyper(self) -> dict[str, float]:
        """replacement_rate, maturity_threshold and decay_rate."""
        return dict(self._hyper)

    def set_hyper(self, **values: float) -> None:
        """Set replacement_rate, maturity_threshold or decay_rate; all are checked before any is set."""
        check_hyper(values)
        self._hyper.update(values)
        self.state.set_hyper(**self._hyper)

    @property
    def why_not_triton(self) -> str | None:
        """On a GPU, why the reference runs that nobody asked for."""
        device = self.state.buffer.device
        if device.type == "cpu" or self._wanted is not None or self.backend == "triton":
            return None
        return why_not_triton(self.state.rule, device, self._split)

    @property
    def has_data(self) -> bool:
        """Whether a forward was observed since the last step."""
        return bool(self._held) or bool(self.state.count.any())

    @property
    def held_bytes(self) -> int:
        """Activations held until the next step."""
        return self._held_bytes

    def forget_forwards(self) -> None:
        """Drop what forwards since the last step have left."""
        self.await_sums()
        self.finish()
        self.state.forget_forwards()

    def record(self, slot: int, h: Tensor) -> None:
        """Take the activations that one reading layer saw in one forward."""
        if type(h) is not Tensor and is_dtensor(h):
            h = local_activations(h, h.dim() - 1 - self.state.slots[slot].spatial)
        if not self.enabled:
            return
        # a compiled forward keeps the operator in its graph, but would be compiled anew for every length of a list
        if is_compiling():
            if h.device == self._device:
                self._functions.capture_(self.state, slot, h.detach())
                self._captured = True
            return
        nbytes = self._nbytes(h)
        # what is on another device may belong to a model that is being moved; what torch.func's transforms run on is no
        # batch, and does not outlive them
        if _here.unobserved or (nbytes < 0 and (type(h) is Tensor or h.device != self._device)):
            return
        h = h.detach()
        held = self._held_bytes + nbytes
        # the kernels do not see whether a tensor is the negative of its memory, or only stands for others
        if held > self._room or nbytes < 0 or self._inline[slot] or h.is_neg():
            # in the order of the forwards, on which a running mean depends
            for earlier_slot, earlier in zip(*self._take_held(), strict=True):
                self._functions.capture_(self.state, earlier_slot, earlier)
            self._functions.capture_(self.state, slot, h.resolve_neg())
            self._captured = True
        else:
            self._held_bytes = held
            self._held.append(h)
            self._slots.append(slot)
            self._versions.append(h._version)
            if self._device.type == "cuda":
                self._streams.add(stream_of(self._device))

    def select(self) -> int:
        """Average utilities, age units and choose; returns how many were chosen, -1 if only the device knows.

        Raises:
            RuntimeError: a tensor is not what it was at attach. Nothing has changed then.
        """
        if self.processes is not None:
            return self._select_together()
        slots, held = self._intact()
        return self._whole(self._functions.select_, True, held, slots)

    def _join_streams(self) -> None:
        """Activations stay until this stream has read them, whichever stream they were made on."""
        here = stream_of(self._device)
        if self._streams == {here}:
            return
        if not here.capturing and any(stream.capturing for stream in self._streams):
            raise RuntimeError(
                "a forward was captured in a CUDA graph, and the step of continual backprop was not: replays of the "
                "graph would not be observed. Attach with capture='inline', or capture the whole training step"
            )
        for h in self._held:
            h.record_stream(torch.cuda.current_stream(self._device))

    def _select_together(self) -> int:
        splits = self.state.splits_sums
        if not self.begun:
            self.await_sums()
            self._add_up(splits)
        self.await_sums()
        return self._whole(self._functions.choose_, not splits)

    def begin(self) -> None:
        """Let the processes add up what they saw, while the optimizer works; no weight may be needed for that."""
        self.await_sums()
        self._add_up(with_weights=False)

    @property
    def begun(self) -> bool:
        """Whether the processes are adding up all that this one saw."""
        return self._sums is not None and not self._held and not self._captured

    def await_sums(self) -> None:
        """Wait for what the processes are adding up, if they are; it is forgotten unless a step uses it at once."""
        sums, self._sums = self._sums, None
        if sums is not None:
            sums.wait()

    def _add_up(self, with_weights: bool) -> None:
        assert self.processes is not None
        slots, held = self._intact()
        self._whole(self._functions.sum_, with_weights, held, slots)
        # they are in the state now
        self.finish()
        self._sums = self.processes.reduce_(self.state.flat[: self.state.reduced])

    def _whole(self, function: Callable[..., Any], with_weights: bool, *args: object) -> Any:
        """What a function of the backend returns; if it raises, the state is as before, and a tensor is named."""
        if self._backend == "triton":
            # all was checked in `collect`, and what is launched is not held up by this process
            return function(self.state, self._weights() if with_weights else [], *args)
        # the compiled functions check everything before they write, and keep the copy themselves
        keeps = self._backend == "cpp"
        if not keeps:
            if with_weights:
                self.check_tensors()
            self.keep()
        try:
            return function(self.state, self._weights() if with_weights else [], *args)
        except BaseException as error:
            if not keeps:
                self.restore()
            if isinstance(error, Exception):
                try:
                    self.check_tensors()
                except RuntimeError as named:
                    raise named from None
            raise

    def _weights(self) -> list[Tensor]:
        """The weights that the rule reads, or this process's parts."""
        weights: list[Any] = list(map(getitem, self._owners, self._keys))
        return [local(w) for w in weights] if self._in_parts else weights

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
            self._known = None if self._in_parts else _Known(self.state, optimizers, numbers, tensors)
            return numbers, tensors
        return self._known.numbers, self._known.tensors

    def _collected(self, optimizers: Sequence[Optimizer]) -> tuple[list[int], list[Tensor]]:
        state = self.state
        reset = state.rule.reset_optimizer and state.rule.name != "clarena"
        chosen = [1] * len(state.layouts) if self.chooses_alone else state.num_chosen.tolist()
        numbers: list[int] = []
        tensors: list[Tensor] = []
        for count, regions in zip(chosen, self._regions, strict=True):
            for number in regions if count else ():
                region = state.regions[number]
                tensor = self._checked(region.ref)
                numbers.append(2 * number)
                tensors.append(tensor)
                if region.kind == TRANSFER:
                    assert region.weight is not None
                    tensors.append(self._checked(region.weight))
                elif reset and region.ref.is_parameter:
                    slots = slots_of(optimizers, tensor)
                    _check_slots(region.ref.name, tensor, slots)
                    numbers += [2 * number + 1] * len(slots)
                    tensors += slots
        return numbers, tensors

    def reinit(self, numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Re-initialise everything that belongs to the chosen units."""
        parts = [local(tensor) for tensor in tensors] if self._in_parts else tensors
        self._functions.reinit_(self.state, numbers, parts)
        # neither a compiled kernel nor a library implementation tells autograd that it wrote
        torch.autograd.graph.increment_version(tensors)

    def finish(self) -> None:
        """End a step: what the forwards left has been used."""
        self._held: list[Tensor] = []
        self._slots: list[int] = []
        self._versions: list[int] = []
        self._held_bytes = 0
        # on which they were seen
        self._streams: set[_Stream] = set()
        # whether forwards are in the state that are in no sums of the processes
        self._captured = False

    def _intact(self) -> tuple[list[int], list[Tensor]]:
        """Slots and activations held, to be read on this stream, less those that were changed in place since."""
        if self._streams:
            self._join_streams()
        if list(map(_version_of, self._held)) == self._versions:
            return self._slots, self._held
        fresh = [h._version == v for h, v in zip(self._held, self._versions, strict=True)]
        for slot, same in zip(self._slots, fresh, strict=True):
            self._inline[slot] |= not same
        return list(compress(self._slots, fresh)), list(compress(self._held, fresh))

    def _take_held(self) -> tuple[list[int], list[Tensor]]:
        taken = self._intact()
        self.finish()
        return taken

    def keep(self) -> None:
        """Keep the state as it is, for `restore`."""
        self.state.backup.copy_(self.state.buffer)

    def restore(self) -> None:
        """Take back what was done since the state was kept, as the last `select` does where it can be taken back."""
        self.state.buffer.copy_(self.state.backup)

    def to(self, device: torch.device) -> None:
        """Follow the model to another device. Forwards since the last step are forgotten."""
        backend = backend_for(device, self._wanted, self.state.rule, self._split)
        self.state.to(device)
        self._device = self.state.buffer.device
        self.use(backend)
        self.forget_forwards()
        self._prepare()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as copies, by group name."""
        state = self.state
        groups: dict[str, dict[str, Any]] = {}
        for g, layout in enumerate(state.layouts):
            groups[layout.name] = {
                "utility": state.utility[layout.units].clone(),
                "age": state.age[layout.units].clone(),
                "pending": float(state.pending[g]),
                "num_replaced": int(state.num_replaced[g]),
            }
            if state.rule.keeps_mean:
                groups[layout.name]["running_mean"] = state.running_mean[state.columns_of(layout)].clone()
        rule = {f.name: getattr(state.rule, f.name) for f in fields(state.rule) if f.init}
        numbers = {"seed": int(state.seed), "step": int(state.step)}
        measured = {"deviations": state.deviations} if state.deviations else {}
        return {"rule": rule, **self._hyper, **numbers, **measured, "groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; see `ContinualBackprop.load_state_dict`."""
        state, own = self.state, self.state_dict()
        _check_keys("state_dict", state_dict, own)
        if state_dict["rule"] != own["rule"]:
            theirs = state_dict["rule"] if isinstance(state_dict["rule"], Mapping) else {}
            differ = [
                f"{key}={theirs.get(key)!r}, not {mine!r}"
                for key, mine in own["rule"].items()
                if theirs.get(key) != mine
            ]
            raise ValueError(f"state_dict was saved with another rule: {'; '.join(differ) or state_dict['rule']!r}")
        _check_keys("state_dict['groups'] (another network?)", state_dict["groups"], own["groups"])
        for name, mine in own["groups"].items():
            theirs = state_dict["groups"][name]
            _check_keys(f"state_dict of group '{name}'", theirs, mine)
            for key, value in mine.items():
                _check_entry(f"{key} of group '{name}'", theirs[key], value)
        for key in ("seed", "step"):
            _check_entry(key, state_dict[key], own[key])
        if state.deviations:
            _check_keys("state_dict['deviations']", state_dict["deviations"], state.deviations)
            for name, mine in state.deviations.items():
                _check_entry(f"deviation of {name}", state_dict["deviations"][name], mine)
        # the last call that can fail checks before it sets
        self.set_hyper(**{key: state_dict[key] for key in self._hyper})
        for g, layout in enumerate(state.layouts):
            theirs = state_dict["groups"][layout.name]
            state.utility[layout.units].copy_(theirs["utility"])
            state.age[layout.units].copy_(theirs["age"])
            state.pending[g] = theirs["pending"]
            state.num_replaced[g] = theirs["num_replaced"]
            if state.rule.keeps_mean:
                state.running_mean[state.columns_of(layout)].copy_(theirs["running_mean"])
        if state.deviations:
            state.deviations = state_dict["deviations"]
        state.seed.fill_(state_dict["seed"])
        state.step.fill_(state_dict["step"])
        state.num_chosen.zero_()
        self.forget_forwards()

    def adopt(self, other: Engine) -> None:
        """Go on where another engine of the model and rule is: groups of the same name and width keep their state."""
        state, theirs = self.state, other.state
        before = {layout.name: (g, layout) for g, layout in enumerate(theirs.layouts)}
        for g, layout in enumerate(state.layouts):
            number, old = before.get(layout.name, (0, None))
            if old is None or old.num_units != layout.num_units:
                continue
            state.utility[layout.units].copy_(theirs.utility[old.units])
            state.age[layout.units].copy_(theirs.age[old.units])
            state.pending[g].copy_(theirs.pending[number])
            state.num_replaced[g].copy_(theirs.num_replaced[number])
            readers = {theirs.slots[s].module: theirs.slots[s] for s in old.slots}
            for slot in (state.slots[s] for s in layout.slots if state.rule.keeps_mean):
                same = readers.get(slot.module)
                if same is not None and same.block == slot.block:
                    state.running_mean[slot.columns].copy_(theirs.running_mean[same.columns])
        if state.deviations:
            state.deviations = theirs.deviations
        state.seed.copy_(theirs.seed)
        state.step.copy_(theirs.step)

    def check_tensors(self) -> None:
        """Raises RuntimeError for a tensor that is not what it was at attach."""
        for region in self.state.regions:
            self._checked(region.ref)
        for ref in self.state.weights:
            self._checked(ref)

    def _checked(self, ref: TensorRef) -> Tensor:
        tensor, of = ref.get(), f"{self.layer}: " if self.layer else ""
        again = "make the layer anew" if self.layer else "call refresh()"
        if tensor is None:
            raise RuntimeError(f"{of}{ref.name} is no longer there; {again}")
        if tensor.device != self.state.buffer.device:
            move = "model.to" if self.layer else "cbp.to"
            raise RuntimeError(
                f"{of}{ref.name} is on {tensor.device} but continual backprop's state is on "
                f"{self.state.buffer.device}; call {move}({str(tensor.device)!r}) after moving the model"
            )
        if is_dtensor(tensor) != ref.place.is_dtensor:
            raise RuntimeError(
                f"{ref.name} became a {type(tensor).__name__} after continual backprop was attached; first fully_shard "
                "or parallelize_module the model, then make the optimizer, then attach"
            )
        if ref.is_parameter and not tensor.requires_grad:
            raise RuntimeError(
                f"{of}{ref.name} was frozen (requires_grad is False) after continual backprop was attached; "
                + ("take the layer out" if self.layer else "call refresh(), or exclude= its group")
            )
        for what, now, then in (("shape", tensor.shape, ref.shape), ("dtype", tensor.dtype, ref.dtype)):
            if now != then:
                raise RuntimeError(
                    f"{of}{ref.name} has {what} {_plain(now)} but had {_plain(then)} when continual backprop was "
                    f"attached; {again}"
                )
        return tensor


class Rates:
    """The rates of an engine, checked when they are set."""

    _engine: Engine

    @property
    def replacement_rate(self) -> float:
        """Share of the mature units replaced each step; may be set between steps."""
        return self._engine.hyper["replacement_rate"]

    @replacement_rate.setter
    def replacement_rate(self, value: float) -> None:
        self._engine.set_hyper(replacement_rate=value)

    @property
    def maturity_threshold(self) -> float:
        """Steps for which a new unit is protected; may be set between steps."""
        return self._engine.hyper["maturity_threshold"]

    @maturity_threshold.setter
    def maturity_threshold(self, value: float) -> None:
        self._engine.set_hyper(maturity_threshold=value)

    @property
    def decay_rate(self) -> float:
        """Decay of the running utility a step; may be set between steps."""
        return self._engine.hyper["decay_rate"]

    @decay_rate.setter
    def decay_rate(self, value: float) -> None:
        self._engine.set_hyper(decay_rate=value)


def check_options(capture: str, seed: int | None) -> None:
    """Raises ValueError for a capture or a seed that is none."""
    if capture not in _HELD_BYTES:
        raise ValueError(f"capture is {capture!r}, must be one of {', '.join(_HELD_BYTES)}")
    if seed is not None and (not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
        raise ValueError(f"seed is {seed!r}, must be an integer of 64 bits")


def check_hyper(values: Mapping[str, float]) -> None:
    """Raises TypeError or ValueError for a replacement_rate, maturity_threshold or decay_rate that is none."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is {value!r}, must be a number")
        if name == "maturity_threshold":
            if not 0 <= value < float("inf"):
                raise ValueError(f"maturity_threshold is {value!r}, must be a number of steps, at least 0")
        elif not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}, must lie in [0, 1]")
        if name == "decay_rate" and value == 1:
            raise ValueError("decay_rate is 1, which would never let a utility change; must be below 1")


def step_together(engines: Sequence[Engine], optimizers: Sequence[Optimizer]) -> None:
    """One step of several engines: all choose, then what they chose is re-initialised in order; all of it or nothing.

    Raises:
        RuntimeError: a tensor is not what it was at attach, or cannot be reset. Nothing has changed then.
    """
    if is_compiling():
        # a step belongs into no graph
        return torch.compiler.disable(step_together)(engines, optimizers)
    # what can be wrong is found before the first weight is written, and before anything that cannot be taken back
    due = {engine: engine.collect(optimizers) for engine in engines if engine.chooses_alone}
    selected: list[Engine] = []
    try:
        for engine in engines:
            if engine.chooses_alone and len(engines) > 1:
                engine.keep()
            n = engine.select()
            selected.append(engine)
            if not n:
                due.pop(engine, None)
            elif engine not in due:
                due[engine] = [], []
        for engine in due:
            if not engine.chooses_alone:
                due[engine] = engine.collect(optimizers)
    except BaseException:
        for engine in selected:
            engine.restore()
        raise
    for engine in engines:
        if engine in due:
            engine.reinit(*due[engine])
    for engine in engines:
        engine.finish()


class _Stream(NamedTuple):
    """A CUDA stream, and whether a graph of what it does is captured."""

    stream: int
    capturing: bool


def stream_of(device: torch.device) -> _Stream:
    """The current stream of a CUDA device."""
    with torch.cuda.device(device) if torch.cuda.current_device() != device.index else contextlib.nullcontext():
        return _Stream(torch._C._cuda_getCurrentRawStream(device.index), torch.cuda.is_current_stream_capturing())


class _Known:
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
        self._entries = _entries_of(optimizers)
        ids = set(map(id, self._parameters))
        pairs = ((p, kept) for o in optimizers for p, kept in state_of(o).items() if id(p) in ids)
        self._kept = [kept for _, kept in pairs]
        # a mapping of another kind may make its values anew
        self._plain = all(type(kept) is dict for kept in self._kept)
        values = self._values() if self._plain else []
        self._types = list(map(type, values))
        self._are_tensors = [isinstance(value, Tensor) for value in values]
        self._slots = list(compress(values, self._are_tensors))
        known = set(map(id, self._mine))
        self._watched: list[Any] = [*self._mine, *(t for t in tensors if id(t) not in known)]
        self._layout, _ = cpp.describe(self._watched)

    def _values(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._kept)))

    def still(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether every tensor is the one that it was, with the memory layout, type and device that it had."""
        if not self._plain or not _same(optimizers, self._optimizers):
            return False
        values = self._values()
        return (
            _same(list(map(dict.get, self._owners, self._keys)), self._mine)
            and _same(_entries_of(optimizers), self._entries)
            and list(map(type, values)) == self._types
            and _same(list(compress(values, self._are_tensors)), self._slots)
            and all(map(_is_trained, self._parameters))
            and cpp.describe(self._watched)[0] == self._layout
        )


def _entries_of(optimizers: Sequence[Optimizer]) -> list[Any]:
    """All keys and values of the optimizers' states."""
    states = list(map(state_of, optimizers))
    return [*chain.from_iterable(states), *chain.from_iterable(s.values() for s in states)]


def _same(mine: Sequence[object], theirs: Sequence[object]) -> bool:
    """Whether two lists hold the same objects; tensors compare by their values."""
    return len(mine) == len(theirs) and all(map(is_, mine, theirs))


def _nbytes(device: torch.device, h: Tensor) -> int:
    return -1 if h.device != device or is_functorch_wrapped_tensor(h) else h.nbytes


def _check_slots(name: str, parameter: Tensor, slots: Sequence[Tensor]) -> None:
    for slot in slots:
        if slot.device != parameter.device or slot.layout != torch.strided or slot.dtype not in DTYPES:
            raise RuntimeError(
                f"the optimizer keeps state of {name} as a {slot.layout} tensor of {slot.dtype} on {slot.device}; to "
                f"be reset it must be dense, of 16 to 64 bits and on {parameter.device}"
            )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def _one_device(groups: Sequence[ResolvedGroup]) -> torch.device:
    names: dict[torch.device, str] = {}
    for group in groups:
        for name, module, _ in (*group.incoming, *group.outgoing, *group.norms):
            for tensor in module.parameters(recurse=False):
                names.setdefault(tensor.device, name)
    if len(names) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in names.items())
        raise ValueError(f"the groups lie on several devices ({places}); attach one object to each part of the model")
    device = next(iter(names))
    # of weights that are still to come the state is there already
    return torch.device("cpu") if device.type == "meta" else device


def _check_keys(what: str, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    if not isinstance(theirs, Mapping):
        raise ValueError(f"{what} is a {type(theirs).__name__}, must be a mapping")
    missing, unexpected = sorted(mine.keys() - theirs.keys()), sorted(map(str, theirs.keys() - mine.keys()))
    if missing or unexpected:
        raise ValueError(f"{what}: missing {missing or 'nothing'}, unexpected {unexpected or 'nothing'}")


def _check_entry(what: str, theirs: Any, mine: Any) -> None:
    if isinstance(mine, Tensor):
        if not isinstance(theirs, Tensor) or theirs.shape != mine.shape or theirs.dtype != mine.dtype:
            got = f"{tuple(theirs.shape)} {theirs.dtype}" if isinstance(theirs, Tensor) else type(theirs).__name__
            raise ValueError(f"state_dict: {what} is {got}, must be {tuple(mine.shape)} {mine.dtype}")
        if not theirs.isfinite().all() or (not theirs.is_floating_point() and (theirs < 0).any()):
            raise ValueError(f"state_dict: {what} has entries that are negative or not finite")
    elif type(theirs) is not type(mine):
        raise ValueError(f"state_dict: {what} is {theirs!r}, must be a {type(mine).__name__}")
    else:
        least = -(2**63) if what == "seed" else 0
        if not least <= theirs < 2**63:
            raise ValueError(f"state_dict: {what} is {theirs!r}, must be at least {least} and below 2**63")
