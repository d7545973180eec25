"""Puts a model, its inputs and the random states back as they were, whatever ran in between."""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as same_version

from ...hooks.observing import unobserved
from ...tensors.parts import is_dtensor
from .snapshot import Snapshot


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
    stands_for: dict[Tensor, Tensor] = {}
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
