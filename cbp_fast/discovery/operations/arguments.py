"""What rules do with the arguments of an operation: take what enters the result, indices, and parameters beside."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..nodes.ids import DATA, RANDOM, kinds_of
from ..trace.call import Call
from ..trace.trace import Trace

# the ids of what an operation returns
Results = list[Tensor | None]


def use(trace: Trace, call: Call, *tensors: Tensor) -> None:
    """Tensors enter the operation; a parameter among them has another role than its own."""
    for tensor in tensors:
        trace.use(call.op, trace.parameter(tensor))


def take_ids(trace: Trace, call: Call, name: str) -> Tensor | None:
    """The ids of one argument, which enters the result."""
    ids = None
    for tensor in call.take(name):
        ids = trace.ids(tensor)
        use(trace, call, tensor)
    return ids


def first_ids(trace: Trace, call: Call) -> Tensor | None:
    """The ids of the first argument, if that is a tensor; the rule may still take it."""
    first = call.args[0] if call.args else None
    return trace.ids(first) if isinstance(first, Tensor) else None


def take_index(trace: Trace, call: Call, *names: str) -> int:
    """Takes arguments that say where something is; DATA or RANDOM where that is in them, or 0."""
    by = 0
    for tensor in call.take(*names):
        ids = trace.ids(tensor)
        if ids is None:
            continue
        trace.refuse(ids, f"{trace.why} takes it for an index")
        by = by if by == DATA else RANDOM if bool((kinds_of(ids) == RANDOM).all()) else DATA
    return by


def picked(trace: Trace, ids: Tensor | None, value: Tensor, by: int) -> Tensor:
    """What an index that holds `by` picks from, or puts somewhere: it is in all that is not zero without units."""
    ids = torch.zeros((), dtype=torch.int64, device="cpu").expand(value.shape) if ids is None else ids
    constant = ids == 0
    if value.device.type != "meta" and constant.any() and not (constant & (value != 0).cpu()).any():
        clean = constant | trace.nodes.clean(ids)
    else:
        clean = trace.nodes.clean(ids)
    return torch.where(clean, ids, cast(Tensor, trace.nodes.join(ids, torch.tensor(by, device="cpu"))))


def everything(trace: Trace, call: Call) -> Tensor | None:
    """What all arguments are made of, as one mix."""
    ids = [i for _, t in call.tensors if (i := trace.ids(t)) is not None]
    if not ids:
        return None
    return trace.nodes.mixed(torch.unique(torch.cat([kinds_of(i) for i in ids])))
