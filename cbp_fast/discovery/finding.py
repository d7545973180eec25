"""Finds the hidden-unit groups of a model by running it once, and says what it left out and why."""

from __future__ import annotations

import contextlib
import random
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from ..groups.layers import LAYERS, kind, label, make_width, norm_kind, norm_shape, out_axis, read_width
from ..groups.resolving import resolve, strings
from ..groups.spec import Part, ResolvedGroup, UnitGroup
from .elsewhere import Elsewhere, followed
from .nodes import BASE, DATA, Nodes, scramble
from .running import (
    Forward,
    Given,
    Preserving,
    alive,
    constants,
    forwards,
    guesses,
    held_by,
    is_function,
    leaves_of,
    numpy_state,
    reseed,
    runs_plainly,
    same_path,
    storage_key,
    undivided,
    untouched,
    unwrapped,
)
from .snapshot import Snapshot, tensors_in
from .trace import Exits, Trace
from .verification import check_memory, look


class NeedsInputs(ValueError):
    """The model's forward cannot be run on a guessed input."""


# parts of a layer that are named
_MOST_SPANS = 8
# rows of one layer that may make one unit together (a fused gate and up: 2)
_MAX_ROWS = 8
_IRREGULAR = " in no regular order"
# repetitions of a forward that chooses its path at random, and how many in a row may show nothing new; one on a path
# that was not seen yet counts for two
_REPEATS = 7
_ENOUGH = 4
# batches of more samples are looked at by two and three of them
_FEW = 8


@dataclass
class _Candidate:
    """Units that the same layers make and read.

    Attributes:
        layers: names of the modules that make them, and the rows that are theirs in each, int64 [units, rows].
        reason: why they make no unit group; empty if they do.
        group: the unit group, if it can be written as one.
        coupled: whether readers see different sums of them.
        notes: what a user should know.
    """

    layers: list[tuple[str, Tensor]]
    reason: str = ""
    group: UnitGroup | None = None
    resolved: ResolvedGroup | None = None
    coupled: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass
class _Found:
    taken: list[_Candidate]
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
    rows = [("unit group", "units", "columns", "incoming", "outgoing", "norms")]
    notes = [("note", "")]
    for candidate in found.taken:
        group = candidate.resolved
        assert group is not None
        parts = (
            ", ".join(dict.fromkeys(m.name for m in part)) for part in (group.incoming, group.outgoing, group.norms)
        )
        incoming, outgoing, norms = parts
        columns = str(group.num_units * group.columns_per_unit)
        rows.append((group.name, str(group.num_units), columns, incoming, outgoing, norms or "-"))
        notes += [(group.name, note) for note in candidate.notes]
    notes += [("forward()", remark) for remark in found.remarks]
    lines = _align(rows) if found.taken else ["no unit group found"]
    if found.left_out:
        lines += ["", *_align([("left out", "because"), *found.left_out.items()])]
    if len(notes) > 1:
        lines += ["", *_align(notes)]
    return "\n".join(lines)


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]


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
    _check_has_forward(model, example_inputs)
    with undivided(model) as divided:
        if divided and verify:
            raise ValueError("verify=True changes whole parameters, of which each process here holds a part")
        if verify:
            check_memory(model)
        if example_inputs is None:
            trace, candidates, runs = _guess(model, ignored)
        else:
            if divided:
                example_inputs = tree_map_only(Tensor, lambda t: t.to("meta"), example_inputs)
            runs = forwards(example_inputs)
            try:
                trace, candidates = _given(model, runs, ignored)
            except _NotFollowed as error:
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
    if ignored and not any(path.startswith(ignored) for path in trace.exits):
        there = ", ".join(map(repr, list(trace.exits)[:20])) or "none"
        raise ValueError(f"ignore_outputs is {ignore_outputs!r}, which no output begins with; there are: {there}")
    unreached = [] if unreached_ok else _unreached(model, trace)
    for candidate in candidates:
        if not candidate.reason:
            candidate.reason = _may_share(unreached, candidate)
        if not candidate.reason and candidate.coupled and not include_coupled:
            candidate.reason = (
                "its readers see different combinations of units (of a residual stream, into which several layers add, "
                "or one of them is shared); include_coupled=True takes them together"
            )
        if not candidate.reason and verify:
            assert candidate.resolved is not None
            verdict = look(model, candidate.resolved, runs, ignored)
            if verdict.failure:
                candidate.reason = f"unit group '{candidate.resolved.name}' does not pass the check: {verdict.failure}"
            elif verdict.unshown:
                candidate.notes.append(f"the check showed nothing: {verdict.unshown}")
    taken = [candidate for candidate in candidates if not candidate.reason]
    remarks = [f"the path depends on {at}: only what was taken was seen" for at in trace.branches]
    return _Found(taken, _left_out(model, trace, candidates), remarks)


