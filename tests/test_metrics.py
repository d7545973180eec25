"""`cbp_fast.metrics` against NumPy's SVD and hand-computed cases."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import cbp_fast
from cbp_fast.metrics import Monitor, dormant_units, effective_rank, plot, stable_rank, weight_magnitude

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


class Recorder:
    """A stand-in for TensorBoard's SummaryWriter."""

    def __init__(self):
        self.scalars, self.histograms = {}, {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value

    def add_histogram(self, tag, values, step):
        self.histograms[tag, step] = values.tolist()


def convolutional():
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(2, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(24, 5), torch.nn.ReLU())
    return torch.nn.Sequential(*layers, torch.nn.Linear(5, 3))


def attached(model=None):
    model = convolutional() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"replacement_rate": 0.1, "maturity_threshold": 2}
    return model, optimizer, cbp_fast.ContinualBackprop(model, optimizer, **options)


def train(model, optimizer, monitor, steps, batch=7):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(batch, 2, 4, 4, generator=generator)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        monitor.step()
    return x


def test_a_monitor_measures_at_its_interval_what_the_last_forward_showed():
    model, optimizer, cbp = attached()
    # frozen, so that the last forward can be repeated
    optimizer.param_groups[0]["lr"] = 0.0
    cbp.replacement_rate = 0.0
    monitor = Monitor(cbp, every=3, tau=0.9)
    x = train(model, optimizer, monitor, 3)
    train(model, optimizer, monitor, 2)
    (measured,) = monitor.history
    assert measured["step"] == 3
    assert measured["weight_magnitude"] == weight_magnitude(model).item()
    with torch.no_grad():
        features = model[:3](x)
        hidden = model[:5](x)
    by_unit = features.unflatten(1, (6, 4)).abs().mean((0, 2))
    for name, h, magnitude in (("0", features, by_unit), ("3", hidden, hidden.abs().mean(0))):
        group = measured["groups"][name]
        assert group["effective_rank"] == pytest.approx(numpy_effective_rank(h.double().numpy()), rel=1e-6)
        assert group["stable_rank"] == numpy_stable_rank(h.double().numpy(), 0.99)
        assert group["dormant"] == pytest.approx((magnitude <= 0.9 * magnitude.mean()).double().mean().item())
        assert 0 < group["dormant"] < 1


def test_a_monitor_counts_ages_utilities_and_replaced_units():
    model, optimizer, cbp = attached()
    monitor = Monitor(cbp, every=8)
    train(model, optimizer, monitor, 8)
    for name, group in monitor.history[0]["groups"].items():
        assert group["replaced"] == cbp.num_replaced[name] > 0
        # 30 bins, more than there are ages
        counts = [n for n in group["age"]["counts"] if n]
        assert counts == cbp.age[name].unique(return_counts=True)[1].tolist()
        for key, values in (("age", cbp.age[name]), ("utility", cbp.utility[name])):
            assert sum(group[key]["counts"]) == len(values)
            assert (group[key]["edges"][0], group[key]["edges"][-1]) == (values.min().item(), values.max().item())


def test_a_monitor_looks_at_an_even_share_of_the_samples():
    model, optimizer, cbp = attached()
    monitor = Monitor(cbp, every=np.int64(1), samples=np.int32(4))
    optimizer.param_groups[0]["lr"] = 0.0
    cbp.replacement_rate = 0.0
    x = train(model, optimizer, monitor, 1, batch=10)
    with torch.no_grad():
        sampled = model[:5](x)[::3]
    effective = monitor.history[0]["groups"]["3"]["effective_rank"]
    assert effective == pytest.approx(numpy_effective_rank(sampled.double().numpy()), rel=1e-6)


def test_a_monitor_is_off_the_model_between_measurements_and_after_remove():
    model, optimizer, cbp = attached()
    monitor = Monitor(cbp, every=3)
    hooks = lambda: [len(m._forward_pre_hooks) for m in model]  # noqa: E731
    bare = hooks()
    train(model, optimizer, monitor, 1)
    assert hooks() == bare
    train(model, optimizer, monitor, 1)
    assert hooks() != bare
    monitor.remove()
    assert hooks() == bare


