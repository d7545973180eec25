"""`ContinualBackprop`: attaches continual backpropagation to a model and its optimizer, and checkpoints it."""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .attaching.asking import Asked, filtered, in_forward_order
from .attaching.awaiting import Awaited
from .attaching.children import Child, children_of, compared
from .attaching.recording import FirstForward, Later, Recorder
from .attaching.sharing import check_not_attached
from .attaching.silence import no_forward, unknown_optimizer, unknown_reader, untrained_parameter
from .attaching.turns import Round, check_optimizers, optimizers_in
from .discovery import NeedsInputs, explain, find_unit_groups
from .discovery.running.forwards import Given
from .groups.layers import names_of
from .groups.resolving import check_disjoint, resolve
from .groups.spec import Part, ResolvedGroup, UnitGroup
from .hooks.forwards import Hook, forget_compiled, hang, take_off
from .hooks.optimizers import inside_step, let_go, skipped, unwatch_skips, watch_skips, with_inner
from .hooks.registry import FORGOTTEN, enlist, everyone, strike
from .parallel.processes import join_processes, several_processes, unwrapped
from .rules.rule import Rule
from .state.regions import check_served
from .step.engine import Engine
from .step.joining import Joinable, join_hook_of, notify_join
from .step.rates import Rates
from .step.settings import checked_seed
from .step.together import step_together
from .tensors.memory import own_tensors, shared_memory
from .tensors.parts import is_dtensor


