"""The compiled backend, for tensors on the CPU; `reference` says what its functions do."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import __version__
from .state import State

try:
    from . import _C as _C  # registers the kernels of the operators below
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
_select = torch.ops.cbp_fast.select_.default
_sum = torch.ops.cbp_fast.sum_.default
_choose = torch.ops.cbp_fast.choose_.default
_reinit = torch.ops.cbp_fast.reinit_.default


def capture_(state: State, slot: int, h: Tensor) -> None:
    """See `reference.capture_`."""
    _capture(state.buffer, state.plan, h, slot)


def select_(state: State, weights: Sequence[Tensor], held: Sequence[Tensor], slots: Sequence[int]) -> int:
    """See `reference.select_`; keeps a copy in `state.backup`, and what it raises has changed nothing."""
    return _select(state.buffer, state.backup, state.plan, weights, held, slots)


def sum_(state: State, weights: Sequence[Tensor], held: Sequence[Tensor], slots: Sequence[int]) -> None:
    """See `reference.sum_`."""
    _sum(state.buffer, state.plan, state.flat, weights, held, slots)


def choose_(state: State, weights: Sequence[Tensor]) -> int:
    """See `reference.choose_`; as `select_` in what it keeps."""
    return _choose(state.buffer, state.backup, state.plan, state.flat, weights)


def reinit_(state: State, regions: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """See `reference.reinit_`."""
    _reinit(state.buffer, state.plan, tensors, regions)
