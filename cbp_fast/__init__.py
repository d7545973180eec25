"""Continual backpropagation for PyTorch, in fused kernels."""

__version__ = "0.1.0"

from .continual_backprop import ContinualBackprop
from .discovery import explain, find_unit_groups
from .modules import CBPConv, CBPLinear
from .rules import Rule
from .unit_groups import Part, UnitGroup
from .verification import verify_unit_group

__all__ = [
    "CBPConv",
    "CBPLinear",
    "ContinualBackprop",
    "Part",
    "Rule",
    "UnitGroup",
    "explain",
    "find_unit_groups",
    "verify_unit_group",
]
