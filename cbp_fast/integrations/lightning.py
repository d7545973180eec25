"""`ContinualBackpropCallback`: continual backpropagation in a Lightning Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import metrics
from ..continual_backprop import ContinualBackprop
from ..state.layout import Slot

try:
    from lightning import Callback, LightningModule, Trainer
    from lightning.fabric.utilities import move_data_to_device
    from lightning.pytorch.utilities import rank_zero_warn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'cbp_fast.integrations.lightning needs {error.name}: pip install "cbp_fast[lightning]"', name=error.name
    ) from error


class ContinualBackpropCallback(Callback):
    """Attaches a `ContinualBackprop` to the module that is fitted, and takes it off afterwards.

    It steps after the optimizers that train the model; checkpoints hold its state, and a resumed run is the
    uninterrupted one bit for bit. One callback serves one module; a further fit goes on as after `refresh`: groups of
    the same name and size, where a layer was frozen or a head added. Several submodules want a callback each.

    Logged, every `log_every_n_steps` of the Trainer, under ``continual_backprop/<group>/``: `replaced`, units replaced
    so far. Every `metrics_every_n_steps`, of what the readers of the group saw in that batch: `dormant`, the share of
    features that were zero on every sample, and `effective_rank`; and `continual_backprop/weight_magnitude`. Of a
    submodule, `continual_backprop/` is followed by its name and a dot.

    Args:
        model: name of the submodule whose forward() is the network; by default the LightningModule's own.
        metrics_every_n_steps: 0 for never. The rank takes a singular value decomposition of [samples, features].
        options: as of `ContinualBackprop`, of which `example_inputs` is by default the module's `example_input_array`.

    Attributes:
        cbp: the `ContinualBackprop` of the fit; after it, taken off, to look at; None before the first.

    Example:
        >>> trainer = Trainer(callbacks=[ContinualBackpropCallback(replacement_rate=1e-4)])
    """

    def __init__(self, model: str = "", *, metrics_every_n_steps: int = 500, **options: Any) -> None:
        if metrics_every_n_steps < 0:
            raise ValueError(f"metrics_every_n_steps is {metrics_every_n_steps}, must be 0 or more")
        self.cbp: ContinualBackprop | None = None
        self._model, self._options, self._every = model, options, metrics_every_n_steps
        self._attached = False
        self._adopting: RemovableHandle | None = None
        # what goes on in a fit whose groups are still to be found: the state of a checkpoint, or the object of a fit
        self._loaded: dict[str, Any] = {}
        self._before: ContinualBackprop | None = None
        self._warned = False
        # the step from which on metrics are due, and what readers have seen in the batch that they are of
        self._next = 0
        self._seen: dict[str, Tensor] = {}
        self._watching: list[RemovableHandle] = []

    @property
    def state_key(self) -> str:
        """The name of its state in a checkpoint, for each submodule another."""
        return self._generate_state_key(model=self._model) if self._model else super().state_key

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the model, and go on from the state of a checkpoint or an earlier fit."""
        self._detach()
        self._next, self._warned = 0, False
        model = pl_module.get_submodule(self._model)
        mine = {id(parameter) for parameter in model.parameters()}
        # an optimizer that trains something else need not have stepped
        optimizers = [o for o in trainer.optimizers if any(id(p) in mine for g in o.param_groups for p in g["params"])]
        example = self._options.get("example_inputs", None if self._model else pl_module.example_input_array)
        # as training has its batches
        example = trainer.precision_plugin.convert_input(move_data_to_device(example, pl_module.device))
        cbp = ContinualBackprop(model, optimizers, **self._options | {"example_inputs": example})
        try:
            if self._loaded:
                cbp.load_state_dict(self._loaded)
            elif self.cbp is not None:
                self._go_on(cbp, self.cbp, model)
        except BaseException:
            # what there was is there to go on from
            cbp.remove()
            raise
        self.cbp, self._attached = cbp, True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at what the readers see in this batch, if it is time for metrics."""
        # without an example input the groups are found in the first forward
        if self.cbp is None or not self.cbp.groups or not self._every or trainer.global_step < self._next:
            return
        self._next = trainer.global_step + self._every
        state = self.cbp._engine.state
        for slot in state.slots:
            watch = self._watcher(state.layouts[slot.group].name, slot)
            self._watching.append(slot.module.register_forward_pre_hook(watch, with_kwargs=True))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was replaced, and the metrics; warn if nothing can be."""
        if self.cbp and not self.cbp.groups and trainer.global_step and not self._warned:
            self._warned = True
            self._warn(pl_module)
        values: dict[str, Tensor | float] = {}
        # two callbacks may have groups of one name
        at = "continual_backprop/" + (self._model and f"{self._model}.")
        if self.cbp and trainer.global_step % trainer.log_every_n_steps == 0:
            values |= {f"{at}{name}/replaced": float(n) for name, n in self.cbp.num_replaced.items()}
        if self._seen:
            for name, h in self._seen.items():
                values[f"{at}{name}/dormant"] = metrics.dormant_units(h).float().mean()
                values[f"{at}{name}/effective_rank"] = metrics.effective_rank(h).float()
            model = pl_module.get_submodule(self._model)
            values[f"{at}weight_magnitude"] = metrics.weight_magnitude(model).float()
            self._unwatch()
        pl_module.log_dict(values)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take all hooks off; the state stays."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take all hooks off; the state stays."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """The state of continual backprop, for a checkpoint."""
        if self._attached and self.cbp is not None and self.cbp.groups:
            return self.cbp.state_dict()
        before = self._before or self.cbp
        return before.state_dict() if not self._loaded and before is not None and before.groups else self._loaded

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint, which is there before the fit starts or after."""
        if self._attached and self.cbp is not None:
            self.cbp.load_state_dict(state_dict)
        self._loaded, self._before = state_dict, None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take all hooks off where a fit ends otherwise, as the tuner's do; the state stays."""
        self._detach()

    def __getstate__(self) -> dict[str, Any]:
        # a copy or a pickle has the state, and attaches when it is used itself
        fresh = {"cbp": None, "_attached": False, "_before": None, "_adopting": None, "_loaded": self.state_dict()}
        return {**self.__dict__, **fresh, "_watching": [], "_seen": {}}

    def _detach(self) -> None:
        self._unwatch()
        if not self._attached or self.cbp is None:
            return
        self._attached = False
        self.cbp.remove()
        if self._adopting is not None:
            self._adopting.remove()
        if self.cbp.groups:
            self._loaded = {}
        elif self._before is not None:
            self.cbp = self._before
        self._before = None

    def _go_on(self, cbp: ContinualBackprop, before: ContinualBackprop, model: nn.Module) -> None:
        """Go on with the object of the fit before as `refresh` does, now or when there are groups."""
        cbp._engine.set_hyper(**before._engine.hyper)
        cbp.enabled = before.enabled
        if not before.groups:
            return
        if cbp.groups:
            cbp._engine.adopt(before._engine)
            return
        self._before = before

        def adopt(module: nn.Module, args: Any, output: Any) -> None:
            # a state that was loaded since is what counts
            if self._before is not before or cbp.groups:
                handle.remove()
                if self._before is before:
                    cbp._engine.adopt(before._engine)
                    self._before = None

        handle = self._adopting = model.register_forward_hook(adopt)

    def _warn(self, pl_module: LightningModule) -> None:
        model, scope = pl_module.get_submodule(self._model), self._model and f"{self._model}."
        parts = [scope + name for name, part in model.named_children() if any(True for _ in part.parameters())]
        rank_zero_warn(
            f"the optimizer has stepped, and {type(model).__name__}.forward() was not called yet: continual backprop "
            "found no units and does nothing. If it is compiled, give example_inputs; else name the submodule that "
            f"training_step calls: {' or '.join(f'{type(self).__name__}({part!r})' for part in parts)}"
        )

    def _watcher(self, name: str, slot: Slot) -> Any:
        features = slice(slot.block.start, slot.block.start + slot.columns.stop - slot.columns.start)

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training and torch.is_grad_enabled():
                h = (args[0] if args else kwargs["input"]).detach()
                self._seen[name] = h.movedim(1 if slot.spatial else -1, -1)[..., features]

        return watch

    def _unwatch(self) -> None:
        for handle in self._watching:
            handle.remove()
        self._watching, self._seen = [], {}
