"""Matrix products, with weights that read and make units or of two activations; and embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..nodes.ids import DATA, RANDOM, kinds_of
from ..trace.call import Call
from ..trace.trace import Trace
from .arguments import Results, take_ids, take_index
from .weights import read, with_bias

# they add a first argument
SUMMING = ("addmm", "baddbmm", "_sparse_addmm")


def matmul(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results:
    """A product with a weight makes units of those that its columns read; one of activations is both, mixed."""
    summing, nodes, out = call.op in SUMMING, trace.nodes, outs[0]
    names = call.names[summing:][:2]
    first, second = (call[name] for name in names)
    entries = trace.parameter(first), trace.parameter(second)
    weights = [e if e and e[1].dim() > 1 else None for e in entries]
    added = call["self"] if summing else None
    if (weights[0] or weights[1]) and not all(weights):
        call.take(*names)
        name, parameter = weights[1] or weights[0]  # type: ignore[misc]
        weight, x = (second, first) if weights[1] else (first, second)
        if not weights[1]:
            # out = W x: the units are rows of the result, features are rows of x
            weight, x = weight.transpose(-1, -2), x.transpose(-1, -2)
        axis = _axis_of(weight, parameter)
        ids = trace.ids(x)
        trace.use(call.op, entries[0] if weights[1] else entries[1])
        if axis is None:
            trace.roles[name].add("a slice or a reshape of it")
            trace.refuse(ids, f"it is read through a slice or a reshape of '{name}'")
            return [torch.tensor(DATA, device="cpu")]
        read(trace, name, axis, ids, -1)
        trace.roles[name].add("matrix product" if axis == 1 else "matrix product with its transpose")
        made = nodes.source(name, 1 - axis, weight.shape[-1])
        made = made if weights[1] else made[:, None]
        return [with_bias(trace, call, added, made.expand(out.shape))]
    a, b = trace.ids(first), trace.ids(second)
    for name in names:
        take_ids(trace, call, name)
    for own, other in ((a, b), (b, a)):
        if own is not None and other is not None and _is_computed(trace, own):
            trace.refuse(other, f"{trace.why} multiplies it by a weight that is computed, not a parameter")
    rows = None if a is None else nodes.merge(a)[..., :, None].expand(out.shape)
    columns = None if b is None else nodes.merge(b.transpose(-1, -2))[..., None, :].expand(out.shape)
    return [with_bias(trace, call, added, nodes.product(rows, columns))]


def embedding(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results | None:
    """Rows of a whole table: its columns are units."""
    entry = trace.parameter(call["weight"])
    if not entry or entry[1].shape != call["weight"].shape:
        return None
    call.take("weight")
    take_index(trace, call, "indices")
    trace.roles[entry[0]].add("embedding")
    return [trace.nodes.source(entry[0], 1, entry[1].shape[1])]


def _is_computed(trace: Trace, ids: Tensor) -> bool:
    """Whether a tensor is made of parameters alone."""
    _, leaf = trace.nodes.leaves(kinds_of(ids))
    return bool((leaf > RANDOM).any()) and not bool(trace.nodes.bare[leaf].any()) and not bool((leaf == DATA).any())


def _axis_of(weight: Tensor, parameter: Tensor) -> int | None:
    """The axis along which a parameter reads, by its view `weight` [..., K, N] in x @ weight; None for a part of it."""
    while weight.dim() > 2 and (weight.shape[0] == 1 or weight.stride(0) == 0):
        weight = weight[0]
    if weight.dim() > 2 or weight.numel() != parameter.numel() or parameter.shape[:2].numel() != parameter.numel():
        return None
    shape, strides = parameter.shape[:2], parameter.stride()[:2]
    if weight.shape == shape[::-1] and (weight.stride() == strides[::-1] or 1 in shape):
        return 1
    return 0 if weight.shape == shape and weight.stride() == strides else None
