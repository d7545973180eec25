"""The attached object: what it takes and refuses, what it observes, when it steps, and that it leaves no trace."""

import copy
import io
import itertools
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import cbp_fast
import cbp_fast.state.state
from cbp_fast import ContinualBackprop, Rule, UnitGroup

EAGER = {"replacement_rate": 0.1, "maturity_threshold": 2, "decay_rate": 0.9, "seed": 7}


def mlp(dtype=torch.float32, width=16):
    torch.manual_seed(0)
    layers = [nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 3)).to(dtype)


def momentum(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


class Stream:
    """The same batches every time; sizes differ."""

    def __init__(self, model, optimizer, dtype=torch.float32):
        self.model, self.optimizer, self.dtype = model, optimizer, dtype
        self.generator = torch.Generator().manual_seed(3)

    def batch(self, size=8):
        return torch.randn(size, 6, generator=self.generator).to(self.dtype)

    def loss(self, size=8):
        return (self.model(self.batch(size)) - 1).square().mean()

    def train(self, steps=1):
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()


@pytest.fixture
def attached(backend):
    """A model in training, after a few steps of which some replaced units."""
    model = mlp()
    optimizer = momentum(model)
    cbp = ContinualBackprop(model, optimizer, backend=backend, **EAGER)
    stream = Stream(model, optimizer)
    stream.train(5)
    assert sum(cbp.num_replaced.values()) > 0
    return model, optimizer, cbp, stream


def hooks_of(*objects):
    """Every hook on modules and optimizers, by owner and kind."""
    owners = [owner for o in objects for owner in (o.modules() if isinstance(o, nn.Module) else [o])]
    return [{kind: dict(hooks) for kind, hooks in vars(owner).items() if "hooks" in kind} for owner in owners]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


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


def _compiled_in_place(model):
    model.compile(backend="eager")
    return model


def _with_a_compiled_part(model):
    model[2].compile(backend="eager")
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("called", [False, True], ids=["never called", "called"])
@pytest.mark.parametrize(
    "compiled",
    [lambda model: torch.compile(model, backend="eager"), _compiled_in_place, _with_a_compiled_part],
    ids=["wrapped", "in place", "a part"],
)
def test_a_model_may_be_compiled_already(compiled, called):
    results = []
    for how in (lambda model: model, compiled):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = how(mlp())
        optimizer = momentum(model)
        stream = Stream(model, optimizer)
        if called:
            stream.train(3)
        cbp = ContinualBackprop(model, optimizer, maturity_threshold=2, replacement_rate=0.2, seed=0)
        stream.train(10)
        assert sum(cbp.num_replaced.values()) > 0
        results.append([*cbp.age.values(), *cbp.last_replaced.values(), *(p.detach() for p in model.parameters())])
        # what is compiled holds it
        cbp.remove()
    assert all(map(torch.equal, *results))


def test_refresh_follows_a_new_optimizer(attached):
    model, _, cbp, stream = attached
    ages = cbp.age["0"].clone()
    stream.optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with pytest.warns(UserWarning, match=r"Call refresh\(optimizer="):
        stream.train(1)
    assert torch.equal(cbp.age["0"], ages)
    cbp.refresh(optimizer=stream.optimizer)
    stream.train(6)
    assert cbp.age["0"].max() == ages.max() + 6
    units = cbp.last_replaced["0"]
    assert len(units)
    assert not stream.optimizer.state[model[0].weight]["exp_avg"][units].any()


def test_a_layer_frozen_later_is_named(attached, everything):
    model, _, cbp, stream = attached
    model[5].weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"5\.weight was frozen .* call refresh\(\), or exclude= its group"):
        stream.train(30)
    before = everything(model, cbp)
    cbp.refresh()
    assert list(cbp.age) == ["0"]
    assert before.keys() != everything(model, cbp).keys()
    stream.train(10)


