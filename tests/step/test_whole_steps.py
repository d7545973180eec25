"""A step is whole or nothing, whatever ends it: an exception at any line, a signal, an interrupt."""

import signal
import sys
import time

import pytest
import torch
from small_runs import Layers, Run, same


class Stopped(BaseException):
    """What no code expects."""


def stopped_at(point, call, events=("line", "return")):
    """Raise at the point-th place of the package's own code; whether there was such a one."""
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        if "cbp_fast" not in frame.f_code.co_filename or "tests" in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = "opcode" in events
        if event in events:
            seen += 1
            if seen > point:
                raise Stopped
        return trace

    try:
        sys.settrace(trace)
        call()
    except Stopped:
        return True
    finally:
        sys.settrace(None)
    return False


CASES = {
    "cpp": (Run, "cpp", "nature", "deferred", 1),
    "cpp transfer": (Run, "cpp", "transfer", "deferred", 1),
    "cpp inline": (Run, "cpp", "centred", "inline", 1),
    "cpp several optimizers": (Run, "cpp", "nature", "auto", 2),
    "cpp layers": (Layers, "cpp", "nature", "deferred", 1),
    "reference transfer": (Run, "reference", "transfer", "deferred", 1),
    "reference layers": (Layers, "reference", "nature", "deferred", 1),
    "triton": (Run, "triton", "nature", "deferred", 1),
}


def check_every_place(case, steps, events, stride):
    kind, *arguments = case

    def prepared():
        run = kind(*arguments, steps=steps)
        run.forward(100)
        return run

    whole = prepared()
    # one run is put back for every place
    run = prepared()
    before = run.everything()
    whole.step()
    after = whole.everything()
    assert not same(before, after)
    # which replaces nothing, and says so
    whole.step()
    idle = whole.everything()
    forwards = [(engine._forwards, set(engine._storages)) for engine in run.engines]
    points = taken_back = 0
    while stopped_at(points, run.step, events):
        # without asking the package for anything
        now = [t.detach().clone() for t in run.tensors()]
        is_before = same(now, before)
        assert is_before or same(now, after), f"half a step at place {points}"
        taken_back += is_before
        # the step that follows: the same one, or one without a forward
        run.step()
        assert same(run.everything(), after if is_before else idle), f"another step after place {points}"
        assert not any(engine._forwards or engine._journal for engine in run.engines)
        with torch.no_grad():
            for t, old in zip(run.tensors(), before, strict=True):
                t.copy_(old)
        for engine, (held, storages) in zip(run.engines, forwards, strict=True):
            engine._forwards, engine._storages, engine._captured = held, storages, arguments[2] == "inline"
        points += stride
    assert points > stride
    assert taken_back > 0
    return points


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_step_that_is_stopped_at_any_line_is_whole_or_nothing(case):
    check_every_place(case, 3, ("line", "return"), {"cpp": 1, "reference": 7, "triton": 301}[case[1]])


def test_the_first_step_that_is_stopped_at_any_line_is_whole_or_nothing():
    check_every_place(CASES["cpp"], 0, ("line", "return"), 1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_step_that_is_stopped_anywhere_is_whole_or_nothing(case):
    check_every_place(
        case, 3, ("opcode", "line", "return", "call"), {"cpp": 3, "reference": 29, "triton": 997}[case[1]]
    )


@pytest.mark.parametrize("rule", ["nature", "centred"])
@pytest.mark.parametrize("capture", ["deferred", "inline"])
def test_a_forward_that_is_stopped_anywhere_leaves_what_can_be_stepped(backend, rule, capture):
    points = 0
    while True:
        run = Run(backend, rule, capture, steps=1)
        twin = Run(backend, rule, capture, steps=1)
        if not stopped_at(points, lambda run=run: run.forward(100)):
            break
        counts = [int(n) for n in run.cbp._engine.state.count]
        assert all(n in (0, 4) for n in counts)
        # nothing of a forward that another one follows is counted twice or by half
        run.cbp._engine.forget_forwards()
        for each in (run, twin):
            each.train(range(5, 7))
        assert same(run.everything(), twin.everything()), f"after place {points}"
        points += 2 if backend == "cpp" else 17
    assert points > 20


def test_an_exception_while_a_step_is_taken_back_is_made_good_by_the_next_use(monkeypatch):
    run = Run("cpp", "transfer")
    run.forward(100)
    before = run.everything()
    engine = run.cbp._engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "collect", lambda optimizers: 1 / 0)
        restore = engine.restore
        patch.setattr(engine, "restore", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.step()
        patch.setattr(engine, "restore", restore)
        assert same(run.everything(), before)
    run.step()
    assert engine._journal is None
    assert sum(map(len, run.cbp.last_replaced.values())) > 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
@pytest.mark.parametrize("kind", [Run, Layers])
def test_signals_leave_whole_steps(kind):
    run, generator = kind("cpp"), torch.Generator().manual_seed(0)

    def handler(*_):
        raise Stopped

    previous, interrupted = signal.signal(signal.SIGALRM, handler), 0
    try:
        start = time.perf_counter()
        run.forward(0)
        run.step()
        once = time.perf_counter() - start
        for number in range(300):
            run.forward(number)
            before = run.everything()
            delay = float(torch.rand((), generator=generator)) * once + 1e-6
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                run.step()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Stopped:
                interrupted += 1
                held = [bool(engine._forwards) for engine in run.engines]
                assert all(held) == any(held) == same(run.everything(), before)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted
