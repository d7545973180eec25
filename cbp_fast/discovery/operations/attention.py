"""Attention: values go on as they are, mixed by what decides over them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..nodes.ids import kinds_of
from ..trace.call import Call
from ..trace.trace import Trace
from .arguments import Results, everything, take_ids


def attention(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results:
    """The values, gated by what decides over them; what else it returns is a mix of all."""
    result = _attended(trace, call, outs[0])
    return [result, *itertools.repeat(everything(trace, call), len(outs) - 1)]


def _attended(trace: Trace, call: Call, out: Tensor) -> Tensor | None:
    nodes = trace.nodes
    value = trace.ids(call["value"])
    names = ("query", "key", "value", "attn_mask", "attn_bias")
    mixing = []
    for name in names:
        ids = take_ids(trace, call, name)
        if ids is not None and name != "value":
            mixing.append(kinds_of(ids))
    mixed = nodes.merge(torch.cat(mixing)) if mixing else None
    # one layer's units decide over all values, also where a single one does
    mixed = None if mixed is None else nodes.with_data(mixed)
    if value is not None:
        value = nodes.merge(value.transpose(-1, -2))
        value = value.repeat_interleave(out.shape[-3] // value.shape[-2], -2) if value.dim() > 1 else value
        value = value[..., None, :].expand(out.shape)
    return nodes.product(value, None if mixed is None else mixed.expand(out.shape))
