"""Continual backpropagation for PyTorch, in fused kernels."""

__version__ = "0.1.0"

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from .attaching import attached
from .continual_backprop import ContinualBackprop
from .discovery import explain, find_unit_groups
from .modules import CBPConv, CBPLinear
from .rules import Rule
from .unit_groups import Part, UnitGroup
from .verification import verify_unit_group

if _TYPE_CHECKING:
    from types import ModuleType as _ModuleType

    from . import metrics as metrics

__all__ = [
    "CBPConv",
    "CBPLinear",
    "ContinualBackprop",
    "Part",
    "Rule",
    "UnitGroup",
    "attached",
    "explain",
    "find_unit_groups",
    "metrics",
    "verify_unit_group",
]


def __getattr__(name: str) -> "_ModuleType":
    # imported when it is asked for, and not by everyone who trains
    if name == "metrics":
        return _import_module(".metrics", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # what is for users; the modules of the package are attributes, too, once they are imported
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
