"""Replacement rules: which utility, how many units, and from what distribution they are drawn anew."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

from . import __name__ as _package
from . import __path__ as _folder
from .arithmetic import METHODS, Arithmetic
from .gnt import UTILITIES

INITS = ("kaiming", "default", "xavier", "lecun", "normal", "as_attached")

# every family of methods; each says its name
for _module in iter_modules(_folder):
    if _module.name != "rule":
        import_module(f"{_package}.{_module.name}")


@dataclass(frozen=True)
class Rule:
    """What a step of continual backpropagation computes; make one with `nature`, `gnt` or `clarena`.

    With A = mean abs(h), D = mean abs(h - h_hat), h_hat a unit's running mean, and w_out, w_in the means of abs(W) over
    its outgoing and incoming weights, the utilities y of `gnt` are::

        contribution            A * w_out
        zero_contribution       D * w_out
        adaptable_contribution  D * w_out / w_in
        feature_by_input        D / w_in
        weight                  w_out
        adaptation              1 / w_in
        random                  none: the score is drawn anew each step

    Attributes:
        name: "nature", "gnt" or "clarena", or a method of one's own (`cbp_fast.rules.arithmetic.method`).
        utility: one of these, for `gnt`.
        init: distribution of re-drawn incoming weights: "kaiming", "default", "xavier", "lecun", "normal", or
            "as_attached", which is normal with the standard deviation that each weight had at attach, for networks with
            an initialisation of their own; `clarena` draws from U[0, 1).
        act: activation function whose gain `init` uses, as `torch.nn.functional` names it; not detected. Where
            `torch.nn.init.calculate_gain` knows none, relu's.
        accumulate: keep the fraction of a unit that is due for the next step; otherwise a coin decides on it.
        accrual: "eligible": the rate counts mature units; "all": it counts all units once one is mature.
        transfer_bias: add what a replaced unit gave on average to the biases of the layers that read it.
        reset_optimizer: zero the optimizer's state of every element that was set.
        arithmetic: what all of this amounts to, field by field: the data that every backend goes by.
    """

    name: str
    utility: str = "contribution"
    init: str = "kaiming"
    act: str = "relu"
    accumulate: bool = True
    accrual: str = "eligible"
    transfer_bias: bool = False
    reset_optimizer: bool = True

    arithmetic: Arithmetic = field(init=False, repr=False, compare=False)

    UTILITIES = tuple(UTILITIES)

    def __post_init__(self) -> None:
        def one_of(what: str, allowed: tuple[Any, ...]) -> None:
            if getattr(self, what) not in allowed:
                raise ValueError(
                    f"Rule: {what} is {getattr(self, what)!r}, must be one of {', '.join(map(str, allowed))}"
                )

        one_of("name", tuple(_names()))
        one_of("utility", self.UTILITIES)
        one_of("init", INITS)
        one_of("accrual", ("eligible", "all"))
        for option in ("accumulate", "transfer_bias", "reset_optimizer"):
            one_of(option, (False, True))
        if self.act != "swish" and not hasattr(torch.nn.functional, str(self.act)):
            raise ValueError(
                f"Rule: act is {self.act!r}, must be an activation function as torch.nn.functional names it, as 'relu'"
            )
        method = METHODS[self.name]
        unknown = set(method.options) - set(self.options)
        if unknown:
            raise ValueError(
                f"Rule: method {self.name!r} takes {', '.join(sorted(unknown))}, which is no option of Rule"
            )
        for option in self.options:
            if option not in ("name", *method.options):
                default = type(self).__dataclass_fields__[option].default
                if getattr(self, option) != default:
                    raise ValueError(f"Rule: {option} is no option of rule {self.name!r}")
        object.__setattr__(self, "arithmetic", method.arithmetic(self))

    @classmethod
    def nature(cls, init: str = "kaiming", *, act: str = "relu", transfer_bias: bool = False) -> Rule:
        """Dohare et al., Nature 632 (2024), eq. 1 and Algorithm 1, with the bias correction of the authors' code.

        y = mean abs(h) * sum abs(W_out); u / (1 - decay_rate^age) ranks; floor(pending) units are replaced, where
        Algorithm 1 replaces one once more than one is pending. The default `init` draws sqrt(6) times as large as
        `nn.Linear` initialises itself, which `init="default"` meets; for any other initialisation: "as_attached".
        """
        return cls("nature", init=init, act=act, transfer_bias=transfer_bias)

    @classmethod
    def gnt(
        cls,
        utility: str = "contribution",
        init: str = "kaiming",
        accumulate: bool = True,
        accrual: str = "eligible",
        transfer_bias: bool = False,
        *,
        act: str = "relu",
        reset_optimizer: bool = True,
    ) -> Rule:
        """The authors' generate-and-test code (GnT, ConvGnT): means of weights, seven utilities."""
        return cls("gnt", utility, init, act, accumulate, accrual, transfer_bias, reset_optimizer)

    @classmethod
    def clarena(cls) -> Rule:
        """`clarena.cl_algorithms.CBP` 1.1.0: incoming weights, min-max normalised, u / age ranks, one at a time."""
        return cls("clarena")

    @classmethod
    def make(cls, rule: str | Rule) -> Rule:
        """A `Rule` as it is; a name as its preset with defaults."""
        if isinstance(rule, cls):
            return rule
        if not isinstance(rule, str) or rule not in METHODS:
            raise ValueError(f"rule is {rule!r}, must be one of {', '.join(_names())}, or a cbp_fast.Rule")
        return cls(rule)

    @property
    def options(self) -> dict[str, Any]:
        """What it was asked for with, by which a checkpoint knows it."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    @property
    def centred(self) -> bool:
        """Whether the activation statistic is mean abs(h - h_hat), which reads h twice."""
        return self.arithmetic.centred

    @property
    def keeps_mean(self) -> bool:
        """Whether a running mean of every feature is kept."""
        return self.centred or self.transfer_bias

    @property
    def distribution(self) -> str:
        """Of re-drawn weights, as of `Arithmetic`."""
        plain = self.arithmetic.distribution == "uniform"
        return "normal" if plain and self.init in ("normal", "as_attached") else self.arithmetic.distribution

    def bound(self, fan_in: int, fan_out: int, convolution: bool) -> float:
        """Half-width (uniform) or standard deviation (normal) of re-drawn weights, whatever they were at attach.

        Args:
            fan_in: in_features, or in_channels / groups times the kernel's size.
            fan_out: out_features.
            convolution: convolutions are drawn as PyTorch draws them, whatever init and gain.
        """
        if self.distribution == "unit":
            return 1.0
        if self.init == "normal":
            return self._gain * math.sqrt(1 / fan_in)
        half_width = self._half_width(fan_in, fan_out, convolution)
        return half_width / math.sqrt(3) if self.distribution == "normal" else half_width

    @property
    def _gain(self) -> float:
        try:
            return torch.nn.init.calculate_gain(self.act)  # type: ignore[arg-type]
        except ValueError:
            return math.sqrt(2)

    def _half_width(self, fan_in: int, fan_out: int, convolution: bool) -> float:
        if convolution:
            return math.sqrt(1 / fan_in)
        if self.init == "lecun" or self.act == "selu":
            return math.sqrt(3 / fan_in)
        if self.init == "default":
            return math.sqrt(1 / fan_in)
        if self.init == "xavier":
            return self._gain * math.sqrt(6 / (fan_in + fan_out))
        return self._gain * math.sqrt(3 / fan_in)


def _names() -> list[str]:
    """The methods, those first that `Rule` has a constructor of."""
    return [*(name for name in vars(Rule) if name in METHODS), *(name for name in METHODS if name not in vars(Rule))]
