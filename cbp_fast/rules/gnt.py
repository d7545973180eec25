"""The authors' generate-and-test code: GnT, ConvGnT."""

from __future__ import annotations

from typing import Any

from .arithmetic import Arithmetic, method

# utility -> what it multiplies
UTILITIES: dict[str, dict[str, str | None]] = {
    "contribution": {"activation": "magnitude", "outgoing": "mean"},
    "zero_contribution": {"activation": "centred", "outgoing": "mean"},
    "adaptable_contribution": {"activation": "centred", "outgoing": "mean", "incoming": "divide"},
    "feature_by_input": {"activation": "centred", "outgoing": None, "incoming": "divide"},
    "weight": {"activation": None, "outgoing": "mean"},
    "adaptation": {"activation": None, "outgoing": None, "incoming": "divide"},
    "random": {"activation": None, "outgoing": None},
}


@method("utility", "init", "act", "accumulate", "accrual", "transfer_bias", "reset_optimizer")
def gnt(rule: Any) -> Arithmetic:
    """Means of weights, seven utilities, and what the authors' code leaves open."""
    return Arithmetic(
        **UTILITIES[rule.utility],  # type: ignore[arg-type]
        score="random" if rule.utility == "random" else "corrected",
        accrual=rule.accrual,
        count="floor" if rule.accumulate else "coin",
        resets_optimizer=rule.reset_optimizer,
    )
