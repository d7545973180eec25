"""Continual backpropagation for PyTorch, in fused kernels."""

__version__ = "0.1.0"

from .continual_backprop import ContinualBackprop
from .modules import CBPConv, CBPLinear
from .rules import Rule
from .unit_groups import UnitGroup, explain, find_unit_groups

__all__ = ["CBPConv", "CBPLinear", "ContinualBackprop", "Rule", "UnitGroup", "explain", "find_unit_groups"]
