"""The compiled backend, for tensors on the CPU; `reference` says what its functions do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import Library, fallthrough_kernel

from ..state.state import State
from ..tensors.native import _C

# an operator, so that torch.compile keeps it in its graphs; the compiled module has its kernel
_library = Library("cbp_fast", "DEF")
_library.define("capture_(Tensor(a!) state, Tensor plan, Tensor activations, int slot) -> ()")
# nothing here has a gradient: without a kernel of its own, autograd would look at every argument of every call
_library.impl("capture_", fallthrough_kernel, "Autograd")
_library.impl("capture_", lambda state, plan, activations, slot: None, "Meta")


_capture = torch.ops.cbp_fast.capture_.default


def capture_(state: State, slot: int, h: Tensor) -> None:
    """See `reference.capture_`."""
    # a subclass may only stand for the tensor to read
    if is_compiling() or type(h) is not Tensor:
        _capture(state.buffer, state.plan, h, slot)
    else:
        _C.capture_(state.buffer, state.plan, h, slot)


def select_(state: State, weights: list[Tensor], held: list[Tensor], slots: list[int]) -> int:
    """See `reference.select_`."""
    return _C.select_(state.buffer, state.plan, weights, held, slots)


def sum_(state: State, weights: list[Tensor], held: list[Tensor], slots: list[int]) -> None:
    """See `reference.sum_`."""
    _C.sum_(state.buffer, state.plan, state.flat, weights, held, slots)


def choose_(state: State, weights: list[Tensor]) -> int:
    """See `reference.choose_`."""
    return _C.choose_(state.buffer, state.plan, state.flat, weights)


def reinit_(state: State, regions: list[int], tensors: list[Tensor]) -> None:
    """See `reference.reinit_`."""
    _C.reinit_(state.buffer, state.plan, tensors, regions)


def check_reinit(state: State, regions: list[int], tensors: list[Tensor]) -> None:
    """Raises what `reinit_` would raise, and changes nothing."""
    _C.check_reinit(state.buffer, state.plan, tensors, regions)
