"""What forwards leave behind for the next step: activations that are held, and sums of the others."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling, is_exporting

from ..backends.registry import backend_for, functions_of, prepare_triton, why_not_triton
from ..groups.spec import ResolvedGroup
from ..hooks.observing import in_functional_call, this_thread
from ..parallel.processes import Processes
from ..rules.rule import Rule
from ..state.state import State
from ..tensors.memory import copy_buffer, extent_of, is_fake, room_of
from ..tensors.native import DTYPES, nbytes
from ..tensors.parts import is_dtensor, local_activations
from .checks import one_device
from .journal import Journal
from .settings import HELD_BYTES, checked_hyper, checked_seed

# of the Linear layers that the kernels read; what has more is read as two axes
_MOST_AXES = 8

_version_of = attrgetter("_version")
_size_of = torch.UntypedStorage.nbytes


class Forward(NamedTuple):
    """What one reading layer saw in one forward, held until the step."""

    slot: int
    h: Tensor
    version: int
    storage: torch.UntypedStorage
    size: int  # of the storage, in bytes
    total: int  # bytes of all storages held, up to this one


class Stream(NamedTuple):
    """A CUDA stream, and whether a graph of what it does is captured."""

    stream: int
    capturing: bool


def stream_of(device: torch.device) -> Stream:
    """The current stream of a CUDA device."""
    with torch.cuda.device(device) if torch.cuda.current_device() != device.index else contextlib.nullcontext():
        return Stream(torch._C._cuda_getCurrentRawStream(device.index), torch.cuda.is_current_stream_capturing())


class Observer:
    """One state and its backend, and what the layers that read its units have seen since the last step.

    A view keeps all of its storage, so that is what counts as held, once for all views of a step: what would bring
    "auto" beyond 4 MiB of storages is summed in its forward, a small view of a large tensor too.

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
        device = self._device = one_device(groups)
        self._wanted = backend
        self.layer = layer
        self.capture = capture
        self.enabled = True
        # of a step, or of a forward's sums, under way
        self._journal: Journal[Any] | None = None
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
        if this_thread.unobserved:
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
        journal: Journal[Any] = Journal([self])
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

    def await_sums(self) -> None:
        """Wait for what the processes are adding up, if they are; it is forgotten unless a step uses it at once."""
        sums, self._sums = self._sums, None
        if sums is not None:
            sums.wait()

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
