"""Which units each element of an activation is made of, followed through one forward by a TorchDispatchMode.

Every storage that the forward writes owns one id per element, so that views, chunks, permutations and in-place
operations need no rule. An id is a node: a constant (0), data that no unit makes (1), one unit, the join of two nodes
(an element-wise operation), or the mix of many (a sum over features).
"""

from __future__ import annotations

import gc
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from .running import Preserving, alive, constants, storage_key
from .snapshot import Snapshot
from .unit_groups import NORMS, kind, label

DATA = 1
BASE = 2**31  # ids are below it, so that a pair fits an int64

_SUMMING = ("addmm", "baddbmm", "_sparse_addmm")
_MATMULS = ("mm", "bmm", *_SUMMING)
_NORM_OPS = ("batch_norm", "native_layer_norm", "native_group_norm", "_fused_rms_norm")
_ATTENTION = ("scaled_dot_product", "flash_attention", "efficient_attention")
# f(0, b) = 0, or a constant: data on one side alone does not reach the result when the units on the other are zero
_PRODUCTS = ("mul", "div", "masked_fill", "_prelu_kernel")
_POINTWISE = ("hardswish", "mish", "log_sigmoid_forward", "_prelu_kernel", "rrelu_with_noise", "native_dropout", "copy")
# operations that only move elements, or reduce them along axes
_MOVING = """cat stack index index_select gather repeat flip roll constant_pad_nd pixel_shuffle pixel_unshuffle
    channel_shuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d im2col tril triu index_put slice_scatter select_scatter take_along_dim"""
_REDUCING = "mean sum amax amin max min var std var_mean std_mean prod linalg_vector_norm norm logsumexp any all"
_MOVES, _REDUCTIONS = frozenset(_MOVING.split()), frozenset(_REDUCING.split())
_SPATIAL = re.compile(r"(?:pool|upsample_\w+?|grid_sampler_)([123])d")
_FRESH = re.compile("empty|zeros|ones|full|new_|rand|arange|scalar_tensor|zero|fill|lift")
_DRAWS = ("bernoulli", "normal", "uniform", "exponential", "random")
_HIDDEN = "what was made by code that cannot be followed"
_LIVING = (
    "its units are kept after the forward, outside of the model and its output: in a container or an object of the "
    "caller, in a global or in a thread"
)
_TO_PYTHON = ("_local_scalar_dense", "equal", "is_nonzero", "_is_all_true", "_is_any_true")
_DATA_SIZED = ("nonzero", "_unique2", "masked_select")


def scramble(ids: Tensor) -> Tensor:
    """A hash of int64 `ids`, to be summed over a set; 0 stays 0."""
    ids = ids * -7046029254386353131
    ids = (ids ^ (ids >> 29)) * -4658895280553007687
    return ids ^ (ids >> 32)


def _narrow(*ids: Tensor) -> tuple[list[Tensor], torch.Size]:
    """Ids broadcast together, with one entry along every axis where none varies, and the shape to expand to."""
    wide = torch.broadcast_tensors(*ids)
    shape = wide[0].shape
    for axis, size in enumerate(shape):
        if size > 1 and all(_same_along(t, axis) for t in wide):
            wide = [t.narrow(axis, 0, 1) for t in wide]
    return list(wide), shape


def _same_along(ids: Tensor, axis: int) -> bool:
    # most often all positions hold the same, and what looks at many of them is slow
    return ids.stride(axis) == 0 or (ids.numel() > 4096 and torch.equal(ids.narrow(axis, 0, 1).expand_as(ids), ids))


def _kinds(ids: Tensor) -> Tensor:
    """The different ids, int64 [n]."""
    (ids,), _ = _narrow(ids)
    return torch.unique(ids)


class Source(NamedTuple):
    """Consecutive ids: the units that a weight makes along an axis, or (axis None) the entries of a parameter."""

    parameter: str
    axis: int | None
    first: int
    size: int


