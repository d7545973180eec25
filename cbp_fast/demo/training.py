"""Trains a network online on a demo problem, and many of them on all processors."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing.queues import SimpleQueue

import torch

from .. import metrics
from ..continual_backprop import ContinualBackprop
from ..programs import ignored
from .problems import load


@dataclass(frozen=True)
class Run:
    """One network's life: everything that decides its outcome.

    Attributes:
        problem, rule: as for `load`.
        method: "backprop", or "cbp" for continual backprop.
    """

    problem: str
    rule: str
    method: str
    step_size: float
    seed: int
    tasks: int
    device: str = "cpu"


@dataclass
class History:
    """What a run gave.

    Attributes:
        scores: one a task, every example scored before the update on it.
        dormant: share of all hidden units that are zero on every example of the task, mean over the last tenth.
        effective_rank: of the last hidden layer on the task's examples, mean over the last tenth of the tasks.
        seconds_per_step: in the fastest task.
        backend: of `ContinualBackprop`; None for plain backprop.
    """

    scores: list[float] = field(default_factory=list)
    dormant: float = 0.0
    effective_rank: float = 0.0
    seconds_per_step: float = 0.0
    backend: str | None = None


def tenth(tasks: int) -> int:
    """How many tasks make a tenth of them, at least one."""
    return max(1, tasks // 10)


def train(run: Run, on_task: Callable[[Run, float], None]) -> History:
    """Trains one network over the whole stream; `on_task` is told the score of each task as it ends."""
    problem = load(run.problem, run.rule)
    history = History()
    model = problem.network(run.seed).to(run.device)
    optimizer = getattr(torch.optim, problem.optimizer)(model.parameters(), lr=run.step_size, fused=True)
    if run.method == "cbp":
        cbp = ContinualBackprop(
            model,
            optimizer,
            rule=run.rule,
            replacement_rate=problem.replacement_rate,
            maturity_threshold=problem.maturity_threshold,
            seed=run.seed,
        )
        history.backend = cbp.backend
    step_seconds, dormant, rank = [], [], []
    for task, (x, y) in enumerate(problem.stream(run.seed, run.tasks)):
        x, y = x.to(run.device), y.to(run.device)
        outputs = []
        start = time.perf_counter()
        for batch_x, batch_y in zip(x.split(problem.batch_size), y.split(problem.batch_size), strict=True):
            output = model(batch_x)
            optimizer.zero_grad()
            problem.loss(output, batch_y).backward()
            optimizer.step()
            outputs.append(output.detach())
        # .item() waits for the device, so it belongs to the time
        history.scores.append(problem.measure(torch.cat(outputs), y).item())
        step_seconds.append((time.perf_counter() - start) / len(outputs))
        if task >= run.tasks - tenth(run.tasks):
            hidden = hidden_activations(model, x)
            dormant.append(torch.cat([metrics.dormant_units(h) for h in hidden]).double().mean().item())
            rank.append(metrics.effective_rank(hidden[-1]).item())
        on_task(run, history.scores[-1])
    history.dormant = sum(dormant) / len(dormant)
    history.effective_rank = sum(rank) / len(rank)
    history.seconds_per_step = min(step_seconds)
    return history


@torch.no_grad()
def hidden_activations(model: torch.nn.Sequential, x: torch.Tensor) -> list[torch.Tensor]:
    """The output `[n, width]` of every relu for x `[n, inputs]`."""
    activations = []
    for layer in model:
        x = layer(x)
        if isinstance(layer, torch.nn.ReLU):
            activations.append(x)
    return activations


def train_all(
    runs: Sequence[Run], workers: int, on_task: Callable[[Run, float], None]
) -> Generator[tuple[Run, History | BaseException]]:
    """Trains all runs, several at a time, each on one thread: these networks are too small for two.

    Args:
        runs: what to train; the order is the order of the start.
        workers: processes; 1 trains in this one.
        on_task: called in this process with a run and the score of its latest task.

    Yields:
        each run as it ends, with what it gave or the error that ended it.
    """
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for run in runs:
                yield run, _outcome(run, on_task)
        finally:
            torch.set_num_threads(threads)
        return
    # spawn: a fork would copy a process that already has torch's threads, or a CUDA context
    context = multiprocessing.get_context("spawn")
    queue: SimpleQueue[tuple[Run, float]] = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _start_worker, (queue,)) as pool:
        with ignored():
            futures = {pool.submit(_train_in_worker, run): run for run in runs}
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2)
                while not queue.empty():
                    on_task(*queue.get())
                for future in done:
                    yield futures[future], future.exception() or future.result()
        except BaseException:
            # some may still be importing PyTorch, and none has anything to lose
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _outcome(run: Run, on_task: Callable[[Run, float], None]) -> History | Exception:
    try:
        return train(run, on_task)
    except Exception as error:
        return error


# of a worker: to the process that shows its progress
_queue: SimpleQueue[tuple[Run, float]]


def _start_worker(queue: SimpleQueue[tuple[Run, float]]) -> None:
    global _queue
    _queue = queue
    torch.set_num_threads(1)


def _train_in_worker(run: Run) -> History:
    return train(run, lambda run, score: _queue.put((run, score)))
