"""Layers of a model that step by themselves: which there are, whose turn it is, and what should not pass in silence."""

from __future__ import annotations

import itertools
import sys
import warnings
import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from ..groups.resolving import shared_layer
from ..groups.spec import ResolvedGroup
from ..hooks.optimizers import inside_step, skipped, unwatch_skips, watch_skips
from ..hooks.registry import FORGOTTEN, everyone
from ..step.engine import Engine
from ..step.together import step_together


class Layer(Protocol):
    """What takes part in steps: a `CBPLinear` or `CBPConv`."""

    _engine: Engine
    # its own id once it saw a forward; of a copy that saw none, that of the original or 0
    _known: int
    # whether it saw a forward since it was last looked at, and what was seen before
    _has_news: bool
    _watched: Any
    # whether its seed may change in its first step
    _may_reseed: bool

    @property
    def in_layer(self) -> nn.Module:
        """The layer that makes its units."""


# layers that were made, and copies that saw a forward; the optimizers that were ever seen to train each, all of which
# keep state to reset; those that take turns; and those of them that are still to step
_layers: list[weakref.ref[Layer]] = []
_seen: weakref.WeakKeyDictionary[Layer, weakref.WeakSet[Optimizer]] = weakref.WeakKeyDictionary()
_trainers: weakref.WeakKeyDictionary[Layer, weakref.WeakSet[Optimizer]] = weakref.WeakKeyDictionary()
_waiting: weakref.WeakKeyDictionary[Layer, weakref.WeakSet[Optimizer]] = weakref.WeakKeyDictionary()
# numbers of the optimizers' steps
_steps = itertools.count()
# this module; at exit a layer may outlive the list of modules
_this = sys.modules[__name__]
# torch's hook for all optimizers, while there are layers
_hook: RemovableHandle | None = None


class _Watched:
    """What was seen of a layer in the optimizers' steps, to say what would be silent.

    Attributes:
        weights: names of the layers that make and read the units, and the dicts in which their weights are.
        versions: of those weights when they were last looked at; a step that trains a weight writes to it.
        idle: steps in a row in which something was missing.
        first, last: numbers of the first and the last step before which it saw a forward.
        said: whether a user was told.
    """

    __slots__ = ("first", "idle", "last", "said", "versions", "weights")

    def __init__(self, group: ResolvedGroup) -> None:
        self.weights = [(m.name, m.module._parameters) for m in (*group.incoming, *group.outgoing)]
        self.versions: list[int] = []
        self.idle, self.first, self.last, self.said = 0, -1, -1, False

    def now(self) -> list[int]:
        """The versions now; -1 where there is no such weight, or a frozen one."""
        weights = [parameters.get("weight") for _, parameters in self.weights]
        return [w._version if w is not None and w.requires_grad else -1 for w in weights]


def observed() -> list[Layer]:
    """All layers that saw a forward."""
    return [layer for ref in tuple(_layers) if (layer := ref()) is not None and layer._known == id(layer)]


def observe(layer: Layer) -> None:
    """Let a layer take part in steps."""
    global _hook
    if all(ref() is not layer for ref in _layers):
        _layers.append(weakref.ref(layer, _forget))
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_optimizer_step)
        watch_skips(_this)


def _forget(ref: weakref.ref[Layer]) -> None:
    """Drop a layer that is gone, and with the last one the hook."""
    global _hook
    _layers.remove(ref)
    # a hook that goes while torch loops over the hooks breaks the loop; the next layer then finds it in place
    if not _layers and _hook is not None and not inside_step():
        _hook.remove()
        _hook = None
        unwatch_skips(_this)


def _after_optimizer_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """One step of all layers for which this was the last of the optimizers that train their tensors."""
    if is_compiling():
        # a step belongs into no graph
        return torch.compiler.disable(_after_optimizer_step)(optimizer, args, kwargs)
    # a tuple, because layers may go at any moment
    layers = [layer for ref in tuple(_layers) if (layer := ref()) is not None]
    if not layers:
        return
    if skipped(optimizer):
        _after_skipped_step(optimizer)
        return
    trained = _trained_by(optimizer)
    ready: list[Layer] = []
    mine = [la for la in layers if any(id(region.ref.get()) in trained for region in la._engine.state.regions)]
    of_mine = set(map(id, mine))
    watched = [layer for layer in layers if layer._has_news and id(layer) not in of_mine]
    unheard = [layer for layer in mine if layer._known != id(layer)]
    mine = [layer for layer in mine if layer._known == id(layer)]
    _tell_apart(mine)
    for layer in mine:
        _seen.setdefault(layer, weakref.WeakSet()).add(optimizer)
        trainers = _trainers.setdefault(layer, weakref.WeakSet())
        known = optimizer in trainers
        trainers.add(optimizer)
        waiting = _waiting.get(layer)
        # an empty one is that of a step that was interrupted
        if waiting is None or not len(waiting):
            waiting = _waiting[layer] = weakref.WeakSet(trainers)
        # who steps again alone has taken the place of the others, an optimizer of an earlier task perhaps
        if known and optimizer not in waiting:
            trainers -= waiting
            waiting.clear()
        waiting.discard(optimizer)
        if not len(waiting):
            _waiting[layer] = weakref.WeakSet(trainers)
            ready.append(layer)
    watched += unheard + ready
    messages = _amiss(watched)
    optimizers = {id(o): o for layer in ready for o in _seen[layer]}
    step_together([layer._engine for layer in ready], list(optimizers.values()))
    for layer in watched:
        # what was written in this step is no training
        layer._watched.versions = layer._watched.now()
    for message in messages:
        warnings.warn(message, stacklevel=3)


