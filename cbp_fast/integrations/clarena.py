"""`CBP`: takes the place of `clarena.cl_algorithms.CBP` in an experiment."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..continual_backprop import ContinualBackprop
from ..discovery import NeedsInputs, explain, find_unit_groups
from ..discovery.running.forwards import unwrapped
from ..groups.resolving import resolve
from ..groups.spec import ResolvedGroup, UnitGroup
from ..rules.rule import Rule
from ..state.regions import check_served
from ..step.engine import Engine
from ..step.together import step_together

try:
    from clarena.cl_algorithms import CBP as _ClarenaCBP
    from lightning import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import rank_zero_info
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'cbp_fast.integrations.clarena needs {error.name}: pip install "cbp_fast[clarena]"', name=error.name
    ) from error

_KEY = "continual_backprop"  # in a checkpoint


@cache
def _say_rule() -> None:
    rank_zero_info(
        "cbp_fast: continual backprop by the rule 'nature' (Dohare et al., Nature 632, 2024), not by clarena's own "
        "formulae, which rank units by their incoming weights and, in clarena 1.1.0, stop with an AttributeError at "
        "the first replacement; rule='clarena' computes those."
    )


class _Unusable(BaseException):
    """The backbone is of no use, whatever its input; no `Exception`, after which the next input would be tried."""


class _Network(nn.Module):
    """The backbone and every head in one forward, to be traced; layers have the names that they have in a `CBP`."""

    def __init__(self, backbone: nn.Module, heads: nn.Module, task_id: int, read: Sequence[str] = ()) -> None:
        super().__init__()
        # `read`: layers whose activations the backbone is to return
        self.backbone, self.heads, self.task_id, self.read = backbone, heads, task_id, read

    def forward(self, x: Tensor) -> list[Tensor]:
        name, arguments = f"{type(self.backbone).__name__}.forward()", {"stage": "train", "task_id": self.task_id}
        try:
            signature(self.backbone.forward).bind(x, **arguments)
        except TypeError as error:
            raise _Unusable(f"{name} does not take (input, stage=, task_id=) of clarena's CBP: {error}") from error
        returned = self.backbone(x, **arguments)
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            raise _Unusable(f"{name} returns {type(returned).__name__}, not (feature, activations)")
        feature, activations = returned
        if missing := [layer for layer in self.read if layer not in activations]:
            raise _Unusable(f"{name} returns no activations of {', '.join(missing)}")
        return [head(feature) for head in self.heads.modules() if isinstance(head, nn.Linear)]


class _OfLayers:
    """A dictionary by layer name, read from the state; the empty one that clarena's constructor assigns is dropped."""

    def __init__(self, key: str, convert: Callable[[Any], Any]) -> None:
        self.key, self.convert = key, convert

    def __get__(self, module: CBP, owner: type[CBP]) -> dict[str, Any]:
        state = module._state()
        groups = {} if state is None else state["groups"]
        return {name: self.convert(group[self.key]) for name, group in groups.items()}

    def __set__(self, module: CBP, value: dict[str, Any]) -> None:
        pass


