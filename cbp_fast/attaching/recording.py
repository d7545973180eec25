"""Forward hooks of an attached object: what observes a reader, and what waits for a forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, is_grad_enabled, nn
from torch._C import _get_tracing_state as _tracing
from torch.compiler import is_compiling

from ..hooks.forwards import Hook
from ..hooks.observing import in_functional_call, is_observed
from ..step.engine import Engine


class _Nobody:
    """Stands for the engine of a hook that was taken off, and may hang elsewhere still."""

    @staticmethod
    def record(slot: int, h: Tensor) -> None:
        """Nobody looks at it."""


class Recorder(Hook):
    """Forward pre-hook of a reading layer: its input is the feature that its weight multiplies."""

    __slots__ = ("engine", "slot")

    def __init__(self, owner: Any, engine: Engine, slot: int) -> None:
        super().__init__(owner)
        self.engine: Engine | _Nobody = engine
        self.slot = slot

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """Observe a training forward."""
        # a trace would hold what is done with the activations
        if module.training and is_grad_enabled() and not _tracing():
            self.engine.record(self.slot, args[0] if args else kwargs["input"])

    def off(self) -> None:
        """Observe nothing from now on."""
        self.engine = _Nobody()


class Later(Hook):
    """Forward pre-hook of the model that takes off what could not be taken off at once."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """Sweep."""
        if not is_compiling():
            self.owner._sweep()


class FirstForward(Hook):
    """Forward pre-hook of the model that finds its groups."""

    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """Let the owner find the groups by what the model is given."""
        looks = module.training and is_grad_enabled() and not _tracing() and not is_compiling() and is_observed()
        # nor by parameters that are not the model's
        if looks and not in_functional_call():
            self.owner._attach_in_forward(args, kwargs or {})
