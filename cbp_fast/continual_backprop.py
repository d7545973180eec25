"""`ContinualBackprop`: attaches continual backpropagation to a model and its optimizer, and checkpoints it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .discovery import NeedsInputs, explain, find_unit_groups
from .distributed import Joinable, join_hook_of, join_processes, notify_join, several_processes, unwrapped
from .dtensors import is_dtensor
from .engine import Engine, Rates, checked_hyper, checked_seed, checked_state, described, is_observed, step_together
from .optimizer_state import inside_step, skipped, unwatch_skips, watch_skips
from .rules import Rule
from .running import Given
from .unit_groups import Part, ResolvedGroup, UnitGroup, check_disjoint, own_tensors, resolve, shared_memory


class _Recorder:
    """Forward pre-hook of a reading layer: its input is the feature that its weight multiplies.

    Copies and pickles do nothing, so that a deepcopied or averaged model carries no continual backprop with it.
    """

    __slots__ = ("engine", "slot")

    def __init__(self, engine: Engine | None = None, slot: int = 0) -> None:
        self.engine = engine
        self.slot = slot

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and self.engine is not None and torch.is_grad_enabled():
            self.engine.record(self.slot, args[0] if args else kwargs["input"])

    def __deepcopy__(self, memo: dict[int, Any]) -> _Recorder:
        return _Recorder()

    def __reduce__(self) -> tuple[type[_Recorder], tuple[()]]:
        return _Recorder, ()


class _Later:
    """Forward pre-hook that removes hooks, its own among them; copies and pickles do nothing."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        for handle in self.handles:
            handle.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Later:
        return _Later()

    def __reduce__(self) -> tuple[type[_Later], tuple[()]]:
        return _Later, ()


class _Place(NamedTuple):
    """A module among the children of another."""

    children: dict[str, nn.Module | None]
    key: str
    name: str
    module: nn.Module


class _FirstForward(_Later):
    """Forward pre-hook of the model that finds its groups; copies and pickles do nothing."""

    def __init__(self, cbp: ContinualBackprop) -> None:
        super().__init__()
        self.cbp = cbp

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # type: ignore[override]
        if module.training and torch.is_grad_enabled() and not is_compiling() and is_observed():
            self.cbp._attach_in_forward(args, kwargs)


class _Round:
    """Which of the optimizers are still to step, and whether one of the others did not skip its update."""

    __slots__ = ("everyone", "stepped", "waiting")

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.everyone = frozenset(map(id, optimizers))
        # of a round that has begun
        self.waiting: set[int] = set()
        self.stepped = False

    def is_last(self, optimizer: Optimizer) -> bool:
        """Whether all the others have stepped."""
        return (self.waiting or self.everyone) <= {id(optimizer)}

    def after(self, optimizer: Optimizer, was_skipped: bool) -> bool | None:
        """Whether there was an update, once all optimizers have stepped; before that None."""
        # not when the last one ends: an interrupt there would move the next rounds
        if not self.waiting:
            self.stepped = False
            self.waiting = set(self.everyone)
        self.waiting.discard(id(optimizer))
        self.stepped |= not was_skipped
        return None if self.waiting else self.stepped


