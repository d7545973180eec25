"""Which units each element of an activation is made of, followed through one forward by a TorchDispatchMode.

Every storage that the forward writes owns one id per element, so that views, chunks, permutations and in-place
operations need no rule; an id is a node, as `nodes` has it. A rule takes the arguments of an operation that it accounts
for, and units in any other are refused.
"""

from __future__ import annotations

import functools
import gc
import itertools
import logging
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from ..groups.layers import label, names_of, norm_kind, norm_shape
from ..tensors.memory import own_tensors, shared_memory
from .nodes import BASE, DATA, ONE, RANDOM, Nodes, kinds_of, narrow, same_along
from .running import Preserving, alive, constants, is_view, leaves_of, storage_key
from .snapshot import Snapshot

_SUMMING = ("addmm", "baddbmm", "_sparse_addmm")
_MATMULS = ("mm", "bmm", *_SUMMING)
_NORM_OPS = ("batch_norm", "native_layer_norm", "native_group_norm", "_fused_rms_norm")
_ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention")
_EMPTY = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
_POINTWISE = ("hardswish", "mish", "log_sigmoid_forward", "_prelu_kernel", "rrelu_with_noise", "native_dropout")
# they zero elements at random
_DROPOUTS = ("native_dropout", "rrelu_with_noise")
# operations that only move elements, or reduce them along axes
_MOVING = """cat stack index index_select gather repeat flip roll constant_pad_nd pixel_shuffle pixel_unshuffle
    channel_shuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d im2col tril triu index_put slice_scatter select_scatter take_along_dim"""
_REDUCING = "mean sum amax amin max min var std var_mean std_mean prod linalg_vector_norm norm logsumexp any all"
_MOVES, _REDUCTIONS = frozenset(_MOVING.split()), frozenset(_REDUCING.split())
# of zeros, they are not zero
_NOT_ZERO = ("logsumexp", "all", "_softmax", "_log_softmax", "_safe_softmax", "native_layer_norm", "native_group_norm")
_SPATIAL = re.compile(r"(?:pool|upsample_\w+?|grid_sampler_)([123])d")
_FRESH = re.compile("empty|zeros|ones|full|new_|rand|arange|scalar_tensor|zero|fill$|lift")
_DRAWS = ("bernoulli", "normal", "uniform", "exponential", "random", "cauchy", "geometric", "log_normal")
_HIDDEN = "what was made by code that cannot be followed"
_LIVING = (
    "its units are kept after the forward, outside of the model and its output: in a container or an object of the "
    "caller, in a global or in a thread"
)
_TO_PYTHON = ("_local_scalar_dense", "equal", "is_nonzero", "_is_all_true", "_is_any_true")
_DATA_SIZED = ("nonzero", "_unique2", "masked_select")
# what Python may know of the data
NUMBERS, INTEGERS = 1, 2
# that give a parameter another name, or take nothing but its shape
_NO_USE = re.compile("(detach|alias|empty_like|zeros_like|ones_like|full_like|rand_like|randn_like|new_.*)$")
# seconds after which a line says how far it is, and then each time as many more
_PATIENCE = 5.0


# methods of tensors by which values leave for code that is not followed, and those that let it write, too
_READING = ("tolist", "__repr__", "__deepcopy__", "share_memory_")
_NO_NUMBERS = ("__repr__", "data_ptr")
_OPENING = ("numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage", "apply_", "map_", "map2_")
_OURS = (__name__, Preserving.__module__, Snapshot.__module__)


class Exits(TorchFunctionMode):
    """Refuses the units of tensors whose values leave for Python, NumPy or other libraries.

    Args:
        trace: what follows the units.
        elsewhere: whether this is another thread than the forward's.
    """

    def __init__(self, trace: Trace, elsewhere: bool = False) -> None:
        super().__init__()
        self.trace, self.elsewhere = trace, elsewhere

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "rms_norm" and not self.elsewhere:
            # torch takes it apart, and its sums over features are a norm's statistics
            before, self.trace.statistics = self.trace.statistics, True
            try:
                return func(*args, **(kwargs or {}))
            finally:
                self.trace.statistics = before
        array = name == "__get__" and getattr(func, "__self__", None) is Tensor.__cuda_array_interface__
        out = func(*args, **(kwargs or {}))
        if name == "tensor_split":
            # it reads them past the dispatcher
            for t in (*args[1:], *(kwargs or {}).values()):
                if isinstance(t, Tensor):
                    self._leaves(t, name, True)
        # the look itself asks for addresses, too
        ours = sys._getframe(1).f_globals.get("__name__") in _OURS
        if (array or name in _READING or name in _OPENING) and not ours:
            for t in args:
                if isinstance(t, Tensor):
                    self._leaves(t, name, name in _READING)
            if isinstance(out, Tensor) and name == "__deepcopy__":
                self.trace.open(out, f"{name}() made it")
        return out

    def _leaves(self, t: Tensor, name: str, read_only: bool) -> None:
        entry = self.trace.parameter(t)
        if entry:
            self.trace.roles[entry[0]].add(f"{name}()")
            return
        why = f"{name}() takes its values out of the model's operations"
        if self.elsewhere:
            self.trace.open(t, why)
            return
        if name not in _NO_NUMBERS:
            self.trace.tell(t)
        if storage_key(t) in self.trace.made:
            self.trace.refuse(self.trace.ids(t), why)
            if not read_only:
                self.trace.open(t, why)


class _Shadow(NamedTuple):
    ids: Tensor  # [period]: element i of the storage has ids[i // run % period]
    run: int
    elements: int
    itemsize: int
    whole: bool = False  # whether no element is known to be a constant


class _Schema(NamedTuple):
    """What a rule asks of an operation, which takes long to ask of torch."""

    op: str  # its name without an overload, and without the underscore of an in-place one
    name: str
    names: tuple[str, ...]
    outs: frozenset[str]  # arguments that are only written, as `out=`
    written: frozenset[str]  # those, and what is changed in place
    mutable: bool
    tags: frozenset[torch.Tag]


@functools.cache
def _schema_of(func: torch._ops.OpOverload) -> _Schema:
    name, arguments = func._overloadpacket.__name__, func._schema.arguments
    outs = (a.name for a in arguments if a.kwarg_only and a.alias_info is not None and a.alias_info.is_write)
    names = tuple(a.name for a in arguments)
    written = frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return _Schema(
        name.rstrip("_"), name, names, frozenset(outs), written, func._schema.is_mutable, frozenset(func.tags)
    )


