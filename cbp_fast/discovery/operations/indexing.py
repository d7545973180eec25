"""Elements that an index chooses, or puts somewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..trace.call import Call
from ..trace.trace import Trace
from .arguments import Results, picked, take_ids, take_index


def move_by_index(trace: Trace, call: Call, args: Any, kwargs: Any, by: int) -> Tensor:
    """Elements that data chooses may be any along the axes that are indexed; so may be where they are put."""
    nodes, op = trace.nodes, call.op
    x = args[0]
    if op in ("index", "index_put"):
        axes: list[int] = []
        at = 0
        for index in call.given["indices"]:
            count = index.dim() if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else 1
            axes += range(at, at + count) if index is not None else []
            at += count
    else:
        flat = op == "take_along_dim" and call["dim"] is None
        axes = list(range(x.dim())) if flat else [int(call["dim"]) % max(x.dim(), 1)]
    anywhere = (lambda ids: nodes.along(ids, axes)) if by else (lambda ids: ids)
    if by:
        x = picked(trace, x, call.args[0], by)
    if op != "index_put":
        return on_ids(call.func, (anywhere(x), *args[1:]), kwargs)
    values = args[2]
    if by:
        values = picked(trace, values, call["values"], by)
        rest = x.dim() - len(axes)
        lead = max(values.dim() - rest, 0)
        if lead:
            merged = nodes.merge(values.reshape(-1, *values.shape[lead:]).movedim(0, -1))
            values = merged.expand(values.shape)
    packet = torch.ops.aten.index_put.default
    after = packet(x, args[1], values.expand(values.shape), False)
    accumulates = bool((len(args) > 3 and args[3]) or kwargs.get("accumulate"))
    if accumulates or by:
        after = cast(Tensor, nodes.join(anywhere(x), anywhere(after)))
    return after


def add_at(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results:
    """index_add and scatter_add: every place may receive what any row of the source holds."""
    own = take_ids(trace, call, "self")
    out = outs[0]
    name = "source" if call["source"] is not None else "src"
    source = take_ids(trace, call, name)
    if by := take_index(trace, call, "index"):
        source = picked(trace, source, call[name], by)
    if source is not None and source.dim():
        axis = call["dim"]
        source = trace.nodes.merge(source.movedim(axis, -1)).unsqueeze(axis)
        if all(n in (1, m) for n, m in zip(source.shape, out.shape, strict=True)):
            source = source.expand(out.shape)
        else:
            source = trace.nodes.merge(source.flatten()).expand(out.shape)
    return [trace.nodes.join(own, source)]


def on_ids(func: Any, args: Any, kwargs: Any) -> Tensor:
    """What an operation that moves elements makes of ids: of int64 where it can, and of float64, exact for them too."""
    if func._schema.is_mutable:
        func, kwargs = func._overloadpacket, {k: v for k, v in kwargs.items() if k != "out"}
        args = (args[0].clone(), *args[1:])
    try:
        return cast(Tensor, func(*args, **kwargs)).long()
    except (NotImplementedError, RuntimeError):
        args = tree_map(lambda v: v.double() if isinstance(v, Tensor) and v is args[0] else v, args)
        return cast(Tensor, func(*args, **kwargs)).long()
