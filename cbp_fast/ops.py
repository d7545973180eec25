"""The schemas of the compiled operators, and the backends by name."""

from __future__ import annotations

from types import ModuleType

import torch
from torch.library import Library, fallthrough_kernel

_library = Library("cbp_fast", "DEF")
_library.define("capture_(Tensor(a!) state, Tensor plan, Tensor activations, int slot) -> ()")
_library.define("select_(Tensor(a!) state, Tensor plan, Tensor[] weights, Tensor[] activations, int[] slots) -> int")
_library.define(
    "sum_(Tensor(a!) state, Tensor plan, Tensor(b!) flat, Tensor[] weights, Tensor[] activations, int[] slots) -> ()"
)
_library.define("choose_(Tensor(a!) state, Tensor plan, Tensor flat) -> int")
_library.define("reinit_(Tensor(a!) state, Tensor plan, Tensor(b!)[] tensors, int[] regions) -> ()")
for _name in ("capture_", "select_", "sum_", "choose_", "reinit_"):
    # nothing here has a gradient: without a kernel of its own, autograd would look at every argument of every call
    _library.impl(_name, fallthrough_kernel, "Autograd")
# torch.compile keeps the capture in its graph
_library.impl("capture_", lambda state, plan, activations, slot: None, "Meta")

from . import cpp, reference  # noqa: E402 - importing the compiled module needs the schemas

BACKENDS: dict[str, ModuleType] = {"reference": reference, "cpp": cpp}


def backend_for(device: torch.device, name: str | None) -> str:
    """The backend asked for, or the fastest one for a device.

    Raises:
        ValueError: an unknown name, or a backend that does not serve the device.
    """
    if name is None:
        return "cpp" if device.type == "cpu" else "reference"
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, must be one of {', '.join(BACKENDS)}, or None for the fastest")
    if name == "cpp" and device.type != "cpu":
        raise ValueError(f"backend 'cpp' serves CPU tensors and the model is on {device}; leave backend=None")
    return name