class _Steps(Callback):  # type: ignore[misc, unused-ignore]
    """What a module has no hook for: steps before checkpoints are written, and the end of a fit that failed."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # the Trainer may fit something else by now
        if isinstance(pl_module, CBP):
            pl_module._after_batch(outputs)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, CBP):
            pl_module._detach()


class CBP(_ClarenaCBP):  # type: ignore[misc, valid-type, unused-ignore]
    """`clarena.cl_algorithms.CBP` with the fused kernels; in a config only `_target_` changes.

    The default rule is `nature`, continual backpropagation as published, because clarena 1.1.0's own stops with an
    AttributeError at its first replacement; that is logged once. It observes what each layer's reader sees (after
    activation, norm and dropout), steps after each step of the optimizer, and resets the optimizer's state. The last
    hidden layer is read by the heads: in TIL the head of the task decides what a unit is worth there, and a replaced
    unit is silent in all.

    The rule `clarena` computes what clarena does: on the activations before dropout, and once a batch, after the
    callbacks' `on_train_batch_end` but before checkpoints are written. It takes linear layers only, and none of more
    units than the layer before it has inputs, whose column of that number it re-draws.

    Units are followed through the backbone on `example_input_array` where that is set, else on a guessed input. It may
    be a small batch, or all that forward() takes, ``{"input": batch, "stage": "train", "task_id": 1}``, which is what
    Lightning's model summary wants.

    The state outlives a task. It is in checkpoints, copies and pickles, not in the module's `state_dict`, and one
    without it loads. `replacement_rate`, `maturity_threshold` and `utility_decay_rate` may be changed between batches.

    Args:
        backbone, heads, replacement_rate, maturity_threshold, non_algorithmic_hparams: as of clarena's.
        utility_decay_rate: as of clarena's; 1, by which no utility would ever change, is refused.
        rule: "nature", "gnt", "clarena", a `Rule`, or the fields of one.
        backend: as of `ContinualBackprop`.
        kwargs: what else the installed clarena takes.

    Attributes:
        contribution_utility: of the units of each weighted layer by its name, copies, float32 [N]; empty before the
            first fit.
        age: likewise, in steps.
        num_replacements: replacements that each layer still owes.

    Raises:
        ValueError: at the start of a fit, before any weight changes: the backbone returns no (feature, activations),
            the units of a layer cannot be followed through it (a residual network's shortcuts), or a number is out of
            range.
    """

    contribution_utility = _OfLayers("utility", partial(torch.asarray, dtype=torch.float32, copy=True))
    age = _OfLayers("age", partial(torch.asarray, dtype=torch.float32, copy=True))
    num_replacements = _OfLayers("pending", float)

    def __init__(
        self,
        backbone: nn.Module,
        heads: nn.Module,
        replacement_rate: float,
        maturity_threshold: int,
        utility_decay_rate: float,
        non_algorithmic_hparams: dict[str, Any] | None = None,
        *,
        rule: str | Rule | Mapping[str, Any] = "nature",
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        # numbers of NumPy, which a config may compute, as Python's
        given = replacement_rate, maturity_threshold, utility_decay_rate
        rates: list[Any] = [rate.item() if hasattr(rate, "item") else rate for rate in given]
        replacement_rate, maturity_threshold, utility_decay_rate = rates
        super().__init__(
            backbone,
            heads,
            replacement_rate,
            maturity_threshold,
            utility_decay_rate,
            non_algorithmic_hparams or {},
            **kwargs,
        )
        self.rule = Rule(**rule) if isinstance(rule, Mapping) else Rule.make(rule)
        self.backend = backend
        # plain values, which a checkpoint loads with weights_only=True
        plain = {f.name: getattr(self.rule, f.name) for f in fields(self.rule) if f.init}
        self.save_hyperparameters({"rule": rule if isinstance(rule, str) else plain, "backend": backend})
        self._engine: Engine | None = None
        self._attached: ContinualBackprop | None = None
        self._kept: dict[str, Any] | None = None
        # what the batch returned whose step is taken already
        self._stepped: dict[str, Any] | None = None

    def configure_callbacks(self) -> list[Callback]:
        """The parent's, and one that steps; a Trainer keeps it from fit to fit."""
        there = any(isinstance(callback, _Steps) for callback in getattr(self._trainer, "callbacks", ()))
        return [*super().configure_callbacks(), *([] if there else [_Steps()])]

    def on_fit_start(self) -> None:
        """Attach to the network as the task finds it, its heads included, and go on from the state so far."""
        super().on_fit_start()
        self._detach()
        if self.rule.name == "nature":
            _say_rule()
        try:
            self._start()
        except _Unusable as error:
            raise ValueError(str(error)) from None
        except ValueError as error:
            if "exclude=" not in str(error):
                raise
            # an option that is not to be had here
            raise ValueError(re.sub(r",? or [^,;]*exclude=.*", "", str(error))) from None
        assert self._engine is not None
        try:
            if self._kept is not None:
                self._engine.load_state_dict(self._fitting(self._kept))
        except BaseException:
            # the state so far is what counts, not that of the new engine
            self._engine = None
            self._detach()
            raise

    def on_fit_end(self) -> None:
        """Take the hooks off; the state stays."""
        super().on_fit_end()
        self._detach()

    def on_train_start(self) -> None:
        """Nothing: the parent sets its statistics to zero here, whenever training resumes in the first task."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Follow changes of the rates."""
        if self._engine is not None and self._engine.hyper != self._rates():
            self._engine.set_hyper(**self._rates())
        return super().on_train_batch_start(batch, batch_idx)

    def on_train_batch_end(self, outputs: dict[str, Any], batch: Any, batch_idx: int) -> None:
        """One step of the rule `clarena`, unless the callback was first; the others have had theirs."""
        if self._stepped is not outputs:
            self._after_batch(outputs)
        self._stepped = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the state beside the module's `state_dict`."""
        super().on_save_checkpoint(checkpoint)
        state = self._state()
        if state is not None:
            checkpoint[_KEY] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the state of a checkpoint that has one."""
        super().on_load_checkpoint(checkpoint)
        if _KEY not in checkpoint:
            rank_zero_info("cbp_fast: the checkpoint has no state of continual backprop; it begins anew")
        self._kept = checkpoint.get(_KEY)
        # some strategies restore after the fit has started
        if self._engine is not None and self._kept is not None:
            self._engine.load_state_dict(self._fitting(self._kept))

    def __getstate__(self) -> dict[str, Any]:
        # a copy or a pickle has the state, and attaches when it is fitted itself
        fresh = {"_kept": self._state(), "_engine": None, "_attached": None, "_stepped": None}
        return {**super().__getstate__(), **fresh}

    def _after_batch(self, outputs: dict[str, Any]) -> None:
        """One step of the rule `clarena`."""
        if self._engine is None or self._attached is not None:
            return
        self._stepped = outputs
        for slot, name in enumerate(self.backbone.weighted_layer_names):
            self._engine.record(slot, outputs["activations"][name])
        step_together([self._engine], [])

    def _start(self) -> None:
        if self.rule.name == "clarena":
            self._engine = self._clarena_engine()
            return
        self._attached = ContinualBackprop(
            self,
            self.trainer.optimizers,
            rule=self.rule,
            groups=self._found_groups(),
            backend=self.backend,
            **self._rates(),
        )
        self._engine = self._attached._engine

    def _rates(self) -> dict[str, Any]:
        return {
            "replacement_rate": self.replacement_rate,
            "maturity_threshold": self.maturity_threshold,
            "decay_rate": self.utility_decay_rate,
        }

    def _state(self) -> dict[str, Any] | None:
        return self._kept if self._engine is None else self._engine.state_dict()

    def _detach(self) -> None:
        self._kept = self._state()
        if self._attached is not None:
            self._attached.remove()
        self._engine = self._attached = None

    def _fitting(self, kept: Mapping[str, Any]) -> dict[str, Any]:
        """The state with the rates of this object, and with running means for the heads that it did not know."""
        assert self._engine is not None
        own, groups = self._engine.state_dict()["groups"], dict(kept["groups"])
        for name, group in own.items():
            if "running_mean" in group and name in groups:
                mean, size = groups[name]["running_mean"], group["running_mean"].numel()
                # a new head sees what the others see
                groups[name] = {**groups[name], "running_mean": mean.repeat(-(-size // mean.numel()))[:size]}
        return {**kept, **self._rates(), "groups": groups}

    def _example(self) -> Any:
        """The batch in `example_input_array`, as training has its batches."""
        example = self.example_input_array
        if isinstance(example, Mapping):
            example = example["input"]
        elif isinstance(example, (tuple, list)):
            example = example[0]
        return None if example is None else self.trainer.precision_plugin.convert_input(example.to(self.device))

    def _found_groups(self) -> list[UnitGroup]:
        """A group for each weighted layer, under clarena's name for it."""
        names, backbone = self.backbone.weighted_layer_names, type(self.backbone).__name__
        start = f"rule {self.rule.name!r} follows units through {backbone}.forward(), and cannot for"
        if hasattr(self.backbone, "_orig_mod") or self.backbone._compiled_call_impl is not None:
            raise ValueError(
                f"{start} {', '.join(names)}: the backbone is compiled and would not call new hooks; leave it as it "
                "is, and give the Trainer torch.compile() of the whole CBP"
            )
        network, example = _Network(self.backbone, self.heads, self.task_id), self._example()
        try:
            groups = find_unit_groups(network, example)
        except NeedsInputs as error:
            raise ValueError(
                f"{start} {', '.join(names)}: what it takes cannot be told from its layers; set example_input_array of "
                f'the CBP to {{"input": a small batch, "stage": "train", "task_id": {self.task_id}}}'
            ) from error
        except ValueError as error:
            raise ValueError(f"{start} any of {', '.join(names)}: {error}") from error
        found: dict[str, UnitGroup] = {}
        shared = ""
        for group in groups:
            members = resolve(network, group).incoming
            makers = [member.name.removeprefix("backbone.").replace(".", "/") for member in members]
            if len(makers) == 1:
                found[makers[0]] = replace(group, name=makers[0])
            else:
                shared += f"{', '.join(makers)} make the same units, and clarena knows each layer's own\n"
        unread = [name for name in names if name not in found]
        if unread:
            why = explain(network, example)
            if "is frozen" in why:
                why += "\na CBP leaves out no weighted layer: train it and its readers (rule='clarena': one head)"
            raise ValueError(f"{start} {', '.join(unread)}:\n{shared}{why}")
        return [found[name] for name in names]

    def _clarena_engine(self) -> Engine:
        """An engine with a group for each weighted layer; the one before it in the list counts as preceding."""
        if self.trainer.world_size > 1:
            raise RuntimeError("rule 'clarena' runs in one process only: each would replace units of its own")
        names = self.backbone.weighted_layer_names
        # a compiled backbone will do, as there are no hooks
        network = _Network(unwrapped(self.backbone), self.heads, self.task_id, names)
        layers = [f"backbone.{name}".replace("/", ".") for name in names]
        heads = [name for name, head in network.named_modules() if name[:6] == "heads." and isinstance(head, nn.Linear)]
        # as will any head, as the rule reads and changes none; but a group has none that is frozen
        head = max(heads, key=lambda name: network.get_parameter(f"{name}.weight").requires_grad)
        groups: list[ResolvedGroup] = []
        for name, layer, reader in zip(names, layers, [*layers[1:], head], strict=True):
            group = resolve(network, UnitGroup(name, [layer], [reader]))
            groups.append(replace(group, preceding=groups[-1].incoming if groups else ()))
        check_served(self.rule, groups)
        # only to see what the backbone returns: no unit has to be followed
        with suppress(Exception):
            find_unit_groups(network, self._example())
        return Engine(self.rule, groups, **self._rates(), backend=self.backend, capture="auto", seed=None)
