"""Times taken in turns, so that a slow spell of the machine hits everything that is compared."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..programs import ignored

_T = TypeVar("_T")
Name = TypeVar("Name", str, tuple[str, str])
# does something so many times and returns what each of them took
Timer = Callable[[int], list[_T]]

# glibc returns large blocks to the system when they are freed; kept, the reference's temporaries cost no page faults
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}
_WARM_UP = 2
# seconds, and calls, of a turn
_TURN, _MOST_CALLS = 5e-3, 50


@dataclass
class Options:
    """What all suites are told.

    Attributes:
        rule: None: the suite's own.
        compiled: whether `torch.compile` takes part; it takes minutes.
        cases: names of the cases to time; None: all.
        seconds: after which a case is cut short; its median then stands on fewer rounds.
        tick: called with the number of a case's rounds that are over.
        failed: why, of the cases that could not be timed.
    """

    threads: int = 1
    device: str = "cpu"
    rule: str | None = None
    compiled: bool = True
    cases: list[str] | None = None
    seconds: float = 20.0
    tick: Callable[[int], object] = lambda rounds: None
    failed: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """An error in here costs this case alone."""
        try:
            yield
        except Exception as error:
            first = next(iter(str(error).splitlines()), "")
            self.failed[name] = f"{type(error).__name__}: {first}"


class Row(NamedTuple):
    """One measured time: a line of the CSV.

    Attributes:
        op: what of the case is timed.
        x: the case's place on the axis of the suite's plot.
        bytes: that it must at least read and write.
        share: of the training step that it is part of.
        low, median, high: 10th, 50th and 90th percentile in microseconds.
    """

    suite: str
    case: str
    op: str
    method: str
    x: float
    bytes: int
    rounds: int
    low: float
    median: float
    high: float
    share: float | None = None


def row(
    suite: str,
    case: str,
    op: str,
    method: str,
    seconds: list[float],
    *,
    x: float = 0,
    moved: int = 0,
    share: float | None = None,
) -> Row:
    """The row of a list of times."""
    deciles = quantiles(seconds, n=10) if len(seconds) > 1 else seconds
    low, middle, high = (1e6 * t for t in (deciles[0], median(seconds), deciles[-1]))
    return Row(suite, case, op, method, x, moved, len(seconds), low, middle, high, share)


def in_turns(timers: Mapping[Name, Timer[_T]], rounds: int, options: Options) -> dict[Name, list[_T]]:
    """What each timer returns in `rounds` turns, or fewer, but three, where that takes longer than `options.seconds`.

    A turn lasts some milliseconds. Where one call takes less, the first of a turn is not counted: others were there
    before it, and what is used step after step finds its code and data where it left them.
    """
    calls: dict[Name, int] = {}
    for name, timer in timers.items():
        timer(_WARM_UP)
        start = time.perf_counter()
        timer(_WARM_UP)
        calls[name] = max(1, min(int(_TURN * _WARM_UP / (time.perf_counter() - start)), _MOST_CALLS))
    results: dict[Name, list[_T]] = {name: [] for name in timers}
    end = time.perf_counter() + options.seconds
    for turn in range(rounds):
        if turn >= 3 and time.perf_counter() > end:
            options.tick(rounds - turn)
            break
        for name, timer in timers.items():
            n = calls[name]
            results[name] += timer(n + 1)[1:] if n > 1 else timer(1)
        options.tick(1)
    return results


def timer(step: Callable[[], object], device: str = "cpu") -> Timer[float]:
    """A function that does `step` some times and returns the seconds that each took."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def timed() -> float:
        wait()
        start = time.perf_counter()
        step()
        wait()
        return time.perf_counter() - start

    return lambda calls: [timed() for _ in range(calls)]


class Worker:
    """A process with its own allocator or number of threads; `timers()` are those that `build(*args)` returns there.

    Args:
        build: a function of a module, so that the process can import it.
        threads: of PyTorch.
        environment: variables of the process.

    Raises:
        RuntimeError: by what asks it for something: there was an error in the process, or it is gone.
    """

    def __init__(
        self, build: Callable[..., Mapping[str, Timer[Any]]], *args: Any, threads: int, **environment: str
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, threads, build, args), daemon=True)
        # the allocator reads them when the process starts
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            with ignored():
                self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        # an end that nobody writes to: a process that dies is then an EOFError here
        there.close()

    def timers(self) -> dict[str, Timer[Any]]:
        """The process's timers by name."""
        names: list[str] = self._answer()
        return {name: lambda calls, name=name: self._ask(name, calls) for name in names}  # type: ignore[misc]

    def _ask(self, name: str, calls: int) -> Any:
        # where it has ended it may have said why
        with suppress(OSError):
            self._pipe.send((name, calls))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer, error = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise RuntimeError(f"a process that was timed has ended with {self._process.exitcode}") from None
        if error is not None:
            raise RuntimeError(error)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        self._pipe.close()
        # what it is busy with may take minutes
        if error is not None:
            self._process.terminate()
        self._process.join()


def _serve(pipe: Any, threads: int, build: Callable[..., Mapping[str, Callable[[], Any]]], args: tuple[Any]) -> None:
    try:
        torch.set_num_threads(threads)
        timers = build(*args)
        pipe.send((list(timers), None))
        while True:
            try:
                name, calls = pipe.recv()
            except EOFError:
                return
            pipe.send((timers[name](calls), None))  # type: ignore[call-arg]
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {error}"))


def hook_seconds() -> float:
    """Seconds that PyTorch itself takes to call a forward pre-hook that does nothing."""
    plain, hooked = nn.Identity(), nn.Identity()
    hooked.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    x = torch.zeros(1)
    timers = {name: timer(lambda m=m: m(x)) for name, m in (("plain", plain), ("hooked", hooked))}  # type: ignore[misc]
    times = in_turns(timers, 50, Options())
    return median(times["hooked"]) - median(times["plain"])
