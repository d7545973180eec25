"""The backends by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch

from . import cpp, reference
from .rules import Rule
from .state import State

BACKENDS = ("reference", "cpp", "triton")


class Functions(NamedTuple):
    """What every backend does; `reference` says what."""

    capture_: Callable[..., None]
    select_: Callable[..., int]
    sum_: Callable[..., None]
    choose_: Callable[..., int]
    reinit_: Callable[..., None]


def _module_of(backend: str) -> ModuleType:
    # that of Triton is imported on first use
    if backend == "triton":
        from . import triton_backend

        return triton_backend
    return cpp if backend == "cpp" else reference


def functions_of(backend: str) -> Functions:
    """The functions of a backend."""
    return Functions(*(getattr(_module_of(backend), name) for name in Functions._fields))


def prepare_triton(state: State, inline: bool) -> None:
    """Let the Triton backend compile what the steps of a state will run; `inline`: also what sums in the forward."""
    _module_of("triton").prepare(state, inline)


def why_not_triton(rule: Rule, device: torch.device, split: bool) -> str | None:
    """Why the Triton backend cannot serve a rule on a device, with `split` parameters or whole ones; None if it can."""
    if device.type not in ("cpu", "cuda"):
        return f"serves CUDA and ROCm devices and the model is on {device}"
    if find_spec("triton") is None:
        return "is not installed"
    return _module_of("triton").why_not(rule, device, split)


def backend_for(device: torch.device, name: str | None, rule: Rule, split: bool = False) -> str:
    """The backend asked for, or the fastest one for a device and a rule.

    Args:
        split: whether processes hold parts of the parameters, or see the same samples.

    Raises:
        ValueError: an unknown name, or a backend that does not serve the device or the rule.
        ModuleNotFoundError: "triton" was asked for and is not installed.
    """
    if name is None:
        if device.type == "cpu":
            return "cpp"
        return "reference" if why_not_triton(rule, device, split) else "triton"
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, must be one of {', '.join(BACKENDS)}, or None for the fastest")
    if name == "cpp" and device.type != "cpu":
        raise ValueError(f"backend 'cpp' serves CPU tensors and the model is on {device}; leave backend=None")
    if name == "triton":
        if find_spec("triton") is None:
            raise ModuleNotFoundError("backend 'triton' needs Triton: pip install triton, or leave backend=None")
        why = why_not_triton(rule, device, split)
        if why is not None:
            raise ValueError(f"backend 'triton' {why}; leave backend=None")
    return name
