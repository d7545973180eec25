"""Norms: their entries belong to units, and their statistics couple or mix them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

from torch import Tensor

from ...groups.layers import label, norm_kind, norm_shape
from ..nodes.ids import kinds_of, narrow
from ..trace.call import Call
from ..trace.trace import Trace, join_name
from .arguments import Results, everything, take_ids, use

# of zeros, they are not zero
_NOT_ZERO = ("native_layer_norm", "native_group_norm")


def norm(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results:
    """Units go on, scaled and shifted by entries that are theirs; the statistics are of all."""
    result = _normalised(trace, call)
    return [result, *itertools.repeat(everything(trace, call), len(outs) - 1)]


def _normalised(trace: Trace, call: Call) -> Tensor | None:
    op, nodes = call.op, trace.nodes
    ids = trace.ids(call["input"])
    use(trace, call, *call.take("input"))
    features = "layer" in op or "rms" in op
    if ids is None:
        use(trace, call, *call.take())
        return None
    axis, columns = (-1, ids.flatten(-len(call["normalized_shape"]))) if features else (1, ids)
    result, owners = _with_entries(trace, call, ids, columns, features)
    if len(owners) > 1:
        trace.refuse(ids, f"{trace.why} takes entries of several norms: {', '.join(owners)}")
    for owner in owners:
        trace.record("norm", owner, columns, axis)
    if "batch" not in op:
        trace.notes.append((kinds_of(ids), f"{norm_here(trace)} couples its units"))
        return nodes.with_one(result) if op in _NOT_ZERO else result
    # of an instance norm on features without channels, a channel is a sample
    thin = narrow(columns)[0][0]
    if thin.numel() == thin.shape[axis]:
        return result
    across = nodes.merge(columns.transpose(0, 1).flatten(1)).reshape(-1, *(1,) * (ids.dim() - 2))
    _, leaf = nodes.leaves(kinds_of(across))
    return nodes.join(result, across) if bool((nodes.mix[leaf] > 0).any()) else result


def _with_entries(
    trace: Trace, call: Call, ids: Tensor, columns: Tensor, features: bool
) -> tuple[Tensor, dict[str, None]]:
    """The ids of the result, and the norms that own what scales and shifts it.

    What else scales, shifts or is said to be a statistic enters the result.
    """
    nodes = trace.nodes
    of_norm: dict[str, None] = {}
    result: Tensor = ids
    for key in ("weight", "bias", "running_mean", "running_var"):
        tensor = call[key]
        if not isinstance(tensor, Tensor):
            continue
        entry = trace.parameter(tensor)
        if entry and key.startswith("running") and call.given.get("training", "no_update" not in call.op):
            trace.note_written(entry[0], ids)
        owner, module = trace.owners[entry[0]] if entry else ("", None)
        whole = entry is not None and tensor.shape == entry[1].shape and entry[0] == join_name(owner, key)
        if entry and whole and norm_kind(module):
            call.take(key)
            trace.roles[entry[0]].add("norm")
            of_norm[owner] = None
            continue
        repeated = _repeated(trace, tensor, key)
        own = trace.ids(tensor)
        if repeated:
            call.take(key)
            channels = columns.movedim(1, 0)
            size = norm_shape(trace.modules[repeated])[0]
            for first in range(0, len(channels), size):
                trace.record("norm", repeated, channels[first : first + size], 0)
            continue
        if key.startswith("running") or own is None:
            # a constant shift, or statistics that were copied for every sample
            result = nodes.with_one(result) if own is None and key == "bias" else result
            if own is None:
                call.take(key)
            continue
        added = take_ids(trace, call, key)
        assert added is not None
        shape = added.shape if features else (added.shape[0], *(1,) * (ids.dim() - 2))
        added = added.reshape(shape).expand(ids.shape)
        joined = nodes.product(result, added) if key == "weight" else nodes.join(result, added)
        result = cast(Tensor, joined)
    return result, of_norm


def norm_here(trace: Trace) -> str:
    """The norm that runs, as notes say it."""
    return label(*trace.stack[-1]) if trace.stack else "a norm"


def _repeated(trace: Trace, tensor: Tensor, key: str) -> str:
    """The instance norm of which a tensor repeats the scale or shift for every sample, or an empty string."""
    ids = trace.ids(tensor)
    if ids is None or key not in ("weight", "bias"):
        return ""
    kinds = kinds_of(ids)
    source = trace.nodes.source_of(int(kinds[0]))
    if len(kinds) != 1 or source is None:
        return ""
    name = source.parameter
    owner, module = trace.owners.get(name, ("", None))
    of_norm = module is not None and norm_kind(module).startswith("InstanceNorm")
    return owner if of_norm and name == join_name(owner, key) else ""
