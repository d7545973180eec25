"""`CBPLinear` and `CBPConv`: continual backpropagation as layers that stand between the two layers of a group."""

from __future__ import annotations

import hashlib
import io
import itertools
import struct
import sys
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from .groups.resolving import resolve, shared_layer
from .groups.spec import ResolvedGroup, UnitGroup
from .hooks.observing import is_observed
from .hooks.optimizers import inside_step, skipped, unwatch_skips, watch_skips
from .hooks.registry import FORGOTTEN, Attached, everyone
from .parallel.processes import several_processes
from .rules.rule import Rule
from .step.engine import Engine
from .step.rates import Rates
from .step.together import step_together
from .tensors.parts import local

# layers that were made, and copies that saw a forward; the optimizers that were ever seen to train each, all of which
# keep state to reset; those that take turns; and those of them that are still to step
_layers: list[weakref.ref[_CBPLayer]] = []
_seen: weakref.WeakKeyDictionary[_CBPLayer, weakref.WeakSet[Optimizer]] = weakref.WeakKeyDictionary()
_trainers: weakref.WeakKeyDictionary[_CBPLayer, weakref.WeakSet[Optimizer]] = weakref.WeakKeyDictionary()
_waiting: weakref.WeakKeyDictionary[_CBPLayer, weakref.WeakSet[Optimizer]] = weakref.WeakKeyDictionary()
# numbers of the optimizers' steps
_steps = itertools.count()
# what messages call a layer by, as it does not know its name in the model
_numbers = itertools.count(1)
# this many weights of a layer tell it from others
_TOLD_BY = 256
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


def observed() -> list[_CBPLayer]:
    """All layers that saw a forward."""
    return [layer for ref in tuple(_layers) if (layer := ref()) is not None and layer._known == id(layer)]


def _observe(layer: _CBPLayer) -> None:
    """Let a layer take part in steps."""
    global _hook
    if all(ref() is not layer for ref in _layers):
        _layers.append(weakref.ref(layer, _forget))
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_optimizer_step)
        watch_skips(_this)


def _forget(ref: weakref.ref[_CBPLayer]) -> None:
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
    ready: list[_CBPLayer] = []
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


def _amiss(layers: list[_CBPLayer]) -> list[str]:
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


def _idle(layer: _CBPLayer, trained: list[bool]) -> str:
    if all(trained):
        why = f"it saw no training forward in {FORGOTTEN} steps that trained its layers; is it called?"
    else:
        name = layer._watched.weights[trained.index(False)][0]
        why = f"{name}.weight was not trained in {FORGOTTEN} steps of optimizers; was the layer replaced?"
    return (
        f"{layer._engine.layer}: {why} Make it anew from the two layers that are trained, and call it where out_layer "
        "reads the units, or take it out"
    )


def _doubled(layers: list[_CBPLayer]) -> list[str]:
    """Which of the layers share their units with another one that sees forwards, or with an attached object."""
    messages: list[str] = []
    by_maker: dict[nn.Module, list[_CBPLayer]] = {}
    for layer in observed():
        if layer._watched is not None and layer._watched.last >= 0:
            by_maker.setdefault(layer.in_layer, []).append(layer)
    for layer in layers:
        mine = layer._watched
        # one that was replaced by another may be there still, and saw its last forward before that one's first
        twins: list[_CBPLayer | Attached] = [
            other
            for other in by_maker[layer.in_layer]
            if other is not layer and other._watched.last >= mine.first and other._watched.first <= mine.last
        ]
        if mine.first == mine.last:
            twins += [cbp for cbp in everyone() if isinstance(cbp._engine, Engine) and cbp.enabled]
        twin = next((twin for twin in twins if _share_units(twin._engine, layer._engine)), None)
        if twin is not None and not mine.said:
            mine.said = True
            if isinstance(twin, _CBPLayer):
                twin._watched.said = True
            messages.append(
                f"{layer._engine.layer}: {twin._engine.layer or 'an attached ContinualBackprop'} re-initialises its "
                "units, too; take one of them out"
            )
    return messages