class _Call:
    """One operation with its arguments, which a rule takes one by one; `left` are those that it did not.

    Attributes:
        given: arguments by their names in the schema.
        tensors: those that are read, with the name of their argument; what `out=` gives is not.
    """

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.plain = isinstance(func, torch._ops.OpOverload)
        if self.plain:
            self.op, self.name, names, self.outs, self.written, self.mutable, self.tags = _schema_of(func)
            self.given = dict(zip(names, args, strict=False))
            self.given.update((k, v) for k, v in kwargs.items() if k not in self.outs)
        else:
            self.op = self.name = str(func)
            self.given, self.mutable = {"arguments": (args, kwargs)}, False
            self.outs = self.written = self.tags = frozenset[Any]()
        self.tensors: list[tuple[str, Tensor]] = []
        for key, value in self.given.items():
            if isinstance(value, Tensor):
                self.tensors.append((key, value))
            elif isinstance(value, (list, tuple)):
                self.tensors += [(key, t) for t in leaves_of(value) if isinstance(t, Tensor)]
        self.left = list(self.tensors)

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name)

    def take(self, *names: str) -> list[Tensor]:
        """The tensors of some arguments, or of all; the rule accounts for them."""
        taken = [t for name, t in self.left if not names or name in names]
        self.left = [(name, t) for name, t in self.left if names and name not in names]
        return taken


