"""Convolutions: they read units, or pass each on by itself, and make others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..nodes.ids import DATA
from ..trace.call import Call
from ..trace.trace import Trace
from .arguments import Results, use
from .weights import read, with_bias


def convolution(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results:
    """Units are read along the channels; a depthwise one that no unit shares a channel in passes them on."""
    out = outs[0]
    x, weight, bias = call["input"], call["weight"], call["bias"]
    transposed, groups = call["transposed"], call["groups"]
    entry, ids = trace.parameter(weight), trace.ids(x)
    spread = (1,) * (out.dim() - 2)
    call.take("input")
    use(trace, call, x)
    if entry is None or weight.shape != entry[1].shape:
        trace.refuse(ids, f"{trace.why} multiplies it by a weight that is computed, not a parameter")
        return [torch.tensor(DATA, device="cpu")]
    name = entry[0]
    call.take("weight")
    if groups > 1 and groups == x.shape[1] and ids is not None and not transposed:
        channels = trace.nodes.merge(ids.flatten(2))
        if (trace.nodes.bare[channels] > 0).any():
            return [_depthwise(trace, call, name, channels, out)]
    trace.roles[name].add("convolution")
    read(trace, name, int(not transposed), ids, 1)
    made = with_bias(trace, call, bias, trace.nodes.source(name, int(transposed), out.shape[1]))
    return [cast(Tensor, made).reshape(-1, *spread).expand(out.shape)]


def _depthwise(trace: Trace, call: Call, name: str, channels: Tensor, out: Tensor) -> Tensor:
    """Every channel by itself, several times where it has several filters: its units are passed on."""
    bias = call["bias"]
    channels = channels.repeat_interleave(out.shape[1] // call["groups"], 1)
    trace.record("pass", (name, 0), channels, 1)
    trace.roles[name].add("depthwise convolution")
    if bias is not None:
        own = trace.parameter(bias)
        call.take("bias")
        if own and trace.owners[own[0]][1] is trace.owners[name][1] and own[0].endswith("bias"):
            trace.roles[own[0]].add("bias")
        else:
            trace.use(call.op, own)
            added = trace.ids(bias)
            channels = cast(Tensor, trace.nodes.join(channels, added))
            channels = trace.nodes.with_one(channels) if added is None else channels
    return channels.reshape(channels.shape + (1,) * (out.dim() - 2)).expand(out.shape)