def test_looking_at_a_model_is_no_forward(backend, everything):
    """Discovery, and the check by changing weights, run a model that is attached already."""
    model = mlp()
    cbp = ContinualBackprop(model, include="0", backend=backend, capture="inline")
    layer = cbp_fast.CBPLinear(model[2], model[5], bn_layer=model[3])
    model.insert(5, layer)
    before = everything(cbp), everything(model)
    example = torch.randn(4, 6)
    (group,) = cbp_fast.find_unit_groups(model, example, verify=True)[:1]
    cbp.refresh(example_inputs=example)
    assert (everything(cbp), everything(model)) == before
    assert not layer._engine.has_data
    assert group.name == "0"


class TwoInputs(nn.Module):
    """Its forward takes what cannot be guessed."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x, scale):
        return self.out((self.hidden(x) * scale).relu())


def test_without_inputs_groups_are_found_in_the_first_training_forward(backend, everything):
    """From there on it is as if attached with example_inputs."""
    results = []
    for example_inputs in (None, (torch.randn(2, 6), 2.0)):
        torch.manual_seed(0)
        model = TwoInputs()
        optimizer = momentum(model)
        cbp = ContinualBackprop(model, optimizer, example_inputs=example_inputs, backend=backend, **EAGER)
        if example_inputs is None:
            assert (cbp.groups, cbp.utility, cbp.num_replaced) == ([], {}, {})
            assert "found in the first training forward" in repr(cbp)
            with torch.no_grad():
                model(torch.randn(2, 6), 1.0)
            assert cbp.groups == []
        stream = torch.Generator().manual_seed(1)
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 6, generator=stream), scale=2.0).sum().backward()
            optimizer.step()
        assert cbp.groups == [UnitGroup("hidden", ("hidden",), ("out",))]
        results.append(everything(model, optimizer, cbp))
        cbp.remove()
        assert not any(module._forward_pre_hooks for module in model.modules())
    assert results[0] == results[1]


def test_a_state_loaded_before_the_first_forward_is_gone_on_from(backend):
    model = TwoInputs()
    attached = ContinualBackprop(model, example_inputs=(torch.randn(2, 6), 2.0), backend=backend, seed=11)
    model(torch.randn(4, 6), 1.0)
    attached.step()
    attached.remove()
    state = attached.state_dict()
    cbp = ContinualBackprop(model, backend=backend)
    with pytest.raises(RuntimeError, match="no state yet"):
        cbp.state_dict()
    cbp.load_state_dict(state)
    model(torch.randn(4, 6), 1.0)
    assert cbp.state_dict()["step"] == 1
    same(cbp.utility["hidden"], state["groups"]["hidden"]["utility"])


def test_a_first_forward_without_groups_says_why():
    class Sum(TwoInputs):
        def forward(self, x, scale):
            return self.hidden(x) * scale

    model = Sum()
    ContinualBackprop(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="the model has no unit group to work on"):
            model(torch.randn(2, 6), 1.0)
    assert not any(module._forward_pre_hooks for module in model.children())


def test_a_replaced_layer_is_named_and_refresh_follows_it(attached, everything):
    model, _, cbp, stream = attached
    before = everything(cbp)
    ages = {name: age.clone() for name, age in cbp.age.items()}
    model[2] = nn.Linear(16, 16)
    stream.loss()
    with pytest.raises(RuntimeError, match="'2' was replaced after attaching; call refresh"):
        cbp.step()
    with pytest.raises(ValueError, match=r"the optimizer does not hold 2\.weight"):
        cbp.refresh()
    assert everything(cbp) == before
    cbp._optimizers[0].add_param_group({"params": model[2].parameters()})
    cbp.refresh()
    assert {name: age.tolist() for name, age in cbp.age.items()} == {n: age.tolist() for n, age in ages.items()}
    stream.train(1)
    assert cbp.age["0"].max() == ages["0"].max() + 1


@pytest.mark.parametrize("rule", ["nature", Rule.gnt("zero_contribution", transfer_bias=True)])
def test_refresh_keeps_what_was_known_and_adds_what_is_new(backend, rule, everything):
    """A task that brings a head, and a layer before it."""
    model = nn.ModuleDict({"body": nn.Linear(6, 16), "a": nn.Linear(16, 3)})
    optimizer = momentum(model)
    body = UnitGroup("body", "body", "a")
    cbp = ContinualBackprop(model, optimizer, groups=body, rule=rule, backend=backend, **EAGER)

    def train(steps):
        for _ in range(steps):
            h = model["body"](torch.randn(8, 6)).relu()
            heads = [model["a"](h)] + ([model["b"](model["more"](h).relu())] if "b" in model else [])
            optimizer.zero_grad()
            sum((head - 1).square().mean() for head in heads).backward()
            optimizer.step()

    train(6)
    before = cbp.state_dict()
    model.update({"more": nn.Linear(16, 4), "b": nn.Linear(4, 3)})
    for layer in ("more", "b"):
        optimizer.add_param_group({"params": model[layer].parameters()})
    cbp.refresh(groups=[UnitGroup("body", "body", ["a", "more"]), UnitGroup("more", "more", "b")])
    after = cbp.state_dict()
    for key in ("utility", "age", "pending", "num_replaced"):
        assert everything_equal(after["groups"]["body"][key], before["groups"]["body"][key])
    if "running_mean" in after["groups"]["body"]:
        same(after["groups"]["body"]["running_mean"][:16], before["groups"]["body"]["running_mean"])
    assert {k: after[k] for k in ("seed", "step", "replacement_rate")} == {
        k: before[k] for k in ("seed", "step", "replacement_rate")
    }
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 3
    train(9)
    assert cbp.num_replaced["more"] > 0


def everything_equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("rule", ["nature", "clarena"])
def test_a_collision_of_random_streams_is_refused(monkeypatch, rule):
    monkeypatch.setattr(cbp_fast.state.state, "stream_id", lambda name, group=False: 5 + group)
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight"):
        ContinualBackprop(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)), rule=rule)


def test_it_is_neither_copied_nor_pickled(attached):
    cbp = attached[2]
    for take in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="state_dict"):
            take(cbp)


# what is observed


def observed(cbp):
    """Whether a forward was seen since the last step."""
    before = cbp.state_dict()["step"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no training forward")
        cbp.step()
    return cbp.state_dict()["step"] > before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients_is_not_observed(backend, context):
    model = mlp()
    cbp = ContinualBackprop(model, backend=backend)
    with context():
        model(torch.randn(4, 6))
    assert not observed(cbp)


def test_a_forward_in_eval_mode_is_not_observed(backend):
    model = mlp().eval()
    cbp = ContinualBackprop(model, backend=backend)
    model(torch.randn(4, 6))
    assert not observed(cbp)
    model.train()
    model(torch.randn(4, 6))
    assert observed(cbp)


def test_a_first_step_without_a_forward_is_said_once(backend):
    model = mlp()
    cbp = ContinualBackprop(model, backend=backend)
    with pytest.warns(UserWarning, match="no training forward of the model was seen before the first step"):
        cbp.step()
    cbp.step()
    assert cbp.state_dict()["step"] == 0


def test_evaluation_between_steps_changes_nothing(backend, everything):
    results = []
    for evaluate in (False, True):
        model = mlp()
        optimizer = momentum(model)
        cbp = ContinualBackprop(model, optimizer, backend=backend, **EAGER)
        stream = Stream(model, optimizer)
        for _ in range(6):
            stream.train()
            if evaluate:
                model.eval()
                model(torch.randn(50, 6) * 100)
                model.train()
        results.append(everything(model, optimizer, cbp))
    assert results[0] == results[1]


def test_an_input_given_by_name_is_observed(backend):
    incoming, reader = nn.Linear(2, 3), nn.Linear(3, 1)
    model = nn.ModuleList([incoming, reader])
    cbp = ContinualBackprop(model, groups=[UnitGroup("g", [incoming], [reader])], backend=backend)
    reader(input=torch.ones(1, 3))
    assert observed(cbp)


def test_disabled_it_neither_observes_nor_steps(backend, everything):
    model = mlp()
    optimizer = momentum(model)
    cbp = ContinualBackprop(model, optimizer, backend=backend, **EAGER)
    stream = Stream(model, optimizer)
    stream.train(5)
    cbp.enabled = False
    before = everything(cbp)
    stream.train(3)
    cbp.step()
    assert everything(cbp) == before
    cbp.enabled = True
    # nothing of the forwards in between is left
    cbp.step()
    assert not any(len(units) for units in cbp.last_replaced.values())
    stream.train()
    assert cbp.state_dict()["step"] == 6


@pytest.mark.parametrize("rule", ["nature", "clarena", Rule.gnt("zero_contribution")], ids=["nature", "clarena", "gnt"])
def test_activations_held_and_summed_at_once_are_the_same_bits(backend, everything, rule):
    results = {}
    for capture in ("deferred", "inline", "auto"):
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p)
        optimizer = momentum(model)
        cbp = ContinualBackprop(model, optimizer, rule=rule, capture=capture, backend=backend, **EAGER)
        stream = Stream(model, optimizer)
        for _ in range(6):
            optimizer.zero_grad()
            for size in (5, 1, 17):
                stream.loss(size).backward()
            optimizer.step()
        results[capture] = everything(model, optimizer, cbp)
    assert results["deferred"] == results["inline"] == results["auto"]


def test_what_is_held_is_summed_before_what_no_longer_fits(backend):
    utility = []
    for capture in ("inline", "auto"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 2))
        cbp = ContinualBackprop(model, rule=Rule.gnt("zero_contribution"), capture=capture, backend=backend)
        for i in range(4):
            # 1.5 MB each; a distance is one from the mean of the forwards so far
            model(torch.randn(6000, 6, generator=torch.Generator().manual_seed(i)) * (i + 1) + i)
        cbp.step()
        utility.append(cbp.utility["0"])
    same(*utility)


def test_accumulated_uneven_batches_give_the_pooled_mean(backend):
    utility = []
    for sizes in ((23,), (5, 1, 17)):
        # no batch norm, which would see the batches by themselves
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        cbp = ContinualBackprop(model, backend=backend)
        x = torch.randn(23, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for part in x.split(sizes):
            model(part)
        cbp.step()
        utility.append(cbp.utility["0"])
    torch.testing.assert_close(*utility, rtol=1e-14, atol=0)


def test_by_default_little_is_held(backend):
    model = mlp(width=256)
    cbp = ContinualBackprop(model, backend=backend)
    model(torch.randn(1024, 6))
    first = cbp._engine.held_bytes
    assert first == 2 * 1024 * 256 * 4
    for _ in range(4):
        model(torch.randn(1024, 6))
    assert cbp._engine.held_bytes <= 4 * 2**20
    cbp.step()
    assert cbp._engine.held_bytes == 0


class InPlace(nn.Module):
    """Changes what its reader has read, after it was read."""

    def __init__(self, change):
        super().__init__()
        self.incoming, self.reader, self.change = nn.Linear(6, 4), nn.Linear(4, 2), change

    def forward(self, x):
        h = self.incoming(x)
        y = self.reader(h.detach())
        if self.change:
            h.data.mul_(1)
            h.detach().mul_(100)
        return y


def attach_in_place(backend, change, **options):
    torch.manual_seed(0)
    model = InPlace(change)
    groups = [UnitGroup("g", ["incoming"], ["reader"])]
    return model, ContinualBackprop(model, groups=groups, backend=backend, **options)


def test_an_activation_changed_in_place_is_not_used(backend):
    model, cbp = attach_in_place(backend, change=True)
    model(torch.ones(3, 6))
    assert not observed(cbp)


@pytest.mark.parametrize("capture", ["auto", "deferred"])
def test_a_reader_whose_input_is_changed_is_summed_at_once_from_then_on(backend, capture):
    model, cbp = attach_in_place(backend, change=True, capture=capture)
    plain, expected = attach_in_place(backend, change=False, capture="inline")
    model(torch.ones(3, 6))
    cbp.step()
    for m, c in ((model, cbp), (plain, expected)):
        m(torch.ones(3, 6))
        c.step()
    same(cbp.utility["g"], expected.utility["g"])
    assert cbp.age["g"].tolist() == [1] * 4


def test_an_activation_changed_in_place_does_not_stop_the_others(backend):
    model, cbp = attach_in_place(backend, change=True)
    model(torch.ones(3, 6))
    model.change = False
    model(torch.ones(2, 6))
    assert observed(cbp)
    h = model.incoming(torch.ones(2, 6))
    expected = (1 - 0.99) * h.abs().mean(0).detach() * model.reader.weight.detach().abs().sum(0)
    torch.testing.assert_close(cbp.utility["g"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forwards_leave_the_mean_right(backend, reentrant):
    utility = []
    for recompute in (False, True):
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p)
        cbp = ContinualBackprop(model, backend=backend)
        x = torch.ones(5, 6, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.sum().backward()
        cbp.step()
        utility.append(cbp.utility["0"])
    same(*utility)


@pytest.mark.parametrize("capture", ["inline", "deferred"])
def test_gradients_of_single_samples_are_not_observed(backend, capture):
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    cbp = ContinualBackprop(model, capture=capture, backend=backend)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    assert gradients(dict(model.named_parameters()), torch.randn(5, 6))["0.weight"].shape == (5, 4, 6)
    assert not observed(cbp)
    model(torch.randn(5, 6))
    assert observed(cbp)


def test_a_compiled_model_is_observed_in_one_graph(everything):
    import torch._dynamo.testing  # takes a second

    results = []
    for compiled in (False, True):
        model = mlp()
        optimizer = momentum(model)
        cbp = ContinualBackprop(model, optimizer, **EAGER)
        counter = torch._dynamo.testing.CompileCounter()
        stream = Stream(torch.compile(model, backend=counter) if compiled else model, optimizer)
        stream.train(20)
        results.append(everything(model, optimizer, cbp))
    assert sum(cbp.num_replaced.values()) > 10
    assert results[0] == results[1]
    assert counter.frame_count == 1


def test_a_compiled_model_may_see_batches_of_any_size(everything):
    results = []
    for compiled in (False, True):
        model = mlp()
        optimizer = momentum(model)
        cbp = ContinualBackprop(model, optimizer, **EAGER)
        stream = Stream(torch.compile(model, backend="eager") if compiled else model, optimizer)
        for size in (8, 4, 5, 6, 8, 3) * 3:
            optimizer.zero_grad()
            stream.loss(size).backward()
            optimizer.step()
        results.append(everything(model, optimizer, cbp))
    assert sum(cbp.num_replaced.values()) > 8
    assert results[0] == results[1]


@pytest.mark.parametrize("capture", ["inline", "deferred"])
def test_what_is_stored_as_its_negative_is_read_as_it_is(backend, capture):
    h = torch.randn(5, 4, requires_grad=True)
    utility = []
    for lazy in (False, True):
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
        for layer in model:
            nn.init.ones_(layer.weight)
        group = UnitGroup("g", [model[0]], [model[1]])
        # where the sign is seen: in the mean of both steps
        rule = Rule.gnt(utility="adaptable_contribution")
        cbp = ContinualBackprop(model, groups=group, rule=rule, capture=capture, backend=backend)
        for step in range(2):
            model[1](torch._neg_view(-h) if lazy and step else h)
            cbp.step()
        utility.append(cbp.utility["g"])
    same(*utility)
    assert utility[0].count_nonzero() == 4


class Standing(torch.Tensor):
    """Has no memory of its own: it stands for a tensor, which every function gets in its place."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=True)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        return function(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))


