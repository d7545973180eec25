"""`cbp_fast.metrics` against NumPy's SVD and hand-computed cases."""

import math

import numpy as np
import pytest
import torch

from cbp_fast.metrics import dormant_units, effective_rank, stable_rank, weight_magnitude

NAN, INF = math.nan, math.inf


def numpy_effective_rank(h):
    s = np.linalg.svd(h, compute_uv=False)
    p = s[s > 0] / s.sum()
    return math.exp(-(p * np.log(p)).sum())


def numpy_stable_rank(h, share):
    s = np.linalg.svd(h, compute_uv=False)
    return next(k for k in range(1, len(s) + 1) if s[:k].sum() >= share * s.sum())


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (50, 1), (40, 12), (12, 40)], ids=str)
def test_ranks_match_numpy(shape):
    h = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu() + 0.01
    assert effective_rank(h).item() == pytest.approx(numpy_effective_rank(h.double().numpy()), rel=1e-10)
    for share in (0.5, 0.9, 0.99):
        assert stable_rank(h, share).item() == numpy_stable_rank(h.double().numpy(), share)


@pytest.mark.parametrize(
    ("singular_values", "effective", "stable"),
    [
        ([1, 1, 1, 1], 4, 4),
        ([5, 0, 0, 0], 1, 1),
        ([3, 1, 0, 0], 4 / 3**0.75, 2),  # exp of the entropy of (3/4, 1/4)
        ([995, 5, 0, 0], math.exp(-0.995 * math.log(0.995) - 0.005 * math.log(0.005)), 1),
        ([0, 0, 0, 0], 0, 0),
    ],
    ids=str,
)
def test_ranks_of_known_spectra(singular_values, effective, stable):
    h = torch.diag(torch.tensor(singular_values, dtype=torch.float32))
    assert effective_rank(h).item() == pytest.approx(effective, rel=1e-12)
    assert stable_rank(h).item() == stable


def test_ranks_of_equal_samples_are_one():
    h = torch.arange(1.0, 6.0).expand(30, 5)
    assert effective_rank(h).item() == pytest.approx(1, abs=1e-12)
    assert stable_rank(h).item() == 1


def test_stable_rank_of_the_whole_sum_counts_every_direction():
    h = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    assert stable_rank(h, share=1).item() == 9


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_ranks_of_what_is_not_finite_are_nan(bad):
    h = torch.ones(4, 3)
    h[1, 2] = bad
    assert effective_rank(h).isnan()
    assert stable_rank(h).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_leading_dimensions_are_samples(dtype):
    h = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = h.double().reshape(20, 6)
    assert effective_rank(h).item() == pytest.approx(numpy_effective_rank(flat.numpy()), rel=1e-10)
    assert dormant_units(h, tau=0.9).equal(dormant_units(flat, tau=0.9))


def test_dormant_units_relative_to_the_layer():
    # mean magnitudes 0, 1, 3, 8: the layer's is 3
    h = torch.tensor([[0.0, -1.0, 3.0, 16.0], [0.0, 1.0, -3.0, 0.0]])
    assert dormant_units(h).tolist() == [True, False, False, False]
    assert dormant_units(h, tau=0.3).tolist() == [True, False, False, False]
    assert dormant_units(h, tau=1 / 3).tolist() == [True, True, False, False]
    assert dormant_units(h, tau=1).tolist() == [True, True, True, False]


@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_dormant_units_of_a_dead_layer_are_all(tau):
    assert dormant_units(torch.zeros(3, 2), tau).all()
    assert dormant_units(torch.zeros(1, 1), tau).all()


def test_dormant_units_with_one_unit_or_one_sample():
    assert dormant_units(torch.tensor([[2.0], [0.0]]), tau=0.5).tolist() == [False]
    assert dormant_units(torch.tensor([[2.0, 0.0]])).tolist() == [False, True]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_unit_that_is_not_finite_is_not_dormant_and_leaves_the_others_alone(bad):
    h = torch.tensor([[0.0, 1.0, 3.0, bad], [0.0, 1.0, 3.0, 1.0]])
    assert dormant_units(h, tau=0.75).tolist() == [True, True, False, False]
    assert not dormant_units(h[:, 3:], tau=0.75).any()


def test_weight_magnitude_is_the_mean_over_all_entries():
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -1.0]]))
        model.bias.fill_(-5.0)
    assert weight_magnitude(model).item() == 3
    assert weight_magnitude(torch.nn.Sequential(model, torch.nn.Linear(1, 1, bias=False).requires_grad_(False))) <= 3


def test_nothing_here_is_differentiated():
    h = torch.ones(4, 3, requires_grad=True) * 2
    results = (dormant_units(h), effective_rank(h), stable_rank(h), weight_magnitude(torch.nn.Linear(2, 2)))
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dormant_units(torch.ones(2, 2), tau=-0.1), "tau is -0.1, must be 0 or more"),
        (lambda: dormant_units(torch.ones(2, 2), tau=NAN), "tau is nan"),
        (lambda: dormant_units(torch.ones(3)), r"h is \[3\], must be \[samples, units\]"),
        (lambda: effective_rank(torch.ones(0, 3)), r"h is \[0, 3\]"),
        (lambda: stable_rank(torch.ones(2, 2), share=0), "share is 0, must be above 0 and at most 1"),
        (lambda: weight_magnitude(torch.nn.ReLU()), "no parameter"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
