"""What is said where continual backprop would otherwise do less than it seems, without a word."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from ..hooks.registry import FORGOTTEN
from ..step.engine import Engine


def no_forward(model: nn.Module) -> str:
    """No training forward was seen before the first step."""
    return (
        "no training forward of the model was seen before the first step of continual backprop, which changes "
        f"nothing; if the training loop does not call {type(model).__name__}.forward(), give "
        "example_inputs=lambda model: ..., which runs what it calls, or attach to its parts; if the model is "
        "compiled, attach before its first compiled call, with example_inputs"
    )


def untrained_parameter(
    names: Mapping[nn.Module, str], assigned: Iterable[tuple[nn.Module, str]], optimizers: Iterable[Optimizer]
) -> str:
    """The first parameter that was assigned since attaching and that no optimizer holds; or nothing.

    Args:
        names: of the model's modules.
        assigned: modules, and under which key each was given a parameter.
        optimizers: those that are followed.
    """
    known = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    for module, key in assigned:
        now = module._parameters.get(key)
        if module in names and now is not None and now.requires_grad and id(now) not in known:
            return (
                f"{names[module]}{names[module] and '.'}{key} was assigned anew after continual backprop was "
                "attached, and no optimizer given to it holds the new one; make one that does, and call "
                "refresh(optimizer=...)"
            )
    return ""


def unknown_reader(names: Mapping[nn.Module, str], seen: Container[nn.Module], engine: Engine) -> str:
    """The first layer that was added since attaching and that may read units; or nothing.

    Args:
        names: of the model's modules.
        seen: the modules that were there when it was last looked at.
    """
    widths = {n for g in engine.groups for n in (g.num_units, g.num_units * g.columns_per_unit)}
    widths |= {slot.features for slot in engine.state.slots}
    for module, name in names.items():
        own = module._parameters.values()
        if module not in seen and any(p is not None and not widths.isdisjoint(p.shape) for p in own):
            return (
                f"'{name}' was added to the model after continual backprop was attached; should it read units of a "
                "group, it would feel every replaced one: call refresh()"
            )
    return ""


def unknown_optimizer(optimizer: Optimizer, follows_others: bool) -> str:
    """An optimizer trains the units whose steps are not followed."""
    if follows_others:
        what = (
            "that was not given to continual backprop trains its units; its steps are not followed, nor is its "
            "state reset. Call refresh(optimizer=...) with all that train the model (cbp_fast.attached(model) "
            "finds the object)"
        )
    else:
        what = (
            f"has stepped {FORGOTTEN} times over units of continual backprop, which was given no optimizer and "
            "whose step() was not called: it does nothing. Call refresh(optimizer=...), or step() after each update"
        )
    return f"an optimizer ({type(optimizer).__name__}) {what}, or remove()"
