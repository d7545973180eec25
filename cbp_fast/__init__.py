"""Continual backpropagation for PyTorch, in fused kernels."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from ._version import __version__ as __version__
from .continual_backprop import ContinualBackprop, attached
from .discovery import explain, find_unit_groups, verify_unit_group
from .groups.spec import Part, UnitGroup
from .layers import CBPConv, CBPLinear
from .rules.rule import Rule

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
