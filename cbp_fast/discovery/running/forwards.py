"""The forwards that there are to run: of a model inside its wrappers, on the inputs given, or on a guess at them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as same_version
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_leaves, tree_map

from ...groups.layers import LAYERS, inside, kind, label, read_width, spatial_axes
from .holding import tensors_in
from .memory import is_plain
from .reach import is_array
from .restoring import restored, untouched

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


def check_has_forward(model: nn.Module, example_inputs: Any) -> None:
    """Checks that a model has a forward, or is given with a function that runs it.

    Raises:
        ValueError: if not.
    """
    inputs = example_inputs if isinstance(example_inputs, list) and example_inputs else [example_inputs]
    if getattr(model.forward, "__func__", None) is not nn.Module.forward or all(map(is_function, inputs)):
        return
    name = type(model).__name__
    parts = [repr(key) for key, part in model.named_children() if any(True for _ in part.parameters())]
    raise ValueError(
        f"{name} has no forward() to find its unit groups by; give example_inputs=lambda model: ..., a function that "
        f"runs what the training loop calls, or attach to its parts by themselves ({', '.join(parts) or 'it has none'})"
    )


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
        self.samples = len(tensors[0]) if tensors and all(is_plain(t) for t in tensors) else 0
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
            if type(leaf) is not Tensor or not is_plain(leaf):
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


def runs_plainly(model: nn.Module, runs: Sequence[Forward]) -> bool:
    """Whether the forwards run when nothing is followed."""
    for run in runs:
        with untouched(model, *held_by(run)) as snapshot:
            tensors = [t for t in snapshot.tensors() if is_plain(t) and not t.is_inference()]
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
