"""What stands for an engine until a forward shows which groups there are."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from ..rules.rule import Rule
from ..step.checkpoint import checked_state
from ..step.settings import checked_hyper


class Awaited:
    """Stands for the engine until a training forward shows which groups there are."""

    backend = "not chosen before the first training forward"
    has_data = False
    chooses_alone = False
    held_bytes = 0
    why_not_triton = None
    processes = None

    def __init__(self, rule: Rule, hyper: dict[str, float], capture: str) -> None:
        self.rule = rule
        self.hyper = checked_hyper(hyper)
        # less what was loaded
        self.set = dict(self.hyper)
        self.capture = capture
        self.enabled = True
        self.kept: dict[str, Any] | None = None
        nothing = torch.zeros(0)
        self.state = SimpleNamespace(
            layouts=[], slots=[], num_replaced=nothing, num_chosen=nothing, buffer=nothing, step=0
        )

    def set_hyper(self, **values: float) -> None:
        """Set rates, to be those of the engine."""
        checked = checked_hyper(values)
        for rates in (self.set, self.hyper, self.kept):
            if rates is not None:
                rates.update(checked)

    def to(self, device: torch.device) -> None:
        """Nothing is anywhere yet."""

    def select(self) -> int:
        """Nothing is chosen yet."""
        return 0

    def forget_forwards(self) -> None:
        """Nothing is held yet."""

    def state_dict(self) -> dict[str, Any]:
        """What was loaded; RuntimeError if nothing was."""
        if self.kept is None:
            raise RuntimeError(
                "the unit groups are found in the first training forward, so there is no state yet; with "
                "example_inputs they are found when attaching"
            )
        return copy.deepcopy(self.kept)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep a copy, of which all is checked but which groups there are."""
        own = {"rule": self.rule.options, **self.hyper, "seed": 0, "step": 0, "groups": None}
        measured = {"deviations": None} if self.rule.init == "as_attached" else {}
        kept = checked_state(state_dict, own | measured)
        self.hyper = {key: kept[key] for key in self.hyper}
        self.kept = kept
