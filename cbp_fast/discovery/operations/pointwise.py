"""Element by element: the union of the arguments, or the units alone where those make the result zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...groups.layers import norm_kind
from ..nodes.ids import DATA, kinds_of
from ..running.calls import leaves_of
from ..trace.call import Call
from ..trace.trace import Trace
from .arguments import Results, first_ids
from .told import may_be_told
from .weights import is_bias

# they zero elements at random
_DROPOUTS = ("native_dropout", "rrelu_with_noise")
# numbers that an operation is tried on
_SAMPLES = 24


def pointwise(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results | None:
    """The union of the arguments; the units alone where those make the result zero when they are."""
    return [_joined(trace, call, outs[0])] * len(outs) if outs else None


def glu(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results | None:
    """Two halves of one tensor, of which one gates the other."""
    x = first_ids(trace, call)
    if x is None:
        return None
    call.take(call.tensors[0][0])
    axis = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", -1)
    return [trace.nodes.join(*x.chunk(2, axis))]


def _joined(trace: Trace, call: Call, out: Tensor) -> Tensor:
    nodes, op = trace.nodes, call.op
    tensors = call.take()
    zero = torch.tensor(0, device="cpu")
    ids = [zero if i is None else i for i in map(trace.ids, tensors)]
    biases: set[int] = set()
    for i, tensor in enumerate(tensors):
        entry, others = trace.parameter(tensor), ids[:i] + ids[i + 1 :]
        if entry is None:
            continue
        if len(others) == 1 and others[0] is not zero:
            if op == "add" and call["alpha"] in (None, 1) and is_bias(trace, entry[0], others[0]):
                trace.roles[entry[0]].add("bias")
                ids[i] = zero
                biases.add(i)
                continue
            if _scale(trace, entry, tensor, others[0]):
                ids[i] = zero
                continue
        trace.use(call.op, entry)
    tracked = [k for k, i in enumerate(ids) if i is not zero]
    wide, shape = nodes.uncrossed([ids[k].expand(out.shape) for k in tracked] or [zero.expand(out.shape)])
    # 0: constant, 1: zero where its units are, 2: anything else
    codes = [(i > 0).long() + (nodes.bare[i] != i) for i in wide]
    code = cast(Tensor, sum(c * 3**k for k, c in enumerate(codes)))
    joined = result = None
    for number in torch.unique(code).tolist():
        kinds = [0] * len(ids)
        for k, i in enumerate(tracked):
            kinds[i] = number // 3**k % 3
        # with its units, a layer's bias is zero too
        zeros = [kind == 1 or i in biases for i, kind in enumerate(kinds)]
        is_zero = 1 in kinds and _is_zero(trace, call, tensors, kinds, zeros)
        if is_zero and 2 in kinds:
            new = nodes.union([nodes.bare[i] if kinds[k] == 2 else i for i, k in zip(wide, tracked, strict=True)])
        else:
            joined = nodes.union(wide) if joined is None else joined
            # of units, and not zero without them: this goes for the join only where no data is in it
            new = nodes.with_one(joined) if 1 in kinds and not is_zero else joined
        result = new if result is None else torch.where(code == number, new, result)
    assert result is not None
    if may_be_told(trace, call):
        # what is not zero without its units has one of the numbers in it
        data = torch.tensor(DATA, device="cpu")
        result = torch.where(nodes.clean(result), result, cast(Tensor, nodes.join(result, data)))
    return result.expand(shape)


def _is_zero(trace: Trace, call: Call, tensors: Sequence[Tensor], kinds: Sequence[int], zeros: Sequence[bool]) -> bool:
    """Whether an element-wise operation gives zero where some arguments are, whatever those of kind 2 are."""
    if torch.Tag.nondeterministic_seeded in call.tags:
        return call.op in _DROPOUTS
    stand_ins: dict[int, Tensor] = {}
    known: list[Any] = []
    for i, (tensor, kind) in enumerate(zip(tensors, kinds, strict=True)):
        constant = kind == 0 and tensor.numel() == 1 and tensor.device.type != "meta"
        if zeros[i]:
            stand_in = torch.zeros(_SAMPLES, dtype=tensor.dtype, device="cpu")
        elif constant:
            stand_in = tensor.detach().reshape(()).cpu().expand(_SAMPLES).clone()
            known.append(stand_in[0].item())
        else:
            stand_in = _samples(tensor.dtype, i)
        stand_ins[id(tensor)] = stand_in
    others = [v for v in leaves_of(call.args, call.kwargs) if not isinstance(v, Tensor)]
    key = (call.func, tuple(t.dtype for t in tensors), tuple(kinds), tuple(zeros), str(known), str(others))
    if key not in trace.probed:
        args, kwargs = tree_map(
            lambda v: stand_ins.get(id(v), v) if isinstance(v, Tensor) else v, (call.args, call.kwargs)
        )
        kwargs = {k: v for k, v in kwargs.items() if k not in call.outs}
        try:
            packet = call.func._overloadpacket if call.outs else call.func
            result = leaves_of(packet(*args, **kwargs))[0]
            trace.probed[key] = not bool(result.ne(0).any())
        except Exception:  # an operation may refuse what it is tried on
            trace.probed[key] = False
    return trace.probed[key]


def _scale(trace: Trace, entry: tuple[str, Tensor], tensor: Tensor, ids: Tensor) -> bool:
    """Notes a parameter that multiplies units, or is added to them; whether it is the scale of a norm."""
    name, parameter = entry
    owner, module = trace.owners[name]
    if norm_kind(module) == "RMSNorm" and tensor.shape == parameter.shape and trace.inside(module):
        if name.endswith("weight"):
            trace.roles[name].add("norm")
            trace.record("norm", owner, ids.flatten(-parameter.dim()), -1)
            return True
    elif not norm_kind(module) and isinstance(parameter, nn.Parameter):
        ids = trace.nodes.bare[kinds_of(ids)]
        trace.notes.append((ids, f"'{name}' goes into its units and is left as it is"))
    return False


def _samples(dtype: torch.dtype, number: int) -> Tensor:
    """Values of many sizes and both signs, the same ones each time."""
    generator = torch.Generator("cpu").manual_seed(number)
    if dtype == torch.bool:
        return torch.rand(_SAMPLES, generator=generator, device="cpu") < 0.5
    values = torch.randn(_SAMPLES, generator=generator, dtype=torch.float32, device="cpu") * 3
    values[::5] = values[::5].sign()
    if not (dtype.is_floating_point or dtype.is_complex):
        values = values.abs().ceil()
    return values.to(dtype)
