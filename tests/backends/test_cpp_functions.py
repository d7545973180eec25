"""The compiled functions themselves: what they allocate, what they take, and what they refuse."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from group_cases import (
    RULES,
    Chain,
)
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cbp_fast import _C, ContinualBackprop, Rule

# memory


def two_wide_layers(backend, width, rate):
    """A model that has done one step and is about to do another."""
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    options = {"replacement_rate": 0.0, "maturity_threshold": 1, "capture": "deferred", "backend": backend}
    cbp = ContinualBackprop(model, rule=Rule.gnt("adaptable_contribution", transfer_bias=True), **options)
    h = torch.randn(256, width)
    cbp._engine.record(0, h)
    cbp.step()
    cbp.replacement_rate = rate
    cbp._engine.record(0, h)
    return cbp


def allocated(cbp):
    """Bytes that the profiler sees PyTorch allocate in a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        cbp.step()
    return sum(max(0, event.self_cpu_memory_usage) for event in record.events())


@pytest.mark.parametrize(("rate", "replaced"), [(0.0, 0), (0.01, 5)])
def test_a_compiled_step_allocates_no_tensors(rate, replaced):
    cbp = two_wide_layers("cpp", 512, rate)
    assert allocated(cbp) < 1024
    assert len(cbp.last_replaced["0"]) == replaced
    # the profiler does see what the reference allocates: one weight has a million bytes
    assert allocated(two_wide_layers("reference", 512, rate)) > 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how much memory is in use")