@pytest.mark.parametrize("capture", ["inline", "deferred"])
def test_what_only_stands_for_a_tensor_is_read_as_that(capture):
    h, utility = torch.randn(5, 4), []
    for inner in (h, Standing(h)):
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
        nn.init.ones_(model[1].weight)
        cbp = ContinualBackprop(model, groups=UnitGroup("g", [model[0]], [model[1]]), capture=capture, backend="cpp")
        model[1](inner)
        cbp.step()
        utility.append(cbp.utility["g"])
    same(*utility)
    assert utility[0].count_nonzero() == 4


# when it steps


def test_a_compiled_step_of_the_optimizer_is_followed(everything):
    results = []
    for compiled in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        cbp = ContinualBackprop(model, optimizer, **EAGER)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        stream = Stream(model, optimizer)
        with warnings.catch_warnings():
            # no complaint of functions that torch.compile does not know
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "Dynamo")
            for _ in range(12):
                optimizer.zero_grad()
                stream.loss().backward()
                step()
        results.append(everything(model, cbp))
    assert sum(cbp.num_replaced.values()) > 4
    assert results[0] == results[1]


def test_it_steps_after_the_optimizer(backend):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cbp = ContinualBackprop(model, optimizer, replacement_rate=1, maturity_threshold=0, backend=backend)
    Stream(model, optimizer).train()
    # the update would have moved the zeroed weights away
    assert (model[5].weight == 0).all()
    assert cbp.state_dict()["step"] == 1


