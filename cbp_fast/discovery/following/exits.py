"""Values that leave the operations: for Python, NumPy, other libraries, other threads."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..running.memory import storage_key
from ..trace.trace import Trace

# methods of tensors by which values leave for code that is not followed, and those that let it write, too
_READING = ("tolist", "__repr__", "__deepcopy__", "share_memory_")
_NO_NUMBERS = ("__repr__", "data_ptr")
_OPENING = ("numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage", "apply_", "map_", "map2_")
# the rooms that ask the model's own tensors for their memory; a thread that a user hands something to is none of them
_PACKAGE = __name__.rpartition(".following.")[0]
_OURS = tuple(f"{_PACKAGE}.{room}" for room in ("running.", "trace.", "operations.", "following.tracer"))


class Exits(TorchFunctionMode):
    """Refuses the units of tensors whose values leave for Python, NumPy or other libraries.

    Args:
        trace: what follows the units.
        elsewhere: whether this is another thread than the forward's.
    """

    def __init__(self, trace: Trace, elsewhere: bool = False) -> None:
        super().__init__()
        self.trace, self.elsewhere = trace, elsewhere

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "rms_norm" and not self.elsewhere:
            # torch takes it apart, and its sums over features are a norm's statistics
            before, self.trace.statistics = self.trace.statistics, True
            try:
                return func(*args, **(kwargs or {}))
            finally:
                self.trace.statistics = before
        array = name == "__get__" and getattr(func, "__self__", None) is Tensor.__cuda_array_interface__
        out = func(*args, **(kwargs or {}))
        if name == "tensor_split":
            # it reads them past the dispatcher
            for t in (*args[1:], *(kwargs or {}).values()):
                if isinstance(t, Tensor):
                    self._leaves(t, name, True)
        if (array or name in _READING or name in _OPENING) and not _is_ours(sys._getframe(1)):
            for t in args:
                if isinstance(t, Tensor):
                    self._leaves(t, name, name in _READING)
            if isinstance(out, Tensor) and name == "__deepcopy__":
                self.trace.open(out, f"{name}() made it")
        return out

    def _leaves(self, t: Tensor, name: str, read_only: bool) -> None:
        entry = self.trace.parameter(t)
        if entry:
            self.trace.roles[entry[0]].add(f"{name}()")
            return
        why = f"{name}() takes its values out of the model's operations"
        if self.elsewhere:
            self.trace.open(t, why)
            return
        if name not in _NO_NUMBERS:
            self.trace.tell(t)
        if storage_key(t) in self.trace.made:
            self.trace.refuse(self.trace.ids(t), why)
            if not read_only:
                self.trace.open(t, why)


def _is_ours(frame: FrameType) -> bool:
    """Whether the look itself asks, as it does for addresses."""
    return str(frame.f_globals.get("__name__")).startswith(_OURS)
