"""One step of several engines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.compiler import is_compiling
from torch.optim import Optimizer

from .engine import Engine
from .journal import Journal


def step_together(engines: Sequence[Engine], optimizers: Sequence[Optimizer]) -> None:
    """One step of several engines: all choose, then what they chose is re-initialised in order; all of it or nothing.

    Raises:
        RuntimeError: a tensor is not what it was at attach, or cannot be reset. Nothing has changed then.
    """
    if is_compiling():
        # a step belongs into no graph
        return torch.compiler.disable(step_together)(engines, optimizers)
    for engine in engines:
        if engine._journal is not None:
            engine._journal.settle()
        engine.add_up()
    # what can be wrong is found before the first weight is written, and before anything that cannot be taken back
    due = {engine: engine.collect(optimizers) for engine in engines if engine.chooses_alone}
    journal = Journal(engines)
    try:
        for engine in engines:
            journal.keep(engine)
            if not engine.select():
                due.pop(engine, None)
            elif not engine.chooses_alone:
                due[engine] = [], []
        for engine in due:
            if not engine.chooses_alone:
                due[engine] = engine.collect(optimizers)
        journal.finish(due)
    except BaseException:
        journal.settle()
        raise