def test_a_measurement_that_is_due_is_in_nobodys_way(everything):
    """What the model is looked at for, copied and pickled for, is the same as without, and is not measured."""
    model, optimizer, cbp = attached()
    groups, x = cbp.groups, torch.randn(5, 2, 4, 4)
    text = cbp_fast.explain(model, x)
    monitor = Monitor(cbp, every=1)
    train(model, optimizer, monitor, 1)
    twin = copy.deepcopy(model)
    twin.load_state_dict(pickle.loads(pickle.dumps(model)).state_dict())
    assert not any(m._forward_pre_hooks for m in twin.modules())
    assert cbp_fast.explain(model, x) == text
    twin.train()(x)
    model(x)
    twin(torch.zeros(3, 2, 4, 4))
    cbp_fast.explain(model, torch.zeros(3, 2, 4, 4))
    seen = [h for _, h in monitor._seen.values()]
    assert len(seen) == len(groups)
    assert all(len(h) == 5 and h.any() for h in seen)
    cbp.refresh()
    assert cbp.groups == groups
    train(model, optimizer, monitor, 3)
    assert all("dormant" in group for group in monitor.history[-1]["groups"].values())


def test_a_monitor_changes_nothing_in_the_run(everything):
    plain, watched = attached(), attached()
    monitor = Monitor(watched[2], every=2, writer=Recorder())
    train(*plain[:2], Monitor(plain[2], every=10**9), 6)
    train(*watched[:2], monitor, 6)
    assert len(monitor.history) == 3
    assert everything(*plain) == everything(*watched)


def test_forwards_outside_training_are_not_measured():
    model, optimizer, cbp = attached()
    monitor = Monitor(cbp, every=1)
    model.eval()(torch.zeros(3, 2, 4, 4))
    model.train()
    assert "dormant" not in monitor.step()["groups"]["0"]
    train(model, optimizer, monitor, 1)
    before = monitor.history[-1]["groups"]["0"]
    assert before["dormant"] == 0


def test_a_writer_gets_every_measurement():
    model, optimizer, cbp = attached()
    writer = Recorder()
    monitor = Monitor(cbp, every=2, writer=writer)
    train(model, optimizer, monitor, 4)
    assert {step for _, step in writer.scalars} == {2, 4}
    for measured in monitor.history:
        step = measured["step"]
        assert writer.scalars["weight_magnitude", step] == measured["weight_magnitude"]
        for name, group in measured["groups"].items():
            for key in ("dormant", "effective_rank", "stable_rank", "replaced"):
                assert writer.scalars[f"{name}/{key}", step] == group[key]
    assert writer.histograms["3/age", 4] == cbp.age["3"].tolist()
    assert writer.histograms["0/utility", 4] == cbp.utility["0"].tolist()


def test_the_history_is_plain_and_is_drawn(tmp_path):
    model, optimizer, cbp = attached()
    monitor = Monitor(cbp, every=2)
    train(model, optimizer, monitor, 6)
    figure = plot(json.loads(json.dumps(monitor.history)))
    steps = [m["step"] for m in monitor.history]
    ranks = figure.axes[1].lines
    assert [line.get_label() for line in ranks] == ["0", "3"]
    assert ranks[1].get_xdata().tolist() == steps
    assert ranks[1].get_ydata().tolist() == [m["groups"]["3"]["effective_rank"] for m in monitor.history]
    figure.savefig(tmp_path / "plasticity.png")
    assert (tmp_path / "plasticity.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cbp: Monitor(cbp, every=0), "every is 0, must be a positive integer"),
        (lambda cbp: Monitor(cbp, samples=1.5), "samples is 1.5"),
        (lambda cbp: Monitor(cbp, tau=NAN), "tau is nan"),
        (lambda cbp: plot([]), "the history is empty"),
    ],
)
def test_bad_arguments_of_a_monitor(call, message):
    with pytest.raises(ValueError, match=message):
        call(attached()[2])


def test_a_monitor_takes_the_attached_object():
    with pytest.raises(TypeError, match="cbp is a Linear, must be a ContinualBackprop attached to the model"):
        Monitor(nn.Linear(2, 2))
