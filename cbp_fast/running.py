"""Running a model to look at it: from example inputs or a guess at them, and so that nothing of it remains."""

from __future__ import annotations

import contextlib
import inspect
import math
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as same_version
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from .dtensors import is_dtensor
from .engine import unobserved
from .unit_groups import LAYERS, kind, label, read_width, spatial_axes

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
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError("DataParallel wraps the model: pass the model itself, model.module")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            break
    for name, module in model.named_modules():
        if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
            raise ValueError(f"{label(name, module)} is lazy and has no weight yet: run the model once")
    return model


def forwards(example_inputs: Any) -> list[Forward]:
    """Functions that run a model: one for each of the example inputs, which are a list where there are several."""
    several = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    return [inputs if is_function(inputs) else _call(inputs) for inputs in several]


def is_function(inputs: Any) -> bool:
    """Whether example inputs are a function that runs the model."""
    return callable(inputs) and not isinstance(inputs, (Tensor, dict))


def _call(inputs: Any) -> Forward:
    if isinstance(inputs, dict):
        return lambda model: model(**inputs)
    return lambda model: model(*inputs) if isinstance(inputs, tuple) else model(inputs)


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
    weight = first.get_parameter("weight")
    options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    shapes: list[tuple[int, ...]]
    if kind(first) == "Embedding":
        options["dtype"] = torch.int64
        shapes = [(size,) for size in _SIZES if size <= 64]
    elif spatial_axes(first):
        shapes = [(read_width(first), *(size,) * spatial_axes(first)) for size in _SIZES]
    else:
        shapes = [(read_width(first),)]
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


def storage_key(tensor: Tensor) -> int:
    """Identifies the memory of a tensor, which its views share."""
    # sparse ones have none
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else -id(tensor)


class Preserving(TorchDispatchMode):
    """Remembers what operations change that was there before, to put it back.

    Attributes:
        made: keys of the storages that were made under this mode.
    """

    # they may change anything
    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # it would import the compiler
        return False

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()
        self._saved: dict[int, tuple[Tensor, Tensor, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        plain = isinstance(func, torch._ops.OpOverload)
        # batch norms do not say that they change statistics
        if not plain or func._schema.is_mutable or "batch_norm" in func._overloadpacket.__name__:
            with _disable_current_modes():
                self._save(func, args, kwargs, taken)
        out = func(*args, **kwargs)
        keys = {storage_key(t) for t in taken}
        fresh = plain and func._overloadpacket.__name__ == "lift_fresh"
        made = (storage_key(t) for t in tree_leaves(out) if isinstance(t, Tensor))
        self.made.update(key for key in made if fresh or key not in keys)
        return out

    def _save(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> None:
        """Remembers what an operation is about to change, unless it was made under this mode."""
        written: Sequence[Any] = tensors
        if isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable:
            values = [*args, *(kwargs.get(a.name) for a in func._schema.arguments[len(args) :])]
            marked = zip(func._schema.arguments, values, strict=False)
            written = tree_leaves([v for a, v in marked if a.alias_info is not None and a.alias_info.is_write])
        for tensor in written:
            if isinstance(tensor, Tensor) and storage_key(tensor) not in self.made and tensor.numel():
                whole = tensor.detach()
                if tensor.device.type != "meta":
                    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                    whole = whole.as_strided((elements,), (1,), 0)
                version = contextlib.nullcontext() if tensor.is_inference() else same_version(tensor)
                self._saved.setdefault(storage_key(tensor), (whole, whole.clone(), version))

    def restore(self) -> None:
        """Puts back every tensor that was changed but not made under this mode."""
        with torch.no_grad():
            for tensor, before, version in self._saved.values():
                with version:
                    tensor.copy_(before)


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
def untouched(model: nn.Module) -> Iterator[list[tuple[str, Any]]]:
    """Puts back what forward() may change beside tensors: attributes, containers among them, modes and random states.

    Yields:
        A list, filled at the end with the names and values of attributes that were set or grew meanwhile.
    """
    entries = [(name, module, vars(module)) for name, module in model.named_modules()]
    held = [c for _, _, attributes in entries for c in (attributes, *attributes.values()) if _is_container(c)]
    saved = [list(c.items() if isinstance(c, dict) else c) for c in held]
    grads = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    left: list[tuple[str, Any]] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(unobserved())
        stack.enter_context(torch.random.fork_rng([]))
        for device in devices:
            stack.enter_context(torch.random.fork_rng([device], device_type=device.type))
        try:
            yield left
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])
            own = vars(nn.Module())
            for name, module, _ in entries:
                for key, value in vars(module).items():
                    if key not in own or key == "_buffers":
                        left.append((f"{name}.{key}" if name else key, value))
            left[:] = [
                (name, list(v) if isinstance(v, (list, set)) else dict(v) if isinstance(v, dict) else v)
                for name, v in left
            ]
            for container, content in zip(held, saved, strict=True):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
            for parameter, grad, requires_grad in grads:
                parameter.grad = grad
                parameter.requires_grad_(requires_grad)


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


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, set))


def tensors_in(
    value: Any, path: str = "", seen: set[int] | None = None, objects: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in what a model returns, in containers and in attributes of `objects`, with its path."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield path, value
        return
    if id(value) in seen or isinstance(value, (nn.Module, type, str, bytes, int, float)):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        children = [(f"{path}[{key!r}]", child) for key, child in value.items()]
    elif isinstance(value, (list, tuple, set)):
        children = [(f"{path}[{i}]", child) for i, child in enumerate(value)]
    elif objects and hasattr(value, "__dict__") and not callable(value):
        children = [(f"{path}.{key}", child) for key, child in vars(value).items()]
    else:
        return
    for where, child in children:
        yield from tensors_in(child, where, seen, objects)