class _Awaited:
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
        self.state = SimpleNamespace(layouts=[], slots=[], num_replaced=nothing, num_chosen=nothing)

    def set_hyper(self, **values: float) -> None:
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
        if self.kept is None:
            raise RuntimeError(
                "the unit groups are found in the first training forward, so there is no state yet; with "
                "example_inputs they are found when attaching"
            )
        return copy.deepcopy(self.kept)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep a copy, of which all is checked but which groups there are."""
        own = {"rule": described(self.rule), **self.hyper, "seed": 0, "step": 0, "groups": None}
        measured = {"deviations": None} if self.rule.init == "as_attached" else {}
        kept = checked_state(state_dict, own | measured)
        self.hyper = {key: kept[key] for key in self.hyper}
        self.kept = kept


class ContinualBackprop(Rates, Joinable):
    """Continual backpropagation (Dohare et al., Nature 632, 2024) for a model that keeps training.

    After every step of the optimizer a few hidden units of least utility are re-initialised: their incoming weights are
    drawn anew, their bias, norm entries, outgoing weights and optimizer state are reset. The model is not wrapped or
    changed; `remove()` takes everything off again.

    Args:
        model: the network. Its hidden units are found by tracing its forward once (see `find_unit_groups`), or given
            by `groups`.
        optimizer: the optimizer, or all of them, that train the model. A step of continual backprop follows once each
            has stepped. Without one, call `step()` after your own update; it then knows no optimizer's state to reset.
        rule: "nature", "gnt", "clarena" or a `Rule`.
        replacement_rate: share of the mature units that is replaced each step, in [0, 1].
        maturity_threshold: steps for which a new unit is protected.
        decay_rate: of the running utility, in [0, 1).
        groups: the unit groups, instead of discovery.
        example_inputs: a small batch to run the model on, to find its groups; as of `find_unit_groups`. Without it one
            is guessed, and where that cannot be done the groups are found in the first training forward.
        include, exclude: patterns (`fnmatch`) of group names to take, or to leave out.
        backend: "cpp", "triton", "reference", or None for the fastest on the model's device.
        capture: "deferred" holds activations until the step, "inline" sums them in the forward, "auto" does the first
            while less than 4 MiB are held.
        seed: of re-drawn weights, 64 bits; by default `torch.initial_seed()`, of the first process where they are
            several. The global generators are never used.
        process_group: the processes that train the model together, a `torch.distributed.ProcessGroup`; by default that
            of DistributedDataParallel or of `fully_shard`'s mesh, else all. Each step then adds up their statistics in
            one all_reduce, and all choose the same units. A group of one process trains by itself.

    In several processes a centred utility, which measures distances from a running mean, takes the mean that the step
    before left: the mean of this step's samples is known to nobody while they come in.

    Raises:
        ValueError: no unit groups were found, layers that do not fit together, numbers out of range, or unknown names.
        TypeError: an argument of a wrong kind.

    Example:
        >>> cbp = ContinualBackprop(model, optimizer, replacement_rate=1e-4)
        >>> for x, y in stream:
        ...     loss = F.cross_entropy(model(x), y)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        rule: str | Rule = "nature",
        replacement_rate: float = 1e-4,
        maturity_threshold: float = 100,
        decay_rate: float = 0.99,
        groups: UnitGroup | Sequence[UnitGroup] | None = None,
        example_inputs: Any = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        backend: str | None = None,
        capture: str = "auto",
        seed: int | None = None,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, must be a torch.nn.Module")
        super().__init__()
        self._rule = Rule.make(rule)
        self._optimizers = _optimizers(optimizer)
        wrapped, model = model, unwrapped(model)
        _check_not_compiled(model)
        self._model, self._wrapped, self._process_group = model, wrapped, process_group
        self._given = (groups, example_inputs)
        self._patterns = (include, exclude)
        self._backend, self._seed = backend, seed
        self._engine: Engine
        self._groups: list[UnitGroup] = []
        self._places: list[_Place] = []
        self._follow_places()
        self._hooks: list[RemovableHandle] = []
        hyper = {
            "replacement_rate": replacement_rate,
            "maturity_threshold": maturity_threshold,
            "decay_rate": decay_rate,
        }
        self._seed = checked_seed(capture, seed)
        try:
            self._attach(self._resolve(), **hyper, capture=capture)
        except NeedsInputs:
            # in a forward, parameters that processes hold parts of are not what they are in a step
            if any(is_dtensor(p) for p in model.parameters()):
                raise
            self._engine = cast(Engine, _Awaited(self._rule, hyper, capture))
            self._hooks = [model.register_forward_pre_hook(_FirstForward(self), with_kwargs=True)]
        self._heard = False
        self._follow_optimizers()

    def _follow_optimizers(self) -> None:
        self._round = _Round(self._optimizers)
        self._optimizer_hooks = [o.register_step_post_hook(self._after_optimizer_step) for o in self._optimizers]
        if self._optimizers:
            watch_skips(self)
        if several_processes():
            self._optimizer_hooks += [o.register_step_pre_hook(self._before_optimizer_step) for o in self._optimizers]

    def _resolve(self) -> list[ResolvedGroup]:
        """The groups, given or found in the model as it is, after all checks."""
        groups, example_inputs = self._given
        if isinstance(groups, UnitGroup):
            groups = [groups]
        found = find_unit_groups(self._model, example_inputs) if groups is None else list(groups)
        tied = shared_memory(own_tensors(self._model))
        every = _in_forward_order([resolve(self._model, group, tied) for group in found])
        if not every:
            why = "groups is empty" if groups is not None else explain(self._model, example_inputs)
            raise ValueError(f"the model has no unit group to work on:\n{why}")
        resolved = _filtered(every, *self._patterns)
        if not resolved:
            names = ", ".join(group.name for group in every)
            raise ValueError(f"include= and exclude= leave no unit group to work on; they are: {names}")
        check_disjoint(resolved)
        _check_clarena(self._rule, resolved)
        _check_not_attached(self._model, resolved, self if self._hooks else None)
        _check_optimizers(self._optimizers, resolved)
        return resolved

    def _attach(self, resolved: list[ResolvedGroup], **options: Any) -> None:
        """Make the state of the groups and observe their readers."""
        alike = {**options, "rule": self._rule, "backend": self._backend}
        processes = join_processes(self._wrapped, resolved, self._process_group, self._seed, alike)
        seed = processes.seed if processes else self._seed
        self._engine = Engine(self._rule, resolved, backend=self._backend, seed=seed, processes=processes, **options)
        self._groups = [group.unit_group() for group in resolved]
        self._places = _places(self._model, resolved)
        self._follow_places()
        self._hooks = [
            slot.module.register_forward_pre_hook(_Recorder(self._engine, i), with_kwargs=True)
            for i, slot in enumerate(self._engine.state.slots)
        ]

    def _follow_places(self) -> None:
        # apart, as each step compares them at once
        self._parents = [place.children for place in self._places]
        self._keys = [place.key for place in self._places]
        self._modules: list[nn.Module | None] = [place.module for place in self._places]

    def _attach_in_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the groups by what a training forward is given, and observe it already."""
        awaited, (hook,), given = cast(_Awaited, self._engine), self._hooks, self._given
        hook.remove()
        self._given = (None, Given(args, kwargs))
        misfit: ValueError | None = None
        try:
            self._attach(self._resolve(), **awaited.hyper, capture=awaited.capture)
            self._engine.enabled = awaited.enabled
            if awaited.kept is not None:
                try:
                    self._engine.load_state_dict(awaited.kept)
                except ValueError as error:
                    misfit = error
                    self._engine.set_hyper(**awaited.set)
        except BaseException:
            # the next forward tries again
            for handle in self._hooks:
                handle.remove()
            self._engine, self._groups, self._places = cast(Engine, awaited), [], []
            self._follow_places()
            self._hooks = [self._model.register_forward_pre_hook(_FirstForward(self), with_kwargs=True)]
            raise
        finally:
            self._given = given
        if misfit is not None:
            raise ValueError(
                f"what was loaded before the unit groups were found does not fit them, and training starts without it: "
                f"{misfit}"
            ) from misfit

    def refresh(
        self,
        *,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        groups: UnitGroup | Sequence[UnitGroup] | None = None,
        example_inputs: Any = None,
    ) -> None:
        """Follow a model that was changed (a head was added, a layer replaced or frozen), or a new optimizer.

        The groups are found anew. Those of the same name and number of units keep their utilities, ages and totals;
        the others start afresh. Forwards since the last step are forgotten.

        Args:
            optimizer, groups, example_inputs: as at attaching; None: what was given there, or here the last time.

        Raises:
            ValueError, TypeError: as at attaching. Nothing has changed then.
            RuntimeError: after `remove()`.
        """
        self._check_attached()
        before, optimizers = self._given, self._optimizers
        self._given = (before[0] if groups is None else groups, before[1] if example_inputs is None else example_inputs)
        old, hooks = self._engine, self._hooks
        try:
            if optimizer is not None:
                self._optimizers = _optimizers(optimizer)
            self._attach(self._resolve(), **old.hyper, capture=old.capture)
        except Exception:
            self._given, self._optimizers = before, optimizers
            raise
        if self._optimizers is not optimizers:
            for handle in self._optimizer_hooks:
                handle.remove()
            self._follow_optimizers()
        for handle in hooks:
            handle.remove()
        if not isinstance(old, _Awaited):
            self._engine.adopt(old)
        elif old.kept is not None:
            self._engine.load_state_dict(old.kept)
        self._engine.enabled = old.enabled
        old.enabled = False

    def step(self) -> None:
        """One step of continual backprop; runs by itself after the optimizer's if one was given.

        Without a forward since the last step it changes nothing. It happens whole or not at all.

        Raises:
            RuntimeError: after `remove()`, or if a parameter is not on the device, or not of the shape or type, that
                it had when attached.
        """
        self._check_attached()
        engine = self._engine
        if not engine.enabled:
            return
        if list(map(dict.get, self._parents, self._keys)) != self._modules:
            name = next(p.name for p in self._places if p.children.get(p.key) is not p.module)
            raise RuntimeError(f"'{name}' was replaced after attaching; call refresh()")
        if not self._heard:
            self._heard = True
            # of several processes one may be without data
            if engine.processes is None and not engine.has_data:
                warnings.warn(
                    "no training forward of the model was seen before the first step of continual backprop, which "
                    "changes nothing; if the model is compiled, attach before its first compiled call, with "
                    "example_inputs",
                    stacklevel=2,
                )
        if engine.processes is not None and not engine.begun:
            notify_join(self)
        step_together([engine], self._optimizers)

    def _check_attached(self) -> None:
        if not self._hooks:
            raise RuntimeError("this ContinualBackprop was removed from its model; attach a new one")

    def _before_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # a closure has forwards of its own, and of several optimizers the others may be followed by some
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        last, engine = self._round.is_last(optimizer), self._engine
        if engine.processes is None:
            return
        if closure is not None or not last or not self._hooks or not engine.enabled or engine.state.splits_sums:
            engine.await_sums()
        # where a step failed in this process alone and is tried again, the others are adding up already
        elif not engine.begun:
            notify_join(self)
            engine.begin()

    def _after_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._follow(optimizer, skipped(optimizer))

    def _after_skipped_step(self, optimizer: Optimizer) -> None:
        if any(optimizer is mine for mine in self._optimizers):
            self._follow(optimizer, was_skipped=True)

    def _follow(self, optimizer: Optimizer, was_skipped: bool) -> None:
        if not self._hooks:
            return
        stepped = self._round.after(optimizer, was_skipped)
        if stepped:
            self.step()
        elif stepped is not None:
            # of an update that was none nothing counts
            self._engine.forget_forwards()

    def join_hook(self, **kwargs: Any) -> Any:
        """For `torch.distributed.algorithms.Join([ddp_model, cbp])`, where processes have more or less data.

        In this order, and with a step after every backward pass. A process that ran out of data takes over, in the end,
        the parameters and this state from one that had the most; the optimizer's state it does not.
        """
        return join_hook_of(self._engine)

    @property
    def join_device(self) -> torch.device:
        """Where the collectives of a process without data run."""
        return self._engine.state.buffer.device

    @property
    def join_process_group(self) -> Any:
        """The processes that step together."""
        return self._engine.processes.group if self._engine.processes else None

    def remove(self) -> None:
        """Take all hooks off the model and the optimizers; the object keeps its statistics but works no more."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []
        unwatch_skips(self)
        if not inside_step():
            for handle in self._optimizer_hooks:
                handle.remove()
            return

        # a hook that goes while torch loops over the hooks breaks the loop; the next forward is soon enough
        later = _Later()
        later.handles = [*self._optimizer_hooks, self._model.register_forward_pre_hook(later)]

    def to(self, device: str | int | torch.device) -> ContinualBackprop:
        """Move the state to a device, after `model.to(device)`; forwards since the last step are forgotten."""
        self._engine.to(torch.device(device))
        return self

    def __setattr__(self, name: str, value: object) -> None:
        # of a setting that there is not, nobody would notice that nothing came of it
        if type(self) is ContinualBackprop and not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"ContinualBackprop has no {name!r} to set")
        super().__setattr__(name, value)

    @property
    def rule(self) -> Rule:
        """What is computed and how units are re-initialised."""
        return self._rule

    @property
    def groups(self) -> list[UnitGroup]:
        """The unit groups, in forward order."""
        return list(self._groups)

    @property
    def enabled(self) -> bool:
        """While False, forwards are not observed and steps do nothing."""
        return self._engine.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"enabled is {value!r}, must be True or False")
        self._engine.enabled = value

    @property
    def backend(self) -> str:
        """The backend in use."""
        return self._engine.backend

    @property
    def utility(self) -> dict[str, Tensor]:
        """Running utility of each group's units: views [N] of the state, float32 (float64 in a float64 network)."""
        state = self._engine.state
        return {layout.name: state.utility[layout.units] for layout in state.layouts}

    @property
    def age(self) -> dict[str, Tensor]:
        """Steps since each unit was replaced: int32 views [N] of the state."""
        state = self._engine.state
        return {layout.name: state.age[layout.units] for layout in state.layouts}

    @property
    def num_replaced(self) -> dict[str, int]:
        """Units of each group replaced so far."""
        state = self._engine.state
        return {layout.name: n for layout, n in zip(state.layouts, state.num_replaced.tolist(), strict=True)}

    @property
    def last_replaced(self) -> dict[str, Tensor]:
        """Units of each group replaced in the last step that was one, least utility first: int64 [k]."""
        state = self._engine.state
        return {
            layout.name: state.chosen[layout.units][:n].long()
            for layout, n in zip(state.layouts, state.num_chosen.tolist(), strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit for bit, as copies; loads with `weights_only=True`.

        Take it between steps: what forwards have left since the last step is not in it.
        """
        return self._engine.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict()` of the same network and rule; rates and seed are taken from it too.

        Raises:
            ValueError: a key is missing, or groups, shapes, rule or numbers do not fit. Nothing has changed then.
        """
        self._engine.load_state_dict(state_dict)

    def __repr__(self) -> str:
        engine = self._engine
        rows: list[tuple[str, ...]] = [("group", "units", "incoming", "norms", "outgoing")]
        for group, layout in zip(self.groups, engine.state.layouts, strict=True):
            incoming, outgoing, norms = (
                ", ".join(map(_name_of, p)) for p in (group.incoming, group.outgoing, group.norms)
            )
            if layout.columns_per_unit > 1:
                outgoing += f" ({layout.columns_per_unit} columns a unit)"
            rows.append((group.name, str(layout.num_units), incoming, norms or "-", outgoing))
        hyper = ", ".join(f"{name}={value:g}" for name, value in engine.hyper.items())
        held = f" holding {engine.held_bytes} bytes" if engine.held_bytes else ""
        capture = f"capture={engine.capture}{held}"
        why = f" (triton {engine.why_not_triton})" if engine.why_not_triton else ""
        head = f"ContinualBackprop(rule={self.rule.name}, {hyper}, backend={engine.backend}{why}, {capture})"
        if isinstance(engine, _Awaited):
            rows = [("the unit groups are found in the first training forward",)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        removed = "" if self._hooks else " removed"
        return "\n  ".join([head + removed, *(line.rstrip() for line in table)])

    def __deepcopy__(self, memo: dict[int, Any]) -> ContinualBackprop:
        raise TypeError(
            "a ContinualBackprop belongs to one model; attach a new one to the copy and load its state_dict"
        )

    def __reduce__(self) -> Any:
        raise TypeError("a ContinualBackprop cannot be pickled; save its state_dict()")


def _name_of(layer: str | nn.Module | Part) -> str:
    """A layer as the table of groups names it: a part by the index of unit 0."""
    return f"{layer.layer}[{layer.start}:]" if isinstance(layer, Part) else str(layer)


def _optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    optimizers = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    if not isinstance(optimizers, Iterable):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, must be a torch.optim.Optimizer or several")
    optimizers = list(optimizers)
    for o in optimizers:
        if not isinstance(o, Optimizer):
            raise TypeError(f"optimizer holds a {type(o).__name__}, must be torch.optim.Optimizer objects")
    # one that is given twice steps once
    return list({id(o): o for o in optimizers}.values())


def _in_forward_order(groups: Sequence[ResolvedGroup]) -> list[ResolvedGroup]:
    """Groups whose readers make the units of another go before it; each is told which layers precede its own."""
    makers = [{member.module for member in group.incoming} for group in groups]
    before = [
        [other for other in groups if other is not group and any(member.module in made for member in other.outgoing)]
        for group, made in zip(groups, makers, strict=True)
    ]
    waiting, ordered = list(range(len(groups))), []
    placed: set[str] = set()
    while waiting:
        # in a circle the given order stands
        ready = (i for i in waiting if all(other.name in placed for other in before[i]))
        i = next(ready, waiting[0])
        waiting.remove(i)
        placed.add(groups[i].name)
        ordered.append(replace(groups[i], preceding=tuple(layer for other in before[i] for layer in other.incoming)))
    return ordered


def _filtered(
    groups: list[ResolvedGroup], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> list[ResolvedGroup]:
    def matches(option: str, patterns: str | Sequence[str]) -> set[str]:
        hits: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"{option} holds {pattern!r}, must be patterns of group names, such as 'layers.*'")
            found = {group.name for group in groups if fnmatchcase(group.name, pattern)}
            if not found:
                names = ", ".join(group.name for group in groups)
                raise ValueError(f"{option}={pattern!r} matches no unit group; they are: {names}")
            hits |= found
        return hits

    taken = {group.name for group in groups} if include is None else matches("include", include)
    left_out = set() if exclude is None else matches("exclude", exclude)
    return [group for group in groups if group.name in taken - left_out]


def _check_clarena(rule: Rule, groups: Sequence[ResolvedGroup]) -> None:
    if rule.name != "clarena":
        return
    for group in groups:
        members = (*group.incoming, *group.outgoing)
        if not all(isinstance(member.module, nn.Linear) for member in members) or group.columns_per_unit > 1:
            raise ValueError(
                f"rule 'clarena' is defined for linear layers only, and group '{group.name}' has convolutions; "
                "use rule='nature', or exclude= the group"
            )
        for name, module, _ in group.preceding:
            inputs = cast(Tensor, module.weight).shape[1]
            if inputs < group.num_units:
                raise ValueError(
                    f"rule 'clarena' re-draws column j of the preceding layer for unit j, but '{name}' has "
                    f"{inputs} inputs and group '{group.name}' has {group.num_units} units"
                )


def _check_not_attached(model: nn.Module, groups: list[ResolvedGroup], own: ContinualBackprop | None) -> None:
    """No unit belongs to two objects: `own` is the one that is asking."""
    engines = {
        hook.engine
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, _Recorder) and hook.engine is not None
    }
    # those of the layers that do the same
    engines |= {e for module in model.modules() if isinstance(e := getattr(module, "_engine", None), Engine)}
    for engine in engines - ({own._engine} if own else set()):
        theirs = [replace(group, name=f"{group.name} ") for group in engine.groups]
        try:
            check_disjoint([*theirs, *groups])
        except ValueError as error:
            raise ValueError(
                f"the model has continual backprop attached already ({error}); call its remove() first, or take the "
                "layer out"
            ) from None


def _check_not_compiled(model: nn.Module) -> None:
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError("the model is compiled already and would not call new hooks; attach first, then compile")


def _places(model: nn.Module, groups: Sequence[ResolvedGroup]) -> list[_Place]:
    """Where every layer of the groups, and every module that holds one, hangs in the model."""
    places: dict[str, _Place] = {}
    for group in groups:
        for member in (*group.incoming, *group.norms, *group.outgoing):
            parent, path = model, ""
            for key in member.name.split(".") if member.name else ():
                path = f"{path}.{key}" if path else key
                child = parent._modules[key]
                assert child is not None
                places[path] = _Place(parent._modules, key, path, child)
                parent = child
    return list(places.values())


def _check_optimizers(optimizers: Sequence[Optimizer], groups: Sequence[ResolvedGroup]) -> None:
    if any(getattr(o, "_overlap_with_ddp", False) for o in optimizers):
        raise ValueError(
            "ZeroRedundancyOptimizer with overlap_with_ddp=True steps within the backward pass, where continual "
            "backprop cannot follow it; leave overlap_with_ddp=False"
        )
    known = {id(p) for o in optimizers for param_group in o.param_groups for p in param_group["params"]}
    for group in groups if optimizers else ():
        for name, module, _ in (*group.incoming, *group.outgoing):
            if id(module.weight) not in known:
                raise ValueError(
                    f"the optimizer does not hold {name}.weight of group '{group.name}'; pass every optimizer that "
                    "trains the model, made from its present parameters, after fully_shard or parallelize_module, or "
                    "exclude= the group"
                )
