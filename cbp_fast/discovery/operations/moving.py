"""Operations that move elements and change none: they are carried out on ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..nodes.ids import DATA, ONE, narrow, same_along
from ..running.calls import leaves_of
from ..trace.call import Call
from ..trace.trace import Trace
from .arguments import Results, take_ids, take_index, use
from .indexing import move_by_index, on_ids


def copied(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results | None:
    """A copy of the first argument, or into it."""
    name, first = call.tensors[0]
    if call.op in ("copy", "fill"):
        if not call.mutable:
            return None
        call.take(name)
        return [take_ids(trace, call, "src" if call.op == "copy" else "value")]
    if call.op == "_to_copy" and outs[0].shape != first.shape:
        return None
    return [take_ids(trace, call, name)]


def move(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results:
    """What only moves elements is carried out on their ids."""
    op, nodes = call.op, trace.nodes
    moved = {"index_put": ("self", "values"), "slice_scatter": ("self", "src"), "select_scatter": ("self", "src")}
    names = moved.get(op, (call.tensors[0][0],))
    for name in names:
        use(trace, call, *call.take(name))
    by = take_index(trace, call, "index", "indices")
    places = [t for _, t in call.tensors if not any(t is other for n in names for other in leaves_of(call[n]))]
    if any(t.device.type == "meta" for t in places):
        for name in names:
            for tensor in leaves_of(call[name]):
                trace.refuse(trace.ids(tensor), f"{trace.why} has no rule")
        return [torch.tensor(DATA, device="cpu")]

    def ids_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if any(value is place for place in places):
            return value.cpu()
        ids = trace.ids(value)
        zeros = torch.zeros((), dtype=torch.int64, device="cpu").expand(value.shape)
        return zeros if ids is None else ids

    if op in ("cat", "stack"):
        return [_side_by_side(call, [ids_of(t) for t in call.args[0]], outs[0])]
    args, kwargs = (call.args[:2], {}) if op == "constant_pad_nd" else (call.args, dict(call.kwargs))
    args, kwargs = tree_map(ids_of, (args, {k: v for k, v in kwargs.items() if k not in call.outs}))
    if by or op == "index_put":
        return [move_by_index(trace, call, args, kwargs, by)]
    ids = on_ids(call.func, args, kwargs)
    if op == "constant_pad_nd" and call.args[2:] and call.args[2] != 0:
        filled = (ids == 0) & (nodes.bare[args[0]].any())
        ids = torch.where(filled, DATA if trace.told else ONE, ids)
    return [ids]


def _side_by_side(call: Call, ids: list[Tensor], out: Tensor) -> Tensor:
    """`cat` and `stack`, for which axes where nothing varies stay narrow."""
    axis = call["dim"] or 0
    if call.op == "stack":
        axis = axis % out.dim()
        ids = [i.unsqueeze(axis) for i in ids]
    else:
        axis = axis % out.dim()
        # an empty tensor of one axis goes with all
        ids = [i for i in ids if i.dim() == out.dim()]
    sizes = [i.shape[axis] for i in ids]
    wide = [i.narrow(axis, 0, 1) if i.shape[axis] > 1 and same_along(i, axis) else i for i in ids]
    thin = [narrow(i)[0][0] for i in wide]
    shape = [max(i.shape[k] for i in thin) for k in range(out.dim())]
    parts = []
    for i, size in zip(thin, sizes, strict=True):
        parts.append(i.expand([size if k == axis else shape[k] for k in range(out.dim())]))
    return torch.cat(parts, axis).expand(out.shape)