def _check_has_forward(model: nn.Module, example_inputs: Any) -> None:
    """Raises ValueError for a model that can be run only by a function, where there is none."""
    inputs = example_inputs if isinstance(example_inputs, list) and example_inputs else [example_inputs]
    if getattr(model.forward, "__func__", None) is not nn.Module.forward or all(map(is_function, inputs)):
        return
    name = type(model).__name__
    parts = [repr(key) for key, part in model.named_children() if any(True for _ in part.parameters())]
    raise ValueError(
        f"{name} has no forward() to find its unit groups by; give example_inputs=lambda model: ..., a function that "
        f"runs what the training loop calls, or attach to its parts by themselves ({', '.join(parts) or 'it has none'})"
    )


def _guess(model: nn.Module, ignored: tuple[str, ...]) -> tuple[Trace, list[_Candidate], list[Forward]]:
    """The trace and candidates for guessed inputs; batches of two sizes must agree."""
    failed: _NotFollowed | None = None
    for small, large in guesses(model):
        try:
            found = _agreed(model, [small], [large], ignored)
        except _NotFollowed as error:
            failed = error if failed is None and runs_plainly(model, [small, large]) else failed
            continue
        if found:
            return (*found, [small])
    if failed is not None:
        raise ValueError(_limitation(model, failed)) from failed.__cause__
    raise NeedsInputs(
        f"what {type(model).__name__}.forward() takes cannot be told from its layers: pass example_inputs, a small "
        "batch that it runs on"
    )


def _agreed(
    model: nn.Module, small: Sequence[Forward], large: Sequence[Forward], ignored: tuple[str, ...]
) -> tuple[Trace, list[_Candidate]] | None:
    """The trace and candidates for small batches, if those of larger ones are the same."""
    traces = [_run(model, runs, ignored) for runs in (small, large)]
    candidates = [_candidates(model, trace) for trace in traces]
    if [(c.group, c.reason) for c in candidates[0]] == [(c.group, c.reason) for c in candidates[1]]:
        return traces[0], candidates[0]
    return None


def _given(model: nn.Module, runs: Sequence[Forward], ignored: tuple[str, ...]) -> tuple[Trace, list[_Candidate]]:
    """The trace and candidates for given inputs; of large batches some samples, where they take the same path."""
    if any(isinstance(run, Given) and run.samples > _FEW for run in runs):
        with contextlib.suppress(Exception):  # a few samples may be no input, and the user's code may raise anything
            found = _shortened(model, runs, ignored)
            if found:
                return found
    trace = _run(model, runs, ignored)
    return trace, _candidates(model, trace)


def _shortened(
    model: nn.Module, runs: Sequence[Forward], ignored: tuple[str, ...]
) -> tuple[Trace, list[_Candidate]] | None:
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
        paths = paths or [_path(model, run) for run in whole]
        seen = [path for run, path in zip(runs, found[0].paths, strict=True) if any(run is w for w in whole)]
        if all(same_path(path, run.samples, part, 2) for run, path, part in zip(whole, paths, seen, strict=True)):
            return found
    return None


def _path(model: nn.Module, run: Forward, snapshot: Snapshot | None = None) -> Any:
    """The operations of a forward that is not followed."""
    with untouched(model, *held_by(run), snapshot=snapshot) as snapshot:
        mode = Preserving(snapshot.tensors())
        _run_under(mode, model, run)
        return mode.path


def _run_under(mode: Preserving, model: nn.Module, run: Forward) -> None:
    with _looking(model):
        try:
            with mode:
                run(model)
        finally:
            mode.restore()


def _is_out_of_memory(error: BaseException) -> bool:
    words = ("bad_alloc", "out of memory", "allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


class _NotFollowed(Exception):
    """A forward raised under a trace; says where."""


def _limitation(model: nn.Module, error: _NotFollowed) -> str:
    return (
        f"{type(model).__name__}.forward() runs, but cannot be followed (at or after {error}): {error.__cause__}. "
        "This is a limitation of finding groups; they can be given by hand, as groups="
    )


@contextlib.contextmanager
def _looking(model: nn.Module) -> Iterator[None]:
    """How a model runs that is looked at: without compiling, with gradients."""
    compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())
    torch.clear_autocast_cache()
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with torch.inference_mode(False), torch.enable_grad(), eager:
        yield


