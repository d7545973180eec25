"""Running a model to look at it: from example inputs or a guess at them, and so that nothing of it remains."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import math
import pickle
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as same_version
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ..groups.layers import LAYERS, inside, kind, label, read_width, spatial_axes
from ..hooks.observing import unobserved
from ..tensors.parts import is_dtensor
from .snapshot import Snapshot, is_array, tensors_in

Forward = Callable[[nn.Module], Any]

# sizes tried for images and signals, the usual ones first; the same up to 64 for token sequences
_USUAL = (32, 28, 64, 224, 16, 8, 84, 96, 128, 48, 256, 112, 160, 192, 227, 299, 384, 80)
_SIZES = (*_USUAL, *(n for n in range(2, 64) if n not in _USUAL), 1)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DistributedDataParallel.

    Raises:
        TypeError: if it is no module.
        ValueError: if it is a DataParallel, or has lazy layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    model = inside(model)
    if isinstance(model, nn.DataParallel):
        raise ValueError("DataParallel wraps the model: pass the model itself, model.module")
    for name, module in model.named_modules():
        if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
            raise ValueError(f"{label(name, module)} is lazy and has no weight yet: run the model once")
    return model


def forwards(example_inputs: Any) -> list[Forward]:
    """Functions that run a model: one for each of the example inputs, which are a list where there are several."""
    several = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    runs = [inputs if is_function(inputs) else _call(inputs) for inputs in several]
    if not runs or any(isinstance(run, Given) and run.empty for run in runs):
        raise ValueError("the example_inputs are empty, and show nothing; a batch of two samples is enough")
    return runs


def is_function(inputs: Any) -> bool:
    """Whether example inputs are a function that runs the model."""
    return callable(inputs) and not isinstance(inputs, (Tensor, dict))


def _call(inputs: Any) -> Forward:
    if isinstance(inputs, dict):
        return Given((), inputs)
    return Given(inputs if isinstance(inputs, tuple) else (inputs,), {})


def held_by(run: Forward) -> tuple[Any, ...]:
    """What the forward may change beside the model: the arguments, or what a function holds."""
    return (run.args, run.kwargs) if isinstance(run, Given) else (run,)


class Given:
    """Runs a model on given arguments. It gets containers of its own, and tensors that only share memory with those.

    Attributes:
        samples: length of the first axis that the tensors have in common; 0 where they may not be cut there.
        empty: whether there are tensors without any element, and nothing else but numbers.
        told: whether there are arrays, or numbers that are no integers.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        leaves = tree_leaves((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor) and t.dim()]
        numbers = [leaf for leaf in leaves if isinstance(leaf, Number) and not isinstance(leaf, int)]
        self.told = bool(numbers) or any(map(is_array, leaves))
        nothing = all(isinstance(leaf, (Tensor, Number, type(None))) for leaf in leaves)
        self.empty = bool(tensors) and nothing and not any(t.numel() for t in tensors)
        self.samples = len(tensors[0]) if tensors and all(_is_plain(t) for t in tensors) else 0
        for leaf in leaves:
            # what counts rows of another tensor would point beyond its end; what others hold is not cut
            if isinstance(leaf, Tensor):
                if leaf.dim() and len(leaf) != self.samples and not leaf.is_floating_point():
                    self.samples = 0
            elif next(tensors_in(leaf), None) is not None:
                self.samples = 0

    def __call__(self, model: nn.Module) -> Any:
        """What the model returns."""
        copies: dict[int, Any] = {}

        def own(leaf: Any) -> Any:
            if type(leaf) is not Tensor or not _is_plain(leaf):
                return leaf
            if id(leaf) not in copies:
                copies[id(leaf)] = leaf.detach().requires_grad_(leaf.requires_grad)
            return copies[id(leaf)]

        args, kwargs = tree_map(own, (self.args, self.kwargs))
        return model(*args, **kwargs)

    def orders(self) -> Iterator[list[int]]:
        """Samples to take for all: the first ones, then those that differ most in a mask or in what else counts."""
        yield list(range(self.samples))
        differing: list[tuple[int, int, int, list[int]]] = []
        for t in tree_leaves((self.args, self.kwargs)):
            if isinstance(t, Tensor) and t.dim() and not t.is_floating_point() and t.device.type != "meta":
                values = t.detach().reshape(self.samples, -1).long()
                sums = values.sum(1).tolist()
                if min(sums) < max(sums):
                    # masks have the fewest values and the most axes
                    differing.append((int(values.max() - values.min()), -t.dim(), len(differing), sums))
        for *_, sums in sorted(differing)[:2]:
            order = sorted(range(self.samples), key=sums.__getitem__)
            yield [order[0], order[-1], *order[1:-1]]

    def cut(self, rows: Sequence[int]) -> Given | None:
        """The same for some samples alone; None where that may be no input."""
        n = self.samples

        def taken(value: Any) -> Any:
            if isinstance(value, Tensor):
                if not value.dim() or len(value) != n:
                    return value
                index = torch.tensor(rows, device=value.device)
                return value.detach().index_select(0, index).requires_grad_(value.requires_grad)
            if type(value) is dict:
                return {key: taken(child) for key, child in value.items()}
            if type(value) in (list, tuple):
                return type(value)([value[i] for i in rows] if len(value) == n else map(taken, value))
            if is_array(value) and value.ndim and len(value) == n:
                return value[list(rows)]
            return tree_map(lambda leaf: leaf if leaf is value else taken(leaf), value)

        args = tuple(map(taken, self.args))
        kwargs = {key: taken(value) for key, value in self.kwargs.items()}
        for t in tree_leaves((args, kwargs)):
            # an index beyond the end is an error that a processor survives, and a GPU does not
            if isinstance(t, Tensor) and t.dim() and not t.is_floating_point() and t.dtype != torch.bool:
                narrow = len(t) == len(rows) and t.numel() <= 2 * len(t) and t.device.type not in ("cpu", "meta")
                if narrow and len(rows) <= int(t.abs().max()) < n:
                    return None
        return Given(args, kwargs)


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and not t.is_nested