def _trained_by(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _amiss(layers: list[Layer]) -> list[str]:
    """What should not pass in silence, of layers that an optimizer has trained or that saw a forward; said once each.

    Both weights are trained and a forward was seen, or neither: a layer of another task. A layer of which only one is
    true, many times in a row, has lost the others, or is called nowhere.
    """
    messages: list[str] = []
    number = next(_steps)
    for layer in layers:
        if layer._watched is None:
            layer.__dict__["_watched"] = _Watched(layer._engine.groups[0])
        watched, news = layer._watched, layer._has_news
        if news:
            layer.__dict__["_has_news"] = False
            watched.first = number if watched.first < 0 else watched.first
            watched.last = number
        versions = watched.now()
        trained = [version != old for version, old in zip(versions, watched.versions, strict=False)]
        if news and all(trained):
            watched.idle = 0
        # frozen ones wait for another time, and those that are not used for another task
        elif trained and -1 not in versions and (news or all(trained)):
            watched.idle += 1
            if watched.idle == FORGOTTEN and not watched.said:
                watched.said = True
                messages.append(_idle(layer, trained))
    # not in each step, nor always in that of the same optimizer
    if number % 7 == 0 or any(layer._watched.first == number for layer in layers):
        messages += _doubled([layer for layer in layers if layer._watched.last == number])
    return messages


def _idle(layer: Layer, trained: list[bool]) -> str:
    if all(trained):
        why = f"it saw no training forward in {FORGOTTEN} steps that trained its layers; is it called?"
    else:
        name = layer._watched.weights[trained.index(False)][0]
        why = f"{name}.weight was not trained in {FORGOTTEN} steps of optimizers; was the layer replaced?"
    return (
        f"{layer._engine.layer}: {why} Make it anew from the two layers that are trained, and call it where out_layer "
        "reads the units, or take it out"
    )


def _doubled(layers: list[Layer]) -> list[str]:
    """Which of the layers share their units with another one that sees forwards, or with an attached object."""
    messages: list[str] = []
    by_maker: dict[nn.Module, list[Layer]] = {}
    for layer in observed():
        if layer._watched is not None and layer._watched.last >= 0:
            by_maker.setdefault(layer.in_layer, []).append(layer)
    for layer in layers:
        mine = layer._watched
        # one that was replaced by another may be there still, and saw its last forward before that one's first
        twins: list[Any] = [
            other
            for other in by_maker[layer.in_layer]
            if other is not layer and other._watched.last >= mine.first and other._watched.first <= mine.last
        ]
        if mine.first == mine.last:
            twins += [cbp for cbp in everyone() if isinstance(cbp._engine, Engine) and cbp.enabled]
        twin = next((twin for twin in twins if _share_units(twin._engine, layer._engine)), None)
        if twin is not None and not mine.said:
            mine.said = True
            if twin in by_maker[layer.in_layer]:
                twin._watched.said = True
            messages.append(
                f"{layer._engine.layer}: {twin._engine.layer or 'an attached ContinualBackprop'} re-initialises its "
                "units, too; take one of them out"
            )
    return messages


def _share_units(one: Engine, other: Engine) -> bool:
    return any(shared_layer(theirs, mine) for theirs in one.groups for mine in other.groups)


def forget_optimizers(layer: Layer) -> None:
    """Forget the optimizers that were seen to train it: one that does not step again leaves its state where it is."""
    _seen.pop(layer, None)


def _tell_apart(layers: list[Layer]) -> None:
    """Give layers that step together, and were made of equal weights or copied, seeds of their own.

    Not where they are made, because there a second layer of a model looks like the first of the same model made again.
    """
    if not any(layer._may_reseed for layer in layers):
        return
    taken: set[int] = set()
    # first those whose seed stays
    for layer in sorted(layers, key=lambda layer: layer._may_reseed):
        seed = layer._engine.state.seed
        while layer._may_reseed and int(seed) in taken:
            seed.add_(1)
        taken.add(int(seed))
        layer._may_reseed = False


def _after_skipped_step(optimizer: Optimizer) -> None:
    """What layers saw counts for nothing if the only optimizer that trains them made no update of it."""
    trained = _trained_by(optimizer)
    for layer in [layer for ref in tuple(_layers) if (layer := ref()) is not None]:
        alone = all(other is optimizer for other in _trainers.get(layer, ()))
        if alone and any(id(region.ref.get()) in trained for region in layer._engine.state.regions):
            layer._engine.forget_forwards()