def _share_units(one: Engine, other: Engine) -> bool:
    return any(shared_layer(theirs, mine) for theirs in one.groups for mine in other.groups)


def check_not_attached(groups: Iterable[ResolvedGroup], own: Any, modules: Iterable[nn.Module]) -> None:
    """No unit belongs to two of what is attached, layers or objects.

    Args:
        groups: the units that are asked for.
        own: the engine that asks.
        modules: of the model, some of which may do the same.

    Raises:
        ValueError: one does.
    """
    call = "cbp_fast.attached(model) lists what is attached: call remove() of it first, or exclude= the group"
    engines = {cbp._engine: call for cbp in everyone()}
    layers = (getattr(layer, "_engine", None) for layer in (*modules, *observed()))
    engines |= {engine: "take the layer out" for engine in layers if isinstance(engine, Engine)}
    for engine, mend in engines.items():
        for theirs in engine.groups if isinstance(engine, Engine) and engine is not own else ():
            for group in groups:
                if both := shared_layer(theirs, group):
                    whose = f"group '{group.name}'" if engine.layer else f"its group '{theirs.name}'"
                    by = engine.layer and f"by {engine.layer}, "
                    raise ValueError(
                        f"the model has continual backprop attached already ({by}with {both} of {whose}); {mend}"
                    )


def _tell_apart(layers: list[_CBPLayer]) -> None:
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