def _run(model: nn.Module, runs: Sequence[Forward], ignored: tuple[str, ...]) -> Trace:
    with _disable_current_modes():
        trace = Trace(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_looking(model))
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
                    _look(model, run, trace, snapshot, ignored)
                except Exception as error:  # the user's code may raise anything
                    raise _NotFollowed(trace.where) from error
                finally:
                    trace.restore()
                    drawn = snapshot.drawn() or before != (random.getstate(), numpy_state())
                    snapshot.restore()
                path, before_it, facts = hash(tuple(trace.path)), facts, trace.facts()
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


def _takes(model: nn.Module, run: Forward, paths: set[int], snapshot: Snapshot) -> bool:
    """Whether a forward that is not followed takes one of some paths, given by their hashes."""
    try:
        return hash(tuple(_path(model, run, snapshot))) in paths
    except Exception:  # the user's code may raise anything; if it does so again, it is told
        return False


class _Watching(Preserving):
    """Notes whether an operation takes numbers that were neither there before nor made by one."""

    unseen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in leaves_of(args, kwargs):
            if isinstance(t, Tensor) and t.layout == torch.strided and t.is_floating_point() and not self.unseen:
                key = storage_key(t)
                self.unseen = key not in self.known and key not in self.made and t.untyped_storage().resizable()
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


def _look(model: nn.Module, run: Forward, trace: Trace, snapshot: Snapshot, ignored: tuple[str, ...]) -> None:
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


# from a trace to groups


class _Entries:
    """Where each unit was made, read, normalised and passed on: one pair for each place.

    Attributes:
        layers: role and layer of each part of the places, which are numbered through.
        starts: the first place of each.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[str, Any]] = []
        self.starts = [0]
        self._pairs: list[Tensor] = []

    def add(self, role: str, key: Any, unit: Tensor, position: Tensor) -> None:
        self.layers.append((role, key))
        self._pairs.append(torch.stack([unit, position + self.starts[-1]]))
        self.starts.append(self.starts[-1] + int(position.max()) + 1)

    def pairs(self) -> Tensor:
        """Units and places, int64 [2, E]; they are handed over."""
        return _taken_together(self._pairs)

    def split(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's number and the position there of each place."""
        starts = torch.tensor(self.starts, device="cpu")
        layer = torch.bucketize(places, starts, right=True) - 1
        return layer, places - starts[layer]