def test_without_an_optimizer_it_steps_when_told(backend, everything):
    results = []
    for hooked in (True, False):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        cbp = ContinualBackprop(model, optimizer if hooked else None, backend=backend, **EAGER)
        stream = Stream(model, optimizer)
        for _ in range(5):
            stream.train()
            if not hooked:
                cbp.step()
        results.append(everything(model, cbp))
    assert results[0] == results[1]


def test_of_several_optimizers_the_last_to_step_is_followed(backend):
    model = mlp()
    optimizers = [torch.optim.SGD(model[i:].parameters(), 0.0) for i in (0, 2, 5)]
    optimizers[0].param_groups[0]["params"] = list(model[:2].parameters())
    cbp = ContinualBackprop(model, optimizers, backend=backend)
    steps = []
    for i in (0, 0, 2, 0, 1, 2, 1, 1, 0):
        model(torch.randn(4, 6))
        optimizers[i].step()
        steps.append(cbp.state_dict()["step"])
    assert steps == [0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_an_optimizer_given_twice_is_one(backend):
    model = mlp()
    optimizer = momentum(model)
    cbp = ContinualBackprop(model, [optimizer, optimizer], backend=backend)
    Stream(model, optimizer).train(3)
    assert cbp.state_dict()["step"] == 3


def test_state_of_several_optimizers_is_reset(backend):
    model = mlp()
    optimizers = [torch.optim.Adam(model[:2].parameters()), torch.optim.SGD(model[2:].parameters(), 0.1, momentum=0.9)]
    cbp = ContinualBackprop(model, optimizers, replacement_rate=1, maturity_threshold=0, backend=backend)
    Stream(model, None).loss().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert cbp.num_replaced == {"0": 16, "2": 16}
    assert (optimizers[0].state[model[0].weight]["exp_avg"] == 0).all()
    assert (optimizers[1].state[model[2].weight]["momentum_buffer"] == 0).all()


def test_a_step_skipped_by_a_grad_scaler_is_no_step(backend, everything):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    cbp = ContinualBackprop(model, optimizer, backend=backend, **EAGER)
    stream = Stream(model, optimizer)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(stream.loss() * (math.inf if step == 4 else 1)).backward()
        before = everything(model, optimizer, cbp)
        scaler.step(optimizer)
        assert (everything(model, optimizer, cbp) == before) is (step == 4)
        scaler.update()
    assert cbp.state_dict()["step"] == 5


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


# taking it off


def test_remove_leaves_no_trace(backend):
    model = mlp()
    optimizer = momentum(model)
    model[2].register_forward_pre_hook(lambda module, args: None)
    optimizer.register_step_post_hook(lambda *_: None)
    before = hooks_of(model, optimizer)
    cbp = ContinualBackprop(model, optimizer, backend=backend)
    assert hooks_of(model, optimizer) != before
    cbp.remove()
    assert hooks_of(model, optimizer) == before


def test_a_removed_object_does_not_step(attached, everything):
    model, optimizer, cbp, stream = attached
    cbp.remove()
    cbp.remove()
    before = everything(cbp)
    stream.train(3)
    assert everything(cbp) == before
    with pytest.raises(RuntimeError, match="removed"):
        cbp.step()
    ContinualBackprop(model, optimizer)


def remove_in_a_step(cbp, optimizer, stream, first):
    """Take it off inside a hook of the optimizer, before or after its own; which hooks ran in that step."""
    ran = []

    def remove(*_):
        if not ran:
            cbp.remove()
        ran.append("remove")

    handles = [optimizer.register_step_post_hook(remove), optimizer.register_step_post_hook(lambda *_: ran.append(1))]
    if first:
        optimizer._optimizer_step_post_hooks.move_to_end(handles[0].id, last=False)
    stream.train()
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("first", [True, False], ids=["before its own", "after its own"])
def test_remove_inside_a_step_breaks_no_loop(attached, everything, first):
    model, optimizer, cbp, stream = attached
    age = cbp.state_dict()["step"]
    assert remove_in_a_step(cbp, optimizer, stream, first) == ["remove", 1]
    assert cbp.state_dict()["step"] == age + (not first)
    before = everything(cbp)
    stream.train()
    assert everything(cbp) == before
    assert not any(hooks for owner in hooks_of(model, optimizer) for kind, hooks in owner.items() if "step" not in kind)
    assert not optimizer._optimizer_step_post_hooks


def test_a_model_can_be_saved_right_after_a_remove_inside_a_step(attached):
    model, optimizer, cbp, stream = attached
    remove_in_a_step(cbp, optimizer, stream, first=False)
    restored = pickle.loads(pickle.dumps(model))
    same(restored.state_dict(), model.state_dict())


def test_a_copied_model_carries_nothing_of_it(attached, everything):
    model, _, cbp, _ = attached
    other = copy.deepcopy(model)
    before = everything(cbp)
    F.mse_loss(other(torch.randn(4, 6)), torch.zeros(4, 3)).backward()
    assert everything(cbp) == before
    same(other.state_dict()["0.weight"], model.state_dict()["0.weight"])
    mine = ContinualBackprop(other, momentum(other))
    mine.remove()


def test_an_averaged_model_carries_nothing_of_it(attached, everything):
    model, _, cbp, _stream = attached
    averaged = torch.optim.swa_utils.AveragedModel(model)
    before = everything(cbp)
    averaged(torch.randn(4, 6))
    averaged.update_parameters(model)
    assert everything(cbp) == before


def test_a_pickled_model_carries_nothing_of_it(attached, everything):
    model, _, cbp, _ = attached
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    before = everything(cbp)
    other(torch.randn(4, 6))
    assert everything(cbp) == before
    ContinualBackprop(other)


# a model that changed under it: an error with the name, and nothing happened


def failing_step(cbp, message):
    with pytest.raises(RuntimeError, match=message):
        cbp.step()


def replaced_parameter(module, key, change):
    def apply(model):
        owner = model[module]
        setattr(owner, key, nn.Parameter(change(getattr(owner, key).detach())))

    return apply


CHANGES = {
    "weight wider": (replaced_parameter(2, "weight", lambda w: w.repeat(1, 2)), r"2\.weight has shape \(16, 32\)"),
    "weight shorter": (replaced_parameter(5, "weight", lambda w: w[:2]), r"5\.weight has shape \(2, 16\)"),
    "weight flat": (replaced_parameter(0, "weight", lambda w: w.flatten()), r"0\.weight has shape \(96,\)"),
    "weight double": (replaced_parameter(2, "weight", lambda w: w.double()), r"2\.weight has dtype torch\.float64"),
    "bias shorter": (replaced_parameter(0, "bias", lambda b: b[:-1]), r"0\.bias has shape \(15,\)"),
    "bias half": (replaced_parameter(2, "bias", lambda b: b.half()), r"2\.bias has dtype torch\.float16"),
    "bias gone": (lambda model: setattr(model[2], "bias", None), r"2\.bias is no longer there"),
    "norm wider": (replaced_parameter(3, "weight", lambda w: w.repeat(2)), r"3\.weight has shape \(32,\)"),
    "statistics double": (
        lambda model: setattr(model[3], "running_var", model[3].running_var.double()),
        r"3\.running_var has dtype torch\.float64",
    ),
    "weight on another device": (
        replaced_parameter(5, "weight", lambda w: w.to("meta")),
        r"5\.weight is on meta but .* cpu; call cbp\.to\('meta'\)",
    ),
    "bias on another device": (
        replaced_parameter(0, "bias", lambda b: b.to("meta")),
        r"0\.bias is on meta but .* cpu; call cbp\.to\('meta'\)",
    ),
    "weight pruned": (lambda model: prune.l1_unstructured(model[2], "weight", 0.5), r"2\.weight is no longer there"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize(
    "rule", ["nature", Rule.gnt("adaptable_contribution", transfer_bias=True)], ids=["nature", "gnt"]
)
@pytest.mark.parametrize("capture", ["inline", "deferred"])
def test_a_changed_parameter_is_named_and_nothing_happens(backend, everything, capture, rule, change, message):
    model = mlp()
    optimizer = momentum(model)
    cbp = ContinualBackprop(model, rule=rule, capture=capture, backend=backend, **EAGER)
    cbp._optimizers = [optimizer]
    stream = Stream(model, optimizer)
    for _ in range(4):
        stream.train()
        cbp.step()
    stream.train()
    cbp.replacement_rate = 1
    originals = [(owner, key, owner[key]) for m in model for owner in (m._parameters, m._buffers) for key in owner]
    change(model)
    before = everything(*model, cbp), everything(optimizer)
    for _ in range(2):
        failing_step(cbp, message)
        assert (everything(*model, cbp), everything(optimizer)) == before

    # made good again, the step takes place with what was observed
    for owner, key, tensor in originals:
        owner[key] = tensor
    cbp.step()
    assert cbp.state_dict()["step"] == 5
    assert len(cbp.last_replaced["0"]) > 0


def test_a_model_that_moved_asks_for_to(backend):
    model = mlp()
    cbp = ContinualBackprop(model, backend=backend)
    model(torch.randn(2, 6))
    model.to("meta")
    failing_step(cbp, r"cbp\.to\('meta'\)")
    model(torch.randn(2, 6, device="meta"))
    failing_step(cbp, r"cbp\.to\('meta'\)")


def test_forwards_on_another_device_do_not_stop_a_model_that_came_back(backend):
    model = mlp()
    cbp = ContinualBackprop(model, backend=backend)
    parameters = {key: value.clone() for key, value in model.state_dict().items()}
    model.to("meta")
    model(torch.randn(2, 6, device="meta"))
    model.to_empty(device="cpu").load_state_dict(parameters)
    model(torch.randn(2, 6))
    assert observed(cbp)


def test_a_model_cast_to_another_type_is_named(backend):
    model = mlp()
    cbp = ContinualBackprop(model, backend=backend)
    model(torch.randn(2, 6))
    model.bfloat16()
    failing_step(cbp, r"weight has dtype torch\.bfloat16 but had torch\.float32")


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


def test_a_deviation_that_is_not_finite_is_refused():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"as_attached.*0\.weight, which has entries that are not finite"):
        ContinualBackprop(model, rule=Rule.nature(init="as_attached"))


def test_a_weight_set_anew_is_followed(backend):
    model = mlp()
    cbp = ContinualBackprop(model, replacement_rate=1, maturity_threshold=0, backend=backend)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    model(torch.randn(4, 6))
    cbp.step()
    assert (model[5].weight == 0).all()


@pytest.mark.parametrize(
    "slot",
    [
        lambda p: torch.ones(p.shape, device="meta"),
        lambda p: torch.ones(p.shape).to_sparse(),
        lambda p: torch.ones(p.shape).to(torch.float8_e4m3fn),
    ],
    ids=["another device", "sparse", "float8"],
)
def test_an_optimizer_state_that_cannot_be_zeroed_stops_the_step_before_it_began(backend, everything, slot):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    cbp = ContinualBackprop(model, optimizer, backend=backend, **{**EAGER, "replacement_rate": 0.0})
    stream = Stream(model, optimizer)
    stream.train(4)
    optimizer.state[model[5].weight]["slot"] = slot(model[5].weight)
    cbp.replacement_rate = 1
    loss = stream.loss()
    before = everything(model, cbp)
    with pytest.raises((RuntimeError, NotImplementedError)):
        cbp.step()
    assert everything(model, cbp) == before
    loss.backward()


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
