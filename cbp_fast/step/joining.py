"""A process that ran out of data while others have some: `torch.distributed.algorithms.Join`."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..parallel.processes import Processes
from .engine import Engine

if dist.is_available():
    from torch.distributed.algorithms.join import Join, JoinHook
    from torch.distributed.algorithms.join import Joinable as Joinable

    class _JoinHook(JoinHook):
        """Takes part in the reductions of the processes that still have data, and gets their state in the end."""

        def __init__(self, engine: Engine, processes: Processes) -> None:
            self.engine, self.processes = engine, processes

        def main_hook(self) -> None:
            if self.engine.enabled:
                state = self.engine.state
                self.processes.reduce_(torch.zeros_like(state.flat[: state.reduced])).wait()

        def post_hook(self, is_last_joiner: bool) -> None:
            group, buffer = self.processes.group, self.engine.state.buffer
            source = torch.tensor(dist.get_rank(group) if is_last_joiner else -1, device=buffer.device)
            dist.all_reduce(source, op=dist.ReduceOp.MAX, group=group)
            dist.broadcast(buffer, group=group, group_src=int(source))

else:

    class Joinable:  # type: ignore[no-redef]
        """Stands in where PyTorch was built without torch.distributed."""


def notify_join(joinable: Joinable) -> None:
    """Tell processes without data, in `torch.distributed.algorithms.Join`, that this one takes a step."""
    Join.notify_join_context(joinable)


def join_hook_of(engine: Engine) -> JoinHook:
    """What a process without data does while others still have some."""
    return JoinHook() if engine.processes is None else _JoinHook(engine, engine.processes)
