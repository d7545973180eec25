"""Random numbers: Philox as published, the same bits on every backend, and uniform."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from group_cases import (
    DTYPES,
    NAMES,
    SEED,
)
from hypothesis import example, given, settings
from small_runs import Run, same
from torch import nn

from cbp_fast import _C, ContinualBackprop, Rule, UnitGroup
from cbp_fast.backends import reference


def test_the_oracle_has_the_published_answers(philox):
    # kat_vectors of Random123, philox4x32 10
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox.words((0,) * 4, (0,) * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox.words((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox.words(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


words = st.integers(0, 2**32 - 1)
seeds = st.integers(0, 2**64 - 1)
# beyond 2 ** 34 the block number needs its high word
firsts = st.one_of(st.integers(0, 200), st.integers(2**34 - 100, 2**34 + 100), st.integers(0, 2**60))


@settings(max_examples=60)
@given(seed=seeds, step=words, stream=words, first=firsts, n=st.integers(1, 8))
@example(seed=SEED, step=1, stream=2**31, first=2**34 - 4, n=8)
def test_reference_draws_philox(philox, seed, step, stream, first, n):
    signed = seed if seed < 2**63 else seed - 2**64
    elements = torch.arange(first, first + n)
    drawn = reference.philox(elements, torch.tensor([signed]), torch.tensor([step]), stream)
    assert drawn.tolist() == [philox.word(seed, step, stream, first + i) for i in range(n)]


@settings(max_examples=60)
@given(seed=seeds, step=words, stream=words, first=firsts, n=st.integers(0, 300))
@example(seed=SEED, step=1, stream=2**31, first=2**34 - 100, n=300)
@example(seed=SEED, step=1, stream=2**31, first=2**34 - 39, n=80)
def test_compiled_draws_are_those_of_the_reference(every_isa, seed, step, stream, first, n):
    signed = seed if seed < 2**63 else seed - 2**64
    elements = torch.arange(first, first + n)
    expected = reference.unit_uniform(elements, torch.tensor([signed]), torch.tensor([step]), stream).tolist()
    for name, drawn in every_isa(lambda: _C.philox_uniform(seed, step, stream, first, n)).items():
        assert drawn == expected, name


def test_draws_are_uniform():
    n, bins = 2**18, 256
    r = np.array(_C.philox_uniform(SEED, 1, 2, 0, n))
    assert 0 <= r.min() <= r.max() < 1
    counts = np.bincount((r * bins).astype(int), minlength=bins)
    # chi-squared with 255 degrees of freedom: 5 standard deviations from its mean
    assert abs(((counts - n / bins) ** 2 / (n / bins)).sum() - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("change", ["seed", "step", "stream", "first"])
def test_other_counters_give_unrelated_draws(change):
    n = 2**16
    one = {"seed": SEED, "step": 1, "stream": 2, "first": 0}
    other = {**one, change: one[change] + (n if change == "first" else 1)}
    x, y = (np.array(_C.philox_uniform(**arguments, n=n)) for arguments in (one, other))
    # the standard deviation of a correlation of n unrelated pairs is 1 / sqrt(n)
    assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("rule", [Rule.nature(), Rule.clarena()], ids=lambda rule: rule.name)
def test_drawn_weights_are_the_same_bits_everywhere(backend, philox, rule, dtype):
    # 1030 columns: more than are drawn at once
    incoming, reader = nn.Linear(1030, 3, dtype=dtype), nn.Linear(3, 2, dtype=dtype)
    model = nn.Sequential(incoming, reader)
    cbp = ContinualBackprop(
        model,
        rule=rule,
        replacement_rate=1,
        maturity_threshold=0,
        groups=[UnitGroup("g", [incoming], [reader])],
        seed=SEED,
        backend=backend,
    )
    model(torch.ones(1, 1030, dtype=dtype))
    cbp.step()
    (*_, unit) = cbp.last_replaced["g"].tolist()
    elements, stream = range(unit * 1030, (unit + 1) * 1030), philox.stream("0.weight")
    if rule.name == "clarena":
        drawn = philox.unit(SEED, 1, stream, elements)
    else:
        drawn = philox.uniform(SEED, 1, stream, elements, math.sqrt(2) * math.sqrt(3 / 1030))
    assert torch.equal(incoming.weight[unit], torch.from_numpy(drawn).to(dtype))


def test_normal_draws_agree_to_a_millionth(philox):
    drawn = {}
    for backend in ("reference", "cpp"):
        model = nn.Sequential(nn.Linear(300, 8), nn.ReLU(), nn.Linear(8, 2))
        options = {"replacement_rate": 1, "maturity_threshold": 0, "seed": SEED, "backend": backend}
        cbp = ContinualBackprop(model, rule=Rule.nature(init="normal"), **options)
        model(torch.ones(1, 300))
        cbp.step()
        drawn[backend] = model[0].weight.detach().double()
    deviation = math.sqrt(2) * math.sqrt(1 / 300)
    # Box-Muller on the words of a pair
    r = philox.unit(SEED, 1, philox.stream("0.weight"), range(2400)).astype(np.float64).reshape(-1, 2)
    radius, angle = np.sqrt(-2 * np.log1p(-r[:, 0])), 2 * np.pi * r[:, 1]
    expected = deviation * np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(8, 300)
    for weight in drawn.values():
        np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-6 * deviation)
    # 2400 draws: mean and deviation within 5 standard errors
    assert abs(expected.mean()) < 5 * deviation / math.sqrt(2400)
    assert abs(expected.std() / deviation - 1) < 5 / math.sqrt(2 * 2400)


def test_the_high_bits_of_a_step_draw_anew_and_alike(philox):
    seed, stream = 12345678901234567890, 77
    drawn = []
    for step in (5, 2**32 + 5, 2**40 + 5, 2**48 - 1):
        mine = _C.philox_uniform(seed, step, stream, 0, 16)
        words = [
            philox.words((e // 4, ((step >> 32) << 16) % 2**32, step % 2**32, stream), (seed % 2**32, seed >> 32))
            for e in range(16)
        ]
        assert mine == [(words[e][e % 4] >> 8) * 2.0**-24 for e in range(16)]
        drawn.append(tuple(mine))
    assert len(set(drawn)) == 4


def test_backends_draw_alike_past_the_32nd_bit_of_a_step():
    weights = []
    for backend in ("reference", "cpp", "triton"):
        run = Run(backend, steps=0)
        saved = run.cbp.state_dict()
        saved["step"] = 2**40 + 3
        run.cbp.load_state_dict(saved)
        run.train(range(3))
        assert sum(run.cbp.num_replaced.values()) > 3
        weights.append([p.detach().clone() for p in run.model.parameters()])
    assert same(weights[0], weights[1])
    assert same(weights[0], weights[2])


def test_a_negative_number_of_draws_is_refused():
    with pytest.raises(ValueError, match="negative"):
        _C.philox_uniform(0, 0, 0, 0, -1)
