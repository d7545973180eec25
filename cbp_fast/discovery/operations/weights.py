"""A layer's weight and bias: who reads units, and which bias belongs to the layer that makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...groups.layers import norm_kind
from ..nodes.ids import kinds_of
from ..trace.call import Call
from ..trace.trace import Trace
from .arguments import take_ids


def read(trace: Trace, name: str, axis: int, ids: Tensor | None, along: int) -> None:
    """A weight reads units by its `axis`, which lie along another one of the ids."""
    if not trace.inside(trace.owners[name][1]):
        trace.outside.add(name)
    if ids is not None:
        trace.record("read", (name, axis), ids, along)


def is_bias(trace: Trace, name: str, ids: Tensor) -> bool:
    """Whether a parameter is the bias of the very layers that make the units it is added to."""
    module = trace.owners[name][1]
    if not name.endswith("bias") or norm_kind(module):
        return False
    kinds = kinds_of(ids)
    maker = trace.nodes.source_of(int(kinds[0]))
    if maker is not None and maker.axis is not None and int(kinds[-1]) < maker.first + maker.size:
        # in the usual case, all are units of one layer
        return trace.owners[maker.parameter][1] is module
    _, leaves = trace.nodes.leaves(kinds)
    units = leaves[trace.nodes.is_unit(leaves)]
    makers = {trace.nodes.sources[i - 1].parameter for i in torch.unique(trace.nodes.origin[units]).tolist()}
    return bool(makers) and len(units) == len(leaves) and {trace.owners[maker][1] for maker in makers} == {module}


def with_bias(trace: Trace, call: Call, bias: Any, made: Tensor | None) -> Tensor | None:
    """The ids of a layer's result with its summand: its own bias adds none."""
    if not isinstance(bias, Tensor):
        return made
    name = next(name for name, t in call.tensors if t is bias)
    entry = trace.parameter(bias)
    if entry and made is not None and call["beta"] in (None, 1) and is_bias(trace, entry[0], made):
        call.take(name)
        trace.roles[entry[0]].add("bias")
        return made
    added = take_ids(trace, call, name)
    if added is not None and made is not None:
        return trace.nodes.join(made, added.expand(made.shape))
    if added is None:
        return made if made is None else trace.nodes.with_one(made)
    return added