class _Facts:
    """What the records of a trace say of every node: which units belong together, and what forbids them."""

    def __init__(self, trace: Trace) -> None:
        nodes = trace.nodes
        n = nodes.size
        self.entries = _Entries()
        self.reasons = [reason for _, reason in trace.refused]
        for i, source in enumerate(nodes.sources):
            if source.axis is not None:
                rows = torch.arange(source.size, device="cpu")
                self.entries.add("make", (source.parameter, source.axis, i), source.first + rows, rows)

        causes = [(ids, i) for i, (ids, _) in enumerate(trace.refused)]
        raw = torch.zeros(n, dtype=torch.bool, device="cpu")
        edges: list[Tensor] = []
        sums: list[Tensor] = []
        crowds: list[tuple[Tensor, str]] = []
        # where a layer stands: in the order of the forward, makers first
        for (role, key), pairs in trace.records.items():
            pairs_ = torch.unique(torch.cat([p * BASE + i for p, i in pairs]))
            place, ids = pairs_ // BASE, pairs_ % BASE
            row, leaf = nodes.leaves(ids)
            is_unit = nodes.is_unit(leaf)
            at = place[row]
            dirty = torch.zeros(int(place.max()) + 1 if len(place) else 1, dtype=torch.bool, device="cpu")
            if not is_unit.all():
                causes.append((leaf[nodes.mix[leaf] > 0], BASE))
                dirty[at[leaf == DATA]] = role == "read"
                row, at, leaf = row[is_unit], at[is_unit], leaf[is_unit]
                raw[leaf[dirty[at]]] = True
            if not len(leaf):
                continue
            first = torch.full_like(dirty, BASE, dtype=torch.int64).scatter_reduce_(0, at, leaf, "amin")
            joined = torch.stack([leaf, first[at]])
            edges.append(joined[:, joined[0] != joined[1]])
            total = torch.zeros(len(ids), dtype=torch.int64, device="cpu").index_add_(0, row, scramble(leaf))
            one = torch.zeros_like(total).index_copy_(0, row, leaf)
            sums.append(torch.stack([one, total])[:, total != 0])
            self.entries.add(role, key, leaf, at)
            if not (place.diff() > 0).all():
                crowd = _crowded(nodes, row, at, leaf)
                if len(crowd):
                    name = key[0] if isinstance(key, tuple) else key
                    crowds.append((crowd, f"'{name}' takes several of its units for one"))

        def mixed(number: int) -> int:
            self.reasons.append(f"its features are mixed by {nodes.mixes[number].why}")
            return len(self.reasons) - 1

        self.refusal = nodes.spread(causes, mixed)
        for crowd, reason in crowds:
            self.refusal[crowd] = self.refusal[crowd].clamp(max=len(self.reasons))
            self.reasons.append(reason)
        self.notes: dict[str, Tensor] = defaultdict(lambda: torch.zeros(n, dtype=torch.bool, device="cpu"))
        for ids, note in trace.notes:
            _, leaf = nodes.leaves(torch.unique(ids))
            self.notes[note][leaf] = True

        self.root = _connect(n, _taken_together(edges))
        for held in self.notes.values():
            held[self.root[held.nonzero()[:, 0]]] = True
        self.raw = torch.zeros_like(raw)
        self.raw[self.root[raw]] = True
        self.refusal = torch.full_like(self.refusal, BASE).scatter_reduce_(0, self.root, self.refusal, "amin")
        one, total = _taken_together(sums)
        zero, at = torch.zeros_like(self.root), self.root[one]
        low, high = (zero.scatter_reduce(0, at, total, how, include_self=False) for how in ("amin", "amax"))
        self.coupled = high != low


def _taken_together(parts: list[Tensor]) -> Tensor:
    """Pairs [2, ...] in one tensor; the list is emptied, so that they are held once."""
    whole = torch.cat([torch.zeros(2, 0, dtype=torch.int64, device="cpu"), *parts], 1)
    parts.clear()
    return whole


