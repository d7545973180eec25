"""What is looked at: inputs that are guessed, or of given ones a few samples, until what they show agrees."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import nn

from .candidates.candidates import Candidate, candidates_of
from .following.following import NotFollowed, follow, path_of
from .running.forwards import Forward, Given, forwards, guesses, runs_plainly
from .trace.trace import Trace

# batches of more samples are looked at by two and three of them
_FEW = 8


class NeedsInputs(ValueError):
    """The model's forward cannot be run on a guessed input."""


class Look(NamedTuple):
    """What was seen of a model, and by which forwards."""

    trace: Trace
    candidates: list[Candidate]
    runs: Sequence[Forward]


def look(model: nn.Module, example_inputs: Any, ignored: tuple[str, ...]) -> Look:
    """Looks at a model by its example inputs, or by a guess at them where they are None.

    Raises:
        NeedsInputs: if none can be guessed.
        ValueError: if the forward does not run, or cannot be followed.
    """
    if example_inputs is None:
        return _guess(model, ignored)
    runs = forwards(example_inputs)
    try:
        return Look(*_given(model, runs, ignored), runs)
    except NotFollowed as error:
        cause = error.__cause__
        if cause is not None and _is_out_of_memory(cause):
            # what was followed takes the memory that the forward by itself may need
            for raised in (cause, error):
                traceback.clear_frames(raised.__traceback__)
        if runs_plainly(model, runs):
            raise ValueError(_limitation(model, error)) from cause
        raise ValueError(
            f"{type(model).__name__}.forward() does not run on the example_inputs given: {cause}"
        ) from cause


def _guess(model: nn.Module, ignored: tuple[str, ...]) -> Look:
    """What guessed inputs show; batches of two sizes must agree."""
    failed: NotFollowed | None = None
    for small, large in guesses(model):
        try:
            found = _agreed(model, [small], [large], ignored)
        except NotFollowed as error:
            failed = error if failed is None and runs_plainly(model, [small, large]) else failed
            continue
        if found:
            return Look(*found, [small])
    if failed is not None:
        raise ValueError(_limitation(model, failed)) from failed.__cause__
    raise NeedsInputs(
        f"what {type(model).__name__}.forward() takes cannot be told from its layers: pass example_inputs, a small "
        "batch that it runs on"
    )


def _given(model: nn.Module, runs: Sequence[Forward], ignored: tuple[str, ...]) -> tuple[Trace, list[Candidate]]:
    """The trace and candidates for given inputs; of large batches some samples, where they take the same path."""
    if any(isinstance(run, Given) and run.samples > _FEW for run in runs):
        with contextlib.suppress(Exception):  # a few samples may be no input, and the user's code may raise anything
            found = _shortened(model, runs, ignored)
            if found:
                return found
    trace = follow(model, runs, ignored)
    return trace, candidates_of(model, trace)


def _agreed(
    model: nn.Module, small: Sequence[Forward], large: Sequence[Forward], ignored: tuple[str, ...]
) -> tuple[Trace, list[Candidate]] | None:
    """The trace and candidates for small batches, if those of larger ones are the same."""
    traces = [follow(model, runs, ignored) for runs in (small, large)]
    candidates = [candidates_of(model, trace) for trace in traces]
    if [(c.group, c.reason) for c in candidates[0]] == [(c.group, c.reason) for c in candidates[1]]:
        return traces[0], candidates[0]
    return None


def _shortened(
    model: nn.Module, runs: Sequence[Forward], ignored: tuple[str, ...]
) -> tuple[Trace, list[Candidate]] | None:
    """What two and three samples of each batch show, if they agree and take the path of the whole batch."""
    whole = [run for run in runs if isinstance(run, Given) and run.samples > _FEW]
    paths: list[Any] = []
    for orders in zip(*(run.orders() for run in whole)):  # noqa: B905 some have one order only
        cuts: list[list[Forward]] = []
        for k in (2, 3):
            cut = dict(
                zip(map(id, whole), (run.cut(order[:k]) for run, order in zip(whole, orders, strict=True)), strict=True)
            )
            if None in cut.values():
                return None
            cuts.append([cast(Forward, cut.get(id(run), run)) for run in runs])
        found = _agreed(model, cuts[0], cuts[1], ignored)
        if not found:
            return None
        if found[0].random:
            # then no two forwards need take the same path
            return found
        paths = paths or [path_of(model, run) for run in whole]
        seen = [path for run, path in zip(runs, found[0].paths, strict=True) if any(run is w for w in whole)]
        if all(_same_path(path, run.samples, part, 2) for run, path, part in zip(whole, paths, seen, strict=True)):
            return found
    return None


def _same_path(whole: Sequence[Any], n: int, part: Sequence[Any], k: int) -> bool:
    """Whether two forwards, of n and of k samples, carried out the same operations, on sizes in proportion."""
    return len(whole) == len(part) and all(
        f is g and len(a) == len(b) and all(x == y or x * k == y * n for x, y in zip(a, b, strict=True))
        for (f, a), (g, b) in zip(whole, part, strict=True)
    )


def _is_out_of_memory(error: BaseException) -> bool:
    words = ("bad_alloc", "out of memory", "allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _limitation(model: nn.Module, error: NotFollowed) -> str:
    return (
        f"{type(model).__name__}.forward() runs, but cannot be followed (at or after {error}): {error.__cause__}. "
        "This is a limitation of finding groups; they can be given by hand, as groups="
    )
