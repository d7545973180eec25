"""`clarena.cl_algorithms.CBP` 1.1.0."""

from __future__ import annotations

from typing import Any

from .arithmetic import Arithmetic, method


@method()
def clarena(rule: Any) -> Arithmetic:
    """Incoming weights, min-max normalised, u / age ranks, one unit at a time; only incoming weights are set."""
    return Arithmetic(
        outgoing=None,
        incoming="times_sum",
        normalisation="min_max",
        score="per_step",
        accrual="whole",
        count="one",
        draws_preceding=True,
        resets=(),
        resets_optimizer=False,
        distribution="unit",
        only_linear=True,
    )
