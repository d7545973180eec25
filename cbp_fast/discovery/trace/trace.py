"""What is known while a forward is followed: which units each element is made of, and where they were seen.

Every storage that the forward writes owns one id per element, so that views, chunks, permutations and in-place
operations need no rule; an id is a node, as `nodes` has it.
"""

from __future__ import annotations

import gc
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ...groups.layers import names_of, norm_kind
from ...tensors.memory import own_tensors, shared_memory
from ..nodes.ids import BASE, DATA, kinds_of, narrow
from ..nodes.nodes import Nodes
from ..running.memory import alive, bytes_of, constants, is_lent, storage_key
from ..running.preserving import Preserving
from .shadow import Shadow, written

_HIDDEN = "what was made by code that cannot be followed"
_LIVING = (
    "its units are kept after the forward, outside of the model and its output: in a container or an object of the "
    "caller, in a global or in a thread"
)
# what Python may know of the data
NUMBERS, INTEGERS = 1, 2
# that give a parameter another name, or take nothing but its shape
_NO_USE = re.compile("(detach|alias|empty_like|zeros_like|ones_like|full_like|rand_like|randn_like|new_.*)$")


class Trace(Preserving):
    """What is known while a forward is followed, and what was found so far.

    Attributes:
        nodes: what ids mean.
        records: by role ("read", "norm" or "pass", for a depthwise convolution) and layer (parameter and axis, or name
            of a norm): pairs of positions along that axis and ids seen there.
        roles: what each parameter and buffer is used for; a second role forbids it.
        refused: ids and why their units are refused, in the order of the forward.
        notes: ids and what is said of their units.
        outside: weights that were read elsewhere than in the forward of their own module.
        seen: parameters that were used; `used_by`: those that an operation without a rule used.
        branches: operations that handed a value to Python.
        modules: of the model, by name; `names`: by module.
        owners: name and module that each parameter and buffer belongs to.
        tied: parameters that share their memory, and with which.
        exits: paths of what is returned or kept.
        paths: operations of the forwards, each in its first run.
        random: whether a path may depend on random numbers.
        unsure: whether a tensor appeared of which it is not known whether it was there before the forward.
        statistics: whether what is summed now are statistics of a norm over features that torch takes apart.
        told: what Python knows of the data, so that numbers which it gives back may be made of them: 0 nothing, NUMBERS
            that are no integers, or INTEGERS, too.
        unwritten: storages that were made or resized to be written to, and that no operation seen has written to since.
        stack: names of the modules that run, and the modules, the innermost last.
        why: the operation that is followed, and where it is, as reasons begin.
        probed: what was learnt of operations by trying them on numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nodes = Nodes()
        self.records: dict[tuple[str, Any], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.roles: dict[str, set[str]] = defaultdict(set)
        self.refused: list[tuple[Tensor, str]] = []
        self.notes: list[tuple[Tensor, str]] = []
        self.outside: set[str] = set()
        self.seen: set[str] = set()
        self.used_by: dict[str, str] = {}
        self.branches: dict[str, None] = {}
        self.exits: dict[str, None] = {}
        self.owners: dict[str, tuple[str, nn.Module]] = {}
        self.tied = shared_memory(own_tensors(model))
        self.statistics, self.told = False, 0
        # by storage, with the bytes that each one takes of it
        self._parameters: dict[int, list[tuple[range, str, Tensor]]] = defaultdict(list)
        self._shadows: dict[int, Shadow] = {}
        self.unwritten: set[int] = set()
        # parameters and buffers that hold data since the forward began
        self._written: set[str] = set()
        self._kept: list[Tensor] = []
        self.stack: list[tuple[str, nn.Module]] = []
        self.why = ""
        self.probed: dict[Any, bool] = {}
        self.names = names_of(model)
        self.modules = {name: module for module, name in self.names.items()}
        for prefix, module in self.modules.items():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.numel():
                    name = join_name(prefix, key)
                    self._parameters[storage_key(tensor)].append((bytes_of(tensor), name, tensor))
                    self.owners.setdefault(name, (prefix, module))
        self.paths: list[Any] = []
        self.random = False
        self._own = dict(self._parameters)
        self._constants = constants(model)
        self.unsure = self._knows_all = False

    @property
    def where(self) -> str:
        """The operation that was followed last, and the module, as errors say it."""
        return self.why or "its first operation"

    def begin(self, known: Iterable[Tensor], everything: bool, told: bool) -> None:
        """Before a forward: `known` tensors, or everything there is, it does not make; `told` numbers it is given."""
        self.unsure, self.told = False, NUMBERS if told else 0
        self._knows_all = everything
        self.known = alive() if everything else set(map(storage_key, known))
        self.known |= self._constants

    def end(self) -> None:
        """After a forward, when its results are gone and the model is as before: refuses what is alive all the same."""
        for key, why in self.opened.items():
            for _, name, _ in self._parameters.get(key, ()):
                self.roles[name].add("what another thread does with it")
            if key in self._shadows:
                self.refuse(self._shadows[key].ids, why)
        for again in (True, False):
            living = [
                shadow.ids
                for key, shadow in self._shadows.items()
                if not cast(StorageWeakRef, self.made[key]).expired() and self.nodes.bare[shadow.ids].any()
            ]
            if living and again:
                gc.collect()
        for ids in living:
            self.refuse(ids, _LIVING)
        self.forget()
        self._shadows.clear()
        self.unwritten.clear()
        self._written.clear()
        self._kept.clear()
        self._parameters = dict(self._own)

    def found(self) -> Any:
        """What was noted so far, apart from the nodes that stand for it in each forward."""
        roles = sum(map(len, self.roles.values()))
        return set(self.records), roles, {why for _, why in self.refused}, len(self.seen), len(self.outside)

    def ids(self, tensor: Tensor) -> Tensor | None:
        """What the elements of a tensor are made of, int64 of its shape; None for constants."""
        if tensor.is_nested or not tensor.numel():
            return None
        if tensor.layout != torch.strided:
            return torch.tensor(DATA, device="cpu").expand(tensor.shape)
        key = storage_key(tensor)
        shadow = self._shadows.get(key)
        if key in self.opened and key not in self._parameters:
            if shadow is not None:
                self.refuse(shadow.ids, self.opened[key])
            return torch.tensor(DATA, device="cpu").expand(tensor.shape)
        if shadow is None and (key not in self.made or key in self._parameters):
            return self._outer(tensor)
        if shadow is None and tensor.grad_fn is None and key not in self.unwritten:
            return None
        if shadow is None:
            # made by a kernel that is called past the dispatcher
            return self._hidden().expand(tensor.shape)
        if shadow.elements != tensor.untyped_storage().nbytes() // shadow.itemsize:
            # resized by a kernel that is called past the dispatcher
            return self._hidden().expand(tensor.shape)
        if shadow.itemsize != tensor.element_size():
            self.refuse(shadow.ids, f"{self.why} reinterprets its bytes")
            return torch.tensor(DATA, device="cpu").expand(tensor.shape)
        ids = shadow.seen_through(tensor)
        while ids is None:
            # first element by element of one period, then of the whole storage
            shadow = shadow.unrolled(shadow.elements if shadow.run == 1 else None)
            self._shadows[key] = shadow
            ids = shadow.seen_through(tensor)
        return ids if shadow.whole or narrow(ids)[0][0].any() else None

    def _hidden(self) -> Tensor:
        """Something made by code that is not followed, of whatever there was."""
        for source in self.nodes.sources:
            if source.axis is not None:
                units = self.nodes.source(source.parameter, source.axis, source.size)
                self.refuse(units, f"{self.why} takes {_HIDDEN}")
        return torch.tensor(DATA, device="cpu")

    def _borrowed(self, tensor: Tensor) -> None:
        """Memory that belongs to others: it may be that of an activation, lent to them and back."""
        address = tensor.untyped_storage().data_ptr()
        for key, shadow in self._shadows.items():
            storage = torch.UntypedStorage._new_with_weak_ptr(key)
            if storage is not None and storage.data_ptr() <= address < storage.data_ptr() + max(storage.nbytes(), 1):
                self.refuse(shadow.ids, f"{self.why} takes its memory by way of another library")

    def _outer(self, tensor: Tensor) -> Tensor | None:
        """The ids of a tensor that was there before the forward."""
        entry = self._entry(tensor)
        if entry is None:
            appeared = self.appeared(tensor)
            if appeared and is_lent(tensor):
                self._borrowed(tensor)
                appeared = False
            self.unsure |= appeared and not self._knows_all
            hidden = appeared and self._knows_all
            return (self._hidden() if hidden else torch.tensor(DATA, device="cpu")).expand(tensor.shape)
        if entry[0] in self._written:
            return torch.tensor(DATA, device="cpu").expand(tensor.shape)
        if not isinstance(entry[1], nn.Parameter):
            return None
        return self.nodes.source(entry[0], None, 1).reshape(()).expand(tensor.shape)

    def put(self, tensor: Tensor, ids: Tensor | None) -> None:
        """Writes the ids of a tensor's elements."""
        if tensor.layout != torch.strided:
            return
        key = storage_key(tensor)
        if key in self._parameters or (key not in self.made and ids is not None):
            entry = self._entry(tensor)
            if entry and ids is not None:
                self.note_written(entry[0], ids)
            name = f"'{entry[0]}'" if entry else "a tensor"
            self.refuse(ids, f"{self.why} writes it to {name} that outlives the forward")
            return
        self.unwritten.discard(key)
        shadow = self._shadows.get(key)
        if not tensor.numel() or (shadow is None and ids is None):
            return
        after = written(shadow, tensor, ids)
        if after is None:
            del self._shadows[key]
        else:
            self._shadows[key] = after

    def parameter(self, tensor: Any) -> tuple[str, Tensor] | None:
        """Name and value of the parameter or buffer that a tensor is a view of."""
        entry = self._entry(tensor) if isinstance(tensor, Tensor) and tensor.numel() else None
        if entry:
            self.seen.add(entry[0])
            self.seen.add(self.tied.get(entry[0], entry[0]))
        return entry

    def _entry(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        entries = self._parameters.get(storage_key(tensor))
        if not entries:
            return None
        own = bytes_of(tensor)
        # neighbours in one storage share nothing
        return next(((name, t) for r, name, t in entries if r.start < own.stop and own.start < r.stop), None)

    def follows(self, tensor: Tensor) -> bool:
        """Whether something is known of the storage of a tensor."""
        return storage_key(tensor) in self._shadows

    def stand_in(self, copy: Tensor, entry: tuple[str, Tensor]) -> None:
        """Until the end of the forward, a copy of a whole parameter is that parameter."""
        self._parameters[storage_key(copy)] = [(bytes_of(copy), *entry)]
        self._kept.append(copy)

    def inside(self, module: nn.Module | None) -> bool:
        """Whether a module is the innermost one that runs."""
        return bool(self.stack) and self.stack[-1][1] is module

    def refuse(self, ids: Tensor | None, reason: str) -> None:
        """No unit in `ids` can be in a group."""
        kinds = None if ids is None else kinds_of(ids)
        if kinds is not None and self.nodes.bare[kinds].any():
            self.refused.append((kinds, reason))

    def use(self, op: str, entry: tuple[str, Tensor] | None) -> None:
        """A parameter that enters an operation other than those which it is for has another role."""
        if entry and not _NO_USE.match(op):
            module = self.owners[entry[0]][1]
            if op == "repeat" and norm_kind(module).startswith("InstanceNorm") and self.inside(module):
                self.roles[entry[0]].add("norm")
                return
            self.roles[entry[0]].add(self.why)
            if entry[1].dim() > 1:
                self.used_by.setdefault(entry[0], self.why)

    def record(self, role: str, layer: Any, ids: Tensor, axis: int) -> None:
        """Units are seen along an axis of ids, where a layer reads, normalises or passes them on."""
        n = ids.shape[axis]
        moved = narrow(ids)[0][0].movedim(axis, 0)
        moved = moved.expand(n, *moved.shape[1:]).reshape(n, -1)
        if torch.equal(moved.amin(1), moved.amax(1)):
            self.records[role, layer].append((torch.arange(n, device="cpu"), moved[:, 0]))
            return
        pairs = torch.unique(torch.arange(n, device="cpu")[:, None] * BASE + moved)
        self.records[role, layer].append((pairs // BASE, pairs % BASE))

    def note_written(self, name: str, ids: Tensor) -> None:
        """A parameter or buffer is written to."""
        if self.nodes.holds_data(ids):
            self._written.add(name)

    def tell(self, tensor: Tensor) -> None:
        """Python reads what is in a tensor; a truth value is no number."""
        ids = self.ids(tensor) if tensor.dtype != torch.bool else None
        if ids is not None and self.nodes.holds_data(ids):
            real = tensor.is_floating_point() or tensor.is_complex()
            self.told = max(self.told, NUMBERS if real else INTEGERS)

    def open(self, tensor: Tensor, why: str) -> None:
        """From now on code that is not followed may read and write its memory."""
        super().open(tensor, why)
        self.told = INTEGERS


def join_name(owner: str, key: str) -> str:
    """The name of a parameter in the model, by its module's and its own."""
    return f"{owner}.{key}" if owner else key