def test_a_compiled_step_runs_where_room_for_an_eighth_of_a_weight_is_left():
    # 64 MiB a weight: more than malloc keeps for later
    cbp = two_wide_layers("cpp", 4096, 0.001)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**23, before[1]))
    try:
        cbp.step()
        with pytest.raises(RuntimeError, match="alloc"):
            torch.empty(2**26, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert len(cbp.last_replaced["0"]) == 4


# a step in two halves


@pytest.mark.parametrize("rule", RULES)
def test_a_step_in_two_halves_is_the_step(rule, backend, everything):
    results = []
    for halves in ("", "whole", "split"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
        options = {"replacement_rate": 0.2, "maturity_threshold": 2, "backend": backend, "seed": 3}
        cbp = ContinualBackprop(model, rule=RULES[rule], **options)
        engine = cbp._engine
        for _ in range(8):
            model(torch.randn(7, 12))
            if not halves:
                cbp.step()
                continue
            slots, held = engine._intact()
            weights = [ref.get() for ref in engine.state.weights]
            # where they are split their sums belong to the first half
            first, second = (weights, []) if halves == "split" else ([], weights)
            engine._functions.sum_(engine.state, first, held, slots)
            assert engine._functions.choose_(engine.state, second) == int(engine.state.num_chosen.sum())
            engine.reinit(*engine.collect([]))
            engine.finish()
        assert sum(cbp.num_replaced.values()) > 4
        results.append(everything(model, cbp))
    assert results[0] == results[1] == results[2]


# arguments


@pytest.fixture
def operators():
    engine = Chain("cpp", 5, 4).engine
    return engine.state, [ref.get().detach() for ref in engine.state.weights]


def test_capture_is_a_well_made_operator(operators):
    state, _ = operators
    torch.library.opcheck(torch.ops.cbp_fast.capture_.default, (state.buffer, state.plan, torch.randn(3, 5), 0))


ops = _C
BAD_CALLS = {
    "short plan": lambda s, w: ops.select_(s.buffer, s.plan[:-1], w, [], []),
    "empty plan": lambda s, w: ops.select_(s.buffer, s.plan[:0], w, [], []),
    "plan of another type": lambda s, w: ops.select_(s.buffer, s.plan.int(), w, [], []),
    "plan with gaps": lambda s, w: ops.select_(s.buffer, s.plan.repeat_interleave(2)[::2], w, [], []),
    "short buffer": lambda s, w: ops.select_(s.buffer[:-1], s.plan, w, [], []),
    "buffer of another type": lambda s, w: ops.select_(s.buffer.char(), s.plan, w, [], []),
    "short copy": lambda s, w: ops.copy_(s.backup[:-1], s.buffer),
    "copy of another type": lambda s, w: ops.copy_(s.buffer, s.backup.char()),
    "too few weights": lambda s, w: ops.select_(s.buffer, s.plan, w[:-1], [], []),
    "weight of another shape": lambda s, w: ops.select_(s.buffer, s.plan, [w[0][:-1], *w[1:]], [], []),
    "weight of another rank": lambda s, w: ops.select_(s.buffer, s.plan, [w[0][None], *w[1:]], [], []),
    "weight of another type": lambda s, w: ops.select_(s.buffer, s.plan, [w[0].double(), *w[1:]], [], []),
    "h without its slot": lambda s, w: ops.select_(s.buffer, s.plan, w, [torch.ones(1, 5)], []),
    "h of another width": lambda s, w: ops.select_(s.buffer, s.plan, w, [torch.ones(1, 6)], [0]),
    "h of another type": lambda s, w: ops.select_(s.buffer, s.plan, w, [torch.ones(1, 5).int()], [0]),
    "h without axes": lambda s, w: ops.capture_(s.buffer, s.plan, torch.ones(()), 0),
    "slot beyond": lambda s, w: ops.capture_(s.buffer, s.plan, torch.ones(1, 5), 2),
    "slot before": lambda s, w: ops.select_(s.buffer, s.plan, w, [torch.ones(1, 5)], [-1]),
    "short sums": lambda s, w: ops.sum_(s.buffer, s.plan, s.flat[:-1], w, [], []),
    "sums of another type": lambda s, w: ops.choose_(s.buffer, s.plan, s.flat.float(), w),
    "sums with gaps": lambda s, w: ops.choose_(s.buffer, s.plan, s.flat.repeat_interleave(2)[::2], w),
    "no weights": lambda s, w: ops.select_(s.buffer, s.plan, [], [], []),
    "too few weights to choose": lambda s, w: ops.choose_(s.buffer, s.plan, s.flat, w[:-1]),
    "too few weights to sum": lambda s, w: ops.sum_(s.buffer, s.plan, s.flat, w[:-1], [], []),
    "region beyond": lambda s, w: ops.reinit_(s.buffer, s.plan, [w[0]], [2 * len(s.regions)]),
    "region before": lambda s, w: ops.reinit_(s.buffer, s.plan, [w[0]], [-1]),
    "too few tensors": lambda s, w: ops.reinit_(s.buffer, s.plan, [], [0]),
    "region beyond, checked": lambda s, w: ops.check_reinit(s.buffer, s.plan, [w[0]], [2 * len(s.regions)]),
    "too many tensors": lambda s, w: ops.reinit_(s.buffer, s.plan, [w[0], w[0]], [0]),
    "another tensor": lambda s, w: ops.reinit_(s.buffer, s.plan, [w[1]], [0]),
    "tensor of another type": lambda s, w: ops.reinit_(s.buffer, s.plan, [w[0].int()], [0]),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_an_operator_refuses_what_would_lead_it_astray(operators, call):
    state, weights = operators
    before = state.buffer.clone(), [w.clone() for w in weights]
    with pytest.raises(RuntimeError, match="cbp_fast: "):
        call(state, weights)
    assert torch.equal(state.buffer, before[0])
    assert all(map(torch.equal, weights, before[1]))


WRONG_KINDS = {
    "too few arguments": (lambda s, w: ops.select_(s.buffer, s.plan), "takes 5 arguments, not 2"),
    "an array": (lambda s, w: ops.capture_(s.buffer, s.plan, np.ones((1, 5)), 0), "numpy.ndarray stands for a torch"),
    "nothing": (lambda s, w: ops.select_(s.buffer, s.plan, [None, *w[1:]], [], []), "NoneType stands for a"),
    "a tuple": (lambda s, w: ops.select_(s.buffer, s.plan, tuple(w), [], []), "tuple stands for a list"),
    "a name": (lambda s, w: ops.capture_(s.buffer, s.plan, torch.ones(1, 5), "0"), "'str' object cannot be"),
}


@pytest.mark.parametrize(("call", "message"), WRONG_KINDS.values(), ids=WRONG_KINDS.keys())
def test_a_compiled_function_refuses_arguments_of_a_wrong_kind(operators, call, message):
    state, weights = operators
    before = state.buffer.clone()
    with pytest.raises(TypeError, match=message):
        call(state, weights)
    assert torch.equal(state.buffer, before)


def test_a_compiled_function_says_what_pytorch_does_not_show(operators):
    state, weights = operators
    for odd, error in (
        (torch.ones(1, 5, device="meta"), "meta"),
        (torch.ones(1, 5).to_sparse(), "storage|Sparse|strides"),
        (torch._efficientzerotensor((1, 5)), "no memory"),
    ):
        with pytest.raises((RuntimeError, BufferError), match=error):
            ops.select_(state.buffer, state.plan, weights, [odd], [0])
    assert not state.buffer[state.offsets[4] :].any()


def test_bytes_are_of_memory_on_the_cpu():
    assert _C.nbytes(torch.ones(3, 5)) == 60
    assert _C.nbytes(torch.ones(3, 5, dtype=torch.bfloat16)[::2, :3]) == 12
    assert _C.nbytes(torch.ones(())) == 4
    assert _C.nbytes(torch.ones(0, 5)) == 0
    for nowhere in (torch.ones(3, device="meta"), torch.ones(3).to_sparse(), None, "h"):
        assert _C.nbytes(nowhere) == -1
    torch.func.vmap(lambda h: [h, assert_nowhere(h)][0])(torch.ones(3, 5))
    torch.func.grad(lambda h: [h.sum(), assert_nowhere(h)][0])(torch.ones(5))


def assert_nowhere(h):
    assert _C.nbytes(h) == -1


@pytest.mark.parametrize("name", ["v5", "", "BASELINE"])
def test_an_unknown_instruction_set_is_refused(name):
    before = _C.get_isa()
    with pytest.raises(ValueError, match=f"'{name}'"):
        _C.set_isa(name)
    assert _C.get_isa() == before
