"""What kernels are compiled for, and how many units they may have to choose, by the rule of a state."""

from __future__ import annotations

import math
from typing import Any

from ...rules.rule import Rule
from . import kernels
from .rows import DISTANCES, MAGNITUDES, VALUES


def meta_of(rule: Rule, wide: bool) -> dict[str, Any]:
    """What `select` is compiled for, besides the types that it sums: a rule, and whether utilities are float64."""
    arithmetic = rule.arithmetic
    return {
        "ACTIVATION": arithmetic.activation is not None,
        "OUTGOING": arithmetic.number("outgoing"),
        "INCOMING": arithmetic.number("incoming"),
        "MEAN": rule.keeps_mean,
        "MIN_MAX": arithmetic.normalisation == "min_max",
        "SCORE": arithmetic.number("score"),
        "ACCRUAL": arithmetic.number("accrual"),
        "COUNT": arithmetic.number("count"),
        "WIDE_UTILITY": wide,
    }


def kernels_of(
    rule: Rule, wide: bool, types: int, previous: bool, inline: bool = True
) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that steps may launch, with what each is compiled for.

    Args:
        types: bit i is set if sums of the type numbered i occur.
        previous: whether distances are measured from the mean that the step before left.
        inline: whether activations may be summed in the forward.
    """
    meta = meta_of(rule, wide)
    found: list[tuple[Any, dict[str, Any]]] = []
    sums = meta["ACTIVATION"] or meta["OUTGOING"] or meta["INCOMING"]
    if sums:
        found.append((kernels.select, {"TYPES": types, **meta}))
    # where nothing is summed there is nothing else
    if meta["MIN_MAX"] or not sums:
        found.append((kernels.score, score_meta(meta)))
    found.append((kernels.reinit, {"WIDE_UTILITY": wide}))
    if rule.keeps_mean:
        found.append((kernels.capture, {"TYPES": types, "SUM": VALUES.value, "COUNTS": True}))
    if rule.centred:
        found.append((kernels.hat, {"PREVIOUS": previous}))
        found.append((kernels.capture, {"TYPES": types, "SUM": DISTANCES.value, "COUNTS": False}))
    elif rule.arithmetic.activation and (inline or rule.keeps_mean):
        found.append((kernels.capture, {"TYPES": types, "SUM": MAGNITUDES.value, "COUNTS": not rule.keeps_mean}))
    if rule.transfer_bias:
        found.append((kernels.transfer, {}))
    return found


def score_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """What `score` is compiled for, of what `select` is."""
    return {key: meta[key] for key in ("MIN_MAX", "MEAN", "SCORE", "ACCRUAL", "COUNT", "WIDE_UTILITY")}


def at_most(rule: Rule, num_units: int, rate: float) -> int:
    """How many units of a group a step chooses, where less than one was left to be chosen from the one before."""
    if rule.arithmetic.count == "one":
        return 1
    return num_units if rule.arithmetic.accrual == "all" else min(num_units, math.ceil(rate * num_units))
