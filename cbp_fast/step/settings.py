"""Rates, seed and capture of an engine, checked."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# what "auto" may hold of storages of activations beyond their backward pass; what comes after is summed at once
HELD_BYTES = {"auto": 4 * 2**20, "deferred": 2**62, "inline": -1}


def checked_seed(capture: str, seed: int | None) -> int | None:
    """The seed as an integer of Python; raises ValueError for a capture or a seed that is none."""
    if capture not in HELD_BYTES:
        raise ValueError(f"capture is {capture!r}, must be one of {', '.join(HELD_BYTES)}")
    if seed is None:
        return None
    try:
        number = operator.index(seed)
    except TypeError:
        number = -(2**64)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed is {seed!r}, must be an integer of 64 bits")
    return number


def checked_hyper(values: Mapping[str, Any]) -> dict[str, float]:
    """A replacement_rate, maturity_threshold or decay_rate as numbers of Python.

    Raises:
        TypeError, ValueError: one is no number, or lies out of range.
    """
    checked: dict[str, float] = {}
    for name, given in values.items():
        if isinstance(given, bool) or not isinstance(given, numbers.Real):
            raise TypeError(f"{name} is {shown(given)}, must be a number")
        value = int(given) if isinstance(given, numbers.Integral) else float(given)
        if name == "maturity_threshold":
            if not 0 <= value < 2**63:
                raise ValueError(f"maturity_threshold is {shown(given)}, must be a number of steps, at least 0")
        elif not 0 <= value <= 1:
            raise ValueError(f"{name} is {shown(given)}, must lie in [0, 1]")
        if name == "decay_rate" and value == 1:
            raise ValueError("decay_rate is 1, which would never let a utility change; must be below 1")
        checked[name] = value
    return checked


def shown(value: Any) -> str:
    """What a message shows of anything, whose own way of showing itself may fail, or read memory that is not there."""
    if isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    try:
        if value is None or isinstance(value, (str, bytes, numbers.Number)):
            text = repr(value)
        elif isinstance(value, Exception):
            text = f"{type(value).__name__}: {value}"
        else:
            text = f"a {type(value).__name__}"
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:200] + "..."
