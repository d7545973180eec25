"""Numbers that no unit makes: constants, random numbers, and what Python knows of the data and gives back."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ..nodes.ids import DATA, RANDOM, is_data
from ..running.memory import is_lent, storage_key
from ..trace.call import Call
from ..trace.trace import INTEGERS, Trace
from .arguments import Results, use

_FRESH = re.compile("empty|zeros|ones|full|new_|rand|arange|scalar_tensor|zero|fill$|lift")
_DRAWS = ("bernoulli", "normal", "uniform", "exponential", "random", "cauchy", "geometric", "log_normal")
# they give a value to Python
TO_PYTHON = ("_local_scalar_dense", "equal", "is_nonzero", "_is_all_true", "_is_any_true")
_DATA_SIZED = ("nonzero", "_unique2", "masked_select")


def note_reading(trace: Trace, call: Call) -> None:
    """What Python learns of values may choose the path, and come back as a number."""
    if call.op in TO_PYTHON or call.op in _DATA_SIZED:
        trace.branches[f"a value read by Python ({trace.why})"] = None
        if call.op == "_local_scalar_dense":
            trace.tell(call.tensors[0][1])


def condition(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results | None:
    """A truth value for Python; a number would come back unseen."""
    if call.tensors[0][1].dtype != torch.bool:
        return None
    call.take()
    return []


def made_anew(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results | None:
    """What an operation fills or draws that takes nothing of a tensor but its shape, or constants."""
    seeded = torch.Tag.nondeterministic_seeded in call.tags
    fresh = len(call.tensors) == 1 and (bool(_FRESH.match(call.op)) or (seeded and call.mutable and call.op in _DRAWS))
    if fresh and not seeded and _is_told(trace, call, outs):
        call.take()
        return [torch.tensor(DATA, device="cpu")] * len(outs)
    if fresh or (seeded and all(trace.ids(t) is None for _, t in call.tensors)):
        use(trace, call, *call.take())
        # what an index of them chooses is another thing each time
        return [torch.tensor(RANDOM, device="cpu")] * len(outs) if seeded else []
    return None


def without_units(trace: Trace, call: Call, outs: Sequence[Tensor]) -> Results | None:
    """What is made of data alone, or of nothing that is followed."""
    followed = [ids for _, t in call.tensors if (ids := trace.ids(t)) is not None]
    if not all(map(is_data, followed)):
        return None
    taken = call.take()
    use(trace, call, *taken)
    if followed or _is_told(trace, call, outs):
        return [torch.tensor(DATA, device="cpu")] * len(outs)
    # what is made of a norm's statistics is known to be of nothing
    return [torch.tensor(0, device="cpu")] * len(outs) if any(map(trace.follows, taken)) else []


def _is_told(trace: Trace, call: Call, outs: Sequence[Tensor]) -> bool:
    """Whether results that no followed tensor is in may hold what Python, NumPy or others know of the data."""
    if not outs or not (outs[0].is_floating_point() or outs[0].is_complex()):
        # an index; what is made of it is looked at again
        return False
    if call.op == "lift_fresh":
        if is_lent(outs[0]):
            return True
        return bool(trace.told) and (outs[0].device.type == "meta" or bool(outs[0].any()))
    counts = bool(_FRESH.match(call.op)) or torch.Tag.pointwise in call.tags or "value" in call.given
    return (counts or not call.tensors or call.op == "_to_copy") and may_be_told(trace, call)


def may_be_told(trace: Trace, call: Call) -> bool:
    """Whether there are numbers among the arguments of an operation that may be made of the data."""
    # the numbers of a softplus, which it gets by default, give it its shape
    if not trace.told or call.op == "softplus":
        return False
    # with the one of `1 - t` one cannot tell
    least = 0 if trace.told == INTEGERS else 1
    if any(type(v) in (int, float, complex) and v not in range(-least, least + 1) for v in call.given.values()):
        return True
    whole = (t for _, t in call.tensors if not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool))
    return any(storage_key(t) in trace.made and trace.ids(t) is None for t in whole)