def same_path(whole: Sequence[Any], n: int, part: Sequence[Any], k: int) -> bool:
    """Whether two forwards, of n and of k samples, carried out the same operations, on sizes in proportion."""
    return len(whole) == len(part) and all(
        f is g and len(a) == len(b) and all(x == y or x * k == y * n for x, y in zip(a, b, strict=True))
        for (f, a), (g, b) in zip(whole, part, strict=True)
    )


def guesses(model: nn.Module) -> Iterator[tuple[Forward, Forward]]:
    """Forwards that run, each in a batch of 2 and of 3, for a model whose forward needs one tensor."""
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(needed) != 1 and not (takes_any and not needed):
        return
    first = next((m for m in model.modules() if kind(m) in LAYERS), None)
    if first is None:
        return
    # where it is parametrized, the weight itself is computed
    weight = next(first.parameters(), None)
    if weight is None:
        return
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    shapes: list[tuple[int, ...]]
    if kind(first) == "Embedding":
        options["dtype"] = torch.int64
        shapes = [(size,) for size in _SIZES if size <= 64]
    else:
        sizes = (getattr(first, key, 0) for key in ("in_features", "in_channels", "nx"))
        axes, width = spatial_axes(first), max(sizes) or read_width(first)
        shapes = [(width, *(size,) * axes) for size in (_SIZES if axes else (1,))]
    # what is larger takes too long to try
    shapes = [shape for shape in shapes if math.prod(shape) <= 2**18]
    saved = [t.detach().clone() for t in (*model.parameters(), *model.buffers())] if len(shapes) > 1 else []
    for shape in shapes:
        if len(shapes) == 1 or _fits(model, _on_batch(2, shape, options), saved):
            yield _on_batch(2, shape, options), _on_batch(3, shape, options)


def _fits(model: nn.Module, forward: Forward, saved: Sequence[Tensor]) -> bool:
    with restored(model, saved), torch.no_grad():
        try:
            forward(model)
        except Exception:  # the user's code may raise anything
            return False
    return True


def _on_batch(batch: int, shape: tuple[int, ...], options: dict[str, Any]) -> Forward:
    return lambda model: model(torch.zeros(batch, *shape, **options))


_PLAIN = frozenset([int, float, bool, complex, str, type(None), torch.dtype, torch.device, Tensor, nn.Parameter])


def leaves_of(*values: Any) -> list[Any]:
    """As PyTorch's `tree_leaves` of the values, quicker: for what is asked at every operation."""
    found: list[Any] = []
    for value in values:
        cls = type(value)
        if cls in _PLAIN:
            found.append(value)
        elif cls is tuple or cls is list:
            found += leaves_of(*value)
        elif cls is dict:
            found += leaves_of(*value.values())
        else:
            found += tree_leaves(value)
    return found


