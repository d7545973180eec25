"""The backends by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch

from ..rules.rule import Rule
from ..state.state import State
from . import cpp, reference

BACKENDS = ("reference", "cpp", "triton")
# what the tests run: the Triton of PyTorch 2.10, and the newest
OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 9)
TESTED_TRITON = " to ".join(".".join(map(str, version)) for version in (OLDEST_TRITON, NEWEST_TRITON))


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
        from .triton import backend as triton_backend

        return triton_backend
    return cpp if backend == "cpp" else reference


def functions_of(backend: str) -> Functions:
    """The functions of a backend."""
    return Functions(*(getattr(_module_of(backend), name) for name in Functions._fields))


def prepare_triton(state: State, inline: bool) -> None:
    """Let the Triton backend compile what the steps of a state will run; `inline`: also what sums in the forward."""
    _module_of("triton").prepare(state, inline)


def triton_version() -> str | None:
    """The version of Triton, None if it is not installed."""
    if find_spec("triton") is None:
        return None
    # what is installed may be called triton, pytorch-triton, triton-windows, ..; the module knows
    import triton

    return getattr(triton, "__version__", "unknown")


def _numbers(version: str) -> tuple[int, ...] | None:
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else None


def is_tested_triton(version: str) -> bool:
    """Whether the tests run on a version of Triton."""
    numbers = _numbers(version)
    return numbers is not None and OLDEST_TRITON <= numbers <= NEWEST_TRITON


# once a version and process
@cache
def _warn_of(version: str) -> None:
    if not is_tested_triton(version):
        warnings.warn(f"Triton {version} is none of those that the tests cover ({TESTED_TRITON})", stacklevel=2)


def why_not_triton(rule: Rule, device: torch.device, split: bool) -> str | None:
    """Why the Triton backend cannot serve a rule on a device, with `split` parameters or whole ones; None if it can."""
    if device.type not in ("cpu", "cuda"):
        return f"serves CUDA and ROCm devices and the model is on {device}"
    version = triton_version()
    if version is None:
        return "is not installed"
    # before the backend is imported, which an older one may not survive
    if (_numbers(version) or OLDEST_TRITON) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return (
            f"must be {oldest} or newer and is {version} "
            f'(pip install "triton>={oldest}", or the one that PyTorch asks for)'
        )
    return _module_of("triton").why_not(rule, device, split)


def backend_for(device: torch.device, name: str | None, rule: Rule, split: bool = False) -> str:
    """The backend asked for, or the fastest one for a device and a rule.

    Args:
        split: whether processes hold parts of the parameters, or see the same samples.

    Raises:
        ValueError: an unknown name, or a backend that does not serve the device or the rule.
        ModuleNotFoundError: "triton" was asked for and is not installed.

    Warns:
        UserWarning: once, of a Triton that the tests do not cover.
    """
    if name is None:
        if device.type == "cpu":
            return "cpp"
        if why_not_triton(rule, device, split):
            return "reference"
        name = "triton"
    elif name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, must be one of {', '.join(BACKENDS)}, or None for the fastest")
    elif name == "cpp" and device.type != "cpu":
        raise ValueError(f"backend 'cpp' serves CPU tensors and the model is on {device}; leave backend=None")
    elif name == "triton":
        if find_spec("triton") is None:
            raise ModuleNotFoundError("backend 'triton' needs Triton: pip install triton, or leave backend=None")
        why = why_not_triton(rule, device, split)
        if why is not None:
            raise ValueError(f"backend 'triton' {why}; leave backend=None")
    if name == "triton":
        _warn_of(triton_version() or "")
    return name
