"""The rates of an engine as attributes of what holds it."""

from __future__ import annotations

from .engine import Engine


class Rates:
    """The rates of an engine, checked when they are set."""

    _engine: Engine

    @property
    def replacement_rate(self) -> float:
        """Share of the mature units replaced each step; may be set between steps."""
        return self._engine.hyper["replacement_rate"]

    @replacement_rate.setter
    def replacement_rate(self, value: float) -> None:
        self._engine.set_hyper(replacement_rate=value)

    @property
    def maturity_threshold(self) -> float:
        """Steps for which a new unit is protected; may be set between steps."""
        return self._engine.hyper["maturity_threshold"]

    @maturity_threshold.setter
    def maturity_threshold(self, value: float) -> None:
        self._engine.set_hyper(maturity_threshold=value)

    @property
    def decay_rate(self) -> float:
        """Decay of the running utility a step; may be set between steps."""
        return self._engine.hyper["decay_rate"]

    @decay_rate.setter
    def decay_rate(self, value: float) -> None:
        self._engine.set_hyper(decay_rate=value)
