"""Dohare et al., Loss of plasticity in deep continual learning, Nature 632 (2024)."""

from __future__ import annotations

from typing import Any

from .arithmetic import Arithmetic, method


@method("init", "act", "transfer_bias")
def nature(rule: Any) -> Arithmetic:
    """Equation 1 and Algorithm 1, with the bias correction of the authors' code."""
    return Arithmetic()
