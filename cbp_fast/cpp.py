"""The compiled backend, for tensors on the CPU; `reference` says what its functions do."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import Library, fallthrough_kernel

from . import __version__
from .state import State

# an operator, so that torch.compile keeps it in its graphs; the compiled module has its kernel
_library = Library("cbp_fast", "DEF")
_library.define("capture_(Tensor(a!) state, Tensor plan, Tensor activations, int slot) -> ()")
# nothing here has a gradient: without a kernel of its own, autograd would look at every argument of every call
_library.impl("capture_", fallthrough_kernel, "Autograd")
_library.impl("capture_", lambda state, plan, activations, slot: None, "Meta")

try:
    from . import _C
except ImportError as error:
    found = ", ".join(path.name for path in Path(__file__).parent.glob("_C.*.*")) or "no file"
    fix = "--no-build-isolation --force-reinstall --no-deps cbp_fast    (in a checkout: . for cbp_fast)"
    # a version is compared as one
    fix = '"torch>=2.10"' if torch.__version__ < "2.10" else fix
    raise ImportError(
        f"cbp_fast {__version__} has no compiled module for Python {platform.python_version()} on {platform.machine()} "
        f"with PyTorch {torch.__version__} (2.10 is the oldest that will do): {found} in {Path(__file__).parent}. "
        f"Type:\n    pip install {fix}"
    ) from error

_capture = torch.ops.cbp_fast.capture_.default

# bytes of a tensor's elements; -1 where it has no memory of its own on the CPU, as what torch.func's transforms run on
nbytes = _C.nbytes
# what a list of tensors looks like in memory, on any device: its layout, and the addresses
describe = _C.describe
# copies a uint8 tensor to another, with no call of the dispatcher, which a mode might take for its own
copy_ = _C.copy_
# which tensor of a list cannot be written, and why
unwritable = _C.unwritable


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
