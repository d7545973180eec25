"""What `explain` says: the groups taken, why other layers are left out, and notes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..groups.layers import LAYERS, kind, label
from .candidates.candidates import Candidate
from .trace.trace import Trace, join_name

# parts of a layer that are named
_MOST_SPANS = 8


def tables(taken: Sequence[Candidate], left_out: Mapping[str, str], remarks: Sequence[str]) -> str:
    """Tables to print: the groups that were found, why other layers are left out, and notes."""
    rows = [("unit group", "units", "columns", "incoming", "outgoing", "norms")]
    notes = [("note", "")]
    for candidate in taken:
        group = candidate.resolved
        assert group is not None
        parts = (
            ", ".join(dict.fromkeys(m.name for m in part)) for part in (group.incoming, group.outgoing, group.norms)
        )
        incoming, outgoing, norms = parts
        columns = str(group.num_units * group.columns_per_unit)
        rows.append((group.name, str(group.num_units), columns, incoming, outgoing, norms or "-"))
        notes += [(group.name, note) for note in candidate.notes]
    notes += [("forward()", remark) for remark in remarks]
    lines = _align(rows) if taken else ["no unit group found"]
    if left_out:
        lines += ["", *_align([("left out", "because"), *left_out.items()])]
    if len(notes) > 1:
        lines += ["", *_align(notes)]
    return "\n".join(lines)


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]


def left_out_of(model: nn.Module, trace: Trace, candidates: Sequence[Candidate]) -> dict[str, str]:
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
        weights = [join_name(name, key) for key, p in module._parameters.items() if p is not None and p.dim() > 1]
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


@_disable_current_modes()
def _spans(rows: Sequence[Tensor]) -> str:
    """The rows of several parts, as messages say them: units 0-3, 5."""
    every = torch.unique(torch.cat([part.flatten() for part in rows]))
    runs = every.tensor_split(((every.diff() > 1).nonzero()[:, 0] + 1).tolist())
    ends = [(int(run[0]), int(run[-1])) for run in runs[:_MOST_SPANS]]
    spans = [str(first) if first == last else f"{first}-{last}" for first, last in ends]
    more = [f"and {len(runs) - _MOST_SPANS} more parts"] if len(runs) > _MOST_SPANS else []
    return f"unit{'s' if len(every) > 1 else ''} {', '.join(spans + more)}"
