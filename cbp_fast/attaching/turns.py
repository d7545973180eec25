"""Which optimizers a step follows, and whether each has had its turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer

from ..groups.spec import ResolvedGroup
from ..hooks.optimizers import check_runs_hooks, is_optimizer


class Round:
    """Which of the optimizers are still to step, and whether one of the others did not skip its update."""

    __slots__ = ("everyone", "stepped", "waiting")

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.everyone = frozenset(map(id, optimizers))
        # of a round that has begun
        self.waiting: set[int] = set()
        self.stepped = False

    def is_last(self, optimizer: Optimizer) -> bool:
        """Whether all the others have stepped."""
        return (self.waiting or self.everyone) <= {id(optimizer)}

    def after(self, optimizer: Optimizer, was_skipped: bool) -> bool | None:
        """Whether there was an update, once all optimizers have stepped; before that None."""
        # not when the last one ends: an interrupt there would move the next rounds
        if not self.waiting:
            self.stepped = False
            self.waiting = set(self.everyone)
        self.waiting.discard(id(optimizer))
        self.stepped |= not was_skipped
        return None if self.waiting else self.stepped


def optimizers_in(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """What was given as optimizers; raises TypeError for what is none, or runs no hooks."""
    given: Any = [] if optimizer is None else [optimizer] if is_optimizer(optimizer) else optimizer
    if not isinstance(given, Iterable):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, must be a torch.optim.Optimizer or several")
    optimizers = list(given)
    for o in optimizers:
        if not is_optimizer(o):
            raise TypeError(f"optimizer holds a {type(o).__name__}, must be torch.optim.Optimizer objects")
        check_runs_hooks(o)
    # one that is given twice steps once
    return list({id(o): o for o in optimizers}.values())


def check_optimizers(optimizers: Sequence[Optimizer], groups: Sequence[ResolvedGroup]) -> None:
    """Raises ValueError for optimizers that cannot be followed, or do not hold the weights of the groups."""
    if any(getattr(o, "_overlap_with_ddp", False) for o in optimizers):
        raise ValueError(
            "ZeroRedundancyOptimizer with overlap_with_ddp=True steps within the backward pass, where continual "
            "backprop cannot follow it; leave overlap_with_ddp=False"
        )
    known = {id(p) for o in optimizers for param_group in o.param_groups for p in param_group["params"]}
    for group in groups if optimizers else ():
        for name, module, _ in (*group.incoming, *group.outgoing):
            if id(module.weight) not in known:
                raise ValueError(
                    f"the optimizer does not hold {name}.weight of group '{group.name}'; pass every optimizer that "
                    "trains the model, made from its present parameters, after fully_shard or parallelize_module, or "
                    "exclude= the group"
                )
