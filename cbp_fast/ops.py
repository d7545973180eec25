"""The schemas of the compiled operators, and the backends by name."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch
from torch.library import Library, fallthrough_kernel

from .rules import Rule

_library = Library("cbp_fast", "DEF")
_library.define("capture_(Tensor(a!) state, Tensor plan, Tensor activations, int slot) -> ()")
_library.define(
    "select_(Tensor(a!) state, Tensor(b!) backup, Tensor plan, Tensor[] weights, Tensor[] activations, int[] slots)"
    " -> int"
)
_library.define(
    "sum_(Tensor(a!) state, Tensor plan, Tensor(b!) flat, Tensor[] weights, Tensor[] activations, int[] slots) -> ()"
)
_library.define("choose_(Tensor(a!) state, Tensor(b!) backup, Tensor plan, Tensor(c!) flat, Tensor[] weights) -> int")
_library.define("reinit_(Tensor(a!) state, Tensor plan, Tensor(b!)[] tensors, int[] regions) -> ()")
for _name in ("capture_", "select_", "sum_", "choose_", "reinit_"):
    # nothing here has a gradient: without a kernel of its own, autograd would look at every argument of every call
    _library.impl(_name, fallthrough_kernel, "Autograd")
# torch.compile keeps the capture in its graph
_library.impl("capture_", lambda state, plan, activations, slot: None, "Meta")

from . import cpp, reference  # noqa: E402 - importing the compiled module needs the schemas

BACKENDS = ("reference", "cpp", "triton")


def module_of(backend: str) -> ModuleType:
    """The functions of a backend; that of Triton is imported on first use."""
    if backend == "triton":
        from . import triton_backend

        return triton_backend
    return cpp if backend == "cpp" else reference


def why_not_triton(rule: Rule, device: torch.device, split: bool) -> str | None:
    """Why the Triton backend cannot serve a rule on a device, with `split` parameters or whole ones; None if it can."""
    if device.type not in ("cpu", "cuda"):
        return f"serves CUDA and ROCm devices and the model is on {device}"
    if find_spec("triton") is None:
        return "is not installed"
    return module_of("triton").why_not(rule, device, split)


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
