"""Sums and other reductions, over axes, windows or all that came before."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ...groups.layers import norm_kind
from ..nodes.ids import kinds_of
from ..trace.call import Call
from ..trace.trace import Trace
from .arguments import Results, first_ids, picked, take_index, use
from .norms import norm_here

# that give any place along their last axes what is at others; the number of these axes
RESAMPLING = re.compile(r"(?:pool|upsample_\w+?|grid_sampler_)([123])d")
# of zeros, they are not zero
_NOT_ZERO = ("logsumexp", "all")


def reduce(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results | None:
    """The union along axes; none of what else is given may have ids."""
    name, x = call.tensors[0][0], first_ids(trace, call)
    if x is None or any(other != name and trace.ids(t) is not None for other, t in call.tensors):
        return None
    use(trace, call, *call.take(name))
    if trace.statistics or (trace.stack and norm_kind(trace.stack[-1][1]) == "RMSNorm"):
        trace.notes.append((kinds_of(x), f"{norm_here(trace)} couples its units"))
        return [torch.tensor(0, device="cpu")] * len(outs)
    reduced = _along(trace, call, x)
    return [trace.nodes.with_one(reduced) if call.op in _NOT_ZERO else reduced] * len(outs)


def _along(trace: Trace, call: Call, ids: Tensor) -> Tensor:
    axes = call["dim"]
    axes = list(range(ids.dim())) if axes in (None, []) else [axes] if isinstance(axes, int) else list(axes)
    axes = [axis % ids.dim() for axis in axes] if ids.dim() else []
    merged = trace.nodes.along(ids, axes) if axes else ids
    place = slice(0, 1) if call["keepdim"] else 0
    return merged[tuple(place if i in axes else slice(None) for i in range(ids.dim()))]


def scan(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results | None:
    """Every element is made of all along an axis, and they are mixed in no other way than one by one."""
    x = first_ids(trace, call)
    if x is None:
        return None
    call.take(call.tensors[0][0])
    merged = trace.nodes.along(x, [call["dim"] % x.dim()]) if x.dim() else x
    return [merged if call.op == "cumsum" else trace.nodes.with_one(merged)]


def resample(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results | None:
    """Pooling, interpolation and sampling: any place may be of any other, along as many last axes as the name says."""
    name, first = call.tensors[0]
    x, n = first_ids(trace, call), int(RESAMPLING.search(call.op)[1])  # type: ignore[index]
    if x is None or x.dim() <= n:
        return None
    use(trace, call, *call.take(name))
    if by := take_index(trace, call, "grid"):
        x = picked(trace, x, first, by)
    merged = trace.nodes.merge(x.flatten(-n))
    return [merged.reshape(merged.shape + (1,) * n)] * len(outs)