class Trace(Preserving):
    """Follows units through all that runs under it.

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
        self._shadows: dict[int, _Shadow] = {}
        # storages that were made or resized to be written to, and that no operation seen has written to since
        self._unwritten: set[int] = set()
        # parameters and buffers that hold data since the forward began
        self._written: set[str] = set()
        self._kept: list[Tensor] = []
        self._stack: list[tuple[str, nn.Module]] = []
        self._why = ""
        self._probed: dict[Any, bool] = {}
        self._count, self._began, self._next_line = 0, time.monotonic(), _PATIENCE
        self.names = names_of(model)
        self.modules = {name: module for module, name in self.names.items()}
        for prefix, module in self.modules.items():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.numel():
                    name = _join(prefix, key)
                    self._parameters[storage_key(tensor)].append((_bytes_of(tensor), name, tensor))
                    self.owners.setdefault(name, (prefix, module))
        self.paths: list[Any] = []
        self.random = False
        self._own = dict(self._parameters)
        self._constants = constants(model)
        self.unsure = self._knows_all = False

    @property
    def where(self) -> str:
        """The operation that was followed last, and the module."""
        return self._why or "its first operation"

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
        self._unwritten.clear()
        self._written.clear()
        self._kept.clear()
        self._parameters = dict(self._own)

    def facts(self) -> Any:
        """What was found so far, apart from the nodes that stand for it in each forward."""
        roles = sum(map(len, self.roles.values()))
        return set(self.records), roles, {why for _, why in self.refused}, len(self.seen), len(self.outside)

    def watch(self) -> list[RemovableHandle]:
        """Hooks that keep track of which module runs."""
        handles = []
        for name, module in self.modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                # it takes no hooks, and the modules in it are not called
                continue
            enter = (lambda entry: lambda *_: self._stack.append(entry))((name, module))
            leave = lambda *_: self._stack.pop() and None  # noqa: E731
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        return handles

    def refuse(self, ids: Tensor | None, reason: str) -> None:
        """No unit in `ids` can be in a group."""
        kinds = None if ids is None else kinds_of(ids)
        if kinds is not None and self.nodes.bare[kinds].any():
            self.refused.append((kinds, reason))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if is_view(func, args):
            self._count += 1
            return out
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "prim":
            # a question of a tensor that stands for another
            return out
        if torch._C._current_graph_task_id() != -1:
            # gradients are no activations
            return out
        with _disable_current_modes(), torch.no_grad():
            call = _Call(func, args, kwargs)
            at = label(*self._stack[-1]) if self._stack and self._stack[-1][0] else "the model"
            self._why = self.nodes.why = f"{call.name} in {at}"
            nested = any(t.is_nested for _, t in call.tensors) or any(
                isinstance(t, Tensor) and t.is_nested for t in leaves_of(out)
            )
            if nested:
                self._nested(call, out)
            else:
                self._follow(call, out)
            self._say_where(at)
        return out

    def _nested(self, call: _Call, out: Any) -> None:
        """Units that go into a nested tensor are refused, and what comes out of it is data."""
        why = f"{self._why} takes or makes a nested tensor, which cannot be followed"
        for t in (*call.take(), *(t for t in leaves_of(out) if isinstance(t, Tensor))):
            entry = None if t.is_nested else self.parameter(t)
            self._use(call.op, entry)
            if not t.is_nested and not entry:
                self.refuse(self.ids(t), why)
                self.open(t, why)

    def _say_where(self, at: str) -> None:
        self._count += 1
        seconds = time.monotonic() - self._began
        if seconds > self._next_line:
            self._next_line = 2 * seconds
            _log.warning(
                "following the units through the forward: %d operations, %.0f s, in %s", self._count, seconds, at
            )

    # ids of tensors

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
            return self._outer(key, tensor)
        if shadow is None and tensor.grad_fn is None and key not in self._unwritten:
            return None
        if shadow is None:
            # made by a kernel that is called past the dispatcher
            return self._hidden().expand(tensor.shape)
        if shadow.elements != tensor.untyped_storage().nbytes() // shadow.itemsize:
            # resized by a kernel that is called past the dispatcher
            return self._hidden().expand(tensor.shape)
        if shadow.itemsize != tensor.element_size():
            self.refuse(shadow.ids, f"{self._why} reinterprets its bytes")
            return torch.tensor(DATA, device="cpu").expand(tensor.shape)
        ids = _seen_through(shadow, tensor)
        while ids is None:
            # first element by element of one period, then of the whole storage
            ids_ = shadow.ids.repeat_interleave(shadow.run) if shadow.run > 1 else shadow.ids
            if shadow.run == 1:
                ids_ = ids_.repeat(-(-shadow.elements // len(ids_)))[: shadow.elements]
            self._shadows[key] = shadow = shadow._replace(ids=ids_, run=1)
            ids = _seen_through(shadow, tensor)
        return ids if shadow.whole or narrow(ids)[0][0].any() else None

    def _hidden(self) -> Tensor:
        """Something made by code that is not followed, of whatever there was."""
        for source in self.nodes.sources:
            if source.axis is not None:
                units = self.nodes.source(source.parameter, source.axis, source.size)
                self.refuse(units, f"{self._why} takes {_HIDDEN}")
        return torch.tensor(DATA, device="cpu")

    def _borrowed(self, tensor: Tensor) -> None:
        """Memory that belongs to others: it may be that of an activation, lent to them and back."""
        address = tensor.untyped_storage().data_ptr()
        for key, shadow in self._shadows.items():
            storage = torch.UntypedStorage._new_with_weak_ptr(key)
            if storage is not None and storage.data_ptr() <= address < storage.data_ptr() + max(storage.nbytes(), 1):
                self.refuse(shadow.ids, f"{self._why} takes its memory by way of another library")

    def _outer(self, key: int, tensor: Tensor) -> Tensor | None:
        """The ids of a tensor that was there before the forward."""
        entry = self._entry(tensor)
        if entry is None:
            # indices are made past the dispatcher, and what is not resizable is memory of NumPy and of others
            new = key not in self.known and tensor.is_floating_point()
            if new and not tensor.untyped_storage().resizable():
                self._borrowed(tensor)
                new = False
            self.unsure |= new and not self._knows_all
            hidden = new and self._knows_all
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
                self._note_written(entry[0], ids)
            name = f"'{entry[0]}'" if entry else "a tensor"
            self.refuse(ids, f"{self._why} writes it to {name} that outlives the forward")
            return
        self._unwritten.discard(key)
        shadow, storage = self._shadows.get(key), tensor.untyped_storage()
        if not tensor.numel() or (shadow is None and ids is None):
            return
        elements = storage.nbytes() // tensor.element_size()
        order = sorted((i for i in range(tensor.dim()) if tensor.shape[i] > 1), key=tensor.stride, reverse=True)
        if tensor.numel() == elements and all(tensor.stride(i) for i in order):
            if ids is None:
                del self._shadows[key]
                return
            (ids,), _ = narrow(ids.expand(tensor.shape))
            while order and ids.shape[order[0]] == 1:
                order.pop(0)
            run = 1
            while order and ids.shape[order[-1]] == 1:
                run *= tensor.shape[order.pop()]
            wide = ids.expand([n if i in order else 1 for i, n in enumerate(tensor.shape)])
            flat = torch.empty(wide.numel(), dtype=torch.int64, device="cpu")
            strides = [stride // run if i in order else 0 for i, stride in enumerate(tensor.stride())]
            flat.as_strided(wide.shape, strides).copy_(wide)
            self._shadows[key] = _Shadow(flat, run, elements, tensor.element_size(), bool(flat.all()))
            return
        if shadow is None:
            zeros = torch.zeros(1, dtype=torch.int64, device="cpu")
            shadow = _Shadow(zeros, 1, elements, tensor.element_size())
        # the view may write into any part of it
        flat = shadow.ids.repeat_interleave(shadow.run) if shadow.run > 1 else shadow.ids
        flat = flat.repeat(-(-elements // len(flat)))[:elements]
        self._shadows[key] = shadow._replace(ids=flat, run=1, whole=False)
        # an expanded tensor writes one element many times
        shape = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        place = flat.as_strided(shape, tensor.stride(), tensor.storage_offset())
        ids = torch.zeros((), dtype=torch.int64, device="cpu") if ids is None else ids
        place.copy_(ids.expand(tensor.shape)[tuple(slice(0, n) for n in shape)])

    def _note_written(self, name: str, ids: Tensor) -> None:
        """A parameter or buffer is written to."""
        if self._holds_data(ids):
            self._written.add(name)

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
        own = _bytes_of(tensor)
        # neighbours in one storage share nothing
        return next(((name, t) for r, name, t in entries if r.start < own.stop and own.start < r.stop), None)

    def _record(self, role: str, layer: Any, ids: Tensor, axis: int) -> None:
        n = ids.shape[axis]
        moved = narrow(ids)[0][0].movedim(axis, 0)
        moved = moved.expand(n, *moved.shape[1:]).reshape(n, -1)
        if torch.equal(moved.amin(1), moved.amax(1)):
            self.records[role, layer].append((torch.arange(n, device="cpu"), moved[:, 0]))
            return
        pairs = torch.unique(torch.arange(n, device="cpu")[:, None] * BASE + moved)
        self.records[role, layer].append((pairs // BASE, pairs % BASE))

    # rules

    def _follow(self, call: _Call, out: Any) -> None:
        op, outs = call.op, [t for t in leaves_of(out) if isinstance(t, Tensor)]
        written = leaves_of([call[name] for name in call.written])
        self._unwritten.difference_update(storage_key(t) for t in written if isinstance(t, Tensor))
        if op == "resize":
            self._unwritten.add(storage_key(call.args[0]))
        elif op in _EMPTY:
            self._unwritten.update(map(storage_key, outs))
            return
        keys = {storage_key(t) for _, t in call.tensors}
        views = bool(outs) and all(storage_key(t) in keys for t in outs)
        if call.plain and ((views and not call.mutable) or torch.Tag.inplace_view in call.tags) and op != "lift_fresh":
            return
        if outs and not any(t.numel() for t in outs):
            # an expert without tokens has not been reached
            return
        first = call.tensors[0][1] if call.tensors else None
        if op == "_to_copy" and first is not None and outs[0].shape == first.shape:
            entry = self.parameter(first)
            if entry and first.shape == entry[1].shape:
                # autocast's copy of a weight
                self._parameters[storage_key(outs[0])] = [(_bytes_of(outs[0]), *entry)]
                self._kept.append(outs[0])
                return
        results = self._results(call, outs)
        rest = False
        for name, tensor in call.left:
            ids = self.ids(tensor)
            if ids is not None:
                self.refuse(ids, f"{self._why} has no rule for its argument '{name}'")
                rest = True
            self._use(op, self.parameter(tensor))
        for i, tensor in enumerate(outs):
            ids = results[i] if i < len(results) else None
            if rest:
                data = torch.tensor(DATA, device="cpu")
                ids = cast(Tensor, self.nodes.join(data if ids is None else ids, data))
            self.put(tensor, None if ids is None else ids.expand(tensor.shape))

    def _results(self, call: _Call, outs: Sequence[Tensor]) -> list[Tensor | None]:
        """The ids of what an operation returns; rules take from `call` the arguments that they account for."""
        op = call.op
        if op in _MATMULS:
            return [self._matmul(call, outs[0])]
        if op == "convolution":
            return [self._convolution(call, outs[0])]
        if op == "embedding":
            entry = self.parameter(call["weight"])
            if entry and entry[1].shape == call["weight"].shape:
                call.take("weight")
                self._take_index(call, "indices")
                self.roles[entry[0]].add("embedding")
                return [self.nodes.source(entry[0], 1, entry[1].shape[1])]
        if any(kind in op for kind in _NORM_OPS):
            return [self._norm(call), *itertools.repeat(self._everything(call), len(outs) - 1)]
        if op in _TO_PYTHON or op in _DATA_SIZED:
            self.branches[f"a value read by Python ({self._why})"] = None
            if op == "_local_scalar_dense":
                self.tell(call.tensors[0][1])
        seeded = torch.Tag.nondeterministic_seeded in call.tags
        # an operation that takes nothing but the shape
        fresh = len(call.tensors) == 1 and (bool(_FRESH.match(op)) or (seeded and call.mutable and op in _DRAWS))
        if fresh and not seeded and self._is_told(call, outs):
            call.take()
            return [torch.tensor(DATA, device="cpu")] * len(outs)
        if fresh or (seeded and all(self.ids(t) is None for _, t in call.tensors)):
            for tensor in call.take():
                self._use(op, self.parameter(tensor))
            # what an index of them chooses is another thing each time
            return [torch.tensor(RANDOM, device="cpu")] * len(outs) if seeded else []
        followed = [(name, ids) for name, t in call.tensors if (ids := self.ids(t)) is not None]
        tracked = {name for name, _ in followed}
        if all(_is_data(ids) for _, ids in followed) and tracked:
            for tensor in call.take():
                self._use(op, self.parameter(tensor))
            return [torch.tensor(DATA, device="cpu")] * len(outs)
        if not tracked:
            taken = call.take()
            for tensor in taken:
                self._use(op, self.parameter(tensor))
            if self._is_told(call, outs):
                return [torch.tensor(DATA, device="cpu")] * len(outs)
            # what is made of a norm's statistics is known to be of nothing
            known = any(storage_key(t) in self._shadows for t in taken)
            return [torch.tensor(0, device="cpu")] * len(outs) if known else []
        return self._rule(call, outs, tracked)

    def tell(self, tensor: Tensor) -> None:
        """Python reads what is in a tensor; a truth value is no number."""
        ids = self.ids(tensor) if tensor.dtype != torch.bool else None
        if ids is not None and self._holds_data(ids):
            real = tensor.is_floating_point() or tensor.is_complex()
            self.told = max(self.told, NUMBERS if real else INTEGERS)

    def open(self, tensor: Tensor, why: str) -> None:
        """From now on code that is not followed may read and write its memory."""
        super().open(tensor, why)
        self.told = INTEGERS

    def _holds_data(self, ids: Tensor) -> bool:
        """Whether it is made of anything but parameters, constants and random numbers."""
        kinds = kinds_of(ids)
        return bool(self.nodes.bare[kinds].any()) or bool((self.nodes.leaves(kinds)[1] == DATA).any())

    def _is_told(self, call: _Call, outs: Sequence[Tensor]) -> bool:
        """Whether results that no followed tensor is in may hold what Python, NumPy or others know of the data."""
        if not outs or not (outs[0].is_floating_point() or outs[0].is_complex()):
            # an index; what is made of it is looked at again
            return False
        if call.op == "lift_fresh":
            if not outs[0].untyped_storage().resizable():
                # memory that is not torch's own
                return True
            return bool(self.told) and (outs[0].device.type == "meta" or bool(outs[0].any()))
        counts = bool(_FRESH.match(call.op)) or torch.Tag.pointwise in call.tags or "value" in call.given
        return (counts or not call.tensors or call.op == "_to_copy") and self._may_be_told(call)

    def _may_be_told(self, call: _Call) -> bool:
        """Whether there are numbers among the arguments of an operation that may be made of the data."""
        # the numbers of a softplus, which it gets by default, give it its shape
        if not self.told or call.op == "softplus":
            return False
        # with the one of `1 - t` one cannot tell
        least = 0 if self.told == INTEGERS else 1
        if any(type(v) in (int, float, complex) and v not in range(-least, least + 1) for v in call.given.values()):
            return True
        whole = (t for _, t in call.tensors if not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool))
        return any(storage_key(t) in self.made and self.ids(t) is None for t in whole)

    def _use(self, op: str, entry: tuple[str, Tensor] | None) -> None:
        """A parameter that enters an operation other than those which it is for has another role."""
        if entry and not _NO_USE.match(op):
            module = self.owners[entry[0]][1]
            if op == "repeat" and norm_kind(module).startswith("InstanceNorm") and self._stack[-1][1] is module:
                self.roles[entry[0]].add("norm")
                return
            self.roles[entry[0]].add(self._why)
            if entry[1].dim() > 1:
                self.used_by.setdefault(entry[0], self._why)

    def _take_index(self, call: _Call, *names: str) -> int:
        """Takes arguments that say where something is; DATA or RANDOM where that is in them, or 0."""
        by = 0
        for tensor in call.take(*names):
            ids = self.ids(tensor)
            if ids is None:
                continue
            self.refuse(ids, f"{self._why} takes it for an index")
            by = by if by == DATA else RANDOM if bool((kinds_of(ids) == RANDOM).all()) else DATA
        return by

    def _picked(self, ids: Tensor | None, value: Tensor, by: int) -> Tensor:
        """What an index that holds `by` picks from, or puts somewhere: it is in all that is not zero without units."""
        ids = torch.zeros((), dtype=torch.int64, device="cpu").expand(value.shape) if ids is None else ids
        constant = ids == 0
        if value.device.type != "meta" and constant.any() and not (constant & (value != 0).cpu()).any():
            clean = constant | self.nodes.clean(ids)
        else:
            clean = self.nodes.clean(ids)
        return torch.where(clean, ids, cast(Tensor, self.nodes.join(ids, torch.tensor(by, device="cpu"))))

    def _take_ids(self, call: _Call, name: str) -> Tensor | None:
        """The ids of one argument, which enters the result."""
        ids = None
        for tensor in call.take(name):
            ids = self.ids(tensor)
            self._use(call.op, self.parameter(tensor))
        return ids

    def _everything(self, call: _Call) -> Tensor | None:
        """What all arguments are made of, as one mix."""
        ids = [i for _, t in call.tensors if (i := self.ids(t)) is not None]
        if not ids:
            return None
        return self.nodes.mixed(torch.unique(torch.cat([kinds_of(i) for i in ids])))

    def _rule(self, call: _Call, outs: Sequence[Tensor], tracked: set[str]) -> list[Tensor | None]:
        """The ids of what an operation returns, of which some argument has ids."""
        op, nodes = call.op, self.nodes
        spatial = _SPATIAL.search(op)
        name, first = call.tensors[0]
        x = self.ids(first) if call.args and call.args[0] is first else None
        if any(kind in op for kind in _ATTENTION):
            return [self._attention(call, outs[0]), *itertools.repeat(self._everything(call), len(outs) - 1)]
        if spatial and x is not None and x.dim() > int(spatial[1]):
            n = int(spatial[1])
            self._use(op, self.parameter(*call.take(name)))
            if by := self._take_index(call, "grid"):
                x = self._picked(x, first, by)
            merged = nodes.merge(x.flatten(-n))
            return [merged.reshape(merged.shape + (1,) * n)] * len(outs)
        if op == "clone" or (op == "_to_copy" and outs[0].shape == first.shape):
            return [self._take_ids(call, name)]
        if op in ("copy", "fill") and call.mutable:
            call.take(name)
            return [self._take_ids(call, "src" if op == "copy" else "value")]
        if op in _MOVES:
            return [self._move(call, outs)]
        if op in ("index_add", "scatter_add"):
            return [self._add_at(call, outs[0])]
        if op == "glu" and x is not None:
            call.take(name)
            return [nodes.join(*x.chunk(2, call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", -1)))]
        if op in _REDUCTIONS and x is not None and tracked == {name}:
            self._use(op, self.parameter(*call.take(name)))
            if self.statistics or (self._stack and norm_kind(self._stack[-1][1]) == "RMSNorm"):
                self.notes.append((kinds_of(x), f"{self._norm_here()} couples its units"))
                return [torch.tensor(0, device="cpu")] * len(outs)
            reduced = self._reduce(call, x)
            return [nodes.with_one(reduced) if op in _NOT_ZERO else reduced] * len(outs)
        if op in ("_softmax", "_log_softmax", "_safe_softmax", "cumsum") and x is not None:
            call.take(name)
            # every element is made of all, and they are mixed in no other way than one by one
            merged = nodes.along(x, [call["dim"] % x.dim()]) if x.dim() else x
            return [merged if op == "cumsum" else nodes.with_one(merged)]
        if op in _TO_PYTHON and first.dtype == torch.bool:
            # a condition; a number would come back unseen
            call.take()
            return []
        if outs and (torch.Tag.pointwise in call.tags or op in _POINTWISE):
            return [self._pointwise(call, outs[0])] * len(outs)
        taken = [i for t in call.take() if (i := self.ids(t)) is not None]
        for ids in taken:
            self.refuse(ids, f"{self._why} has no rule")
        for _, tensor in call.tensors:
            self._use(op, self.parameter(tensor))
        kinds = torch.unique(torch.cat([kinds_of(i) for i in taken]))
        _, leaf = nodes.leaves(kinds)
        known = leaf[leaf > RANDOM]
        if len(known) and not nodes.bare[known].any() and not (leaf == DATA).any():
            # of parameters alone: still no data
            return [known[0]] * len(outs)
        return [torch.tensor(DATA, device="cpu")] * len(outs)

    def _pointwise(self, call: _Call, out: Tensor) -> Tensor | None:
        """The union of the arguments; the units alone where those make the result zero when they are."""
        nodes, op = self.nodes, call.op
        tensors = call.take()
        zero = torch.tensor(0, device="cpu")
        ids = [zero if i is None else i for i in map(self.ids, tensors)]
        biases: set[int] = set()
        for i, tensor in enumerate(tensors):
            entry, others = self.parameter(tensor), ids[:i] + ids[i + 1 :]
            if entry is None:
                continue
            if len(others) == 1 and others[0] is not zero:
                if op == "add" and call["alpha"] in (None, 1) and self._is_bias(entry[0], others[0]):
                    self.roles[entry[0]].add("bias")
                    ids[i] = zero
                    biases.add(i)
                    continue
                if self._scale(entry, tensor, others[0]):
                    ids[i] = zero
                    continue
            self._use(op, entry)
        tracked = [k for k, i in enumerate(ids) if i is not zero]
        wide, shape = nodes.uncrossed([ids[k].expand(out.shape) for k in tracked] or [zero.expand(out.shape)])
        # 0: constant, 1: zero where its units are, 2: anything else
        codes = [(i > 0).long() + (nodes.bare[i] != i) for i in wide]
        code = cast(Tensor, sum(c * 3**k for k, c in enumerate(codes)))
        joined = result = None
        for number in torch.unique(code).tolist():
            kinds = [0] * len(ids)
            for k, i in enumerate(tracked):
                kinds[i] = number // 3**k % 3
            # with its units, a layer's bias is zero too
            zeros = [kind == 1 or i in biases for i, kind in enumerate(kinds)]
            is_zero = 1 in kinds and self._is_zero(call, tensors, kinds, zeros)
            if is_zero and 2 in kinds:
                new = nodes.union([nodes.bare[i] if kinds[k] == 2 else i for i, k in zip(wide, tracked, strict=True)])
            else:
                joined = nodes.union(wide) if joined is None else joined
                # of units, and not zero without them: this goes for the join only where no data is in it
                new = nodes.with_one(joined) if 1 in kinds and not is_zero else joined
            result = new if result is None else torch.where(code == number, new, result)
        assert result is not None
        if self._may_be_told(call):
            # what is not zero without its units has one of the numbers in it
            data = torch.tensor(DATA, device="cpu")
            result = torch.where(nodes.clean(result), result, cast(Tensor, nodes.join(result, data)))
        return result.expand(shape)

    def _is_zero(self, call: _Call, tensors: Sequence[Tensor], kinds: Sequence[int], zeros: Sequence[bool]) -> bool:
        """Whether an element-wise operation gives zero where some arguments are, whatever those of kind 2 are."""
        if torch.Tag.nondeterministic_seeded in call.tags:
            return call.op in _DROPOUTS
        stand_ins: dict[int, Tensor] = {}
        known: list[Any] = []
        for i, (tensor, kind) in enumerate(zip(tensors, kinds, strict=True)):
            constant = kind == 0 and tensor.numel() == 1 and tensor.device.type != "meta"
            if zeros[i]:
                stand_in = torch.zeros(_SAMPLES, dtype=tensor.dtype, device="cpu")
            elif constant:
                stand_in = tensor.detach().reshape(()).cpu().expand(_SAMPLES).clone()
                known.append(stand_in[0].item())
            else:
                stand_in = _samples(tensor.dtype, i)
            stand_ins[id(tensor)] = stand_in
        others = [v for v in leaves_of(call.args, call.kwargs) if not isinstance(v, Tensor)]
        key = (call.func, tuple(t.dtype for t in tensors), tuple(kinds), tuple(zeros), str(known), str(others))
        if key not in self._probed:
            args, kwargs = tree_map(
                lambda v: stand_ins.get(id(v), v) if isinstance(v, Tensor) else v, (call.args, call.kwargs)
            )
            kwargs = {k: v for k, v in kwargs.items() if k not in call.outs}
            try:
                packet = call.func._overloadpacket if call.outs else call.func
                result = leaves_of(packet(*args, **kwargs))[0]
                self._probed[key] = not bool(result.ne(0).any())
            except Exception:  # an operation may refuse what it is tried on
                self._probed[key] = False
        return self._probed[key]

    def _is_bias(self, name: str, ids: Tensor) -> bool:
        """Whether a parameter is the bias of the very layers that make the units it is added to."""
        module = self.owners[name][1]
        if not name.endswith("bias") or norm_kind(module):
            return False
        kinds = kinds_of(ids)
        maker = self.nodes.source_of(int(kinds[0]))
        if maker is not None and maker.axis is not None and int(kinds[-1]) < maker.first + maker.size:
            # in the usual case, all are units of one layer
            return self.owners[maker.parameter][1] is module
        _, leaves = self.nodes.leaves(kinds)
        units = leaves[self.nodes.is_unit(leaves)]
        makers = {self.nodes.sources[i - 1].parameter for i in torch.unique(self.nodes.origin[units]).tolist()}
        return bool(makers) and len(units) == len(leaves) and {self.owners[maker][1] for maker in makers} == {module}

    def _scale(self, entry: tuple[str, Tensor], tensor: Tensor, ids: Tensor) -> bool:
        """Notes a parameter that multiplies units, or is added to them; whether it is the scale of a norm."""
        name, parameter = entry
        owner, module = self.owners[name]
        if norm_kind(module) == "RMSNorm" and tensor.shape == parameter.shape and self._stack[-1:] == [(owner, module)]:
            if name.endswith("weight"):
                self.roles[name].add("norm")
                self._record("norm", owner, ids.flatten(-parameter.dim()), -1)
                return True
        elif not norm_kind(module) and isinstance(parameter, nn.Parameter):
            ids = self.nodes.bare[kinds_of(ids)]
            self.notes.append((ids, f"'{name}' goes into its units and is left as it is"))
        return False

    def _matmul(self, call: _Call, out: Tensor) -> Tensor | None:
        op, nodes = call.op, self.nodes
        names = _schema_of(call.func).names[op in _SUMMING :][:2]
        first, second = (call[name] for name in names)
        entries = self.parameter(first), self.parameter(second)
        weights = [e if e and e[1].dim() > 1 else None for e in entries]
        added = call["self"] if op in _SUMMING else None
        if (weights[0] or weights[1]) and not all(weights):
            call.take(*names)
            name, parameter = weights[1] or weights[0]  # type: ignore[misc]
            weight, x = (second, first) if weights[1] else (first, second)
            if not weights[1]:
                # out = W x: the units are rows of the result, features are rows of x
                weight, x = weight.transpose(-1, -2), x.transpose(-1, -2)
            axis = _axis_of(weight, parameter)
            ids = self.ids(x)
            self._use(op, entries[0] if weights[1] else entries[1])
            if axis is None:
                self.roles[name].add("a slice or a reshape of it")
                self.refuse(ids, f"it is read through a slice or a reshape of '{name}'")
                return torch.tensor(DATA, device="cpu")
            self._read(name, axis, ids, -1)
            self.roles[name].add("matrix product" if axis == 1 else "matrix product with its transpose")
            made = nodes.source(name, 1 - axis, weight.shape[-1])
            made = made if weights[1] else made[:, None]
            return self._with_bias(call, added, made.expand(out.shape))
        a, b = self.ids(first), self.ids(second)
        for name in names:
            self._take_ids(call, name)
        for own, other in ((a, b), (b, a)):
            if own is not None and other is not None and self._is_computed(own):
                self.refuse(other, f"{self._why} multiplies it by a weight that is computed, not a parameter")
        rows = None if a is None else nodes.merge(a)[..., :, None].expand(out.shape)
        columns = None if b is None else nodes.merge(b.transpose(-1, -2))[..., None, :].expand(out.shape)
        return self._with_bias(call, added, nodes.product(rows, columns))

    def _is_computed(self, ids: Tensor) -> bool:
        """Whether a tensor is made of parameters alone."""
        _, leaf = self.nodes.leaves(kinds_of(ids))
        return bool((leaf > RANDOM).any()) and not bool(self.nodes.bare[leaf].any()) and not bool((leaf == DATA).any())

    def _with_bias(self, call: _Call, bias: Any, made: Tensor | None) -> Tensor | None:
        """The ids of a layer's result with its summand: its own bias adds none."""
        if not isinstance(bias, Tensor):
            return made
        name = next(name for name, t in call.tensors if t is bias)
        entry = self.parameter(bias)
        if entry and made is not None and call["beta"] in (None, 1) and self._is_bias(entry[0], made):
            call.take(name)
            self.roles[entry[0]].add("bias")
            return made
        added = self._take_ids(call, name)
        if added is not None and made is not None:
            return self.nodes.join(made, added.expand(made.shape))
        if added is None:
            return made if made is None else self.nodes.with_one(made)
        return added

    def _read(self, name: str, axis: int, ids: Tensor | None, along: int) -> None:
        owner = self.owners[name][1]
        if not self._stack or self._stack[-1][1] is not owner:
            self.outside.add(name)
        if ids is not None:
            self._record("read", (name, axis), ids, along)

    def _convolution(self, call: _Call, out: Tensor) -> Tensor | None:
        x, weight, bias = call["input"], call["weight"], call["bias"]
        transposed, groups = call["transposed"], call["groups"]
        entry, ids = self.parameter(weight), self.ids(x)
        spread = (1,) * (out.dim() - 2)
        call.take("input")
        self._use(call.op, self.parameter(x))
        if entry is None or weight.shape != entry[1].shape:
            self.refuse(ids, f"{self._why} multiplies it by a weight that is computed, not a parameter")
            return torch.tensor(DATA, device="cpu")
        name = entry[0]
        call.take("weight")
        if groups > 1 and groups == x.shape[1] and ids is not None and not transposed:
            channels = self.nodes.merge(ids.flatten(2))
            if (self.nodes.bare[channels] > 0).any():
                channels = channels.repeat_interleave(out.shape[1] // groups, 1)
                self._record("pass", (name, 0), channels, 1)
                self.roles[name].add("depthwise convolution")
                if bias is not None:
                    own = self.parameter(bias)
                    call.take("bias")
                    if own and self.owners[own[0]][1] is self.owners[name][1] and own[0].endswith("bias"):
                        self.roles[own[0]].add("bias")
                    else:
                        self._use(call.op, own)
                        added = self.ids(bias)
                        channels = cast(Tensor, self.nodes.join(channels, added))
                        channels = self.nodes.with_one(channels) if added is None else channels
                return channels.reshape(channels.shape + spread).expand(out.shape)
        self.roles[name].add("convolution")
        self._read(name, int(not transposed), ids, 1)
        made = self._with_bias(call, bias, self.nodes.source(name, int(transposed), out.shape[1]))
        return cast(Tensor, made).reshape(-1, *spread).expand(out.shape)

    def _norm(self, call: _Call) -> Tensor | None:
        op, nodes = call.op, self.nodes
        x = call["input"]
        ids = self.ids(x)
        call.take("input")
        self._use(op, self.parameter(x))
        features = "layer" in op or "rms" in op
        if ids is None:
            for tensor in call.take():
                self._use(op, self.parameter(tensor))
            return None
        axis, columns = (-1, ids.flatten(-len(call["normalized_shape"]))) if features else (1, ids)
        # entries of a norm in their own role; what else scales, shifts or is said to be a statistic enters the result
        of_norm: list[str] = []
        result: Tensor = ids
        for key in ("weight", "bias", "running_mean", "running_var"):
            tensor = call[key]
            if not isinstance(tensor, Tensor):
                continue
            entry = self.parameter(tensor)
            if entry and key.startswith("running") and call.given.get("training", "no_update" not in op):
                self._note_written(entry[0], ids)
            owner, module = self.owners[entry[0]] if entry else ("", None)
            whole = entry is not None and tensor.shape == entry[1].shape and entry[0] == _join(owner, key)
            if entry and whole and norm_kind(module):
                call.take(key)
                self.roles[entry[0]].add("norm")
                of_norm.append(owner)
                continue
            repeated = self._repeated(tensor, key)
            own = self.ids(tensor)
            if repeated:
                call.take(key)
                channels = columns.movedim(1, 0)
                size = norm_shape(self.modules[repeated])[0]
                for first in range(0, len(channels), size):
                    self._record("norm", repeated, channels[first : first + size], 0)
                continue
            if key.startswith("running") or own is None:
                # a constant shift, or statistics that were copied for every sample
                result = nodes.with_one(result) if own is None and key == "bias" else result
                if own is None:
                    call.take(key)
                continue
            added = self._take_ids(call, key)
            assert added is not None
            shape = added.shape if features else (added.shape[0], *(1,) * (ids.dim() - 2))
            added = added.reshape(shape).expand(ids.shape)
            joined = nodes.product(result, added) if key == "weight" else nodes.join(result, added)
            result = cast(Tensor, joined)
        owners = dict.fromkeys(of_norm)
        if len(owners) > 1:
            self.refuse(ids, f"{self._why} takes entries of several norms: {', '.join(owners)}")
        for owner in owners:
            self._record("norm", owner, columns, axis)
        # of an instance norm on features without channels, a channel is a sample
        thin = narrow(columns)[0][0]
        if "batch" in op and thin.numel() == thin.shape[axis]:
            return result
        if "batch" in op:
            across = nodes.merge(columns.transpose(0, 1).flatten(1)).reshape(-1, *(1,) * (ids.dim() - 2))
            _, leaf = nodes.leaves(kinds_of(across))
            if bool((nodes.mix[leaf] > 0).any()):
                result = cast(Tensor, nodes.join(result, across))
        else:
            self.notes.append((kinds_of(ids), f"{self._norm_here()} couples its units"))
            result = nodes.with_one(result) if op in _NOT_ZERO else result
        return result

    def _norm_here(self) -> str:
        return label(*self._stack[-1]) if self._stack else "a norm"

    def _repeated(self, tensor: Tensor, key: str) -> str:
        """The instance norm of which a tensor repeats the scale or shift for every sample, or an empty string."""
        ids = self.ids(tensor)
        if ids is None or key not in ("weight", "bias"):
            return ""
        kinds = kinds_of(ids)
        source = self.nodes.source_of(int(kinds[0]))
        if len(kinds) != 1 or source is None:
            return ""
        name = source.parameter
        owner, module = self.owners.get(name, ("", None))
        of_norm = module is not None and norm_kind(module).startswith("InstanceNorm")
        return owner if of_norm and name == _join(owner, key) else ""

    def _attention(self, call: _Call, out: Tensor) -> Tensor | None:
        nodes = self.nodes
        value = self.ids(call["value"])
        names = ("query", "key", "value", "attn_mask", "attn_bias")
        mixing = []
        for name in names:
            ids = self._take_ids(call, name)
            if ids is not None and name != "value":
                mixing.append(kinds_of(ids))
        mixed = nodes.merge(torch.cat(mixing)) if mixing else None
        # one layer's units decide over all values, also where a single one does
        mixed = None if mixed is None else nodes.with_data(mixed)
        if value is not None:
            value = nodes.merge(value.transpose(-1, -2))
            value = value.repeat_interleave(out.shape[-3] // value.shape[-2], -2) if value.dim() > 1 else value
            value = value[..., None, :].expand(out.shape)
        return nodes.product(value, None if mixed is None else mixed.expand(out.shape))

    def _move(self, call: _Call, outs: Sequence[Tensor]) -> Tensor | None:
        """An operation that only moves elements is carried out on their ids."""
        op, nodes = call.op, self.nodes
        moved = {"index_put": ("self", "values"), "slice_scatter": ("self", "src"), "select_scatter": ("self", "src")}
        names = moved.get(op, (call.tensors[0][0],))
        for name in names:
            for tensor in call.take(name):
                self._use(op, self.parameter(tensor))
        by = self._take_index(call, "index", "indices")
        places = [t for _, t in call.tensors if not any(t is other for n in names for other in leaves_of(call[n]))]
        if any(t.device.type == "meta" for t in places):
            for name in names:
                for tensor in leaves_of(call[name]):
                    self.refuse(self.ids(tensor), f"{self._why} has no rule")
            return torch.tensor(DATA, device="cpu")

        def ids_of(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if any(value is place for place in places):
                return value.cpu()
            ids = self.ids(value)
            zeros = torch.zeros((), dtype=torch.int64, device="cpu").expand(value.shape)
            return zeros if ids is None else ids

        if op in ("cat", "stack"):
            return self._side_by_side(call, [ids_of(t) for t in call.args[0]], outs[0])
        args, kwargs = (call.args[:2], {}) if op == "constant_pad_nd" else (call.args, dict(call.kwargs))
        args, kwargs = tree_map(ids_of, (args, {k: v for k, v in kwargs.items() if k not in call.outs}))
        if by or op == "index_put":
            return self._move_by_index(call, args, kwargs, by)
        ids = _on_ids(call.func, args, kwargs)
        if op == "constant_pad_nd" and call.args[2:] and call.args[2] != 0:
            filled = (ids == 0) & (nodes.bare[args[0]].any())
            ids = torch.where(filled, DATA if self.told else ONE, ids)
        return ids

    def _side_by_side(self, call: _Call, ids: list[Tensor], out: Tensor) -> Tensor:
        """`cat` and `stack`, for which axes where nothing varies stay narrow."""
        axis = call["dim"] or 0
        if call.op == "stack":
            axis = axis % out.dim()
            ids = [i.unsqueeze(axis) for i in ids]
        else:
            axis = axis % out.dim()
            # an empty tensor of one axis goes with all
            ids = [i for i in ids if i.dim() == out.dim()]
        sizes = [i.shape[axis] for i in ids]
        wide = [i.narrow(axis, 0, 1) if i.shape[axis] > 1 and same_along(i, axis) else i for i in ids]
        thin = [narrow(i)[0][0] for i in wide]
        shape = [max(i.shape[k] for i in thin) for k in range(out.dim())]
        parts = []
        for i, size in zip(thin, sizes, strict=True):
            parts.append(i.expand([size if k == axis else shape[k] for k in range(out.dim())]))
        return torch.cat(parts, axis).expand(out.shape)

    def _move_by_index(self, call: _Call, args: Any, kwargs: Any, by: int) -> Tensor:
        """Elements that data chooses may be any along the axes that are indexed; so may be where they are put."""
        nodes, op = self.nodes, call.op
        x = args[0]
        if op in ("index", "index_put"):
            axes: list[int] = []
            at = 0
            for index in call.given["indices"]:
                count = index.dim() if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else 1
                axes += range(at, at + count) if index is not None else []
                at += count
        else:
            flat = op == "take_along_dim" and call["dim"] is None
            axes = list(range(x.dim())) if flat else [int(call["dim"]) % max(x.dim(), 1)]
        anywhere = (lambda ids: nodes.along(ids, axes)) if by else (lambda ids: ids)
        if by:
            x = self._picked(x, call.args[0], by)
        if op != "index_put":
            return _on_ids(call.func, (anywhere(x), *args[1:]), kwargs)
        values = args[2]
        if by:
            values = self._picked(values, call["values"], by)
            rest = x.dim() - len(axes)
            lead = max(values.dim() - rest, 0)
            if lead:
                merged = nodes.merge(values.reshape(-1, *values.shape[lead:]).movedim(0, -1))
                values = merged.expand(values.shape)
        packet = torch.ops.aten.index_put.default
        after = packet(x, args[1], values.expand(values.shape), False)
        accumulates = bool((len(args) > 3 and args[3]) or kwargs.get("accumulate"))
        if accumulates or by:
            after = cast(Tensor, nodes.join(anywhere(x), anywhere(after)))
        return after

    def _add_at(self, call: _Call, out: Tensor) -> Tensor | None:
        """index_add and scatter_add: every place may receive what any row of the source holds."""
        own = self._take_ids(call, "self")
        name = "source" if call["source"] is not None else "src"
        source = self._take_ids(call, name)
        if by := self._take_index(call, "index"):
            source = self._picked(source, call[name], by)
        if source is not None and source.dim():
            axis = call["dim"]
            source = self.nodes.merge(source.movedim(axis, -1)).unsqueeze(axis)
            if all(n in (1, m) for n, m in zip(source.shape, out.shape, strict=True)):
                source = source.expand(out.shape)
            else:
                source = self.nodes.merge(source.flatten()).expand(out.shape)
        return self.nodes.join(own, source)

    def _reduce(self, call: _Call, ids: Tensor) -> Tensor:
        axes = call["dim"]
        axes = list(range(ids.dim())) if axes in (None, []) else [axes] if isinstance(axes, int) else list(axes)
        axes = [axis % ids.dim() for axis in axes] if ids.dim() else []
        merged = self.nodes.along(ids, axes) if axes else ids
        place = slice(0, 1) if call["keepdim"] else 0
        return merged[tuple(place if i in axes else slice(None) for i in range(ids.dim()))]


_log = logging.getLogger("cbp_fast")
_SAMPLES = 24


def _samples(dtype: torch.dtype, number: int) -> Tensor:
    """Values of many sizes and both signs, the same ones each time."""
    generator = torch.Generator("cpu").manual_seed(number)
    if dtype == torch.bool:
        return torch.rand(_SAMPLES, generator=generator, device="cpu") < 0.5
    values = torch.randn(_SAMPLES, generator=generator, dtype=torch.float32, device="cpu") * 3
    values[::5] = values[::5].sign()
    if not (dtype.is_floating_point or dtype.is_complex):
        values = values.abs().ceil()
    return values.to(dtype)


def _is_data(ids: Tensor) -> bool:
    """Whether it is plain to see that all of it is data."""
    (thin,), _ = narrow(ids)
    return thin.numel() == 1 and int(thin) == DATA


def _on_ids(func: Any, args: Any, kwargs: Any) -> Tensor:
    """What an operation that moves elements makes of ids: of int64 where it can, and of float64, exact for them too."""
    if func._schema.is_mutable:
        func, kwargs = func._overloadpacket, {k: v for k, v in kwargs.items() if k != "out"}
        args = (args[0].clone(), *args[1:])
    try:
        return cast(Tensor, func(*args, **kwargs)).long()
    except (NotImplementedError, RuntimeError):
        args = tree_map(lambda v: v.double() if isinstance(v, Tensor) and v is args[0] else v, args)
        return cast(Tensor, func(*args, **kwargs)).long()


def _seen_through(shadow: _Shadow, tensor: Tensor) -> Tensor | None:
    """The ids of a view of the storage as a view of the shadow's; None if they do not repeat as the view does."""
    run, period = shadow.run, len(shadow.ids)
    offset = tensor.storage_offset()
    inner, reach, strides = offset % run, offset // run % period, []
    first = reach
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 1 or stride % (run * period) == 0:
            strides.append(0)
        elif stride % run == 0:
            strides.append(stride // run)
            reach += (size - 1) * strides[-1]
        else:
            strides.append(0)
            inner += (size - 1) * stride
    if inner >= run or reach >= period:
        return None
    return shadow.ids.as_strided(tensor.shape, strides, first)


def _join(owner: str, key: str) -> str:
    return f"{owner}.{key}" if owner else key


def _bytes_of(tensor: Tensor) -> range:
    """The bytes of its storage that a tensor reaches."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first, size = tensor.storage_offset(), tensor.element_size()
    return range(first * size, (first + last + 1) * size)


def _axis_of(weight: Tensor, parameter: Tensor) -> int | None:
    """The axis along which a parameter reads, by its view `weight` [..., K, N] in x @ weight; None for a part of it."""
    while weight.dim() > 2 and (weight.shape[0] == 1 or weight.stride(0) == 0):
        weight = weight[0]
    if weight.dim() > 2 or weight.numel() != parameter.numel() or parameter.shape[:2].numel() != parameter.numel():
        return None
    shape, strides = parameter.shape[:2], parameter.stride()[:2]
    if weight.shape == shape[::-1] and (weight.stride() == strides[::-1] or 1 in shape):
        return 1
    return 0 if weight.shape == shape and weight.stride() == strides else None