def _crowded(nodes: Nodes, row: Tensor, at: Tensor, unit: Tensor) -> Tensor:
    """Units of one layer that share a place without being joined, at different positions."""
    source = nodes.origin[unit]
    _, index, here = torch.unique(row * BASE + source, return_inverse=True, return_counts=True)
    pairs = torch.unique(at * BASE + unit)
    spots, counts = torch.unique(pairs // BASE * BASE + nodes.origin[pairs % BASE], return_counts=True)
    there = counts[torch.searchsorted(spots, at * BASE + source)]
    return unit[here[index] < there]


def _connect(n: int, edges: Tensor) -> Tensor:
    """The smallest node that each of n nodes is connected to, by edges [2, E]."""
    root = torch.arange(n, device="cpu")
    a, b = edges
    while True:
        low = torch.minimum(root[a], root[b])
        new = root.scatter_reduce(0, a, low, "amin").scatter_reduce(0, b, low, "amin")
        new = torch.minimum(new, new[new])
        if torch.equal(new, root):
            return root
        root = new


@_disable_current_modes()
def _candidates(model: nn.Module, trace: Trace) -> list[_Candidate]:
    """Units that the same layers make and read, in the order of forward()."""
    facts = _Facts(trace)
    unit, place = facts.entries.pairs()
    if not len(unit):
        return []
    pairs = torch.unique(facts.root[unit] * BASE + place)
    del unit, place
    rows = torch.stack([pairs // BASE, *facts.entries.split(pairs % BASE)])
    heads, index = torch.unique(rows[0], return_inverse=True)
    status = facts.refusal[heads] * 4 + facts.raw[heads] * 2 + facts.coupled[heads]
    signature = scramble(status + 1).index_add_(0, index, scramble(rows[1] + 2**40))
    _, number = torch.unique(signature, return_inverse=True)
    first = torch.full_like(number, BASE).scatter_reduce_(0, number, heads, "amin")
    candidates = []
    owns, mines = _by_number(heads, number), _by_number(rows, number[index])
    for which in torch.argsort(first[: len(owns)]).tolist():
        own, mine = owns[which], mines[which]
        whole = _candidate(model, trace, facts, own, mine)
        parts = []
        if whole.reason.endswith(_IRREGULAR):
            # heads of a grouped-query attention are regular by themselves
            cuts = _runs(mine[2].reshape(len(own), -1))
            rows_of = [mine[:, torch.isin(mine[0], run)] for run in own.tensor_split(cuts)]
            parts = [
                _candidate(model, trace, facts, *pair) for pair in zip(own.tensor_split(cuts), rows_of, strict=True)
            ]
        candidates += [whole] if not parts or any(part.reason for part in parts) else parts
    return candidates


def _by_number(values: Tensor, number: Tensor) -> Sequence[Tensor]:
    """The columns of `values` [..., E] that have number 0, 1, ..., in their order."""
    return values[..., torch.argsort(number, stable=True)].split(torch.bincount(number).tolist(), -1)


def _runs(positions: Tensor) -> list[int]:
    """Where the positions [N, E] of units, one after the other, make another step than the usual one."""
    if len(positions) < 2:
        return []
    steps = positions.diff(dim=0)
    cuts = (steps != steps.mode(0).values).any(1).nonzero()[:, 0] + 1
    return cuts.tolist() if 2 * len(cuts) < len(positions) else []


def _candidate(model: nn.Module, trace: Trace, facts: _Facts, heads: Tensor, rows: Tensor) -> _Candidate:
    """Units `heads` [N] with their sorted entries `rows` [3, E]: unit, layer, position."""
    n, head = len(heads), int(heads[0])
    places: dict[str, list[tuple[Any, Tensor]]] = defaultdict(list)
    numbers, number = torch.unique(rows[1], return_inverse=True)
    for i, at in zip(numbers.tolist(), _by_number(rows[2], number), strict=True):
        role, key = facts.entries.layers[i]
        places[role].append((key, at.reshape(n, -1)))
    makes = sorted(places["make"], key=lambda place: place[0][2])
    layers = [(trace.owners[key[0]][0], at) for key, at in makes + places["pass"]]
    candidate = _Candidate(layers, coupled=bool(facts.coupled[head]))
    candidate.notes = [note for note, roots in facts.notes.items() if bool(roots[heads].any())]
    touched = list(dict.fromkeys(key[0] for role in ("make", "pass", "read") for key, _ in places[role]))
    refusal = int(facts.refusal[head])
    reason = facts.reasons[refusal] if refusal < len(facts.reasons) else ""
    candidate.reason = _forbidden(trace, places, touched)
    if not candidate.reason and reason.startswith("part of"):
        path = reason.removeprefix("part of the model's output").strip()
        way_out = f"; ignore_outputs={path!r} if nothing is trained on it" if path else ""
        reason = f"its units are {reason}{way_out}" if places["read"] else f"it makes {reason[8:]}"
    candidate.reason = candidate.reason or reason
    if not candidate.reason and not places["read"]:
        candidate.reason = "no layer reads it"
    if not candidate.reason and max(at.shape[1] for _, at in makes) > _MAX_ROWS:
        candidate.reason = "its units cannot be told apart where they are read"
    if not candidate.reason and facts.raw[head]:
        candidate.reason = (
            "its columns hold data that no unit makes, too (added to it, beside it, or gated by it so that the data "
            "does not vanish with the unit)"
        )
    outside = [key[0] for key, _ in places["read"] if key[0] in trace.outside]
    if not candidate.reason and outside:
        owner = label(*trace.owners[outside[0]])
        candidate.reason = (
            f"'{outside[0]}' reads it, but not in a call of {owner}, so that its features cannot be observed there"
        )
    if not candidate.reason:
        _write(model, trace, candidate, n, makes, places)
    return candidate


def _forbidden(trace: Trace, places: dict[str, list[tuple[Any, Tensor]]], touched: Sequence[str]) -> str:
    """Why the weights of a candidate may not be changed, or an empty string."""
    made = {key[0] for key, _ in places["make"]}
    for name in touched:
        owner, module = trace.owners[name]
        roles = sorted(trace.roles[name])
        if name in trace.tied:
            return f"'{name}' is tied: it shares its memory with '{trace.tied[name]}'"
        if len(roles) > 1:
            return f"'{name}' is used in two ways: {', '.join(roles)}"
        if name in made and any(key[0] == name for key, _ in places["read"]):
            return f"'{name}' both makes and reads it (recurrent, applied twice, or a residual branch of one layer)"
        parameter = getattr(module, name.removeprefix(f"{owner}."))
        if not parameter.requires_grad:
            return f"'{name}' is frozen (requires_grad is False)"
        if kind(module) == "Embedding" and (module.padding_idx is not None or module.max_norm is not None):
            return f"{label(owner, module)} has padding_idx or max_norm, which a re-drawn unit would not keep"
    makers = [trace.owners[key[0]][0] for role in ("make", "pass") for key, _ in places[role]]
    entries = [(owner, "bias", "bias") for owner in makers]
    norms = [key for key, _ in places["norm"]]
    entries += [(owner, key, "norm") for owner in norms for key in ("weight", "bias", "running_mean", "running_var")]
    for owner, key, own in entries:
        name = f"{owner}.{key}" if owner else key
        roles = sorted(trace.roles.get(name, set()) - {own})
        if name in trace.tied:
            return f"'{name}' is tied: it shares its memory with '{trace.tied[name]}'"
        if roles:
            return f"'{name}' is used in two ways: {', '.join([own, *roles])}"
    return ""


def _write(
    model: nn.Module,
    trace: Trace,
    candidate: _Candidate,
    n: int,
    makes: Sequence[tuple[Any, Tensor]],
    places: dict[str, list[tuple[Any, Tensor]]],
) -> None:
    """Writes a candidate as a `UnitGroup`, or why it cannot be."""
    incoming: list[Part] = []
    outgoing: list[Part] = []
    norms: list[Part] = []
    for parts, role, entries in (
        (incoming, "make", makes),
        (incoming, "pass", places["pass"]),
        (outgoing, "read", places["read"]),
        (norms, "norm", places["norm"]),
    ):
        for key, at in entries:
            if role == "norm":
                owner, module = key, trace.modules[key]
                at = _norm_entries(module, at)
            else:
                owner, module = trace.owners[key[0]]
                axis = key[1]
                if key[0] != (f"{owner}.weight" if owner else "weight"):
                    candidate.reason = f"'{key[0]}' is not the weight of one of {', '.join(LAYERS)}"
                    return
                if kind(module) in LAYERS and axis != (1 - out_axis(module) if role == "read" else out_axis(module)):
                    candidate.reason = f"'{key[0]}' is not used as {label(owner, module)} would"
                    return
            fitted = _fit(at, role in ("make", "pass"))
            if fitted is None:
                verb = {"make": "makes", "pass": "passes on", "read": "reads", "norm": "normalises"}[role]
                candidate.reason = f"'{owner}' {verb} its units{_IRREGULAR}"
                return
            parts += [Part(owner, *block) for block in fitted]
    first, at = makes[0]
    name = trace.owners[first[0]][0]
    if at.numel() != trace.nodes.sources[first[2]].size:
        name = f"{name}:{int(at.min())}-{int(at.max())}"
    group = UnitGroup(name, incoming, outgoing, norms, n)
    try:
        resolved = resolve(model, group, trace.tied, trace.names)
        short = resolved.unit_group()
        candidate.group, candidate.resolved = group, resolved
        with contextlib.suppress(TypeError, ValueError):
            if replace(resolve(model, short, trace.tied, trace.names)) == resolved:
                candidate.group = short
    except (TypeError, ValueError) as error:
        candidate.reason = str(error).removeprefix(f"unit group '{name}': ")


def _norm_entries(norm: nn.Module, at: Tensor) -> Tensor:
    """Positions in a norm's flattened entries [N, r] as positions along its first axis."""
    if not norm_kind(norm):
        return at
    rest = torch.Size(norm_shape(norm)[1:]).numel()
    whole = (
        (at % rest == torch.arange(rest, device="cpu").repeat(at.shape[1] // rest)).all()
        if at.shape[1] % rest == 0
        else False
    )
    return at[:, ::rest] // rest if whole else at


def _fit(at: Tensor, split: bool) -> list[tuple[int, int, int, int]] | None:
    """Positions [N, r] as parts (start, per_unit, unit_stride, position_stride); `split` allows several."""
    n, r = at.shape
    unit = int(at[1, 0] - at[0, 0]) if n > 1 else r
    position = int(at[0, 1] - at[0, 0]) if r > 1 else 1
    rows, columns = torch.arange(n, device="cpu"), torch.arange(r, device="cpu")
    steps = rows[:, None] * unit + columns * position
    affine = unit > 0 and bool((at == at[0, 0] + steps).all())
    if affine and (not split or r == 1 or (unit, position) == (r, 1)):
        return [(int(at[0, 0]), r, unit, position)]
    if not split or r == 1:
        return None
    parts = [_fit(column[:, None], True) for column in at.unbind(1)]
    return None if None in parts else [block for part in parts for block in part or ()]


def _unreached(model: nn.Module, trace: Trace) -> list[tuple[str, set[int]]]:
    """The modules with parameters that no forward reached, and the sizes along which each may touch units."""
    modules = (
        (n, m, [f"{n}.{k}" if n else k for k, p in m._parameters.items() if p is not None])
        for n, m in model.named_modules()
    )
    return [(label(n, m), set(_widths(m))) for n, m, own in modules if own and not trace.seen.intersection(own)]


def _may_share(unreached: Sequence[tuple[str, set[int]]], candidate: _Candidate) -> str:
    """That a layer which no forward reached may make or read the units of a group, or an empty string."""
    group = candidate.resolved
    assert group is not None
    sizes = {group.num_units, group.num_units * group.columns_per_unit}
    sizes |= {read_width(member.module) for member in group.outgoing}
    for name, widths in unreached:
        if sizes & widths:
            return (
                f"{name} is not reached but has its width, and may share its units elsewhere: give example_inputs that "
                "reach it too, or unreached_ok=True if it reads none of them"
            )
    return ""


def _widths(module: nn.Module) -> Iterator[int]:
    """Sizes along which a module may touch units."""
    # of a computed weight (parametrized, pruned) there is no parameter of this module
    if kind(module) in LAYERS and module._parameters.get("weight") is not None:
        yield make_width(module)
        yield read_width(module)
        return
    for parameter in module._parameters.values():
        if parameter is not None:
            yield from parameter.shape


@_disable_current_modes()
def _spans(rows: Sequence[Tensor]) -> str:
    """The rows of several parts, as messages say them: units 0-3, 5."""
    every = torch.unique(torch.cat([part.flatten() for part in rows]))
    runs = every.tensor_split(((every.diff() > 1).nonzero()[:, 0] + 1).tolist())
    ends = [(int(run[0]), int(run[-1])) for run in runs[:_MOST_SPANS]]
    spans = [str(first) if first == last else f"{first}-{last}" for first, last in ends]
    more = [f"and {len(runs) - _MOST_SPANS} more parts"] if len(runs) > _MOST_SPANS else []
    return f"unit{'s' if len(every) > 1 else ''} {', '.join(spans + more)}"


def _left_out(model: nn.Module, trace: Trace, candidates: Sequence[_Candidate]) -> dict[str, str]:
    """By its label, why each layer makes no unit group, or which of its units do not."""
    modules = dict(model.named_modules())
    reasons: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    taken = {name for candidate in candidates if not candidate.reason for name, _ in candidate.layers}
    for candidate in candidates:
        for name, rows in candidate.layers if candidate.reason else ():
            reasons[name][candidate.reason].append(rows)
    left: dict[str, str] = {}
    for name, why in reasons.items():
        parts = [f"{_spans(rows)}: {reason}" for reason, rows in why.items()]
        left[label(name, modules[name])] = next(iter(why)) if len(why) == 1 and name not in taken else "; ".join(parts)
    for name, module in modules.items():
        if name in reasons or name in taken:
            continue
        weights = [
            f"{name}.{key}" if name else key for key, p in module._parameters.items() if p is not None and p.dim() > 1
        ]
        is_layer = isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd))
        if not is_layer and not isinstance(module, nn.RNNBase) and kind(module) not in LAYERS:
            continue
        used = [trace.used_by[w] for w in weights if w in trace.used_by]
        tied = [w for w in weights if w in trace.tied]
        if tied:
            left[label(name, module)] = f"'{tied[0]}' is tied: it shares its memory with '{trace.tied[tied[0]]}'"
        elif is_layer and "weight" not in module._parameters:
            left[label(name, module)] = "its weight is computed (parametrized, pruned), not a parameter"
        elif weights and not trace.seen.intersection(weights):
            left[label(name, module)] = "forward() does not reach it"
        elif used:
            left[label(name, module)] = f"its weights go into {used[0]}, which makes no units"
        else:
            left[label(name, module)] = "its weight is read through a slice or a reshape"
    return left
