"""`CBPLinear` and `CBPConv`: continual backpropagation as layers that stand between the two layers of a group."""

from __future__ import annotations

import hashlib
import io
import itertools
import struct
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting
from torch.nn.modules.conv import _ConvNd

from .attaching.layered import forget_optimizers, observe
from .groups.resolving import resolve
from .groups.spec import ResolvedGroup, UnitGroup
from .hooks.observing import is_observed
from .parallel.processes import several_processes
from .rules.rule import Rule
from .step.engine import Engine
from .step.rates import Rates
from .tensors.parts import local

# what messages call a layer by, as it does not know its name in the model
_numbers = itertools.count(1)
# this many weights of a layer tell it from others
_TOLD_BY = 256


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
        observe(self)

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
            observe(self)
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
        forget_optimizers(self)

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
