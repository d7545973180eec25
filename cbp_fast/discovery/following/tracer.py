"""Every operation of a forward, as it happens: what goes in, its rule, what comes out."""

from __future__ import annotations

import logging
import time
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from ...groups.layers import label
from ..nodes.ids import DATA
from ..operations.rules import results_of
from ..running.calls import is_view, leaves_of
from ..running.memory import storage_key
from ..trace.call import Call
from ..trace.trace import Trace

_EMPTY = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
# seconds after which a line says how far it is, and then each time as many more
_PATIENCE = 5.0
_log = logging.getLogger("cbp_fast")


class Tracer(Trace):
    """Follows units through all that runs under it, and writes a trace.

    A rule takes the arguments of an operation that it accounts for, and units in any other are refused.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._count, self._began, self._next_line = 0, time.monotonic(), _PATIENCE

    def watch(self) -> list[RemovableHandle]:
        """Hooks that keep track of which module runs."""
        handles = []
        for name, module in self.modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                # it takes no hooks, and the modules in it are not called
                continue
            enter = (lambda entry: lambda *_: self.stack.append(entry))((name, module))
            leave = lambda *_: self.stack.pop() and None  # noqa: E731
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        return handles

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if is_view(func, args):
            self._count += 1
            return out
        if isinstance(func, torch._ops.OpOverload) and func.namespace == "prim":
            # a question of a tensor that stands for another
            return out
        if torch._C._current_graph_task_id() != -1:
            # gradients are no activations
            return out
        with _disable_current_modes(), torch.no_grad():
            call = Call(func, args, kwargs)
            at = label(*self.stack[-1]) if self.stack and self.stack[-1][0] else "the model"
            self.why = self.nodes.why = f"{call.name} in {at}"
            nested = any(t.is_nested for _, t in call.tensors) or any(
                isinstance(t, Tensor) and t.is_nested for t in leaves_of(out)
            )
            if nested:
                self._nested(call, out)
            else:
                self._follow(call, out)
            self._say_where(at)
        return out

    def _nested(self, call: Call, out: Any) -> None:
        """Units that go into a nested tensor are refused, and what comes out of it is data."""
        why = f"{self.why} takes or makes a nested tensor, which cannot be followed"
        for t in (*call.take(), *(t for t in leaves_of(out) if isinstance(t, Tensor))):
            entry = None if t.is_nested else self.parameter(t)
            self.use(call.op, entry)
            if not t.is_nested and not entry:
                self.refuse(self.ids(t), why)
                self.open(t, why)

    def _follow(self, call: Call, out: Any) -> None:
        op, outs = call.op, [t for t in leaves_of(out) if isinstance(t, Tensor)]
        written = leaves_of([call[name] for name in call.written])
        self.unwritten.difference_update(storage_key(t) for t in written if isinstance(t, Tensor))
        if op == "resize":
            self.unwritten.add(storage_key(call.args[0]))
        elif op in _EMPTY:
            self.unwritten.update(map(storage_key, outs))
            return
        keys = {storage_key(t) for _, t in call.tensors}
        views = bool(outs) and all(storage_key(t) in keys for t in outs)
        if call.plain and ((views and not call.mutable) or torch.Tag.inplace_view in call.tags) and op != "lift_fresh":
            return
        if outs and not any(t.numel() for t in outs):
            # an expert without tokens has not been reached
            return
        first = call.tensors[0][1] if call.tensors else None
        if op == "_to_copy" and first is not None and outs[0].shape == first.shape:
            entry = self.parameter(first)
            if entry and first.shape == entry[1].shape:
                # autocast's copy of a weight
                self.stand_in(outs[0], entry)
                return
        results = results_of(self, call, outs)
        rest = False
        for name, tensor in call.left:
            ids = self.ids(tensor)
            if ids is not None:
                self.refuse(ids, f"{self.why} has no rule for its argument '{name}'")
                rest = True
            self.use(op, self.parameter(tensor))
        for i, tensor in enumerate(outs):
            ids = results[i] if i < len(results) else None
            if rest:
                data = torch.tensor(DATA, device="cpu")
                ids = cast(Tensor, self.nodes.join(data if ids is None else ids, data))
            self.put(tensor, None if ids is None else ids.expand(tensor.shape))

    def _say_where(self, at: str) -> None:
        self._count += 1
        seconds = time.monotonic() - self._began
        if seconds > self._next_line:
            self._next_line = 2 * seconds
            _log.warning(
                "following the units through the forward: %d operations, %.0f s, in %s", self._count, seconds, at
            )
