"""Finds the hidden-unit groups of a model by running it once, and says what it left out and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..groups.resolving import strings
from ..groups.spec import UnitGroup
from .candidates.candidates import Candidate
from .candidates.unreached import may_share, unreached_by
from .looking import look
from .report import left_out_of, tables
from .running.forwards import check_has_forward, unwrapped
from .running.restoring import undivided
from .verification.check import check, check_memory


@dataclass
class _Found:
    taken: list[Candidate]
    left_out: dict[str, str]
    remarks: list[str]


def find_unit_groups(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    include_coupled: bool = False,
    unreached_ok: bool = False,
    ignore_outputs: str | Sequence[str] = (),
    verify: bool = False,
) -> list[UnitGroup]:
    """Finds the hidden units of a model, grouped by the layers that make, normalise and read them.

    The model runs once, or a few times where random numbers choose its path, in the mode it is in, and every element of
    every activation is followed: a unit is a row of a weight, and its features are where it is seen at the columns of
    other weights. Units that share a column, and so can be re-initialised only together, are one. What an operation
    without a rule touches is left out, as is all that :func:`explain` lists; nothing is guessed. What Python or NumPy
    read of the data and give back counts as data, as do constants that data picks by an index: units that such is added
    to are left out. A number of the data that chooses the path, or places (``h.roll(int(n))``), is noted by
    :func:`explain`: only what was taken was seen.

    Parameters, buffers, gradients, modes, random states and all that the model and the inputs hold in Python stay as
    they were, also if the forward raises (attributes of classes, globals, iterators and what threads own are out of
    reach); hooks of the user run. Of batches of more than eight samples two and three are looked at, where these take
    the path of the whole batch, which then runs once unfollowed.

    Args:
        model: the model; `torch.compile` and DistributedDataParallel are looked through.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a function of the
            model that runs it (``lambda m: m(x, task=1)``); a list of those where one forward does not reach all heads
            or branches. A small batch will do. Without them, for a forward of one tensor, ``[batch, features]``, images
            and token sequences of usual sizes are tried.
        include_coupled: take groups too that several layers add into (a residual stream): all of these are
            re-initialised, and all readers zeroed, together.
        unreached_ok: trust that layers which the forwards did not reach read no unit of a group.
        ignore_outputs: beginnings of the paths (``"[1]"``, ``"['hidden']"``) of outputs, or of attributes where
            activations are kept (``"body.last"``), on which nothing is trained: units may reach them.
        verify: check every group by :func:`verify_unit_group`, and leave out what fails; needs a model on real memory.
            A group of which the check shows nothing is kept, and :func:`explain` says so.

    Returns:
        The groups in the order of forward(), each called after the first layer that makes its units; may be empty.

    Raises:
        TypeError: if the model is no module.
        ValueError: if the forward does not run on `example_inputs`, or without them, if none can be guessed.
    """
    found = _discover(model, example_inputs, include_coupled, unreached_ok, ignore_outputs, verify)
    return [candidate.group for candidate in found.taken if candidate.group is not None]


def explain(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    include_coupled: bool = False,
    unreached_ok: bool = False,
    ignore_outputs: str | Sequence[str] = (),
    verify: bool = False,
) -> str:
    """Tables to print: the groups that :func:`find_unit_groups` finds, why other layers are left out, and notes."""
    found = _discover(model, example_inputs, include_coupled, unreached_ok, ignore_outputs, verify)
    return tables(found.taken, found.left_out, found.remarks)


def _discover(
    model: nn.Module,
    example_inputs: Any,
    include_coupled: bool,
    unreached_ok: bool,
    ignore_outputs: str | Sequence[str],
    verify: bool,
) -> _Found:
    model = unwrapped(model)
    for name, flag in (("include_coupled", include_coupled), ("unreached_ok", unreached_ok), ("verify", verify)):
        if flag not in (False, True):
            raise TypeError(f"{name} is {flag!r}, must be True or False")
    ignored = strings("ignore_outputs", ignore_outputs, "beginnings of paths, such as \"['hidden']\"")
    check_has_forward(model, example_inputs)
    with undivided(model) as divided:
        if divided and verify:
            raise ValueError("verify=True changes whole parameters, of which each process here holds a part")
        if verify:
            check_memory(model)
        if divided:
            example_inputs = tree_map_only(Tensor, lambda t: t.to("meta"), example_inputs)
        trace, candidates, runs = look(model, example_inputs, ignored)
    if ignored and not any(path.startswith(ignored) for path in trace.exits):
        there = ", ".join(map(repr, list(trace.exits)[:20])) or "none"
        raise ValueError(f"ignore_outputs is {ignore_outputs!r}, which no output begins with; there are: {there}")
    unreached = [] if unreached_ok else unreached_by(model, trace)
    for candidate in candidates:
        group = candidate.resolved
        if candidate.reason or group is None:
            continue
        candidate.reason = may_share(unreached, group)
        if not candidate.reason and candidate.coupled and not include_coupled:
            candidate.reason = (
                "its readers see different combinations of units (of a residual stream, into which several layers add, "
                "or one of them is shared); include_coupled=True takes them together"
            )
        if not candidate.reason and verify:
            verdict = check(model, group, runs, ignored)
            if verdict.failure:
                candidate.reason = f"unit group '{group.name}' does not pass the check: {verdict.failure}"
            elif verdict.unshown:
                candidate.notes.append(f"the check showed nothing: {verdict.unshown}")
    taken = [candidate for candidate in candidates if not candidate.reason]
    remarks = [f"the path depends on {at}: only what was taken was seen" for at in trace.branches]
    return _Found(taken, left_out_of(model, trace, candidates), remarks)
