"""Which rule an operation has: the table of all of them, and what becomes of units in an operation without one."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..nodes.ids import DATA, RANDOM, kinds_of
from ..trace.call import Call
from ..trace.trace import Trace
from .arguments import Results, use
from .attention import attention
from .convolution import convolution
from .indexing import add_at
from .linear import SUMMING, embedding, matmul
from .moving import copied, move
from .norms import norm
from .pointwise import glu, pointwise
from .reducing import RESAMPLING, reduce, resample, scan
from .told import TO_PYTHON, condition, made_anew, note_reading, without_units

# None where a rule does not apply to these arguments
Rule = Callable[[Trace, Call, Sequence[Tensor]], Results | None]
_MOVES = """cat stack index index_select gather repeat flip roll constant_pad_nd pixel_shuffle pixel_unshuffle
    channel_shuffle reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d im2col tril triu index_put slice_scatter select_scatter take_along_dim"""
_REDUCTIONS = "mean sum amax amin max min var std var_mean std_mean prod linalg_vector_norm norm logsumexp any all"
_SCANS = "_softmax _log_softmax _safe_softmax cumsum"
# beside those with a tag that says so
_POINTWISE = "hardswish mish log_sigmoid_forward _prelu_kernel rrelu_with_noise native_dropout"
# they make units, or have entries of their own, whatever goes in
_LAYERS: dict[str, Rule] = {
    **dict.fromkeys(("mm", "bmm", *SUMMING), matmul),
    "convolution": convolution,
    "embedding": embedding,
}
# asked where units, or parameters, go in
_OTHERS: dict[str, Rule] = {
    **dict.fromkeys(("clone", "_to_copy", "copy", "fill"), copied),
    **dict.fromkeys(_MOVES.split(), move),
    **dict.fromkeys(("index_add", "scatter_add"), add_at),
    **dict.fromkeys(_REDUCTIONS.split(), reduce),
    **dict.fromkeys(_SCANS.split(), scan),
    **dict.fromkeys(_POINTWISE.split(), pointwise),
    **dict.fromkeys(TO_PYTHON, condition),
    "glu": glu,
}
# families, by a part of their names
_NORMS = re.compile("batch_norm|native_layer_norm|native_group_norm|_fused_rms_norm")
_ATTENTION = re.compile("scaled_dot_product|flash_attention|efficient_attention")


@functools.cache
def _layer_rule(op: str) -> Rule | None:
    return _LAYERS.get(op) or (norm if _NORMS.search(op) else None)


@functools.cache
def _rule(op: str) -> Rule | None:
    if _ATTENTION.search(op):
        return attention
    return resample if RESAMPLING.search(op) else _OTHERS.get(op)


def results_of(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results:
    """The ids of what an operation returns; rules take from `call` the arguments that they account for."""
    layer = _layer_rule(call.op)
    if layer is not None and (results := layer(trace, call, outs)) is not None:
        return results
    note_reading(trace, call)
    for numbers in (made_anew, without_units):
        if (results := numbers(trace, call, outs)) is not None:
            return results
    rule = _rule(call.op)
    if rule is not None and (results := rule(trace, call, outs)) is not None:
        return results
    if torch.Tag.pointwise in call.tags and (results := pointwise(trace, call, outs)) is not None:
        return results
    return _without_rule(trace, call, outs)


def _without_rule(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results:
    """Units are refused, and what comes out is data; of parameters alone it is still none."""
    nodes = trace.nodes
    taken = [ids for t in call.take() if (ids := trace.ids(t)) is not None]
    for ids in taken:
        trace.refuse(ids, f"{trace.why} has no rule")
    use(trace, call, *(t for _, t in call.tensors))
    _, leaf = nodes.leaves(torch.unique(torch.cat([kinds_of(ids) for ids in taken])))
    known = leaf[leaf > RANDOM]
    if len(known) and not nodes.bare[known].any() and not (leaf == DATA).any():
        return [known[0]] * len(outs)
    return [torch.tensor(DATA, device="cpu")] * len(outs)
