"""The one function by which every kernel is launched, and what kernels are compiled with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# with contraction, the same formula would round differently from one compiler to the next; left to itself, ptxas spills
# what the choice needs to have a few more programs beside each other
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False, **({} if torch.version.hip else {"maxnreg": 128})}
# arguments that are tables of int32; all others are of int64
INT32 = ("tiles", "counters", "owners", "blocks", "readers", "incoming")
# compiled kernels by what they were compiled for, and the device that they are loaded on
_compiled: dict[tuple[object, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], args: Sequence[torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Run a kernel on the current device; every launch goes through here.

    Args:
        args: tables, all of them at multiples of 16 bytes.
        meta: the kernel's constants, in its order.
    """
    key = (id(kernel), args[0].device.index, *meta.values())
    compiled = _compiled.get(key)
    if compiled is not None:
        # Triton's own way looks at every argument, and at every constant of the kernel's files, before each launch
        compiled[(grid[0], 1, 1)](*args, *meta.values())
    else:
        compiled = kernel[grid](*args, **meta, **OPTIONS)
        # the interpreter returns nothing
        if compiled is not None:
            _compiled[key] = compiled


def compile_ahead(kernel: Any, device: torch.device, meta: Mapping[str, Any]) -> None:
    """Compile a kernel for a device, which must be the current one, if that has not been done."""
    key = (id(kernel), device.index, *meta.values())
    if key not in _compiled:
        names = [name for name in kernel.arg_names if name not in meta]
        types = [torch.int32 if name in INT32 else torch.int64 for name in names]
        _compiled[key] = kernel.warmup(*types, grid=(1,), **meta, **OPTIONS)
