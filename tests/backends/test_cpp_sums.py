"""The compiled backend's step: the reference's bits on whole numbers, sums as near as their additions allow."""

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from group_cases import (
    ADDITIONS,
    CONVOLUTIONS,
    DTYPES,
    NAMES,
    RULES,
    Bench,
    Layout,
    Numbers,
    cases,
    check_step_on_whole_numbers,
    gamma,
    layouts,
)
from hypothesis import given, settings
from torch import nn

from cbp_fast import ContinualBackprop, Rule, UnitGroup
from cbp_fast.groups.resolving import resolve
from cbp_fast.step.engine import Engine

# any shape, type and memory layout


def check_compiled_step(case):
    check_step_on_whole_numbers(case, "cpp")


test_step_on_whole_numbers = settings(max_examples=250)(given(cases(powers_of_two=True))(check_compiled_step))
test_many_steps_on_whole_numbers = pytest.mark.slow(
    settings(max_examples=1500)(given(cases(powers_of_two=True))(check_compiled_step))
)


def check_utility_from_sums(case):
    """From the same sums over activations, the utility is as near the one in float64 as sums of weights allow."""
    rule, hyper = RULES[case.rule], {"replacement_rate": 0.0, "maturity_threshold": 1, "decay_rate": 0.9}
    mine, exact = Bench(case, "cpp", **hyper), Bench(case, "reference", torch.float64, **hyper)
    generator = torch.Generator().manual_seed(case.numbers)
    count = torch.tensor(case.forwards[: case.readers])
    columns = count.repeat_interleave(case.units * case.columns)
    activation = torch.rand(columns.shape, generator=generator, dtype=torch.float64) * columns
    prior = torch.rand(case.units, generator=generator)
    for bench in (mine, exact):
        bench.fill(Numbers(case.numbers).any)
        state = bench.engine.state
        state.count.copy_(count)
        state.activation.copy_(activation)
        state.utility.copy_(prior)
        state.age.copy_(torch.arange(case.units) % 4)
    with torch.no_grad():
        # both see what is left of the numbers in the case's type
        for a, b in zip(mine.model.parameters(), exact.model.parameters(), strict=True):
            b.copy_(a)
    for bench in (mine, exact):
        bench.engine.select()
    a, b = mine.engine.state, exact.engine.state
    for name in ("step", "age", "pending", "num_chosen"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    elements = max(layer.weight.numel() for layer in mine.layers) if case.dtype == torch.float64 else 0
    # incoming and outgoing weights, then the few roundings of the average
    error = 2 * gamma(ADDITIONS + elements, case.dtype) + gamma(8, case.dtype)
    scale = b.utility.abs()
    if rule.name == "clarena" and count.any():
        rows = sum(layer.weight.detach().double().abs().sum(1) for layer in mine.layers[: case.producers])
        y = activation.view(case.readers, -1).sum(0) * rows
        # relative to the greatest, as seen through the distance from the least to it
        scale = scale + 2 * y.amax() / (y.amax() - y.amin()).clamp(min=1e-300)
    assert ((a.utility.double() - b.utility).abs() <= error * scale).all()


test_utility_from_sums = settings(max_examples=150)(given(cases())(check_utility_from_sums))
test_many_utilities_from_sums = pytest.mark.slow(settings(max_examples=1000)(given(cases())(check_utility_from_sums)))


@dataclass(frozen=True)
class Forwards:
    """What one reader of a group sees before a step."""

    centred: bool
    units: int
    columns: int  # a unit
    spatial: int
    samples: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    layout: Layout
    numbers: int


@st.composite
def forwards(draw):
    spatial = draw(st.sampled_from((0, 0, 1, 2, 3)))
    axes = draw(st.integers(spatial, spatial + 1)) if spatial else draw(st.integers(0, 3))
    lengths = st.sampled_from((1, 2, 3, 5, 16, 33))
    return Forwards(
        centred=draw(st.booleans()),
        units=draw(st.sampled_from((1, 2, 3, 15, 16, 17, 31, 33))),
        columns=1 if spatial else draw(st.sampled_from((1, 1, 3, 4))),
        spatial=spatial,
        samples=tuple(tuple(draw(lengths) for _ in range(axes)) for _ in range(draw(st.integers(1, 2)))),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=layouts(draw, axes + 1, may_repeat=True),
        numbers=draw(st.integers(0, 2**31)),
    )


def check_activation_sums(case):
    """Sums over activations are as near those in float64 as their additions allow, whatever lies in memory where."""
    features = case.units * case.columns
    kind = max(case.spatial, int(case.columns > 1))
    incoming = CONVOLUTIONS[kind](1, case.units, *[1] * (kind > 0))
    reader = CONVOLUTIONS[case.spatial](features, 1, *[1] * (case.spatial > 0))
    model = nn.ModuleList([incoming, reader])
    rule = Rule.gnt("zero_contribution" if case.centred else "contribution", transfer_bias=True)
    options = {"replacement_rate": 0.0, "maturity_threshold": 0, "decay_rate": 0.9, "seed": 0, "capture": "inline"}
    engine = Engine(rule, [resolve(model, UnitGroup("g", [incoming], [reader]))], backend="cpp", **options)
    generator = torch.Generator().manual_seed(case.numbers)
    before = torch.randn(features, generator=generator, dtype=torch.float64)
    age = torch.arange(case.units, dtype=torch.float64) % 5
    engine.state.running_mean.copy_(before)
    engine.state.age.copy_(age)

    seen, total, magnitude, distance, furthest = 0, *torch.zeros(4, features, dtype=torch.float64)
    for samples in case.samples:
        at = len(samples) - case.spatial
        h = torch.randn(*samples[:at], features, *samples[at:], generator=generator).to(case.dtype)
        repeated = case.layout.repeated
        h = h if repeated is None else h.narrow(repeated, 0, 1).expand(h.shape)
        engine.record(0, case.layout.place(h)[0])
        x = h.double().movedim(at, -1).reshape(-1, features)
        seen, total, magnitude = seen + len(x), total + x.sum(0), magnitude + x.abs().sum(0)
        h_hat = (0.9 * before + 0.1 * total / seen).view(case.units, -1) / (1 - 0.9 ** (age + 1))[:, None]
        h_hat = h_hat.mean(1, keepdim=True).expand(-1, case.columns).flatten()
        distance, furthest = distance + (x - h_hat).abs().sum(0), torch.maximum(furthest, h_hat.abs())

    error = gamma(ADDITIONS + (seen if case.dtype == torch.float64 else 0), case.dtype)
    assert engine.state.count.item() == seen
    assert ((engine.state.feature - total).abs() <= error * magnitude).all()
    if case.centred:
        # h_hat itself is rounded, and is off by what its unit's means are
        widest = magnitude.view(case.units, -1).amax(1, keepdim=True).expand(-1, case.columns).flatten()
        assert ((engine.state.activation - distance).abs() <= error * (distance + seen * furthest + widest)).all()
    else:
        assert ((engine.state.activation - magnitude).abs() <= error * magnitude).all()


test_activation_sums = settings(max_examples=150)(given(forwards())(check_activation_sums))
test_many_activation_sums = pytest.mark.slow(settings(max_examples=1500)(given(forwards())(check_activation_sums)))

# long sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("shape", [(2**18, 3), (3, 2**18)], ids=str)
def test_long_sums_are_as_good_as_short_ones(shape, dtype):
    # in one float32, 2 ** 18 times nearly 0.1 is off by a thousandth
    rows, columns = shape
    model = nn.Sequential(nn.Linear(1, columns), nn.Linear(columns, rows), nn.Linear(rows, 1)).to(dtype)
    tenth = torch.tensor(0.1, dtype=dtype).item()
    for p in model.parameters():
        nn.init.constant_(p, tenth)
    options = {"replacement_rate": 0.0, "decay_rate": 0.0, "backend": "cpp"}
    cbp = ContinualBackprop(model, rule=Rule.gnt("adaptable_contribution"), **options)
    cbp._engine.record(0, torch.full((2, columns), tenth, dtype=dtype) * torch.tensor([[0], [2]], dtype=dtype))
    cbp._engine.record(1, torch.ones(2, rows, dtype=dtype) * torch.tensor([[0], [2]], dtype=dtype))
    cbp.step()
    # distances of 0 and 0.2 from 0.1, or of 0 and 2 from 1; all means over weights are 0.1
    close = {"rtol": 4 * gamma(ADDITIONS, dtype), "atol": 0}
    torch.testing.assert_close(cbp.utility["0"], torch.full((columns,), tenth), **close)
    torch.testing.assert_close(cbp.utility["1"], torch.ones(rows), **close)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["features late", "samples late"])
def test_long_sums_over_samples_are_as_good_as_short_ones(order):
    model = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1))
    cbp = ContinualBackprop(model, rule=Rule.nature(transfer_bias=True), backend="cpp", capture="inline")
    h = torch.full((2**18, 3), 0.1).permute(order).contiguous().permute(order)
    cbp._engine.record(0, h)
    state, expected = cbp._engine.state, torch.full((3,), 2**18 * h[0, 0].item(), dtype=torch.float64)
    for sums in (state.activation, state.feature):
        torch.testing.assert_close(sums, expected, rtol=gamma(ADDITIONS, h.dtype), atol=0)
