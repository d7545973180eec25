"""One state and its backend: what forwards leave behind, and a step that happens whole or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from operator import attrgetter, getitem
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling, is_exporting
from torch.optim import Optimizer

from ..backends import cpp
from ..backends.registry import backend_for, functions_of, prepare_triton, why_not_triton
from ..groups.spec import ResolvedGroup
from ..hooks.observing import _here, in_functional_call
from ..parallel.processes import Processes
from ..rules.rule import Rule
from ..state.layout import TensorRef
from ..state.regions import TRANSFER
from ..state.state import State
from ..tensors.memory import copy_buffer, extent_of, is_fake, room_of
from ..tensors.native import DTYPES, nbytes, unwritable
from ..tensors.parts import is_dtensor, local, local_activations
from .checkpoint import checked_state
from .forwards import Forward, Stream, stream_of
from .journal import Journal
from .known import Known
from .optimizer_state import slots_of
from .settings import HELD_BYTES, checked_hyper, checked_seed

# of the Linear layers that the kernels read; what has more is read as two axes
_MOST_AXES = 8

_version_of = attrgetter("_version")
_size_of = torch.UntypedStorage.nbytes


class Engine:
    """Collects activations of the groups' readers and performs their steps; used by the attached object and layers.

    A view keeps all of its storage, so that is what counts as held, once for all views of a step: what would bring
    "auto" beyond 4 MiB of storages is summed in its forward, a small view of a large tensor too.

    A step is whole or nothing, whatever ends it: see `Journal`.

    Args:
        capture: "deferred" holds activations until the step, which then reads everything in one pass; "inline" sums
            them in the forward; "auto" defers while little is held.
        processes: those that train the model together, if they are several.
        layer: the layer that it works for, for messages; empty for an attached object.
    """

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
        seed = checked_seed(capture, seed)
        seed = torch.initial_seed() if seed is None else seed
        device = self._device = _one_device(groups)
        self._wanted = backend
        self.layer = layer
        self.capture = capture
        self.enabled = True
        # of a step, or of a forward's sums, under way
        self._journal: Journal[Engine] | None = None
        self._room = HELD_BYTES[capture]
        self._split = processes is not None and processes.split
        self.use(backend_for(device, backend, rule, self._split))
        self.groups = list(groups)
        self.processes = processes
        # of all processes, under way
        self._sums: Any = None
        self._state = State(rule, groups, seed=seed & (2**64 - 1), device=device, processes=processes)
        if processes is not None and self._state.deviations:
            # copies of the model may only be made equal after this
            self._state.deviations = processes.of_first(self._state.deviations)
        self._hyper = {"replacement_rate": 0.0, "maturity_threshold": 0.0, "decay_rate": 0.0}
        self.set_hyper(replacement_rate=replacement_rate, maturity_threshold=maturity_threshold, decay_rate=decay_rate)
        self._owners = [ref.owner for ref in self._state.weights]
        self._keys = [ref.key for ref in self._state.weights]
        self._in_parts = any(ref.place.is_dtensor for ref in self._state.weights) or any(
            region.ref.place.is_dtensor for region in self._state.regions
        )
        self._regions: list[list[int]] = [[] for _ in groups]
        for i, region in enumerate(self._state.regions):
            self._regions[region.group].append(i)
        # the parameters of each reading layer, and the weight that it had when it was last observed
        self._readers = [slot.module._parameters for slot in self.state.slots]
        self._own = [None if is_dtensor(own["weight"]) else own["weight"] for own in self._readers]
        # a slot whose activations were once changed in place after the forward is summed inline from then on
        self._inline = [False] * len(self._state.slots)
        # the layer of each slot, and which of them a warning has named
        self._names = [member.name for group in groups for member in group.outgoing]
        self._said: set[int] = set()
        self.forget_forwards()
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        # activations that wait for the step are the original's
        return self.__dict__ | {"_forwards": [], "_storages": set(), "_streams": set(), "_captured": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # and so are those that are in the sums already
        self.__dict__.update(state)
        self._state.forget_forwards()

    @property
    def state(self) -> State:
        """The state, after a step that was cut short has been finished or taken back."""
        if self._journal is not None:
            self._journal.settle()
        return self._state

    def _prepare(self) -> None:
        """Let the backend compile what it will run, where that takes long."""
        if self._backend == "triton":
            prepare_triton(self._state, self.capture != "deferred")

    def use(self, backend: str) -> None:
        """Take the functions of a backend, which has to serve the rule and the device."""
        self._backend = backend
        self._functions = functions_of(backend)
        # nothing is read back from a device: all is checked, and gathered, before anything runs there
        self.chooses_alone = backend == "triton" or self._device.type != "cpu"
        self._known: Known | None = None

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
        hyper = self._hyper | checked_hyper(values)
        self._state.set_hyper(**hyper)
        self._hyper = hyper

    @property
    def why_not_triton(self) -> str | None:
        """On a GPU, why the reference runs that nobody asked for."""
        device = self._state.buffer.device
        if device.type == "cpu" or self._wanted is not None or self.backend == "triton":
            return None
        return why_not_triton(self._state.rule, device, self._split)

    @property
    def has_data(self) -> bool:
        """Whether a forward was observed since the last step."""
        state = self.state
        return bool(self._forwards) or bool(state.count.any())

    @property
    def held_bytes(self) -> int:
        """Bytes of the storages that are held until the next step."""
        return self._forwards[-1].total if self._forwards else 0

    def forget_forwards(self) -> None:
        """Drop what forwards since the last step have left."""
        self.await_sums()
        state = self.state
        self.finish()
        state.forget_forwards()

    def record(self, slot: int, h: Tensor) -> None:
        """Take the activations that one reading layer saw in one forward."""
        if type(h) is not Tensor and is_dtensor(h):
            h = local_activations(h, h.dim() - 1 - self._state.slots[slot].spatial)
        if not self.enabled:
            return
        if h.dim() > _MOST_AXES and self._state.slots[slot].spatial == 0:
            h = h.flatten(0, -2)
        # a compiled forward keeps the operator in its graph, but would be compiled anew for every length of a list
        if is_compiling():
            # what is exported belongs to nobody
            if h.device == self._device and not is_exporting():
                self._captured = True
                self._functions.capture_(self._state, slot, h.detach())
            return
        if _here.unobserved:
            return
        if self._readers[slot].get("weight") is not self._own[slot] and not self._is_own(slot):
            return
        if self._journal is not None:
            self._journal.settle()
        size = self._nbytes(h)
        if size < 0 and not self._stands_for_one(slot, h):
            return
        h = h.detach()
        # of an expanded tensor there is less memory than elements, too
        if size > 0 and h.untyped_storage().nbytes() < size:
            why = self._why_unreadable(slot, h)
            if why is not None:
                self._leave_out([(slot, why)])
                return
        # the kernels do not see whether a tensor is the negative of its memory, or only stands for others
        if self._room < 0 or self._inline[slot] or h.is_neg() or type(h) is not Tensor:
            self._sum_up(slot, h.resolve_neg())
            return
        storage = h.untyped_storage()
        size, key = storage.nbytes(), storage._cdata
        total = self.held_bytes + (0 if key in self._storages else size)
        if total > self._room:
            self._sum_up(slot, h)
            return
        if self._device.type == "cuda":
            self._streams.add(stream_of(self._device))
        # one call: no interrupt finds half of it
        self._forwards.append(Forward(slot, h, h._version, storage, size, total))
        self._storages.add(key)

    def _nbytes(self, h: Tensor) -> int:
        """Bytes of activations; -1 where they have no memory of their own on the state's device."""
        if self._device.type == "cpu":
            return nbytes(h)
        return -1 if h.device != self._device or is_functorch_wrapped_tensor(h) else h.nbytes

    def _stands_for_one(self, slot: int, h: Tensor) -> bool:
        """Whether activations that have no memory of their own can be summed at once all the same."""
        # what is on another device may belong to a model that is being moved; what torch.func's transforms run on is no
        # batch, and does not outlive them; a fake tensor has no numbers
        if h.device != self._device or is_functorch_wrapped_tensor(h) or is_fake(h):
            return False
        why = self._why_unreadable(slot, h)
        if why is not None:
            self._leave_out([(slot, why)])
        return why is None

    def _why_unreadable(self, slot: int, h: Tensor) -> str | None:
        """What keeps activations from being summed; None if nothing is known."""
        spatial, seen = self._state.slots[slot].spatial, len(self._state.slots[slot].seen)
        if h.layout != torch.strided or h.dtype not in DTYPES:
            return f"are a {h.layout} tensor of {h.dtype}"
        if not (h.dim() >= 1 if spatial == 0 else spatial < h.dim() <= spatial + 2):
            return f"have {h.dim()} axes, which their layer does not take"
        features = h.shape[h.dim() - 1 - spatial]
        if features != seen:
            return f"have {features} features, not {seen} as at attach"
        if type(h) is Tensor and room_of(h) < extent_of(h):
            return "were freed"
        return None

    def _leave_out(self, forwards: Sequence[tuple[int, str]]) -> None:
        """Say that forwards of some slots do not count, and why; once for each slot."""
        fresh = {slot: why for slot, why in forwards if slot not in self._said}
        self._said |= fresh.keys()
        for slot, why in fresh.items():
            warnings.warn(
                f"the activations that {self.layer or self._names[slot]} read in a forward {why}; continual backprop "
                "leaves that forward of the layer out",
                stacklevel=2,
            )

    def _sum_up(self, slot: int, h: Tensor) -> None:
        """Add a forward to the sums, after those that are held: a running mean depends on the order."""
        slots, held = self._intact()
        forwards = [*zip(slots, held, strict=True), (slot, h)]
        self._captured = True
        try:
            self._capture(forwards)
        except Exception:
            bad = [(s, why) for s, x in forwards if (why := self._why_unreadable(s, x)) is not None]
            if not bad:
                raise
            self._leave_out(bad)
            self._capture([(s, x) for s, x in forwards if self._why_unreadable(s, x) is None])

    def _capture(self, forwards: Sequence[tuple[int, Tensor]]) -> None:
        """Add forwards to the sums, all that are held among them; all or none."""
        if self._backend == "cpp" and not self._forwards and len(forwards) == 1:
            # one call does it
            ((slot, h),) = forwards
            self._functions.capture_(self._state, slot, h)
            return
        journal = Journal([self])
        try:
            journal.keep(self)
            for slot, h in forwards:
                self._functions.capture_(self._state, slot, h)
            journal.finish({}, captured=True)
        except BaseException:
            journal.settle()
            raise

    def _is_own(self, slot: int) -> bool:
        """Whether the reader's weight, which is another than before, is its own, and not one that it is called with."""
        # what is spread over processes is another tensor while it is in use
        if self._own[slot] is None:
            return True
        if in_functional_call():
            return False
        self._own[slot] = self._readers[slot].get("weight")
        return True

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
        for h in [f.h for f in self._forwards]:
            h.record_stream(torch.cuda.current_stream(self._device))

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

    def await_sums(self) -> None:
        """Wait for what the processes are adding up, if they are; it is forgotten unless a step uses it at once."""
        sums, self._sums = self._sums, None
        if sums is not None:
            sums.wait()

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
                _check_memory(list(weights), [ref.name for ref in self._state.weights], self.layer)
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
            self._known = None if self._in_parts else Known(self._state, optimizers, numbers, tensors)
            return numbers, tensors
        return self._known.numbers, self._known.tensors

    def _collected(self, optimizers: Sequence[Optimizer]) -> tuple[list[int], list[Tensor]]:
        state = self._state
        reset = state.rule.arithmetic.resets_optimizer
        chosen = [1] * len(state.layouts) if self.chooses_alone else state.num_chosen.tolist()
        numbers: list[int] = []
        tensors: list[Tensor] = []
        names: list[str] = []
        for count, regions in zip(chosen, self._regions, strict=True):
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
                    for key, slot in slots_of(optimizers, tensor):
                        _check_slot(key, region.ref.name, tensor, slot)
                        numbers.append(2 * number + 1)
                        tensors.append(slot)
                        names.append(f"{key} of '{region.ref.name}'")
        parts = [local(tensor) for tensor in tensors] if self._in_parts else tensors
        _check_memory(parts, names, self.layer)
        if self._backend == "cpp":
            cpp.check_reinit(state, numbers, parts)
        return numbers, tensors

    def reinit(self, numbers: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Re-initialise everything that belongs to the chosen units."""
        parts = [local(tensor) for tensor in tensors] if self._in_parts else tensors
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

    def finish(self) -> None:
        """Forget what is held: it has been used, or is not wanted."""
        self._forwards: list[Forward] = []
        # of what is held, by address
        self._storages: set[int] = set()
        # on which they were seen
        self._streams: set[Stream] = set()
        # whether forwards are in the state that are in no sums of the processes
        self._captured = False

    def _intact(self) -> tuple[list[int], list[Tensor]]:
        """Slots and activations held, to be read on this stream, less those that were changed in place or freed."""
        forwards = self._forwards
        if not forwards:
            return [], []
        if self._streams:
            self._join_streams()
        slots, held, versions, storages, sizes, _ = zip(*forwards, strict=True)
        if tuple(map(_version_of, held)) == versions and tuple(map(_size_of, storages)) == sizes:
            return list(slots), list(held)
        for f in forwards:
            self._inline[f.slot] |= f.h._version != f.version
        self._leave_out([(f.slot, "were freed before the step") for f in forwards if f.storage.nbytes() < f.size])
        fresh = [f for f in forwards if f.h._version == f.version and f.storage.nbytes() >= f.size]
        return [f.slot for f in fresh], [f.h for f in fresh]

    def keep(self) -> None:
        """Keep the state as it is, for `restore`."""
        copy_buffer(self._state.backup, self._state.buffer)

    def restore(self) -> None:
        """Take back what was done since the state was kept."""
        copy_buffer(self._state.buffer, self._state.backup)

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
        rule = state.rule.options
        numbers = {"seed": int(state.seed), "step": int(state.step)}
        measured = {"deviations": state.deviations} if state.deviations else {}
        return {"rule": rule, **self._hyper, **numbers, **measured, "groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; see `ContinualBackprop.load_state_dict`."""
        state, own = self.state, self.state_dict()
        theirs = checked_state(state_dict, own)
        self.await_sums()
        # all of it in a copy first
        buffer = state.buffer.clone()
        fields = state.views(buffer)
        for g, layout in enumerate(state.layouts):
            group = theirs["groups"][layout.name]
            fields["utility"][layout.units].copy_(group["utility"])
            fields["age"][layout.units].copy_(group["age"])
            fields["pending"][g] = group["pending"]
            fields["num_replaced"][g] = group["num_replaced"]
            if state.rule.keeps_mean:
                fields["running_mean"][state.columns_of(layout)].copy_(group["running_mean"])
        fields["seed"].fill_(theirs["seed"])
        fields["step"].fill_(theirs["step"])
        for name in ("num_chosen", "count", "activation", "feature"):
            fields[name].zero_()
        if state.deviations:
            state.deviations = theirs["deviations"]
        copy_buffer(state.buffer, buffer)
        self.set_hyper(**{key: theirs[key] for key in self._hyper})
        self.finish()

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
        for region in self._state.regions:
            self._checked(region.ref)
        for ref in self._state.weights:
            self._checked(ref)

    def _checked(self, ref: TensorRef) -> Tensor:
        tensor, of = ref.get(), f"{self.layer}: " if self.layer else ""
        again = "make the layer anew" if self.layer else "call refresh()"
        if tensor is None:
            raise RuntimeError(f"{of}{ref.name} is no longer there; {again}")
        if tensor.device != self._state.buffer.device:
            move = "model.to" if self.layer else "cbp.to"
            raise RuntimeError(
                f"{of}{ref.name} is on {tensor.device} but continual backprop's state is on "
                f"{self._state.buffer.device}; call {move}({str(tensor.device)!r}) after moving the model"
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


def _check_slot(key: object, name: str, parameter: Tensor, slot: Tensor) -> None:
    if slot.device != parameter.device or slot.layout != torch.strided or slot.dtype not in DTYPES:
        raise RuntimeError(
            f"the optimizer keeps {key} of '{name}' as a {slot.layout} tensor of {slot.dtype} on {slot.device}; to be "
            f"reset it must be dense, of 16 to 64 bits and on {parameter.device}"
        )


def _check_memory(tensors: list[Tensor], names: Sequence[str], layer: str) -> None:
    """Raises RuntimeError for a tensor that has no memory of its own, or none that can be written."""
    found = unwritable(tensors, list(map(room_of, tensors)))
    if found is not None:
        number, why = found
        of = f"{layer}: " if layer else ""
        kind = type(tensors[number])
        which = "" if kind in (Tensor, torch.nn.Parameter) else f", a {kind.__name__},"
        name = names[number] if " of " in names[number] else f"'{names[number]}'"
        raise RuntimeError(
            f"{of}{name}{which} {why}, so that it cannot be re-initialised and nothing was; give it memory "
            "of its own that can be written, or exclude= its group"
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
