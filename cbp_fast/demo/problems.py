"""The problems by name."""

from __future__ import annotations

from . import digits, regression
from .problem import Problem


def load(name: str, rule: str) -> Problem:
    """The problem "digits" or "regression", as a rule of `ContinualBackprop` needs it."""
    return {"digits": digits.problem, "regression": regression.problem}[name](rule)
