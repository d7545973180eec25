"""What a step of continual backpropagation can compute, field by field, and the methods that fill the fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

# what each field may be, in the order in which the kernels number it: csrc/plan.h has the same numbers
CHOICES: dict[str, tuple[str | None, ...]] = {
    "activation": (None, "magnitude", "centred"),
    "outgoing": (None, "sum", "mean"),
    "incoming": (None, "times_sum", "divide"),
    "normalisation": (None, "min_max"),
    "score": ("corrected", "per_step", "random"),
    "accrual": ("eligible", "all", "whole"),
    "count": ("floor", "coin", "one"),
    "distribution": ("uniform", "normal", "unit"),
}
RESETS = ("bias", "norms", "outgoing")


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """One step as data. The state, its table and every backend are written against these fields.

    A = mean abs(h) and D = mean abs(h - h_hat) are a unit's activation statistics, h_hat its running mean; W_out are
    its outgoing, W_in its incoming weights. The defaults are those of the paper.

    Attributes:
        activation: "magnitude": A. "centred": D, which reads h twice. None: 1.
        outgoing: times the "sum" of abs(W_out), or its "mean". None: not.
        incoming: "times_sum": times the sum of abs(W_in), and A is one mean over the samples of all readers.
            "divide": divided by the mean of abs(W_in). None: not.
        normalisation: "min_max": y becomes (y - min) / (max - min + 1e-8) over the finite ones of a group. None: not.
        score: what is ranked, least first, of the decayed average u of y: "corrected": u / (1 - decay_rate^age).
            "per_step": u / age. "random": U[0, 1), drawn anew each step, and y is 0.
        accrual: what becomes due in a step: "eligible": replacement_rate * mature units. "all": times all units, once
            one is mature. "whole": the first, truncated.
        count: how many are replaced: "floor": as many as are pending, whose fraction waits. "coin": of what is due in
            this step, the fraction by chance. "one": one if more than one is pending.
        draws_preceding: whether column j of the layers that precede is drawn anew for unit j, too.
        resets: what is set beside the incoming weights: a unit's "bias" to 0, its entries of "norms" to those of a new
            norm, its "outgoing" weights to 0.
        resets_optimizer: whether the optimizer's state is zeroed at every entry that was set.
        distribution: of new incoming weights: "uniform" in [-bound, bound), "normal" with deviation bound, "unit" in
            [0, 1).
        only_linear: whether it is defined for linear layers alone.
    """

    activation: str | None = "magnitude"
    outgoing: str | None = "sum"
    incoming: str | None = None
    normalisation: str | None = None
    score: str = "corrected"
    accrual: str = "eligible"
    count: str = "floor"
    draws_preceding: bool = False
    resets: tuple[str, ...] = RESETS
    resets_optimizer: bool = True
    distribution: str = "uniform"
    only_linear: bool = False

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"Arithmetic: {name} is {getattr(self, name)!r}, must be one of {', '.join(map(str, allowed))}"
                )
        unknown = set(self.resets) - set(RESETS)
        if unknown:
            raise ValueError(f"Arithmetic: resets has {sorted(unknown)}, must be some of {', '.join(RESETS)}")

    def number(self, name: str) -> int:
        """The number by which kernels know the value of a field."""
        return CHOICES[name].index(getattr(self, name))

    @property
    def centred(self) -> bool:
        """Whether the activation statistic is mean abs(h - h_hat), which reads h twice."""
        return self.activation == "centred"

    @property
    def pools(self) -> bool:
        """Whether all readers of a unit have one mean, and not each its own."""
        return self.incoming == "times_sum"

    @property
    def averages_weights(self) -> bool:
        """Whether y is divided by the number of outgoing weights, or of columns where those are not read."""
        return not self.pools and self.outgoing != "sum"


class Method(NamedTuple):
    """A method: its name, the options of `Rule` that it takes, and what they amount to."""

    name: str
    options: tuple[str, ...]
    arithmetic: Callable[[Any], Arithmetic]


# by name
METHODS: dict[str, Method] = {}


def method(*options: str) -> Callable[[Callable[[Any], Arithmetic]], Callable[[Any], Arithmetic]]:
    """Make a function the method of its name: it is given a `Rule`, whose `options` it may look at.

    Args:
        options: those of `Rule` that it takes; any other is refused when a rule is made.

    Raises:
        ValueError: another module has a method of that name.
    """

    def add(arithmetic: Callable[[Any], Arithmetic]) -> Callable[[Any], Arithmetic]:
        known = METHODS.get(arithmetic.__name__)
        if known is not None and known.arithmetic.__module__ != arithmetic.__module__:
            raise ValueError(f"there is a method {arithmetic.__name__!r} already, of {known.arithmetic.__module__}")
        METHODS[arithmetic.__name__] = Method(arithmetic.__name__, options, arithmetic)
        return arithmetic

    return add