class ContinualBackprop(Rates, Joinable):
    """Continual backpropagation (Dohare et al., Nature 632, 2024) for a model that keeps training.

    After every step of the optimizer a few hidden units of least utility are re-initialised: their incoming weights are
    drawn anew, their bias, norm entries, outgoing weights and optimizer state are reset. The model is not wrapped or
    changed, and copies and pickles of it carry nothing of this; `remove()` takes everything off again. The object stays
    attached if nobody keeps it: :func:`cbp_fast.attached` finds it.

    Args:
        model: the network. Its hidden units are found by tracing its forward once (see `find_unit_groups`), or given
            by `groups`.
        optimizer: the optimizer, or all of them, that train the model. A step of continual backprop follows once each
            has stepped. Of a wrapper that runs no hooks (accelerate's) give what it wraps. Without one, call `step()`
            after your own update; it then knows no optimizer's state to reset.
        rule: "nature", "gnt", "clarena" or a `Rule`.
        replacement_rate: share of the mature units that is replaced each step, in [0, 1].
        maturity_threshold: steps for which a new unit is protected.
        decay_rate: of the running utility, in [0, 1).
        groups: the unit groups, instead of discovery.
        example_inputs: a small batch to run the model on, to find its groups; as of `find_unit_groups`. Without it one
            is guessed, and where that cannot be done the groups are found in the first training forward.
        include, exclude: patterns (`fnmatch`) of group names to take, or to leave out.
        include_coupled, unreached_ok, ignore_outputs, verify: as of `find_unit_groups`; not with `groups`.
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
        TypeError: an argument of a wrong kind. Whatever is raised, nothing is attached then.

    Warns:
        UserWarning: once, in the step that comes next, of what makes it work less than it seems: no training forward
            was seen, an optimizer that was not given trains the units, a parameter of theirs was assigned that no
            optimizer holds, or a layer was added that may read them.

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
        include_coupled: bool = False,
        unreached_ok: bool = False,
        ignore_outputs: str | Sequence[str] = (),
        verify: bool = False,
        backend: str | None = None,
        capture: str = "auto",
        seed: int | None = None,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, must be a torch.nn.Module")
        super().__init__()
        self._rule = Rule.make(rule)
        steppers = optimizers_in(optimizer)
        self._wrapped, self._model, self._process_group = model, unwrapped(model), process_group
        self._backend, self._seed = backend, seed
        self._asked = Asked(groups, example_inputs, include, exclude)._replace(
            include_coupled=include_coupled, unreached_ok=unreached_ok, ignore_outputs=ignore_outputs, verify=verify
        )
        hyper = {
            "replacement_rate": replacement_rate,
            "maturity_threshold": maturity_threshold,
            "decay_rate": decay_rate,
        }
        self._seed = checked_seed(capture, seed)
        self._engine: Engine = cast(Engine, Awaited(self._rule, hyper, capture))
        self._misfit: ValueError | None = None
        self._groups: list[UnitGroup] = []
        self._children: list[Child] = []
        self._siblings: list[dict[str, nn.Module | None]] = []
        self._keys: list[str] = []
        self._modules: list[nn.Module | None] = []
        self._round = Round([])
        # our hooks, and where they hang; none: it is not attached
        self._hooks: list[tuple[nn.Module, Hook]] = []
        # those that are followed, and those that keep state, which may be inside of them
        self._steppers: list[Optimizer] = []
        self._optimizers: list[Optimizer] = []
        # where hooks are, or have been left
        self._hung: list[nn.Module] = []
        self._met: list[Optimizer] = []
        # whether the groups are still to be found in a forward
        self._waiting = False
        # whether the next step has something to look at: the first forward, or what was registered since
        self._news, self._heard, self._told, self._unheard = True, False, False, 0
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._assigned: list[tuple[nn.Module, str]] = []
        self._follow(self._asked, steppers)

    def _follow(self, asked: Asked, steppers: list[Optimizer], example_inputs: Any = None) -> None:
        """Attach to the model as it is, or go on so; if it raises, wherever that is, nothing has changed.

        Args:
            asked: what is remembered.
            steppers: the optimizers that are followed.
            example_inputs: to be used this time.
        """
        before, attached = self._engine, bool(self._hooks)
        try:
            try:
                new: dict[str, Any] = {"_asked": asked, "_told": False, "_news": True, "_assigned": []}
                new["_seen"] = weakref.WeakSet(self._model.modules())
                try:
                    resolved = self._resolve(asked, steppers, example_inputs)
                except NeedsInputs:
                    # in a forward, parameters that processes hold parts of are not what they are in a step
                    if any(is_dtensor(p) for p in self._model.parameters()):
                        raise
                    new |= {"_waiting": True, "_hooks": [(self._model, FirstForward(self))], **compared([])}
                else:
                    new |= self._attach(resolved, before)
                if steppers != self._steppers:
                    new |= {"_steppers": steppers, "_optimizers": with_inner(steppers), "_round": Round(steppers)}
                    if not steppers:
                        # whoever calls step() from now on may forget it
                        new |= {"_heard": False, "_unheard": 0}
                forget_compiled()
                for module, hook in new["_hooks"]:
                    self._hung.append(module)
                    hang(module, hook)
                for optimizer in steppers:
                    if all(optimizer is not known for known in self._steppers):
                        self._met.append(optimizer)
                        optimizer.register_step_post_hook(self._after_optimizer_step)
                        if several_processes():
                            optimizer.register_step_pre_hook(self._before_optimizer_step)
                enlist(self)
                if steppers:
                    watch_skips(self)
                # at once, as one call; after vars(self).update() every later look at an attribute would take longer
                deque(map(object.__setattr__, repeat(self), new, new.values()), maxlen=0)
                if before is not self._engine:
                    before.enabled = False
                elif self._waiting and not isinstance(before, Awaited):
                    before.forget_forwards()
            finally:
                self._sweep()
            misfit, self._misfit = self._misfit, None
            if misfit is not None:
                raise ValueError(
                    "what was loaded before the unit groups were found does not fit them, and training starts without "
                    f"it: {misfit}"
                ) from misfit
        except BaseException:
            self._sweep()
            if not attached and self._hooks:
                # it came after all was done, but nobody gets the object
                self.remove()
            raise

    def _resolve(self, asked: Asked, steppers: list[Optimizer], example_inputs: Any) -> list[ResolvedGroup]:
        """The groups, given or found in the model as it is, after all checks."""
        groups = [asked.groups] if isinstance(asked.groups, UnitGroup) else asked.groups
        example_inputs = asked.example_inputs if example_inputs is None else example_inputs
        if groups is None:
            found = find_unit_groups(self._model, example_inputs, **asked.finding())
        else:
            asked.check_given()
            if not isinstance(groups, Iterable):
                raise TypeError(f"groups is a {type(groups).__name__}, must be a UnitGroup or a list of them")
            found = list(groups)
        tied, names = shared_memory(own_tensors(self._model)), names_of(self._model)
        every = in_forward_order([resolve(self._model, group, tied, names) for group in found])
        if not every:
            why = "groups is empty" if groups is not None else explain(self._model, example_inputs, **asked.finding())
            raise ValueError(f"the model has no unit group to work on:\n{why}")
        resolved = filtered(every, asked.include, asked.exclude)
        if not resolved:
            there = ", ".join(group.name for group in every)
            raise ValueError(f"include= and exclude= leave no unit group to work on; they are: {there}")
        check_disjoint(resolved)
        check_served(self._rule, resolved)
        check_not_attached(resolved, self._engine, self._model.modules())
        check_optimizers(steppers, resolved)
        return resolved

    def _attach(self, resolved: list[ResolvedGroup], before: Engine) -> dict[str, Any]:
        """The state of the groups, which goes on from what was before, and hooks to observe their readers."""
        options: dict[str, Any] = {**before.hyper, "capture": before.capture}
        alike = {**options, "rule": self._rule, "backend": self._backend}
        processes = join_processes(self._wrapped, resolved, self._process_group, self._seed, alike)
        seed = processes.seed if processes else self._seed
        engine = Engine(self._rule, resolved, backend=self._backend, seed=seed, processes=processes, **options)
        if not isinstance(before, Awaited):
            engine.adopt(before)
        misfit: ValueError | None = None
        if isinstance(before, Awaited) and before.kept is not None:
            try:
                engine.load_state_dict(before.kept)
            except ValueError as error:
                misfit = error
                engine.set_hyper(**before.set)
        engine.enabled = before.enabled
        return {
            "_misfit": misfit,
            "_engine": engine,
            "_groups": [group.unit_group() for group in resolved],
            **compared(children_of(self._model, resolved)),
            "_hooks": [(slot.module, Recorder(self, engine, i)) for i, slot in enumerate(engine.state.slots)],
            "_waiting": False,
        }

    def _sweep(self) -> None:
        """Take off every hook of ours that is not in use."""
        used = {id(hook) for _, hook in self._hooks}
        take_off({*self._model.modules(), *self._hung}, lambda hook: hook.owner is self and id(hook) not in used)
        self._hung = [module for module, _ in self._hooks]
        steppers = self._steppers if self._hooks else []
        unused = [o for o in self._met if all(o is not other for other in steppers)]
        if unused and inside_step():
            # a hook that goes while torch loops over the hooks breaks the loop; the next forward is soon enough
            self._hung.append(self._model)
            hang(self._model, Later(self))
            return
        for optimizer in unused:
            let_go(optimizer, self)
        self._met = list(steppers)
        if not self._hooks:
            strike(self)
            unwatch_skips(self)

    def _attach_in_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the groups by what a training forward is given, and observe it already; or let the next one try."""
        given = Given(args, kwargs)
        if not given.empty:
            self._follow(self._asked, self._steppers, given)

    def refresh(
        self,
        *,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        groups: UnitGroup | Sequence[UnitGroup] | None = None,
        example_inputs: Any = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        include_coupled: bool | None = None,
        unreached_ok: bool | None = None,
        ignore_outputs: str | Sequence[str] | None = None,
        verify: bool | None = None,
    ) -> None:
        """Follow a model that was changed (a head was added, a layer replaced or frozen), or a new optimizer.

        The groups are found anew, as at attaching: now, or where no input is given and none can be guessed, in the next
        training forward. Those of the same name and number of units keep their utilities, ages and totals; the others
        start afresh. Forwards since the last step are forgotten.

        Args:
            optimizer, groups, example_inputs, include, exclude, include_coupled, unreached_ok, ignore_outputs, verify:
                as at attaching; None: what was given there, or here the last time. With `groups` what was said of
                finding them is forgotten.

        Raises:
            ValueError, TypeError: as at attaching. Nothing has changed then.
            RuntimeError: after `remove()`.
        """
        self._check_attached()
        finding = {
            "include_coupled": include_coupled,
            "unreached_ok": unreached_ok,
            "ignore_outputs": ignore_outputs,
            "verify": verify,
        }
        given = {"groups": groups, "example_inputs": example_inputs, "include": include, "exclude": exclude, **finding}
        asked = self._asked if groups is None else self._asked.without_finding()
        asked = asked._replace(**{name: value for name, value in given.items() if value is not None})
        self._follow(asked, self._steppers if optimizer is None else optimizers_in(optimizer))

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
        if list(map(dict.get, self._siblings, self._keys)) != self._modules:
            name = next(c.name for c in self._children if c.siblings.get(c.key) is not c.module)
            raise RuntimeError(f"'{name}' was replaced after attaching; call refresh()")
        if self._news and not self._look():
            return
        if engine.processes is not None and not engine.begun:
            notify_join(self)
        step_together([engine], self._optimizers)

    def _look(self) -> bool:
        """Say what the next step should not pass over in silence; whether there are groups to step."""
        first, self._heard = not self._heard, True
        # of several processes one may be without data
        if first and (self._waiting or (self._engine.processes is None and not self._engine.has_data)):
            warnings.warn(no_forward(self._model), stacklevel=3)
        if self._waiting:
            return False
        self._news = False
        assigned, self._assigned = self._assigned, []
        names = names_of(self._model)
        for message in (
            self._steppers and untrained_parameter(names, assigned, self._steppers),
            unknown_reader(names, self._seen, self._engine),
        ):
            if message:
                warnings.warn(message, stacklevel=3)
        self._seen.update(names)
        return True

    def _registered(self, module: nn.Module, key: str, value: Any) -> None:
        """A module was given a module or a parameter, by assignment for example."""
        if module in self._seen:
            self._news = True
            if isinstance(value, nn.Parameter) and module in self._modules:
                self._assigned.append((module, key))

    def _overheard(self, optimizer: Optimizer) -> bool:
        """An optimizer has stepped; whether that is of no interest, as long as nothing else is attached."""
        if any(optimizer is known for known in self._steppers) or (self._heard and not self._steppers):
            return True
        if self._told or not self._engine.enabled:
            return self._told
        groups = () if self._waiting else self._engine.groups
        members = (m for g in groups for m in (*g.incoming, *g.norms, *g.outgoing))
        mine = {id(p) for module in ({m.module for m in members} or {self._model}) for p in module.parameters()}
        if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            return True
        # what an optimizer that is followed steps itself is its own affair
        if any(inside_step(known) for known in self._steppers):
            return True
        if not self._steppers:
            # a loop may begin to call step() late
            self._unheard += 1
            if self._unheard < FORGOTTEN:
                return False
        self._told = True
        warnings.warn(unknown_optimizer(optimizer, follows_others=bool(self._steppers)), stacklevel=5)
        return True

    def _followed(self) -> set[nn.Module]:
        """The model, its layers that are in a group, and where hooks hang."""
        return {self._model, *(c.module for c in self._children), *(module for module, _ in self._hooks)}

    def _check_attached(self) -> None:
        if not self._hooks:
            raise RuntimeError("this ContinualBackprop was removed from its model; attach a new one")

    def _before_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # a closure has forwards of its own, and of several optimizers the others may be followed by some
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        last, engine = self._round.is_last(optimizer), self._engine
        if engine.processes is None or self._waiting:
            return
        if closure is not None or not last or not self._hooks or not engine.enabled or engine.state.splits_sums:
            engine.await_sums()
        # where a step failed in this process alone and is tried again, the others are adding up already
        elif not engine.begun:
            notify_join(self)
            engine.begin()

    def _after_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._after_update(optimizer, skipped(optimizer))

    def _after_skipped_step(self, optimizer: Optimizer) -> None:
        if any(optimizer is mine for mine in self._steppers):
            self._after_update(optimizer, was_skipped=True)

    def _after_update(self, optimizer: Optimizer, was_skipped: bool) -> None:
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
        self._hooks = []
        self._sweep()

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
        """Units of each group that the last `step()` replaced, least utility first: int64 [k]."""
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
        if isinstance(engine, Awaited):
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


def attached(model: nn.Module) -> list[ContinualBackprop]:
    """The `ContinualBackprop` objects that are attached to a model, or to a part of it, in the order of attaching.

    Also those that nobody keeps: `for cbp in cbp_fast.attached(model): cbp.remove()` takes everything off.

    Raises:
        TypeError: if the model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, must be a torch.nn.Module")
    modules = set(model.modules())
    return [cbp for cbp in everyone() if isinstance(cbp, ContinualBackprop) and not modules.isdisjoint(cbp._followed())]


def _name_of(layer: str | nn.Module | Part) -> str:
    """A layer as the table of groups names it: a part by the index of unit 0."""
    return f"{layer.layer}[{layer.start}:]" if isinstance(layer, Part) else str(layer)
