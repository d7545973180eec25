"""Forwards, followed to what they return and keep, and again where random numbers choose their path."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..running.calls import leaves_of
from ..running.forwards import Forward, Given, held_by
from ..running.holding import tensors_in
from ..running.memory import alive, constants, is_lent, storage_key
from ..running.preserving import Preserving
from ..running.restoring import numpy_state, reseed, untouched
from ..running.snapshot import Snapshot
from ..trace.trace import Trace
from .elsewhere import Elsewhere, followed
from .exits import Exits
from .tracer import Tracer

# repetitions of a forward that chooses its path at random, and how many in a row may show nothing new; one on a path
# that was not seen yet counts for two
_REPEATS = 7
_ENOUGH = 4


class NotFollowed(Exception):
    """A forward raised while it was followed; says where."""


def follow(model: nn.Module, runs: Sequence[Forward], ignored: tuple[str, ...]) -> Trace:
    """What forwards show of a model, each followed until its repetitions show nothing new.

    Raises:
        NotFollowed: if one raises.
    """
    with _disable_current_modes():
        trace = Tracer(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_looked_at(model))
        for handle in trace.watch():
            stack.callback(handle.remove)
        snapshot = stack.enter_context(untouched(model, *(held for run in runs for held in held_by(run))))
        known = list(snapshot.tensors())
        for run in runs:
            paths = set[int]()
            seed = again = 0
            facts: Any = None
            everything = repeated = by_path = False
            while seed < _REPEATS and again < _ENOUGH:
                if repeated:
                    snapshot.reseed(seed)
                    reseed(seed)
                    seed += 1
                # what random numbers change by its path alone is followed again on another path
                if by_path and _takes(model, run, paths, snapshot):
                    again += 1
                    continue
                before = random.getstate(), numpy_state()
                with _disable_current_modes():
                    trace.begin(known, everything, isinstance(run, Given) and run.told)
                try:
                    _follow(model, run, trace, snapshot, ignored)
                except Exception as error:  # the user's code may raise anything
                    raise NotFollowed(trace.where) from error
                finally:
                    trace.restore()
                    drawn = snapshot.drawn() or before != (random.getstate(), numpy_state())
                    snapshot.restore()
                path, before_it, facts = hash(tuple(trace.path)), facts, trace.found()
                # another path that shows nothing new says more than the same one
                again = again + 1 if path in paths else again + 2 if facts == before_it else 0
                paths.add(path)
                if len(paths) == 1 and not again:
                    trace.paths.append(trace.path)
                if drawn:
                    trace.branches["random numbers of Python"] = None
                repeated = drawn or trace.drawn
                by_path = not by_path and repeated and not drawn and not trace.hidden
                trace.random |= repeated
                with _disable_current_modes():
                    trace.end()
                if trace.unsure and not everything:
                    everything = True
                    if _takes_unseen(model, run, snapshot):
                        # look again, knowing what there is
                        repeated, by_path, again = False, False, 0
                        continue
                if not repeated:
                    break
    return trace


def _follow(model: nn.Module, run: Forward, trace: Trace, snapshot: Snapshot, ignored: tuple[str, ...]) -> None:
    """One forward, and what becomes of its activations."""

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with mode, Exits(trace, elsewhere=True):
            yield

    mode = Elsewhere(trace)
    try:
        with followed(enter), trace, Exits(trace):
            output = run(model)
    finally:
        mode.looking = None
    with _disable_current_modes():
        _account(model, output, trace, snapshot, ignored)


def _account(model: nn.Module, output: Any, trace: Trace, snapshot: Snapshot, ignored: tuple[str, ...]) -> None:
    """Refuses the units that are returned, or kept."""
    for path, tensor in tensors_in(output, inside=list(model.modules())):
        trace.exits[path] = None
        if not path.startswith(ignored or ("\0",)):
            trace.refuse(trace.ids(tensor), f"part of the model's output{path and ' ' + path}")
    for attribute, value in snapshot.changed():
        for path, tensor in tensors_in(value, attribute, inside=list(model.modules())):
            if storage_key(tensor) not in trace.made:
                continue
            trace.exits[path] = None
            if not path.startswith(ignored or ("\0",)):
                trace.refuse(trace.ids(tensor), f"its units are kept in the attribute '{path}'")


@contextlib.contextmanager
def _as_looked_at(model: nn.Module) -> Iterator[None]:
    """How a model runs that is looked at: without compiling, with gradients."""
    compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())
    torch.clear_autocast_cache()
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), eager:
        yield


def path_of(model: nn.Module, run: Forward, snapshot: Snapshot | None = None) -> Any:
    """The operations of a forward that is not followed."""
    with untouched(model, *held_by(run), snapshot=snapshot) as snapshot:
        mode = Preserving(snapshot.tensors())
        _run_under(mode, model, run)
        return mode.path


def _run_under(mode: Preserving, model: nn.Module, run: Forward) -> None:
    with _as_looked_at(model):
        try:
            with mode:
                run(model)
        finally:
            mode.restore()


def _takes(model: nn.Module, run: Forward, paths: set[int], snapshot: Snapshot) -> bool:
    """Whether a forward that is not followed takes one of some paths, given by their hashes."""
    try:
        return hash(tuple(path_of(model, run, snapshot))) in paths
    except Exception:  # the user's code may raise anything; if it does so again, it is told
        return False


class _Watching(Preserving):
    """Notes whether an operation takes numbers that were neither there before nor made by one."""

    unseen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in leaves_of(args, kwargs):
            if isinstance(t, Tensor) and not self.unseen:
                self.unseen = self.appeared(t) and not is_lent(t)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _takes_unseen(model: nn.Module, run: Forward, snapshot: Snapshot) -> bool:
    """Whether a forward that is not followed takes what was not there before it, made by code that is not seen."""
    mode = _Watching()
    mode.known = alive() | constants(model)
    try:
        with untouched(model, *held_by(run), snapshot=snapshot):
            _run_under(mode, model, run)
            return mode.unseen
    except Exception:  # the user's code may raise anything; if it does so again, it is told
        return True