class Nodes:
    """The table of nodes.

    Attributes:
        sources: what the ids of units and of parameters' entries stand for.
        mixes: ids that each mix is made of, and the operation that mixed them.
    """

    def __init__(self) -> None:
        self._table = torch.zeros(4, 1024, dtype=torch.int64, device="cpu")
        self.size = 2
        self.sources = [Source("", None, DATA, 1)]
        self.mixes: list[tuple[Tensor, str]] = []
        self._source_of: dict[tuple[str, int | None], int] = {}
        self._joins: dict[int, int] = {}
        self._mix_of: dict[int, int] = {}

    @property
    def left(self) -> Tensor:
        """First child of a join; 0 for a unit, and -1 - i for the mix i; int64."""
        return self._table[0]

    @property
    def right(self) -> Tensor:
        """Second child of a join, int64."""
        return self._table[1]

    @property
    def bare(self) -> Tensor:
        """The node without data and parameters, int64."""
        return self._table[2]

    @property
    def origin(self) -> Tensor:
        """Number of the source, or a hash of the children's, int64; equal ones are not joined but mixed."""
        return self._table[3]

    def _add(self, count: int) -> slice:
        new = slice(self.size, self.size + count)
        self.size = new.stop
        if self.size > self._table.shape[1]:
            self._table = torch.nn.functional.pad(self._table, (0, 2 * self.size - self._table.shape[1]))
        return new

    def source(self, parameter: str, axis: int | None, count: int) -> Tensor:
        """The ids of a source, int64 [count]; new ones the first time."""
        key = parameter, axis
        if key not in self._source_of:
            new = self._add(count)
            self._source_of[key] = len(self.sources)
            self.origin[new] = len(self.sources)
            self.sources.append(Source(parameter, axis, new.start, count))
            if axis is not None:
                self.bare[new] = torch.arange(new.start, new.stop, device="cpu")
        first = self.sources[self._source_of[key]].first
        return torch.arange(first, first + count, device="cpu")

    def join(self, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        """The union of two ids, element by element."""
        if a is None or b is None:
            return b if a is None else a
        (a, b), shape = _narrow(a, b)
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        new = (low != high) & (low > 0)
        if new.any():
            pairs, where = torch.unique(low[new] * BASE + high[new], return_inverse=True)
            high[new] = self._joined(pairs)[where]
        return high.expand(shape)

    def _joined(self, pairs: Tensor) -> Tensor:
        keys = pairs.tolist()
        ids = torch.tensor([self._joins.get(key, 0) for key in keys], device="cpu")
        fresh = ids == 0
        if fresh.any():
            left, right = pairs[fresh] // BASE, pairs[fresh] % BASE
            new = self._add(len(left))
            ids[fresh] = torch.arange(new.start, new.stop, device="cpu")
            self._joins.update(zip(keys, ids.tolist(), strict=True))
            self.left[new], self.right[new] = left, right
            self.origin[new] = scramble(self.origin[left]) ^ self.origin[right] | -(2**62)
            self.bare[new] = ids[fresh]
            less = (self.bare[left] != left) | (self.bare[right] != right)
            if less.any():
                bare = self.join(self.bare[left[less]], self.bare[right[less]])
                self.bare[ids[fresh][less]] = cast(Tensor, bare)
        return ids

    def product(self, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        """The union of two factors; what is not made by units stays only where both factors hold some."""
        if a is None or b is None:
            return b if a is None else a
        (a, b), shape = _narrow(a, b)
        special = (self.bare[a] == a) | (self.bare[b] == b)
        one = (a == 0) | (b == 0)
        strip = special & ~one
        joined = self.join(torch.where(strip, self.bare[a], a), torch.where(strip, self.bare[b], b))
        assert joined is not None
        return joined.expand(shape)

    def merge(self, ids: Tensor, why: str) -> Tensor:
        """The union over the last axis: [..., K] -> [...]. Units of one source are mixed, by the operation `why`."""
        (ids,), shape = _narrow(ids)
        if not ids.numel():
            return ids.new_zeros(()).expand(shape[:-1])
        high = ids.amax(-1)
        mixed = torch.where(ids == 0, high[..., None], ids).amin(-1) != high
        if mixed.any():
            rows = _distinct(ids[mixed])
            keys, where = torch.unique(scramble(rows).sum(-1), return_inverse=True)
            first = torch.full_like(keys, len(rows)).scatter_reduce_(
                0, where, torch.arange(len(rows), device="cpu"), "amin"
            )
            high[mixed] = self._union(rows[first], keys.tolist(), why)[where]
        return high.expand(shape[:-1])

    def _union(self, rows: Tensor, keys: list[int], why: str) -> Tensor:
        """One id for each row of distinct ids, the largest first."""
        origins = torch.where(rows > 0, self.origin[rows], 0).sort(-1).values
        apart = ~((origins[:, 1:] == origins[:, :-1]) & (origins[:, 1:] != 0)).any(-1)
        out = rows[:, 0].clone()
        if apart.any():
            joined, *others = rows[apart].unbind(-1)
            for column in others:
                joined = cast(Tensor, self.join(joined, column))
            out[apart] = joined
        for i in (~apart).nonzero()[:, 0].tolist():
            if keys[i] not in self._mix_of:
                (node,) = range(*self._add(1).indices(self.size))
                self._mix_of[keys[i]] = node
                self.left[node], self.bare[node], self.origin[node] = -1 - len(self.mixes), node, keys[i] | -(2**62)
                self.mixes.append((rows[i][rows[i] > 0], why))
            out[i] = self._mix_of[keys[i]]
        return out

    def leaves(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Units, entries of parameters, data and mixes that `ids` [n] are made of: indices into it, and nodes."""
        row, node = torch.arange(len(ids), device="cpu"), ids
        rows: list[Tensor] = []
        nodes: list[Tensor] = []
        while len(node):
            leaf = self.left[node] <= 0
            if not rows and leaf.all():
                return row, node
            rows.append(row[leaf])
            nodes.append(node[leaf])
            row, node = row[~leaf], node[~leaf]
            pairs = torch.unique(torch.cat([row * BASE + self.left[node], row * BASE + self.right[node]]))
            row, node = pairs // BASE, pairs % BASE
        pairs = torch.unique(torch.cat(rows) * BASE + torch.cat(nodes)) if rows else ids
        return pairs // BASE, pairs % BASE

    def units(self, ids: Tensor) -> Tensor:
        """Every unit that `ids` hold, mixes included."""
        found, todo, done = [], ids, set[int]()
        while len(todo):
            _, nodes = self.leaves(todo)
            found.append(nodes[(self.left[nodes] == 0) & (self.bare[nodes] > 0)])
            mixes = set(nodes[self.left[nodes] < 0].tolist()) - done
            done |= mixes
            todo = torch.cat([ids[:0], *(self.mixes[-1 - int(self.left[m])][0] for m in mixes)])
        return torch.unique(torch.cat([ids[:0], *found]))


def _distinct(rows: Tensor) -> Tensor:
    """Rows with every id once, the largest first, then zeros."""
    rows = rows.sort(-1, descending=True).values
    again = torch.zeros_like(rows, dtype=torch.bool)
    again[:, 1:] = rows[:, 1:] == rows[:, :-1]
    rows = rows.masked_fill(again, 0).sort(-1, descending=True).values
    return rows[:, : int((rows > 0).sum(-1).max())]


# methods of tensors by which values leave for code that is not followed, and those that let it write, too
_READING = ("tolist", "__repr__", "__deepcopy__", "share_memory_")
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
        array = name == "__get__" and getattr(func, "__self__", None) is Tensor.__cuda_array_interface__
        out = func(*args, **(kwargs or {}))
        # the look itself asks for addresses, too
        ours = sys._getframe(1).f_globals.get("__name__") in _OURS
        if (array or name in _READING or name in _OPENING) and not ours:
            for t in args:
                if isinstance(t, Tensor):
                    self._leaves(t, f"{name}() takes its values out of the model's operations", name in _READING)
            if isinstance(out, Tensor) and name == "__deepcopy__":
                self.trace.open(out, f"{name}() made it")
        return out

    def _leaves(self, t: Tensor, why: str, read_only: bool) -> None:
        entry = self.trace.parameter(t)
        if entry:
            self.trace.roles[entry[0]].add(why.partition(" ")[0])
        elif self.elsewhere:
            self.trace.open(t, why)
        elif storage_key(t) in self.trace.made:
            self.trace.refuse(self.trace.ids(t), why)
            if not read_only:
                self.trace.open(t, why)


class _Shadow(NamedTuple):
    ids: Tensor  # [period]: element i of the storage has ids[i % period]
    elements: int
    itemsize: int


class Trace(Preserving):
    """Follows units through all that runs under it.

    Attributes:
        nodes: what ids mean.
        records: by role ("read", "norm" or "pass", for a depthwise convolution) and layer (parameter and axis, or name
            of a norm): pairs of positions along that axis and ids seen there.
        roles: what each weight is used for; a second role forbids it.
        refused: ids and why their units are refused, in the order of the forward.
        notes: ids and what is said of their units.
        scaled: ids and the parameter that multiplies or is added to them.
        outside: weights that were read elsewhere than in the forward of their own module.
        seen: parameters that were used; `used_by`: those that an operation without a rule used.
        branches: operations that handed a value to Python.
        modules: of the model, by name.
        owners: name and module that each parameter and buffer belongs to.
        tied: parameters that share their memory, and with which.
        paths: operations of the forwards, each in its first run.
        random: whether a path may depend on random numbers.
        unsure: whether a tensor appeared of which it is not known whether it was there before the forward.
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
        self.owners: dict[str, tuple[str, nn.Module]] = {}
        self.tied: dict[str, str] = {}
        self._parameters: dict[int, tuple[str, Tensor]] = {}
        self._shadows: dict[int, _Shadow] = {}
        self._kept: list[Tensor] = []
        self._stack: list[tuple[str, nn.Module]] = []
        self._why = ""
        self.modules = dict(model.named_modules())
        for prefix, module in self.modules.items():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.numel():
                    name = f"{prefix}.{key}" if prefix else key
                    first, other = self._parameters.setdefault(storage_key(tensor), (name, tensor))
                    if other is not tensor or first != name:
                        self.tied |= {first: name, name: first}
                    self.owners.setdefault(name, (prefix, module))
        self.paths: list[Any] = []
        self.random = False
        self._own = dict(self._parameters)
        self._constants = constants(model)
        self.unsure = self._everything = False

    @property
    def where(self) -> str:
        """The operation that was followed last, and the module."""
        return self._why or "its first operation"

    def begin(self, known: Iterable[Tensor], everything: bool) -> None:
        """Before a forward: `known` tensors, or everything there is, it does not make."""
        self.unsure = False
        self._everything = everything
        self.known = alive() if everything else set(map(storage_key, known))
        self.known |= self._constants

    def end(self) -> None:
        """After a forward, when its results are gone and the model is as before: refuses what is alive all the same."""
        for key, why in self.opened.items():
            if key in self._parameters:
                self.roles[self._parameters[key][0]].add("what another thread does with it")
            elif key in self._shadows:
                self.refuse(self._shadows[key].ids, why)
        for again in (True, False):
            living = [
                shadow.ids
                for key, shadow in self._shadows.items()
                if not cast(StorageWeakRef, self.made[key]).expired() and shadow.ids.max() > DATA
            ]
            if living and again:
                gc.collect()
        for ids in living:
            self.refuse(ids, _LIVING)
        self.forget()
        self._shadows.clear()
        self._kept.clear()
        self._parameters = dict(self._own)

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
        if ids is not None:
            self.refused.append((_kinds(ids), reason))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        plain = isinstance(func, torch._ops.OpOverload)
        name = func._overloadpacket.__name__ if plain else str(func)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if plain and func.namespace == "prim":
            # a question of a tensor that stands for another
            return out
        if torch._C._current_graph_task_id() != -1:
            # gradients are no activations
            return out
        with _disable_current_modes():
            at = label(*self._stack[-1]) if self._stack and self._stack[-1][0] else "the model"
            self._why = f"{name} in {at}"
            if any(t.is_nested for t in tree_leaves((tensors, out)) if isinstance(t, Tensor)):
                self._nested(name, tensors, out)
                return out
            self._follow(func, name.rstrip("_"), args, kwargs, tensors, out)
        return out

    def _nested(self, op: str, tensors: Sequence[Tensor], out: Any) -> None:
        """Units that go into a nested tensor are refused, and what comes out of it is data."""
        self._use(op, [None if t.is_nested else self.parameter(t) for t in tensors])
        for t in tree_leaves((tensors, out)):
            if isinstance(t, Tensor) and not t.is_nested and not self.parameter(t):
                self.refuse(self.ids(t), f"{self._why} takes or makes a nested tensor, which cannot be followed")
                self.open(t, f"{self._why} takes or makes a nested tensor, which cannot be followed")

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
        if shadow is None and tensor.grad_fn is None:
            return None
        if shadow is None:
            # made by a kernel that is called past the dispatcher
            return self._hidden().expand(tensor.shape)
        if shadow.itemsize != tensor.element_size():
            self.refuse(shadow.ids, f"{self._why} reinterprets its bytes")
            return torch.tensor(DATA, device="cpu").expand(tensor.shape)
        period, strides, reach = len(shadow.ids), [], tensor.storage_offset() % len(shadow.ids)
        offset = reach
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            strides.append(0 if size == 1 or stride % period == 0 else stride)
            reach += (size - 1) * strides[-1]
        if reach >= period:
            self._shadows[key] = shadow = self._unrolled(shadow)
            strides, offset = list(tensor.stride()), tensor.storage_offset()
        ids = shadow.ids.as_strided(tensor.shape, strides, offset)
        return ids if _narrow(ids)[0][0].any() else None

    def _hidden(self) -> Tensor:
        """Something made by code that is not followed, of whatever there was."""
        for source in self.nodes.sources[1:]:
            self.refuse(self.nodes.source(source.parameter, source.axis, source.size), f"{self._why} takes {_HIDDEN}")
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
        if key not in self._parameters:
            # indices are made past the dispatcher, and what is not resizable is memory of NumPy and of others
            new = key not in self.known and tensor.is_floating_point()
            if new and not tensor.untyped_storage().resizable():
                self._borrowed(tensor)
                new = False
            self.unsure |= new and not self._everything
            hidden = new and self._everything
            return (self._hidden() if hidden else torch.tensor(DATA, device="cpu")).expand(tensor.shape)
        name, parameter = self._parameters[key]
        if not isinstance(parameter, nn.Parameter):
            return None
        # entry by entry where it can be the scale of a norm
        if parameter.dim() != 2 and parameter.numel() <= 2**16 and parameter.is_contiguous():
            entries = self.nodes.source(name, None, parameter.numel())
            first = tensor.storage_offset() - parameter.storage_offset()
            return entries.as_strided(tensor.shape, tensor.stride(), first)
        return self.nodes.source(name, None, 1).reshape(()).expand(tensor.shape)

    @staticmethod
    def _unrolled(shadow: _Shadow) -> _Shadow:
        times = -(-shadow.elements // len(shadow.ids))
        return shadow._replace(ids=shadow.ids.repeat(times)[: shadow.elements])

    def put(self, tensor: Tensor, ids: Tensor | None) -> None:
        """Writes the ids of a tensor's elements."""
        if tensor.layout != torch.strided:
            return
        key = storage_key(tensor)
        if key in self._parameters or (key not in self.made and ids is not None):
            name = f"'{self._parameters[key][0]}'" if key in self._parameters else "a tensor"
            self.refuse(ids, f"{self._why} writes it to {name} that outlives the forward")
            return
        shadow, storage = self._shadows.get(key), tensor.untyped_storage()
        if not tensor.numel() or (shadow is None and ids is None):
            return
        elements = storage.nbytes() // tensor.element_size()
        order = sorted((i for i in range(tensor.dim()) if tensor.shape[i] > 1), key=tensor.stride, reverse=True)
        if tensor.numel() == elements and all(tensor.stride(i) for i in order):
            if ids is None:
                del self._shadows[key]
                return
            period, ids = elements, ids.expand(tensor.shape)
            while order and ids.stride(order[0]) == 0:
                period = tensor.stride(order.pop(0))
            for i in range(tensor.dim()):
                ids = ids if i in order else ids.narrow(i, 0, 1)
            flat = torch.empty(period, dtype=torch.int64, device="cpu")
            flat.as_strided(ids.shape, tensor.stride()).copy_(ids)
            self._shadows[key] = _Shadow(flat, elements, tensor.element_size())
            return
        if shadow is None:
            zeros = torch.zeros(elements, dtype=torch.int64, device="cpu")
            shadow = _Shadow(zeros, elements, tensor.element_size())
        self._shadows[key] = shadow = self._unrolled(shadow)
        # an expanded tensor writes one element many times
        shape = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        place = shadow.ids.as_strided(shape, tensor.stride(), tensor.storage_offset())
        ids = torch.zeros((), dtype=torch.int64, device="cpu") if ids is None else ids
        place.copy_(ids.expand(tensor.shape)[tuple(slice(0, n) for n in shape)])

    def parameter(self, tensor: Any) -> tuple[str, Tensor] | None:
        """Name and value of the parameter or buffer that a tensor is a view of."""
        entry = self._parameters.get(storage_key(tensor)) if isinstance(tensor, Tensor) and tensor.numel() else None
        if entry:
            self.seen.add(entry[0])
            self.seen.add(self.tied.get(entry[0], entry[0]))
        return entry

    def _record(self, role: str, layer: Any, ids: Tensor, axis: int) -> None:
        n = ids.shape[axis]
        moved = _narrow(ids)[0][0].movedim(axis, 0)
        moved = moved.expand(n, *moved.shape[1:]).reshape(n, -1)
        if torch.equal(moved.amin(1), moved.amax(1)):
            self.records[role, layer].append((torch.arange(n, device="cpu"), moved[:, 0]))
            return
        pairs = torch.unique(torch.arange(n, device="cpu")[:, None] * BASE + moved)
        self.records[role, layer].append((pairs // BASE, pairs % BASE))

    # rules

    def _follow(self, func: Any, op: str, args: Any, kwargs: Any, tensors: Sequence[Tensor], out: Any) -> None:
        outs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        keys = {storage_key(t) for t in tensors}
        views = bool(outs) and all(storage_key(t) in keys for t in outs)
        plain = isinstance(func, torch._ops.OpOverload)
        if (
            plain
            and ((views and not func._schema.is_mutable) or torch.Tag.inplace_view in func.tags)
            and op != "lift_fresh"
        ):
            return
        if outs and not any(t.numel() for t in outs):
            # an expert without tokens has not been reached
            return
        parameters = [self.parameter(t) for t in tensors]
        if (
            op == "_to_copy"
            and parameters[0]
            and outs[0].shape == parameters[0][1].shape
            and tensors[0].shape == outs[0].shape
        ):
            # autocast's copy of a weight
            self._parameters[storage_key(outs[0])] = parameters[0]
            self._kept.append(outs[0])
            return
        if op in _MATMULS:
            self._matmul(op, args, out)
        elif op == "convolution":
            self._convolution(args, out)
        elif op == "embedding" and parameters[0]:
            name, weight = parameters[0]
            self.roles[name].add("embedding")
            self.put(out, self.nodes.source(name, 1, weight.shape[1]))
        elif any(kind in op for kind in _NORM_OPS):
            self.put(outs[0], self._norm(op, args))
        else:
            self._use(op, parameters)
            if op in _TO_PYTHON or op in _DATA_SIZED:
                self.branches[f"a value read by Python ({self._why})"] = None
            ids = [self.ids(t) for t in tensors]
            draws = op in _DRAWS and plain and func._schema.is_mutable
            if all(i is None for i in ids) or ((draws or _FRESH.match(op)) and len(tensors) == 1):
                result, with_ids = None, 0
            else:
                result, with_ids = self._rule(func, op, args, kwargs, tensors, ids, outs)
            for i, t in enumerate(outs):
                self.put(t, result if i < with_ids else None)

    def _use(self, op: str, parameters: Iterable[tuple[str, Tensor] | None]) -> None:
        """Weights that enter an operation other than those which make or read units have another role."""
        for entry in parameters:
            if entry and entry[1].dim() > 1 and op not in ("detach", "alias", "empty_like"):
                self.roles[entry[0]].add(self._why)
                self.used_by.setdefault(entry[0], self._why)

    def _rule(
        self, func: Any, op: str, args: Any, kwargs: Any, tensors: Sequence[Tensor], ids: list[Tensor | None], outs: Any
    ) -> tuple[Tensor | None, int]:
        """The ids of what an operation returns, and how many of its results have them; the others are constants."""
        live = [i for i in ids if i is not None]
        tags = func.tags if isinstance(func, torch._ops.OpOverload) else ()
        spatial = _SPATIAL.search(op)
        x = ids[0] if ids and tensors and args and args[0] is tensors[0] else None
        if any(kind in op for kind in _ATTENTION):
            return self._attention(args, outs[0]), 1
        if spatial and x is not None and x.dim() > int(spatial[1]):
            n = int(spatial[1])
            merged = self.nodes.merge(x.flatten(-n), self._why)
            for other in ids[1:]:
                self.refuse(other, f"{self._why} takes it for coordinates")
            return merged.reshape(merged.shape + (1,) * n), len(outs)
        if op == "clone" or (op == "_to_copy" and outs[0].shape == tensors[0].shape):
            return ids[0], 1
        if op in _MOVES:
            return self._move(func, op, args, kwargs, tensors, live, outs)
        if op in ("index_add", "scatter_add"):
            return self._add_at(args, ids), 1
        if op == "glu" and x is not None:
            first, second = x.chunk(2, args[1] if len(args) > 1 else -1)
            return self.nodes.join(first, second), 1
        if op in _REDUCTIONS and x is not None and len(live) == 1:
            return self._reduce(func, args, kwargs, x), len(outs)
        if op in ("_softmax", "_log_softmax", "_safe_softmax", "cumsum") and x is not None:
            merged = self.nodes.merge(x.movedim(args[1], -1), self._why)
            if (self.nodes.left[merged] < 0).logical_and(~(self.nodes.left[x] < 0).all()).any():
                self.refuse(x, f"its features are mixed by {self._why}")
            return self.nodes.join(x, merged.unsqueeze(args[1]).expand(x.shape)), 1
        if op in _TO_PYTHON and tensors[0].dtype == torch.bool:
            # a condition; a number would come back unseen
            return None, 0
        if outs and (torch.Tag.pointwise in tags or op in _POINTWISE):
            return self._pointwise(op, tensors, ids, outs), 1
        for i in live:
            self.refuse(i, f"{self._why} has no rule")
        computed = [self.parameter(t) is not None or i is None for t, i in zip(tensors, ids, strict=True)]
        # of parameters alone: still no data
        return live[0].flatten()[0] if all(computed) else torch.tensor(DATA, device="cpu"), len(outs)

    def _pointwise(
        self, op: str, tensors: Sequence[Tensor], ids: list[Tensor | None], outs: Sequence[Tensor]
    ) -> Tensor | None:
        wide = [None if i is None else i.expand(outs[0].shape) for i in ids]
        if op == "copy":
            return wide[1]
        if op == "where" and len(wide) == 3:
            condition = None if wide[0] is None else self.nodes.bare[wide[0]]
            return self.nodes.join(self.nodes.join(wide[1], wide[2]), condition)
        result: Tensor | None = None
        for i, (tensor, own) in enumerate(zip(tensors, wide, strict=True)):
            others = wide[:i] + wide[i + 1 :]
            entry = self.parameter(tensor)
            if entry and len(others) == 1 and others[0] is not None:
                if op == "add" and self._is_bias(entry[0], others[0]):
                    continue
                self._scale(entry, tensor, others[0])
            if op in _PRODUCTS:
                result = self.nodes.product(result, own)
                continue
            if op == "add" and own is not None and result is not None and self.nodes.mixes:
                for mixed, other in ((own, result), (result, own)):
                    lonely = (self.nodes.left[mixed] < 0) & (other > 0) & (other != mixed)
                    if lonely.any():
                        self._refuse_mixed(mixed[lonely])
            result = self.nodes.join(result, own)
        return result

    def _refuse_mixed(self, ids: Tensor) -> None:
        for node in torch.unique(ids).tolist():
            members, why = self.nodes.mixes[-1 - int(self.nodes.left[node])]
            self.refuse(members, f"its features are mixed by {why}")

    def _is_bias(self, name: str, ids: Tensor) -> bool:
        """Whether a parameter belongs to the very layers that make the units it is added to."""
        _, leaves = self.nodes.leaves(_kinds(ids))
        makers = {
            self.nodes.sources[i].parameter for i in torch.unique(self.nodes.origin[leaves]).tolist() if 0 < i < BASE
        }
        owners = {self.owners[maker][1] for maker in makers}
        return bool(makers) and owners == {self.owners[name][1]} and kind(self.owners[name][1]) not in NORMS

    def _scale(self, entry: tuple[str, Tensor], tensor: Tensor, ids: Tensor) -> None:
        """Notes a parameter that multiplies units, or is added to them, entry by entry."""
        name, parameter = entry
        owner, module = self.owners[name]
        if kind(module) == "RMSNorm" and tensor.shape == parameter.shape:
            if name.endswith("weight"):
                self._record("norm", owner, ids.flatten(-parameter.dim()), -1)
        elif kind(module) not in NORMS and isinstance(parameter, nn.Parameter):
            ids = self.nodes.bare[_kinds(ids)]
            self.notes.append((ids, f"'{name}' goes into its units and is left as it is"))

    def _matmul(self, op: str, args: Any, out: Tensor) -> None:
        first, second = args[1:3] if op in _SUMMING else args[:2]
        entries = self.parameter(first), self.parameter(second)
        weights = [e if e and e[1].dim() > 1 else None for e in entries]
        if all(weights):
            self._use(op, weights)
            self.put(out, self.nodes.join(self._whole(self.ids(first)), self._whole(self.ids(second))))
            return
        if weights[1] or weights[0]:
            name, parameter = weights[1] or weights[0]  # type: ignore[misc]
            weight, x = (second, first) if weights[1] else (first, second)
            if not weights[1]:
                # out = W x: the units are rows of the result, features are rows of x
                weight, x, out = weight.transpose(-1, -2), x.transpose(-1, -2), out.transpose(-1, -2)
            axis = _axis_of(weight, parameter)
            ids = self.ids(x)
            if axis is None:
                self.roles[name].add("a slice or a reshape of it")
                self.refuse(ids, f"it is read through a slice or a reshape of '{name}'")
                self.put(out, torch.tensor(DATA, device="cpu").expand(out.shape))
                return
            self._read(name, axis, ids, -1)
            self.roles[name].add("matrix product" if axis == 1 else "matrix product with its transpose")
            made = self.nodes.source(name, 1 - axis, weight.shape[-1])
            if op in _SUMMING:
                made = cast(Tensor, self.nodes.join(made, self._bias(args[0], made)))
            self.put(out, made.expand(out.shape))
            return
        a, b = self.ids(first), self.ids(second)
        for own, other in ((a, b), (b, a)):
            if (
                own is not None
                and other is not None
                and (self.nodes.bare[_narrow(own)[0][0]] == 0).all()
                and own.max() > DATA
            ):
                # no unit and no data but parameters only
                self.refuse(other, f"{self._why} multiplies it by a weight that is computed, not a parameter")
        rows = None if a is None else self.nodes.merge(a, self._why)[..., :, None].expand(out.shape)
        columns = (
            None if b is None else self.nodes.merge(b.transpose(-1, -2), self._why)[..., None, :].expand(out.shape)
        )
        result = self.nodes.product(rows, columns)
        if op in _SUMMING:
            added = self.ids(args[0])
            result = self.nodes.join(result, None if added is None else added.expand(out.shape))
        self.put(out, result)

    def _whole(self, ids: Tensor | None) -> Tensor | None:
        return None if ids is None else self.nodes.merge(_kinds(ids), self._why)

    def _bias(self, bias: Tensor, ids: Tensor) -> Tensor | None:
        """The ids that a layer's summand adds: none if it is its own bias."""
        entry, added = self.parameter(bias), self.ids(bias)
        return None if entry and self._is_bias(entry[0], ids) else added

    def _read(self, name: str, axis: int, ids: Tensor | None, along: int) -> None:
        owner = self.owners[name][1]
        if not self._stack or self._stack[-1][1] is not owner:
            self.outside.add(name)
        if ids is not None:
            self._record("read", (name, axis), ids, along)

    def _convolution(self, args: Any, out: Tensor) -> None:
        x, weight, bias = args[:3]
        transposed, groups = args[6], args[8]
        entry, ids = self.parameter(weight), self.ids(x)
        spread = (1,) * (out.dim() - 2)
        if entry is None or weight.shape != entry[1].shape:
            self.refuse(ids, f"{self._why} multiplies it by a weight that is computed, not a parameter")
            self.put(out, torch.tensor(DATA, device="cpu").expand(out.shape))
            return
        name = entry[0]
        self._use("convolution", [e for e in (self.parameter(bias),) if e and e[1].dim() > 1])
        if groups > 1 and groups == x.shape[1] and ids is not None and not transposed:
            channels = self.nodes.merge(ids.flatten(2), self._why)
            if (self.nodes.bare[channels] > 0).any():
                channels = channels.repeat_interleave(out.shape[1] // groups, 1)
                self._record("pass", (name, 0), channels, 1)
                self.roles[name].add("depthwise convolution")
                self.put(out, channels.reshape(channels.shape + spread).expand(out.shape))
                return
        self.roles[name].add("convolution")
        self._read(name, int(not transposed), ids, 1)
        made = self.nodes.source(name, int(transposed), out.shape[1])
        if bias is not None:
            made = cast(Tensor, self.nodes.join(made, self._bias(bias, made)))
        self.put(out, made.reshape(-1, *spread).expand(out.shape))

    def _norm(self, op: str, args: Any) -> Tensor | None:
        ids = self.ids(args[0])
        features = "layer" in op or "rms" in op
        affine = [t for t in args[2:] if isinstance(t, Tensor)] if features else args[1:5]
        entries = [self.parameter(t) for t in affine]
        if ids is None:
            return None
        axis, columns = (-1, ids.flatten(-len(args[1]))) if features else (1, ids)
        named = [e for e in entries if e]
        if named:
            self._record("norm", self.owners[named[0][0]][0], columns, axis)
        else:
            self._repeated_norm([self.ids(t) for t in affine if isinstance(t, Tensor)], columns)
        # of an instance norm on features without channels, a channel is a sample
        across = "batch" in op and self.nodes.merge(columns.transpose(0, 1).flatten(1), self._why)
        if "batch" not in op or bool((self.nodes.left[across] < 0).any()):
            at = label(*self._stack[-1]) if self._stack else "a norm"
            self.notes.append((_kinds(ids), f"{at} couples its units"))
        return ids

    def _repeated_norm(self, affine: Sequence[Tensor | None], columns: Tensor) -> None:
        """An instance norm repeats its scale for every sample, and makes channels of them."""
        scale = next((i for i in affine if i is not None), None)
        if scale is None:
            return
        source = self.nodes.sources[int(self.nodes.origin[scale.reshape(-1)[0]])]
        channels = columns.movedim(1, 0)
        for first in range(0, len(channels), source.size):
            self._record("norm", self.owners[source.parameter][0], channels[first : first + source.size], 0)

    def _attention(self, args: Any, out: Tensor) -> Tensor | None:
        query, key, value = (self.ids(t) for t in args[:3])
        mixed = self.nodes.join(self._whole(query), self._whole(key))
        if mixed is not None:
            mixed = self.nodes.bare[mixed]
            mixed = None if not mixed.any() else mixed.expand(out.shape)
        if value is not None:
            value = self.nodes.merge(value.transpose(-1, -2), self._why)
            value = value.repeat_interleave(out.shape[-3] // value.shape[-2], -2) if value.dim() > 1 else value
            value = value[..., None, :].expand(out.shape)
        return self.nodes.product(value, mixed)

    def _move(
        self, func: Any, op: str, args: Any, kwargs: Any, tensors: Sequence[Tensor], live: Sequence[Tensor], outs: Any
    ) -> tuple[Tensor | None, int]:
        """An operation that only moves elements is carried out on their ids."""
        if op in ("cat", "stack"):
            moved = set(map(id, args[0]))
        elif op in ("slice_scatter", "select_scatter"):
            moved = set(map(id, args[:2]))
        elif op == "index_put":
            moved = {id(args[0]), id(args[2])}
        else:
            moved = {id(args[0])}
        accumulates = op == "index_put" and ((len(args) > 3 and args[3]) or kwargs.get("accumulate"))
        for tensor in tensors:
            if id(tensor) not in moved:
                self.refuse(self.ids(tensor), f"{self._why} takes it for an index")
        if accumulates or any(t.device.type == "meta" for t in tensors if id(t) not in moved):
            for i in live:
                self.refuse(i, f"{self._why} has no rule")
            return torch.tensor(DATA, device="cpu"), len(outs)

        def ids_of(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in moved:
                return value.cpu()
            ids = self.ids(value)
            zeros = torch.zeros((), dtype=torch.float64, device="cpu").expand(value.shape)
            return zeros if ids is None else ids.double()

        if op == "constant_pad_nd":
            args = args[:2]
        args, kwargs = tree_map(ids_of, (args, kwargs))
        if func._schema.is_mutable:
            args = (args[0].clone(), *args[1:])
        return func(*args, **kwargs).long(), 1

    def _add_at(self, args: Any, ids: list[Tensor | None]) -> Tensor | None:
        """index_add and scatter_add: every place may receive what any row of the source holds."""
        own, source = ids[0], self.ids(args[3])
        self.refuse(self.ids(args[2]), f"{self._why} takes it for an index")
        if source is not None:
            source = self.nodes.merge(source.movedim(args[1], -1), self._why).unsqueeze(args[1]).expand(args[0].shape)
        return self.nodes.join(own, source)

    def _reduce(self, func: Any, args: Any, kwargs: Any, ids: Tensor) -> Tensor:
        names = [a.name for a in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        axes = given.get("dim")
        axes = list(range(ids.dim())) if axes in (None, []) else [axes] if isinstance(axes, int) else list(axes)
        axes = [axis % max(ids.dim(), 1) for axis in axes]
        kept = [axis for axis in range(ids.dim()) if axis not in axes]
        merged = self.nodes.merge(ids.permute(kept + axes).flatten(len(kept)), self._why) if axes else ids
        return (
            merged.reshape([1 if i in axes else n for i, n in enumerate(ids.shape)]) if given.get("keepdim") else merged
        )


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