@functools.cache
def _gives_views(func: torch._ops.OpOverload) -> bool:
    """Whether an operation does nothing but look at the memory of its first argument in another way."""
    schema = func._schema
    returns = [r.alias_info for r in schema.returns]
    return (
        not schema.is_mutable
        and bool(returns)
        and all(alias is not None and not alias.is_write for alias in returns)
        and isinstance(schema.arguments[0].type, torch.TensorType)
        and not any(isinstance(a.type, torch.TensorType) for a in schema.arguments[1:])
        and func._overloadpacket.__name__ != "lift_fresh"
        # what is made of others may copy, and is seen whole in inference mode
        and torch._C._dispatch_has_kernel(func.name())
        and not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


def is_view(func: Any, args: Any) -> bool:
    """Whether an operation gives views of its first argument, and nothing else."""
    if not isinstance(func, torch._ops.OpOverload) or not _gives_views(func) or not args:
        return False
    return type(args[0]) in (Tensor, nn.Parameter) and args[0].layout == torch.strided and not args[0].is_nested


def storage_key(tensor: Tensor) -> int:
    """Identifies the memory of a tensor, which its views share."""
    # sparse ones have none
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else -id(tensor)


def alive() -> set[int]:
    """Keys of the storages of all tensors that Python knows."""
    things = gc.get_objects()
    kinds = {cls for cls in set(map(type, things)) if issubclass(cls, Tensor)}
    keys = set()
    for tensor in [thing for thing in things if type(thing) in kinds]:
        with contextlib.suppress(Exception):  # some have no memory
            keys.add(storage_key(tensor))
    return keys


def constants(model: nn.Module) -> set[int]:
    """Keys of the storages that scripted modules hold in their code."""
    keys = set()
    for module in model.modules():
        graph = getattr(module, "inlined_graph", None) if isinstance(module, torch.jit.ScriptModule) else None
        for node in graph.findAllNodes("prim::Constant", recurse=True) if graph is not None else ():
            if node.output().type().kind() == "TensorType" and node.hasAttribute("value"):
                keys.add(storage_key(node.t("value")))
    return keys


class Preserving(TorchDispatchMode):
    """Remembers what operations change that was there before, to put it back.

    Args:
        known: tensors that are there before.

    Attributes:
        known: keys of their storages.
        made: by their keys, the storages that were made under this mode, held so that no other gets the address.
        opened: storages whose content code that is not followed may read and write, and which code.
        path: operations, with the integers among their arguments and results.
        drawn: whether Python read a value that depends on random numbers; `hidden`: and one that `path` does not tell.
    """

    # they may change anything
    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # it would import the compiler
        return False

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.known = set(map(storage_key, known))
        self.forget()

    def forget(self) -> None:
        """As at the start."""
        self.made: dict[int, StorageWeakRef | None] = {}
        self.opened: dict[int, str] = {}
        self.path: list[tuple[Any, tuple[int, ...]]] = []
        self.drawn = self.hidden = False
        self._random: set[int] = set()
        self._held: dict[int, Any] = {}
        self._adopted: set[int] = set()
        self._saved: dict[int, tuple[Tensor, Tensor, Any, Tensor | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_view(func, args):
            out = func(*args, **kwargs)
            self._take_path(func, leaves_of(args, kwargs), leaves_of(out))
            return out
        plain = isinstance(func, torch._ops.OpOverload)
        leaves = leaves_of(args, kwargs)
        taken = [t for t in leaves if isinstance(t, Tensor)]
        # batch norms do not say that they change statistics
        if not plain or func._schema.is_mutable or "batch_norm" in func._overloadpacket.__name__:
            with _disable_current_modes():
                self._save(func, args, kwargs, taken)
        out = func(*args, **kwargs)
        results = leaves_of(out)
        outs = [t for t in results if isinstance(t, Tensor)]
        keys = {storage_key(t) for t in taken}
        if plain and func._overloadpacket.__name__ == "set_":
            # memory that nothing seen made, and that may be given away unseen (`share_memory_`, copies)
            self._adopted.update(key for t in outs if (key := storage_key(t)) not in self.known)
        fresh = plain and func._overloadpacket.__name__ == "lift_fresh"
        for t in outs:
            key = storage_key(t)
            if fresh or key not in keys:
                self.made.setdefault(key, StorageWeakRef(t.untyped_storage()) if key >= 0 else None)
        if not self._random.isdisjoint(keys) or (plain and torch.Tag.nondeterministic_seeded in func.tags):
            self._random.update(map(storage_key, outs))
            read = not outs or (plain and torch.Tag.dynamic_output_shape in func.tags)
            self.drawn |= read
            self.hidden |= read and not all(isinstance(result, (bool, int, Tensor)) for result in results)
        self._take_path(func, leaves, results)
        return out

    def _take_path(self, func: Any, leaves: Sequence[Any], results: Sequence[Any]) -> None:
        numbers = [n for n in leaves if type(n) is int]
        for result in results:
            numbers += result.shape if isinstance(result, Tensor) and not result.is_nested else ()
            numbers += (result,) if isinstance(result, (bool, int)) else ()
        self.path.append((func, tuple(numbers)))

    def open(self, tensor: Tensor, why: str) -> None:
        """From now on code that is not followed may read and write its memory."""
        key = storage_key(tensor)
        self.drawn |= key in self._random
        self.hidden |= key in self._random
        if key not in self.opened:
            self._held[key] = StorageWeakRef(tensor.untyped_storage()) if key >= 0 else tensor
            self.opened[key] = why

    def _save(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> None:
        """Remembers what an operation is about to change, unless it was made under this mode."""
        written: Sequence[Any] = tensors
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            values = [*args, *(kwargs.get(a.name) for a in func._schema.arguments[len(args) :])]
            marked = zip(func._schema.arguments, values, strict=False)
            written = tree_leaves([v for a, v in marked if a.alias_info is not None and a.alias_info.is_write])
        for tensor in written:
            if not isinstance(tensor, Tensor) or not tensor.numel():
                continue
            if storage_key(tensor) not in self.made and storage_key(tensor) not in self._adopted:
                whole = tensor.detach()
                if tensor.device.type != "meta":
                    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                    whole = whole.as_strided((elements,), (1,), 0)
                version = contextlib.nullcontext() if tensor.is_inference() else same_version(tensor)
                leaf = tensor if tensor._base is None else tensor._base
                self._saved.setdefault(
                    storage_key(tensor), (whole, whole.clone(), version, leaf if leaf.grad_fn is None else None)
                )

    def restore(self) -> None:
        """Puts back every tensor that was changed but not made under this mode."""
        with torch.no_grad():
            for tensor, before, version, leaf in self._saved.values():
                with version:
                    tensor.copy_(before)
                if leaf is not None and leaf.grad_fn is not None:
                    # it was written to with a history
                    leaf.detach_()
        self._saved.clear()


def numpy_state() -> Any:
    """The state of NumPy's global generator, to be compared; None where NumPy is not used."""
    numpy = sys.modules.get("numpy")
    return numpy and pickle.dumps(numpy.random.get_state())


def reseed(seed: int) -> None:
    """Puts the global random generators into another state."""
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed(seed)


@contextlib.contextmanager
def undivided(model: nn.Module) -> Iterator[bool]:
    """While it lasts, parameters that processes hold parts of are whole ones, on the meta device as all of the model.

    Hooks, which would gather the parts, do not run.

    Yields:
        Whether there are such parameters; otherwise nothing is changed.
    """
    if not any(is_dtensor(p) for p in model.parameters()):
        yield False
        return
    kinds = ("_parameters", "_buffers", "_forward_pre_hooks", "_forward_hooks")
    before = [(module, {kind: vars(module)[kind] for kind in kinds}) for module in model.modules()]
    stands_for: dict[torch.Tensor, torch.Tensor] = {}
    for module, own in before:
        for role in ("_parameters", "_buffers"):
            for tensor in own[role].values():
                if tensor is not None and tensor not in stands_for:
                    there = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    stands_for[tensor] = nn.Parameter(there, tensor.requires_grad) if is_parameter else there
            vars(module)[role] = {k: t if t is None else stands_for[t] for k, t in own[role].items()}
        vars(module).update(_forward_pre_hooks=OrderedDict(), _forward_hooks=OrderedDict())
    try:
        yield True
    finally:
        for module, own in before:
            vars(module).update(own)


@contextlib.contextmanager
def untouched(model: nn.Module, *inputs: Any, snapshot: Snapshot | None = None) -> Iterator[Snapshot]:
    """Puts back what forward() may change beside tensors: what `Snapshot` says, and the global random states.

    Args:
        model: the model.
        inputs: what its forward is given, and may change too.
        snapshot: one that was made of them when they were as they are.

    Yields:
        The snapshot, to see and to put back what has changed in between.
    """
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(unobserved())
        stack.enter_context(torch.random.fork_rng([]))
        for device in devices:
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
        snapshot = snapshot or Snapshot([("", model), *(("the inputs", i) for i in inputs)])
        try:
            yield snapshot
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])
            torch.set_default_dtype(dtype)
            snapshot.restore()


@contextlib.contextmanager
def restored(model: nn.Module, saved: Sequence[Tensor] | None = None) -> Iterator[None]:
    """Puts back the values of parameters and buffers (as now, or `saved`), and all that `untouched` does."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [t.detach().clone() for t in tensors] if saved is None else saved
    with untouched(model), same_version(tuple(tensors)):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)


def runs_plainly(model: nn.Module, runs: Sequence[Forward]) -> bool:
    """Whether the forwards run when nothing is followed."""
    for run in runs:
        with untouched(model, *held_by(run)) as snapshot:
            tensors = [t for t in snapshot.tensors() if _is_plain(t) and not t.is_inference()]
            values = [t.detach().clone() for t in tensors]
            with same_version(tuple(tensors)):
                try:
                    with torch.inference_mode(False), torch.enable_grad():
                        run(model)
                except Exception:  # the user's code may raise anything
                    return False
                finally:
                    snapshot.restore()
                    with torch.no_grad():
                        for tensor, value in zip(tensors, values, strict=True):
                            tensor.detach().copy_(value)
    return True
