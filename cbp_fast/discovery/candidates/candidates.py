"""Units that the same layers make and read, and why they make no unit group, if they do not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ...groups.layers import kind, label
from ...groups.spec import ResolvedGroup, UnitGroup
from ..nodes.ids import BASE, scramble
from ..trace.trace import Trace, join_name
from .facts import Facts
from .writing import IRREGULAR, Place, write_group

# rows of one layer that may make one unit together (a fused gate and up: 2)
_MAX_ROWS = 8


@dataclass
class Candidate:
    """Units that the same layers make and read.

    Attributes:
        layers: names of the modules that make them, and the rows that are theirs in each, int64 [units, rows].
        reason: why they make no unit group; empty if they do.
        group: the unit group, if it can be written as one; `resolved`: looked up in the model.
        coupled: whether readers see different sums of them.
        notes: what a user should know.
    """

    layers: list[tuple[str, Tensor]]
    reason: str = ""
    group: UnitGroup | None = None
    resolved: ResolvedGroup | None = None
    coupled: bool = False
    notes: list[str] = field(default_factory=list)


@_disable_current_modes()
def candidates_of(model: nn.Module, trace: Trace) -> list[Candidate]:
    """Units that the same layers make and read, in the order of forward()."""
    facts = Facts(trace)
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
        if whole.reason.endswith(IRREGULAR):
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


def _candidate(model: nn.Module, trace: Trace, facts: Facts, heads: Tensor, rows: Tensor) -> Candidate:
    """Units `heads` [N] with their sorted entries `rows` [3, E]: unit, layer, position."""
    n, head = len(heads), int(heads[0])
    places: dict[str, list[Place]] = defaultdict(list)
    numbers, number = torch.unique(rows[1], return_inverse=True)
    for i, at in zip(numbers.tolist(), _by_number(rows[2], number), strict=True):
        role, key = facts.entries.layers[i]
        places[role].append((key, at.reshape(n, -1)))
    makes = sorted(places["make"], key=lambda place: place[0][2])
    layers = [(trace.owners[key[0]][0], at) for key, at in makes + places["pass"]]
    candidate = Candidate(layers, coupled=bool(facts.coupled[head]))
    candidate.notes = [note for note, roots in facts.notes.items() if bool(roots[heads].any())]
    touched = list(dict.fromkeys(key[0] for role in ("make", "pass", "read") for key, _ in places[role]))
    candidate.reason = _forbidden(trace, places, touched) or _reason(trace, facts, head, places)
    if not candidate.reason:
        written = write_group(model, trace, n, makes, places)
        if isinstance(written, str):
            candidate.reason = written
        else:
            candidate.group, candidate.resolved = written
    return candidate


def _reason(trace: Trace, facts: Facts, head: int, places: Mapping[str, Sequence[Place]]) -> str:
    """What was seen of some units, of which `head` is the least node, that forbids a group; or an empty string."""
    refusal = int(facts.refusal[head])
    reason = facts.reasons[refusal] if refusal < len(facts.reasons) else ""
    if reason.startswith("part of"):
        path = reason.removeprefix("part of the model's output").strip()
        way_out = f"; ignore_outputs={path!r} if nothing is trained on it" if path else ""
        return f"its units are {reason}{way_out}" if places["read"] else f"it makes {reason[8:]}"
    if reason:
        return reason
    if not places["read"]:
        return "no layer reads it"
    if max(at.shape[1] for _, at in places["make"]) > _MAX_ROWS:
        return "its units cannot be told apart where they are read"
    if facts.raw[head]:
        return (
            "its columns hold data that no unit makes, too (added to it, beside it, or gated by it so that the data "
            "does not vanish with the unit)"
        )
    outside = [key[0] for key, _ in places["read"] if key[0] in trace.outside]
    if outside:
        owner = label(*trace.owners[outside[0]])
        return f"'{outside[0]}' reads it, but not in a call of {owner}, so that its features cannot be observed there"
    return ""


def _forbidden(trace: Trace, places: Mapping[str, Sequence[Place]], touched: Sequence[str]) -> str:
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
        name = join_name(owner, key)
        roles = sorted(trace.roles.get(name, set()) - {own})
        if name in trace.tied:
            return f"'{name}' is tied: it shares its memory with '{trace.tied[name]}'"
        if roles:
            return f"'{name}' is used in two ways: {', '.join([own, *roles])}"
    return ""
