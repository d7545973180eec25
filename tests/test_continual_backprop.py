"""The attached object: what it takes and refuses, what can be set and read, and what it leaves alone."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from stream import EAGER, Stream, hooks_of, mlp, momentum
from torch import nn

from cbp_fast import ContinualBackprop, Rule, UnitGroup
from cbp_fast.state import arrangement, regions

# what it takes


def test_attaching_changes_nothing_and_draws_nothing(backend, everything):
    model = mlp()
    optimizer = momentum(model)
    Stream(model, optimizer).train()
    before, state = everything(model, optimizer), torch.get_rng_state()
    ContinualBackprop(model, optimizer, backend=backend)
    assert everything(model, optimizer) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_groups_are_found_in_forward_order():
    cbp = ContinualBackprop(mlp())
    assert cbp.groups == [UnitGroup("0", ["0"], ["2"]), UnitGroup("2", ["2"], ["5"], ["3"])]


def test_groups_may_be_given():
    model = mlp()
    cbp = ContinualBackprop(model, groups=[UnitGroup("mine", [model[0]], ["2"])])
    assert cbp.groups == [UnitGroup("mine", ["0"], ["2"])]


@pytest.mark.parametrize(
    ("patterns", "taken"),
    [
        ({"include": "0"}, ["0"]),
        ({"include": ["2", "0"]}, ["0", "2"]),
        ({"exclude": "2"}, ["0"]),
        ({"include": "?", "exclude": ["0"]}, ["2"]),
    ],
    ids=str,
)
def test_groups_may_be_chosen_by_pattern(patterns, taken):
    assert [group.name for group in ContinualBackprop(mlp(), **patterns).groups] == taken


def test_the_seed_is_the_one_of_torch_unless_given():
    torch.manual_seed(123)
    assert ContinualBackprop(mlp()).state_dict()["seed"] == 0  # mlp() seeds with 0
    assert ContinualBackprop(mlp(), seed=-5).state_dict()["seed"] == -5


@pytest.mark.parametrize(("dtype", "utility"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_what_is_kept_of_a_unit(backend, dtype, utility):
    cbp = ContinualBackprop(mlp(dtype), backend=backend)
    assert {name: (u.shape, u.dtype) for name, u in cbp.utility.items()} == dict.fromkeys(("0", "2"), ((16,), utility))
    assert {name: (a.shape, a.dtype) for name, a in cbp.age.items()} == dict.fromkeys(("0", "2"), ((16,), torch.int32))
    assert cbp.num_replaced == {"0": 0, "2": 0}
    assert {name: units.tolist() for name, units in cbp.last_replaced.items()} == {"0": [], "2": []}


def test_repr_is_a_table_of_the_groups(backend):
    cbp = ContinualBackprop(mlp(), rule="gnt", replacement_rate=1e-3, backend=backend)
    head, titles, *rows = repr(cbp).splitlines()
    for part in ("gnt", "replacement_rate=0.001", "maturity_threshold=100", "decay_rate=0.99", f"backend={backend}"):
        assert part in head
    assert titles.split() == ["group", "units", "incoming", "norms", "outgoing"]
    assert [row.split() for row in rows] == [["0", "16", "0", "-", "2"], ["2", "16", "2", "3", "5"]]
    cbp.remove()
    assert "removed" in repr(cbp)


# what it refuses


NARROW = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
CONV = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3))

BAD_ARGUMENTS = {
    "rate below 0": ({"replacement_rate": -1e-9}, ValueError, "replacement_rate is -1e-09"),
    "rate above 1": ({"replacement_rate": 1.5}, ValueError, "replacement_rate is 1.5"),
    "rate nan": ({"replacement_rate": math.nan}, ValueError, "replacement_rate is nan"),
    "rate no number": ({"replacement_rate": "1e-4"}, TypeError, "replacement_rate is '1e-4'"),
    "rate true": ({"replacement_rate": True}, TypeError, "replacement_rate is True"),
    "threshold negative": ({"maturity_threshold": -1}, ValueError, "maturity_threshold is -1"),
    "threshold infinite": ({"maturity_threshold": math.inf}, ValueError, "maturity_threshold is inf"),
    "threshold none": ({"maturity_threshold": None}, TypeError, "maturity_threshold is None"),
    "decay below 0": ({"decay_rate": -0.1}, ValueError, "decay_rate is -0.1"),
    "decay 1": ({"decay_rate": 1}, ValueError, "decay_rate is 1"),
    "decay above 1": ({"decay_rate": 1.01}, ValueError, "decay_rate is 1.01"),
    "rule": ({"rule": "naturally"}, ValueError, "naturally.* nature, gnt, clarena"),
    "backend": ({"backend": "cuda"}, ValueError, "cuda.* reference, cpp"),
    "capture": ({"capture": "late"}, ValueError, "late.* auto"),
    "seed of 65 bits": ({"seed": 2**64}, ValueError, "seed is 18446744073709551616"),
    "seed no integer": ({"seed": 1.0}, ValueError, "seed is 1.0"),
    "optimizer": ({"optimizer": "adam"}, TypeError, "optimizer"),
    "optimizer type": ({"optimizer": torch.optim.SGD}, TypeError, "optimizer"),
    "optimizer number": ({"optimizer": 3}, TypeError, "optimizer is a int"),
    "optimizer of another model": (
        {"optimizer": momentum(mlp())},
        ValueError,
        "does not hold 0.weight of group '0'",
    ),
    "include of another type": ({"include": [3]}, TypeError, "include holds 3, must be patterns of group names"),
    "include": ({"include": "conv*"}, ValueError, r"include='conv\*'.* 0, 2"),
    "exclude": ({"exclude": ["0", "x"]}, ValueError, "exclude='x'"),
    "nothing left": ({"exclude": "*"}, ValueError, "include= and exclude= leave no unit group .* 0, 2"),
    "no groups": ({"groups": []}, ValueError, "groups is empty"),
    "widths": ({"groups": [UnitGroup("g", ["0"], ["0"])]}, ValueError, "'0'"),
    "unknown layer": ({"groups": [UnitGroup("g", ["0"], ["7"])]}, ValueError, "no module '7'"),
    "not a group": ({"groups": ["0"]}, TypeError, "UnitGroup"),
    "shared layer": ({"groups": [UnitGroup(n, ["0"], ["2"]) for n in "ab"]}, ValueError, "'a' and 'b'"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_arguments_are_refused_and_nothing_is_attached(everything, arguments, error, message):
    model = mlp()
    optimizer = momentum(model)
    before = everything(model, optimizer), hooks_of(model, optimizer)
    with pytest.raises(error, match=message):
        ContinualBackprop(model, **{"optimizer": optimizer, **arguments})
    assert (everything(model, optimizer), hooks_of(model, optimizer)) == before


BAD_MODELS = {
    "no module": ([nn.Linear(2, 2)], {}, TypeError, "model is a list"),
    "one layer": (nn.Linear(3, 2), {}, ValueError, "no unit group"),
    "nothing that reads": (nn.Sequential(nn.Linear(3, 2), nn.ReLU()), {}, ValueError, "output"),
    "widths": (NARROW, {"groups": [UnitGroup("g", ["0"], ["4"])]}, ValueError, "'4'.* reads 8 .* 6 units"),
    "norm": (mlp(), {"groups": [UnitGroup("g", ["0"], ["2"], ["1"])]}, TypeError, r"'1' \(ReLU\)"),
    "clarena on a convolution": (CONV, {"rule": "clarena"}, ValueError, "clarena.* '0' has convolutions"),
    "clarena after fewer inputs": (NARROW, {"rule": "clarena"}, ValueError, "'0' has 4 inputs.* '2' has 8 units"),
}


@pytest.mark.parametrize(("model", "options", "error", "message"), BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_a_model_that_does_not_fit_is_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        ContinualBackprop(model, **options)


@pytest.mark.parametrize("widths", [(3, 0, 2), (0, 3, 2)], ids=["no units", "no inputs"])
def test_a_layer_without_weights_is_refused_by_name(widths):
    layers = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    for layer, (fan_in, fan_out) in zip(layers, itertools.pairwise(widths), strict=True):
        layer.weight = nn.Parameter(torch.empty(fan_out, fan_in))
    with pytest.raises(ValueError, match="'0'"):
        ContinualBackprop(nn.Sequential(*layers), groups=[UnitGroup("g", ["0"], ["1"])])


def test_a_model_without_groups_is_told_why():
    with pytest.raises(ValueError, match="Softmax"):
        ContinualBackprop(nn.Sequential(nn.Linear(3, 4), nn.Softmax(1), nn.Linear(4, 2)))


def test_attaching_twice_is_refused(attached, everything):
    model, optimizer, cbp, _ = attached
    before = everything(model, optimizer, cbp), hooks_of(model, optimizer)
    with pytest.raises(ValueError, match="attached already"):
        ContinualBackprop(model, optimizer)
    assert (everything(model, optimizer, cbp), hooks_of(model, optimizer)) == before


def test_other_groups_of_the_model_may_have_another_one():
    model = mlp()
    one, other = ContinualBackprop(model, include="0"), ContinualBackprop(model, include="2")
    model(torch.randn(4, 6))
    one.step()
    assert (one.age["0"].max(), other.age["2"].max()) == (1, 0)


@pytest.mark.parametrize("rule", ["nature", "clarena"])
def test_a_collision_of_random_streams_is_refused(monkeypatch, rule):
    for module in (arrangement, regions):
        monkeypatch.setattr(module, "stream_id", lambda name, group=False: 5 + group)
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight"):
        ContinualBackprop(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)), rule=rule)


def test_a_deviation_that_is_not_finite_is_refused():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"as_attached.*0\.weight, which has entries that are not finite"):
        ContinualBackprop(model, rule=Rule.nature(init="as_attached"))


def test_it_is_neither_copied_nor_pickled(attached):
    cbp = attached[2]
    for take in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            take(cbp)


# what can be set and read


def test_rates_may_change_between_steps(backend):
    model = mlp()
    optimizer = momentum(model)
    cbp = ContinualBackprop(model, optimizer, replacement_rate=0, maturity_threshold=50, backend=backend)
    stream = Stream(model, optimizer)
    stream.train(3)
    cbp.replacement_rate, cbp.maturity_threshold = 1, 3
    stream.train()
    assert cbp.num_replaced == {"0": 16, "2": 16}
    assert (cbp.replacement_rate, cbp.maturity_threshold, cbp.decay_rate) == (1, 3, 0.99)
    cbp.decay_rate = 0
    stream.train()
    h, reader = [], model[5]
    handle = reader.register_forward_pre_hook(lambda module, args: h.append(args[0]))
    stream.train()
    handle.remove()
    expected = h[0].detach().abs().mean(0) * reader.weight.detach().abs().sum(0)
    torch.testing.assert_close(cbp.utility["2"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "value"), [("replacement_rate", 2), ("maturity_threshold", -1), ("decay_rate", 1.0), ("decay_rate", None)]
)
def test_a_bad_rate_is_refused_and_the_old_one_kept(attached, everything, name, value):
    cbp = attached[2]
    before = everything(cbp)
    with pytest.raises((ValueError, TypeError), match=name):
        setattr(cbp, name, value)
    assert everything(cbp) == before


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("replacment_rate", 0.5, AttributeError, "ContinualBackprop has no 'replacment_rate' to set"),
        ("rule", "gnt", AttributeError, "rule"),
        ("groups", [], AttributeError, "groups"),
        ("enabled", "no", TypeError, "enabled is 'no', must be True or False"),
    ],
)
def test_settings_that_are_none(name, value, error, message):
    model = mlp()
    cbp = ContinualBackprop(model, **EAGER)
    before = repr(cbp)
    with pytest.raises(error, match=message):
        setattr(cbp, name, value)
    assert repr(cbp) == before


def test_totals_and_the_last_step(attached):
    _, _, cbp, stream = attached
    totals = cbp.num_replaced
    for _ in range(10):
        stream.train()
        last = cbp.last_replaced
        totals = {name: n + len(last[name]) for name, n in totals.items()}
        assert cbp.num_replaced == totals
        for name, units in last.items():
            assert units.dtype == torch.int64
            assert (cbp.age[name][units] == 0).all()
    assert sum(totals.values()) > 10


def test_compiled_kernels_do_not_serve_another_device():
    cbp = ContinualBackprop(mlp(), backend="cpp")
    with pytest.raises(ValueError, match="'cpp' serves CPU"):
        cbp.to("meta")
    assert cbp.backend == "cpp"


def test_to_where_it_is_changes_nothing(attached, everything):
    cbp = attached[2]
    before = everything(cbp)
    assert cbp.to("cpu") is cbp
    assert everything(cbp) == before


# what it leaves alone


def test_the_random_generators_are_untouched(attached):
    _, _, cbp, stream = attached
    before, total = torch.get_rng_state(), sum(cbp.num_replaced.values())
    stream.train(5)
    assert sum(cbp.num_replaced.values()) > total
    assert torch.equal(torch.get_rng_state(), before)


def graph_size(loss):
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize("capture", ["inline", "deferred"])
@pytest.mark.parametrize("rule", ["nature", Rule.gnt("zero_contribution", transfer_bias=True)], ids=["nature", "gnt"])
def test_the_autograd_graph_does_not_grow(backend, rule, capture):
    model = mlp()
    stream = Stream(model, momentum(model))
    size = graph_size(stream.loss())
    cbp = ContinualBackprop(model, stream.optimizer, rule=rule, capture=capture, backend=backend, **EAGER)
    for _ in range(6):
        loss = stream.loss()
        assert graph_size(loss) == size
        stream.optimizer.zero_grad()
        loss.backward()
        stream.optimizer.step()
        tensors = [value for value in vars(cbp._engine.state).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) > 10
        assert all(t.grad_fn is None and not t.requires_grad for t in tensors)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_backward_through_weights_that_were_replaced_raises(attached):
    _model, _, cbp, stream = attached
    stream.train()
    loss = stream.loss()
    cbp.replacement_rate = 1
    cbp.step()
    assert len(cbp.last_replaced["2"]) > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_through_weights_that_were_not_replaced_works(attached):
    _, _, cbp, stream = attached
    cbp.replacement_rate = 0
    loss = stream.loss()
    cbp.step()
    assert not any(len(units) for units in cbp.last_replaced.values())
    loss.backward()


def test_num_batches_tracked_is_left(attached):
    model, _, cbp, _ = attached
    assert cbp.num_replaced["2"] > 0
    assert model[3].num_batches_tracked == 5