def _seed_of(layers: Mapping[str, nn.Module | None]) -> int:
    """A seed that the same program finds again, from that of PyTorch and what the two layers hold.

    No state of a generator is in it, as none is advanced by making these layers; and no count of layers, which goes on
    from one run to the next in a process.
    """
    digest = hashlib.sha256(struct.pack("Q", torch.initial_seed() % 2**64))
    for name in ("in_layer", "out_layer"):
        weight = local(cast(nn.Module, layers[name]).get_parameter("weight").detach())
        if not weight.is_meta:
            some = weight.flatten()[:: -(-weight.numel() // _TOLD_BY) or 1].double().tolist()
            digest.update(struct.pack(f"{len(some)}d", *some))
    return int.from_bytes(digest.digest()[:8], "little")


def _after_skipped_step(optimizer: Optimizer) -> None:
    """What layers saw counts for nothing if the only optimizer that trains them made no update of it."""
    trained = _trained_by(optimizer)
    for layer in [layer for ref in tuple(_layers) if (layer := ref()) is not None]:
        alone = all(other is optimizer for other in _trainers.get(layer, ()))
        if alone and any(id(region.ref.get()) in trained for region in layer._engine.state.regions):
            layer._engine.forget_forwards()


class _CBPLayer(Rates, nn.Module):
    """What the two layers share: the rule is `gnt`, and a step follows those of the optimizers that train the group."""

    # whether it saw a forward since it was last looked at, and what was seen before
    _has_news = False
    _watched: Any = None
    # whether its seed may change in its first step; not that of a layer from a file without the word
    _may_reseed = False
    # what in_layer and out_layer may be
    _kinds: tuple[tuple[type[nn.Module], ...], tuple[type[nn.Module], ...]]

    def __init__(
        self,
        layers: Mapping[str, nn.Module | None],
        num_last_filter_outputs: int | None,
        replacement_rate: float,
        maturity_threshold: float,
        init: str,
        act_type: str,
        util_type: str,
        decay_rate: float,
        seed: int | None,
    ) -> None:
        super().__init__()
        for name, kinds in zip(("in_layer", "out_layer"), self._kinds, strict=True):
            if not isinstance(layers[name], kinds):
                allowed = " or a ".join("convolution" if kind is _ConvNd else kind.__name__ for kind in kinds)
                raise TypeError(
                    f"{type(self).__name__}: {name} is a {type(layers[name]).__name__}, must be a {allowed}; CBPLinear "
                    "stands between two linear layers, CBPConv after a convolution"
                )
        present = nn.ModuleDict({name: layer for name, layer in layers.items() if layer is not None})
        norms = [name for name in present if name.endswith(("ln_layer", "bn_layer"))]
        resolved = resolve(present, UnitGroup(type(self).__name__, ["in_layer"], ["out_layer"], norms))
        if num_last_filter_outputs is not None and resolved.columns_per_unit != num_last_filter_outputs:
            raise ValueError(
                f"num_last_filter_outputs is {num_last_filter_outputs!r}, but out_layer reads "
                f"{resolved.columns_per_unit} columns of each unit"
            )
        self._may_reseed = seed is None
        rates = {
            "replacement_rate": replacement_rate,
            "maturity_threshold": maturity_threshold,
            "decay_rate": decay_rate,
        }
        label = f"{type(self).__name__} number {next(_numbers)}, from {layers['in_layer']} to {layers['out_layer']}"
        # an Engine is no Module, so the layers it refers to are not listed a second time in the model's parameters
        self._engine = self._make(
            Rule.gnt(utility=util_type, init=init, act=act_type),
            [resolved],
            rates,
            _seed_of(layers) if seed is None else seed,
            label,
        )
        self._known = 0
        _observe(self)

    @property
    def in_layer(self) -> nn.Module:
        """The layer that makes the units."""
        return self._engine.groups[0].incoming[0].module

    @property
    def out_layer(self) -> nn.Module:
        """The layer that reads them."""
        return self._engine.groups[0].outgoing[0].module

    @property
    def utility(self) -> Tensor:
        """Running utility of the units, a view [N] of the state."""
        return self._engine.state.utility

    @property
    def age(self) -> Tensor:
        """Steps since each unit was replaced: an int32 view [N] of the state."""
        return self._engine.state.age

    @property
    def num_replaced(self) -> int:
        """Units replaced so far."""
        return int(self._engine.state.num_replaced)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, and observe it while training."""
        # what a model is exported or traced to has nothing of this
        if is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return x
        if self.training and torch.is_grad_enabled() and is_observed():
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"{type(self).__name__} was given a {type(x).__name__}, must be a tensor; torch.fx would lose it: "
                    "trace model.eval(), or with a Tracer for which it is a leaf"
                )
            if is_compiling():
                # what is exported belongs to nobody
                if is_exporting():
                    return x
                self._join()
            # a copy of a layer has the number of its original, and is known from its own first forward on; what was
            # compiled for the original has this as its guard, and does not serve the copy
            if self._known != id(self):
                self._join()
            engine = self._engine if is_compiling() else self._current()
            flattened = engine.state.slots[0].spatial == 0 and engine.state.layouts[0].columns_per_unit > 1
            engine.record(0, x.flatten(1) if flattened else x)
            # as an attribute of a module it would take longer
            self.__dict__["_has_news"] = True
        return x

    def __getstate__(self) -> dict[str, Any]:
        # a copy takes part from its own first forward on, and may get the address of its original
        return self.__dict__ | {"_known": 0, "_has_news": False, "_watched": None}

    def _join(self) -> None:
        """Take part in steps from now on."""
        if several_processes():
            raise RuntimeError(
                f"{type(self).__name__} works in one process; attach a ContinualBackprop instead, which keeps "
                "several processes alike"
            )
        # nothing is made anew in a graph
        self._current()
        if self._known != id(self):
            _observe(self)
            self._known = id(self)

    # so that a forward that is compiled calls it while it is traced, and is one graph; a decorator of torch.compiler
    # sets this, too, but imports the compiler
    _join._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def get_extra_state(self) -> Tensor:
        """Ages, utilities and the like, for the model's `state_dict`: a file of torch.save as a uint8 tensor.

        safetensors knows nothing but tensors, and torch.distributed.checkpoint wants them of one size at any step.
        """
        engine, file = self._current(), io.BytesIO()
        state = engine.state_dict() | {name: float(rate) for name, rate in engine.hyper.items()}
        torch.save(_of_fixed_size(state), file)
        return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Take them from a model's `state_dict`.

        Raises:
            ValueError: it is none of such a layer, or of another rule or number of units. Nothing has changed then.
        """
        # saved by an earlier version, it is no tensor
        if isinstance(state, Tensor):
            try:
                file = io.BytesIO(bytes(state.to("cpu", torch.uint8).flatten().tolist()))
                loaded = _with_integers(torch.load(file, map_location="cpu", weights_only=True))
            except Exception as error:  # whatever reads bytes that are no file may raise
                raise ValueError(
                    f"{self._engine.layer}: its state (_extra_state in the state_dict) is not what such a layer saved: "
                    f"{type(state).__name__} of {state.dtype}, shape {tuple(state.shape)}"
                ) from error
        else:
            loaded = state
        engine = self._current()
        engine.load_state_dict(loaded)
        self._may_reseed &= not int(engine.state.step)

    @staticmethod
    def _make(
        rule: Rule, groups: list[ResolvedGroup], rates: Mapping[str, float], seed: int | None, label: str
    ) -> Engine:
        # wherever it is made, it is used in training
        with torch.inference_mode(False), torch.device("cpu"):
            return Engine(
                rule,
                groups,
                replacement_rate=rates["replacement_rate"],
                maturity_threshold=rates["maturity_threshold"],
                decay_rate=rates["decay_rate"],
                backend=None,
                capture="auto",
                seed=seed,
                layer=label,
            )

    def _current(self) -> Engine:
        """The engine, made anew if the model was converted to another type since."""
        old = self._engine
        ref = old.state.regions[0].ref
        tensor = ref.get()
        if tensor is not None:
            # weights that were on no device, or loaded with assign=True
            self._follow(tensor.device)
            if tensor.dtype != ref.dtype:
                self._engine = self._make(old.state.rule, old.groups, old.hyper, None, old.layer)
                self._engine.adopt(old)
        return self._engine

    def _follow(self, device: torch.device) -> None:
        if device.type == "meta" or device == self._engine.state.buffer.device:
            return
        with torch.inference_mode(False), torch.device("cpu"):
            self._engine.to(device)
        # an optimizer that does not step again leaves its state where it is
        _seen.pop(self, None)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # the state follows the model from device to device; to another type when it is next used
        self._follow(fn(torch.empty(0, device=self._engine.state.buffer.device)).device)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        rule, hyper = self._engine.state.rule, self._engine.hyper
        numbers = ", ".join(f"{name}={value:g}" for name, value in hyper.items())
        return f"units={self._engine.state.layouts[0].num_units}, utility={rule.utility}, init={rule.init}, {numbers}"


def _of_fixed_size(state: Any) -> Any:
    # pickle takes more bytes for a larger integer
    if isinstance(state, dict):
        return {key: _of_fixed_size(value) for key, value in state.items()}
    # nor has the name of a device the length of another's
    if isinstance(state, Tensor):
        return state.cpu()
    return torch.tensor(state, device="cpu") if type(state) is int else state


def _with_integers(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _with_integers(value) for key, value in state.items()}
    return state.item() if isinstance(state, Tensor) and state.dim() == 0 else state


class CBPLinear(_CBPLayer):
    """Continual backpropagation of the units between two linear layers; place it where `out_layer` reads them.

    Constructor and placement are those of the authors' layer of this name (Dohare et al., Nature 632, 2024), which does
    otherwise in that

    - it re-initialises inside the backward pass, before the optimizer steps, and leaves the optimizer's state; this one
      after the step, and sets the state to zero;
    - it knows only "contribution", whatever `util_type` says, and takes utilities only when it replaces;
    - its `decay_rate` averages the features of one batch with those of the next, this one's the utilities;
    - it draws as "kaiming" whatever `init` it does not know, "normal" among them, and stops at an `act_type` without a
      gain, which here has that of relu; "selu" it draws with selu's gain, this one always as "lecun";
    - it stops at layers without a bias and at norms without weights, and draws grouped convolutions too narrow;
    - it lists the two layers a second time in the model's `state_dict`, beside `util` and `ages`, here `utility` and
      `age`, views; `in_layer` and `out_layer` can be read, `ln_layer`, `bn_layer`, `util_type` and `bound` cannot.

    The rates can be set while training, and as with an optimizer, loading a `state_dict` sets them to those saved; one
    of another `init`, `act_type` or `util_type` is refused.

    Args:
        in_layer: the linear layer that makes the N units.
        out_layer: the linear layer that reads them.
        ln_layer, bn_layer: norms over the units in between, reset with a unit.
        replacement_rate: share of the mature units that is replaced each step.
        maturity_threshold: steps for which a new unit is protected.
        init: distribution of new incoming weights: "kaiming", "default", "xavier", "lecun" or "normal".
        act_type: activation whose gain `init` uses.
        util_type: a utility of `Rule.gnt`.
        decay_rate: of the running utility; 0 uses the present one.
        seed: of new weights, 64 bits; layers of one seed draw alike. None: from `torch.initial_seed()` and the weights
            that the two layers have, so that the same program draws the same numbers whenever it runs; layers whose
            weights are equal, such as copies, part with the first step that they take together. The global generators
            are not used, and a loaded `state_dict` brings its own seed.

    Raises:
        TypeError, ValueError: layers of another kind or of widths that do not fit, numbers out of range.

    Example:
        >>> self.fc1, self.fc2 = nn.Linear(784, 256), nn.Linear(256, 10)
        >>> self.cbp1 = CBPLinear(self.fc1, self.fc2)
        >>> # in forward: self.fc2(self.cbp1(self.fc1(x).relu()))
    """

    _kinds = (nn.Linear,), (nn.Linear,)

    def __init__(
        self,
        in_layer: nn.Linear,
        out_layer: nn.Linear,
        ln_layer: nn.LayerNorm | None = None,
        bn_layer: nn.BatchNorm1d | None = None,
        replacement_rate: float = 1e-4,
        maturity_threshold: float = 100,
        init: str = "kaiming",
        act_type: str = "relu",
        util_type: str = "contribution",
        decay_rate: float = 0.0,
        seed: int | None = None,
    ) -> None:
        layers = {"in_layer": in_layer, "out_layer": out_layer, "ln_layer": ln_layer, "bn_layer": bn_layer}
        super().__init__(
            layers, None, replacement_rate, maturity_threshold, init, act_type, util_type, decay_rate, seed
        )


class CBPConv(_CBPLayer):
    """Continual backpropagation of a convolution's channels; place it where `out_layer` reads them, before a flatten.

    As `CBPLinear`, with `out_layer` a convolution, or a linear layer that reads the flattened feature map.

    Args:
        in_layer: the convolution that makes the N channels.
        out_layer: the layer that reads them.
        ln_layer, bn_layer: norms over the channels in between, reset with a channel.
        num_last_filter_outputs: positions of a channel in the flattened map, for a linear `out_layer`; else 1.
        replacement_rate: share of the mature channels that is replaced each step.
        maturity_threshold: steps for which a new channel is protected.
        init: as of `CBPLinear`; convolutions are always drawn as PyTorch draws them, except for "normal".
        act_type: activation whose gain `init` uses.
        util_type: a utility of `Rule.gnt`.
        decay_rate: of the running utility; 0 uses the present one.
        seed: as of `CBPLinear`.

    Raises:
        TypeError, ValueError: layers of another kind or of widths that do not fit, numbers out of range.
    """

    _kinds = (_ConvNd,), (_ConvNd, nn.Linear)

    def __init__(
        self,
        in_layer: nn.Module,
        out_layer: nn.Module,
        ln_layer: nn.LayerNorm | None = None,
        bn_layer: nn.Module | None = None,
        num_last_filter_outputs: int = 1,
        replacement_rate: float = 1e-5,
        maturity_threshold: float = 1000,
        init: str = "kaiming",
        act_type: str = "relu",
        util_type: str = "contribution",
        decay_rate: float = 0.0,
        seed: int | None = None,
    ) -> None:
        layers = {"in_layer": in_layer, "out_layer": out_layer, "ln_layer": ln_layer, "bn_layer": bn_layer}
        super().__init__(
            layers,
            num_last_filter_outputs,
            replacement_rate,
            maturity_threshold,
            init,
            act_type,
            util_type,
            decay_rate,
            seed,
        )
