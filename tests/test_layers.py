"""`CBPLinear` and `CBPConv` as layers in a network."""

import copy
import gc
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from cbp_fast import CBPConv, CBPLinear, ContinualBackprop, Rule, UnitGroup

EAGER = {"replacement_rate": 0.05, "maturity_threshold": 5}


class Net(nn.Module):
    """The authors' placement: each layer where the next one reads, the last convolution's before the flatten."""

    def __init__(self, **options):
        super().__init__()
        options = EAGER | options
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc1, self.norm3 = nn.Linear(32, 16), nn.LayerNorm(16)
        self.fc2 = nn.Linear(16, 3)
        self.cbp1 = CBPConv(self.conv1, self.conv2, bn_layer=self.norm1, **options)
        self.cbp2 = CBPConv(self.conv2, self.fc1, num_last_filter_outputs=4, **options)
        self.cbp3 = CBPLinear(self.fc1, self.fc2, ln_layer=self.norm3, **options)

    def forward(self, x):
        x = self.cbp1(self.norm1(self.conv1(x)).relu())
        x = self.cbp2(nn.functional.max_pool2d(self.conv2(x).relu(), 2)).flatten(1)
        return self.fc2(self.cbp3(self.norm3(self.fc1(x)).relu()))


def train(model, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        loss = (model(torch.randn(4, 3, 8, 8, generator=generator)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def layers(model):
    return [model.cbp1, model.cbp2, model.cbp3]


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 30)
    return model, optimizer


def test_forward_is_identity():
    layer = CBPLinear(nn.Linear(4, 5), nn.Linear(5, 2))
    x = torch.randn(3, 5, requires_grad=True)
    assert layer(x) is x


def test_all_layers_replace_units(trained):
    model, _ = trained
    # 30 steps of which the first 5 have nothing mature
    assert all(layer.num_replaced >= 0.05 * 5 * 20 for layer in layers(model))


def test_weights_are_listed_once_in_the_state_dict():
    keys = [key for key in Net().state_dict() if not key.startswith("cbp")]
    assert len(keys) == len(set(keys)) == 15
    assert {key for key in Net().state_dict() if key.startswith("cbp")} == {f"cbp{i}._extra_state" for i in (1, 2, 3)}
    assert sum(1 for _ in Net().parameters()) == 12


def test_rates_can_be_set_and_the_layers_read(trained):
    model, optimizer = trained
    layer, before = model.cbp3, model.cbp3.num_replaced
    assert (layer.replacement_rate, layer.maturity_threshold, layer.decay_rate) == (0.05, 5, 0.0)
    layer.replacement_rate = 0.0
    train(model, optimizer, 20)
    assert layer.num_replaced == before
    layer.maturity_threshold, layer.decay_rate, layer.replacement_rate = 19, 0.9, 1.0
    mature = int((layer.age >= 19).sum())
    train(model, optimizer, 1)
    assert layer.num_replaced == before + mature > before
    with pytest.raises(ValueError, match="decay_rate is 1"):
        layer.decay_rate = 1
    assert (layer.in_layer, layer.out_layer) == (model.fc1, model.fc2)
    assert not list(layer.parameters())
    assert list(layer.state_dict()) == ["_extra_state"]


# the scores of "random" are random, and a layer draws from a stream of its own
@pytest.mark.parametrize("utility", sorted(set(Rule.UTILITIES) - {"random"}))
def test_same_choices_and_resets_as_the_attached_object(utility):
    """One layer of each kind is the attached object with its one group, but for the random numbers."""

    def run(layer):
        torch.manual_seed(1)
        fc1, fc2 = nn.Linear(6, 9), nn.Linear(9, 2)
        options = {"replacement_rate": 0.1, "maturity_threshold": 3, "decay_rate": 0.5}
        if layer:
            cbp = CBPLinear(fc1, fc2, util_type=utility, **options)
            model = nn.Sequential(fc1, nn.ReLU(), cbp, fc2)
        else:
            model = nn.Sequential(fc1, nn.ReLU(), nn.Identity(), fc2)
            cbp = ContinualBackprop(model, rule=Rule.gnt(utility=utility), **options)
        # without learning or new weights in play, the choice depends on the features alone
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        steps = []
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            model(torch.randn(8, 6, generator=generator)).sum().backward()
            optimizer.step()
            if not layer:
                cbp.step()
            fc1.weight.data.fill_(0.25).mul_(torch.arange(1, 10.0)[:, None])
            fc2.weight.data.fill_(0.5)
            steps.append((cbp.age if layer else cbp.age["0"]).tolist())
        return steps

    assert run(layer=True) == run(layer=False)


def test_optimizer_state_of_replaced_units_is_zero():
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(4, 8), nn.Linear(8, 2)
    model = nn.Sequential(fc1, nn.ReLU(), CBPLinear(fc1, fc2, replacement_rate=1.0, maturity_threshold=3), fc2)
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(4):
        loss = model(torch.randn(5, 4)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        zero = not optimizer.state[fc1.weight]["exp_avg_sq"].any()
        assert zero == (step == 3)
    assert not optimizer.state[fc2.weight]["exp_avg"].any()
    assert optimizer.state[fc2.bias]["exp_avg"].any()


def test_no_step_without_a_forward_or_for_another_optimizer(trained):
    model, optimizer = trained
    before = [layer.age.clone() for layer in layers(model)]
    optimizer.step()
    other = nn.Linear(2, 2)
    model(torch.randn(4, 3, 8, 8))
    other(torch.randn(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert all(torch.equal(layer.age, ages) for layer, ages in zip(layers(model), before, strict=True))


def test_eval_and_no_grad_are_not_observed():
    model = Net(replacement_rate=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model(torch.randn(2, 3, 8, 8))
    model.eval()(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not any(layer.age.any() for layer in layers(model))


def test_a_copy_goes_on_by_itself(trained):
    model, optimizer = trained
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.Adam(twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 20, seed=1)
    after = [p.clone() for p in model.parameters()]
    train(twin, twin_optimizer, 20, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(after, twin.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(after, model.parameters(), strict=True))


def test_state_dict_resumes_bit_for_bit(trained, tmp_path):
    model, optimizer = trained
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    resumed = Net()
    resumed_optimizer = torch.optim.Adam(resumed.parameters())
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    resumed_optimizer.load_state_dict(checkpoint["optimizer"])
    train(model, optimizer, 20, seed=1)
    train(resumed, resumed_optimizer, 20, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


def test_loading_sets_the_rates_and_refuses_another_rule(trained):
    resumed = Net(replacement_rate=0.0)
    resumed.load_state_dict(trained[0].state_dict())
    assert resumed.cbp3.replacement_rate == 0.05
    with pytest.raises(ValueError, match="utility='contribution', not 'weight'"):
        Net(util_type="weight").load_state_dict(trained[0].state_dict())


# bounds of five inputs and eight units: selu is drawn as lecun, and an activation without a gain has that of relu
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"init": "kaiming", "act_type": "selu"}, (3 / 5) ** 0.5),
        ({"init": "xavier", "act_type": "selu"}, (3 / 5) ** 0.5),
        ({"init": "kaiming", "act_type": "gelu"}, (2 * 3 / 5) ** 0.5),
        ({"init": "xavier", "act_type": "tanh"}, 5 / 3 * (6 / 13) ** 0.5),
        ({"init": "default"}, (1 / 5) ** 0.5),
    ],
    ids=str,
)
def test_new_weights_have_the_bound_of_the_rule(options, bound):
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(5, 8), nn.Linear(8, 2)
    model = nn.Sequential(fc1, CBPLinear(fc1, fc2, replacement_rate=1.0, maturity_threshold=0, **options), fc2)
    model(torch.randn(5, 5)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert 0.9 * bound < fc1.weight.abs().max() <= bound


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state[: len(state) // 2],
        lambda state: state.roll(1),
        lambda state: state.to(torch.float64) / 3,
        lambda state: state[:0],
        lambda state: state[0],
        lambda state: state.to("meta"),
        lambda state: state.to_sparse(),
        lambda state: 3,
        lambda state: {"step": state},
    ],
    ids=["half", "rolled", "float", "empty", "scalar", "meta", "sparse", "number", "dict"],
)
def test_a_damaged_state_is_refused_and_changes_nothing(trained, damage):
    fresh = Net()
    before = fresh.cbp2.get_extra_state()
    state = trained[0].cbp2.get_extra_state()
    with pytest.raises(ValueError, match=r"_extra_state in the state_dict|state_dict"):
        fresh.load_state_dict({"cbp2._extra_state": damage(state)}, strict=False)
    assert torch.equal(fresh.cbp2.get_extra_state(), before)
    fresh.load_state_dict({"cbp2._extra_state": state}, strict=False)
    assert torch.equal(fresh.cbp2.get_extra_state(), state)


@pytest.mark.parametrize("utility", ["contribution", "zero_contribution"])
def test_the_state_dict_is_tensors_of_one_size(utility, tmp_path):
    """What safetensors and torch.distributed.checkpoint ask for; before, it held a dict, which can still be loaded."""
    torch.manual_seed(0)
    model, resumed = Net(util_type=utility), Net(util_type=utility)
    train(model, torch.optim.Adam(model.parameters()), 300)
    model.cbp1.replacement_rate = 0
    saved, fresh = model.state_dict(), resumed.state_dict()
    assert [value.shape for value in saved.values()] == [value.shape for value in fresh.values()]
    assert all(value.is_contiguous() for value in saved.values())

    def check():
        now = resumed.state_dict()
        assert all(torch.equal(value, now[key]) for key, value in saved.items())
        assert all(int(old.age.max()) > 0 for old in layers(resumed))
        resumed.load_state_dict(fresh)

    resumed.load_state_dict(copy.deepcopy(saved), assign=True)
    check()
    dicts = {f"cbp{i}._extra_state": layer._engine.state_dict() for i, layer in enumerate(layers(model), 1)}
    resumed.load_state_dict(saved | dicts)
    check()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(saved, tmp_path / "model.safetensors")
    resumed.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    check()


def test_a_whole_model_can_be_saved(trained, tmp_path):
    model, _ = trained
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    for layer, copied in zip(layers(model), layers(twin), strict=True):
        assert torch.equal(layer.age, copied.age)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    train(twin, optimizer, 1)
    assert all((layer.age <= copied.age + 31).all() for layer, copied in zip(layers(model), layers(twin), strict=True))
    assert twin.cbp1._engine.state.weights[0].get() is twin.conv2.weight


@pytest.mark.parametrize("summed", [False, True], ids=["held", "summed"])
def test_a_model_that_is_saved_between_forward_and_step_keeps_its_forward_for_itself(trained, tmp_path, summed):
    model, optimizer = trained
    for layer in layers(model):
        layer._engine._inline = [summed] * len(layer._engine._inline)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.Adam(twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    x = torch.randn(4, 3, 8, 8)
    for each, other in ((model, optimizer), (twin, twin_optimizer)):
        other.zero_grad()
        each(x).square().mean().backward()
        if each is model:
            torch.save(model, tmp_path / "model.pt")
            copies = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
            assert [layer._engine.has_data for layer in layers(model)] == [True] * 3
            assert not any(layer._engine.has_data for copied in copies for layer in layers(copied))
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def two_layers(**options):
    fc1, fc2, fc3 = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
    one, two = CBPLinear(fc1, fc2, **options), CBPLinear(fc2, fc3, **options)
    return nn.Sequential(fc1, nn.ReLU(), one, fc2, nn.ReLU(), two, fc3)


def test_a_step_of_all_layers_happens_whole_or_not_at_all():
    model = two_layers(replacement_rate=1.0, maturity_threshold=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    model(torch.randn(5, 4)).sum().backward()
    model[3].bias = nn.Parameter(torch.zeros(9))
    before = [model[0].weight.clone(), model[2].age.clone(), model[2].num_replaced]
    with pytest.raises(
        RuntimeError, match=r"CBPLinear number \d+, .*: in_layer\.bias has shape \(9,\).*make the layer anew"
    ):
        optimizer.step()
    assert torch.equal(model[0].weight, before[0])
    assert torch.equal(model[2].age, before[1])
    assert model[2].num_replaced == before[2]


def test_a_skipped_update_of_a_fused_optimizer_is_no_step():
    model = two_layers(replacement_rate=0.0)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for found in (0.0, 1.0, 0.0):
        model(torch.randn(5, 4)).sum().backward()
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
    assert (model[2].age == 2).all()


def test_with_two_optimizers_a_layer_steps_after_both():
    model = two_layers(replacement_rate=1.0, maturity_threshold=1)
    optimizers = [torch.optim.Adam(model[:2].parameters()), torch.optim.Adam(model[3:].parameters())]
    for _ in range(6):
        loss = model(torch.randn(5, 4)).square().sum()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    replaced = model[2].age == 0
    assert replaced.any()
    assert not model[3].weight[:, replaced][~(model[5].age == 0)].any()
    assert not optimizers[1].state[model[3].weight]["exp_avg"][:, replaced].any()


@pytest.mark.parametrize("period", [2, 3])
def test_the_state_of_an_optimizer_that_steps_less_often_is_zero(period):
    torch.manual_seed(0)
    model = two_layers(replacement_rate=0.1, maturity_threshold=2)
    often, seldom = torch.optim.Adam(model[:2].parameters()), torch.optim.Adam(model[3:].parameters())
    checked = 0
    for step in range(40):
        model.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        if step % period == 1:
            seldom.step()
        before = model[2].num_replaced
        often.step()
        if model[2].num_replaced > before and step > 1:
            checked += 1
            assert not seldom.state[model[3].weight]["exp_avg"][:, model[2].age == 0].any()
    assert checked > 5


def test_a_compiled_model_is_one_graph_and_trains_alike():
    import torch._dynamo.testing  # takes a second

    fc1, fc2, fc3 = nn.Linear(4, 20), nn.Linear(20, 12), nn.Linear(12, 2)
    one, two = CBPLinear(fc1, fc2, **EAGER), CBPLinear(fc2, fc3, **EAGER)
    original = nn.Sequential(fc1, nn.ReLU(), one, fc2, nn.ReLU(), two, fc3)
    counter = torch._dynamo.testing.CompileCounter()
    results = []
    # the second copy is not observed by what was compiled for the first
    for compiled in (False, True, True):
        model = copy.deepcopy(original)
        forward = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        optimizer = torch.optim.Adam(model.parameters())
        generator = torch.Generator().manual_seed(0)
        for step in range(30):
            optimizer.zero_grad()
            forward(torch.randn(4 + step % 3, 4, generator=generator)).square().sum().backward()
            optimizer.step()
        results.append([model[2].age, model[5].age, *model.parameters()])
    assert min(model[2].num_replaced, model[5].num_replaced) > 5
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # each for its first batch and for any other
    assert counter.frame_count <= 4


def test_an_optimizer_of_an_earlier_task_is_not_waited_for():
    model = two_layers(replacement_rate=0.0)
    optimizers = []
    for _ in range(3):
        optimizers.append(torch.optim.SGD(model.parameters(), lr=0.0))
        for _ in range(10):
            model(torch.randn(5, 4)).sum().backward()
            optimizers[-1].step()
    # a change costs one step
    assert (model[2].age == 28).all()


def test_layers_do_not_share_random_numbers():
    torch.manual_seed(0)
    draws = []
    for _ in range(2):
        fc1, fc2 = nn.Linear(4, 8), nn.Linear(8, 2)
        model = nn.Sequential(fc1, CBPLinear(fc1, fc2, replacement_rate=1.0, maturity_threshold=0), fc2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
        draws.append(fc1.weight.detach().clone())
    assert not torch.equal(*draws)


def drawn(model, *optimizers):
    """All weights after a step that draws every one of them anew."""
    optimizers = optimizers or (torch.optim.SGD(model.parameters(), lr=0.1),)
    model(torch.randn(5, 4)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


ALL = {"replacement_rate": 1.0, "maturity_threshold": 0}


def test_the_same_program_draws_the_same_numbers_again():
    results = []
    for _ in range(3):
        torch.manual_seed(3)
        model = two_layers(**ALL)
        results.append(drawn(model))
    # made both before either is trained
    torch.manual_seed(3)
    one = two_layers(**ALL)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    other = two_layers(**ALL)
    assert torch.equal(torch.get_rng_state(), state)
    results += [drawn(one), drawn(other)]
    for weights in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights, results[0], strict=True))
    torch.manual_seed(4)
    assert not torch.equal(drawn(two_layers(**ALL))[0], results[0][0])


def test_a_seed_decides_alone():
    results = []
    for seed in (7, 7, -8):
        torch.manual_seed(seed + len(results))
        model = two_layers(**ALL, seed=seed)
        assert model[2].state_dict()["_extra_state"].equal(two_layers(**ALL, seed=seed)[2].get_extra_state())
        results.append(drawn(model)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    with pytest.raises(ValueError, match="seed is 'one'"):
        two_layers(seed="one")
    conv = CBPConv(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), seed=5)
    assert int(conv._engine.state.seed) == 5


def test_layers_of_one_model_draw_different_numbers_however_they_were_made():
    torch.manual_seed(0)
    square = [nn.Linear(8, 8) for _ in range(3)]
    first, second = CBPLinear(square[0], square[1], **ALL), CBPLinear(square[1], square[2], **ALL)
    chain = nn.Sequential(nn.Linear(4, 8), square[0], first, square[1], second, square[2])
    # one optimizer for each, so that they take no step together
    weights = drawn(chain, *(torch.optim.SGD(layer.parameters(), lr=0.1) for layer in square))
    assert not torch.equal(weights[2], weights[4])

    def block():
        fc1, fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
        for layer in (fc1, fc2):
            nn.init.constant_(layer.weight, 0.25)
        return nn.Sequential(fc1, nn.ReLU(), CBPLinear(fc1, fc2, **ALL), fc2)

    # copies, layers of equal weights, and those without weights yet
    original = block()
    with torch.device("meta"):
        empty = [block() for _ in range(2)]
    for part in empty:
        part.to_empty(device="cpu").load_state_dict(original.state_dict())
    blocks = nn.ModuleList([copy.deepcopy(original), copy.deepcopy(original), original, block(), *empty])
    optimizer = torch.optim.SGD(blocks.parameters(), lr=0.1)
    sum(block(torch.ones(3, 4)) for block in blocks).sum().backward()
    optimizer.step()
    assert len({tuple(block[0].weight.flatten().tolist()) for block in blocks}) == len(blocks)
    # and again after a checkpoint of before that step
    assert len({int(block[2]._engine.state.seed) for block in blocks}) == len(blocks)


@pytest.mark.parametrize("materialised", ["empty", "assigned"])
def test_layers_may_be_made_before_there_are_weights(materialised):
    torch.manual_seed(0)
    expected = two_layers(**EAGER | {"replacement_rate": 0.5})
    with torch.device("meta"):
        model = two_layers(**EAGER | {"replacement_rate": 0.5})
        state = model.state_dict()
    assert state["2._extra_state"].shape == expected.state_dict()["2._extra_state"].shape
    if materialised == "empty":
        model.to_empty(device="cpu")
    model.load_state_dict(copy.deepcopy(expected.state_dict()), assign=materialised == "assigned")
    for net in (expected, model):
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(net.parameters())
        for _ in range(20):
            net(torch.randn(5, 4, generator=generator)).square().sum().backward()
            optimizer.step()
    assert model[2].num_replaced > 10
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("made_in", ["inference", "device", "dtype"])
def test_layers_are_the_same_wherever_they_are_made(made_in):
    results = []
    for plain in (True, False):
        torch.manual_seed(0)
        fc1, fc2 = nn.Linear(4, 8), nn.Linear(8, 2)
        if plain:
            layer = CBPLinear(fc1, fc2, **ALL)
        elif made_in == "inference":
            with torch.inference_mode():
                layer = CBPLinear(fc1, fc2, **ALL)
        elif made_in == "device":
            with torch.device("meta"):
                layer = CBPLinear(fc1, fc2, **ALL)
        else:
            torch.set_default_dtype(torch.float16)
            layer = CBPLinear(fc1, fc2, **ALL)
            torch.set_default_dtype(torch.float32)
        model = nn.Sequential(fc1, nn.ReLU(), layer, fc2)
        weights = drawn(model)
        layer.replacement_rate = 0.5
        model.load_state_dict(model.state_dict())
        # to another type, and its state made anew, in that surrounding
        model.double()
        with torch.inference_mode(made_in == "inference"), torch.device("meta" if made_in == "device" else "cpu"):
            model.state_dict()
        model(torch.randn(5, 4).double()).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        results.append([*weights, layer.age.clone(), *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# what torch.jit.trace says of itself
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_what_is_exported_or_traced_has_nothing_of_it_and_observes_nothing():
    model, x = two_layers(replacement_rate=0.0), torch.randn(5, 4)
    program = torch.export.export(model, (x,))
    assert not any("cbp_fast" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(torch.jit.trace(model, (x,))(x), model(x))
    assert model[2]._engine.held_bytes == 4 * 5 * 8
    with pytest.raises(TypeError, match=r"CBPLinear was given a Proxy.*trace model\.eval\(\)"):
        torch.fx.symbolic_trace(model)
    assert torch.equal(torch.fx.symbolic_trace(model.eval())(x), model(x))


# the compiler's own import
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_an_optimizer_step_may_be_compiled():
    model = two_layers(replacement_rate=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        model(torch.randn(5, 4)).sum().backward()
        step()
    assert (model[2].age == 3).all()


@pytest.mark.parametrize("utility", Rule.UTILITIES)
def test_every_utility_trains(utility):
    torch.manual_seed(0)
    model = Net(util_type=utility, decay_rate=0.9)
    train(model, torch.optim.Adam(model.parameters()), 20)
    assert all(layer.num_replaced > 1 for layer in layers(model))
    assert all(p.isfinite().all() for p in model.parameters())
    # of a random score nothing is averaged
    assert all(bool(layer.utility.any()) == (utility != "random") for layer in layers(model))


def test_accumulated_and_uneven_batches_are_one_batch():
    """Utility is a mean over all samples since the last step, however they were divided."""
    ages, utilities = [], []
    for parts in ([8], [1, 5, 2]):
        torch.manual_seed(0)
        model = Net(replacement_rate=0.0).double()
        model.norm1.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in torch.randn(3, 8, 3, 8, 8, dtype=torch.float64):
            optimizer.zero_grad()
            for part in x.split(parts):
                model(part).sum().backward()
            optimizer.step()
        ages.append([layer.age.tolist() for layer in layers(model)])
        utilities.append([layer.utility for layer in layers(model)])
    assert ages[0] == ages[1] == [[3] * 6, [3] * 8, [3] * 16]
    torch.testing.assert_close(*utilities)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_may_be_converted_to_another_type(dtype):
    torch.manual_seed(0)
    model = Net()
    train(model, torch.optim.Adam(model.parameters()), 20)
    model.to(dtype)
    before, totals = [layer.age.clone() for layer in layers(model)], [layer.num_replaced for layer in layers(model)]
    # only what is used is made anew
    model.state_dict()
    assert {layer.utility.dtype for layer in layers(model)} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(torch.randn(4, 3, 8, 8, dtype=dtype)).sum().backward()
    optimizer.step()
    for layer, age, total in zip(layers(model), before, totals, strict=True):
        assert torch.equal(layer.age, torch.where(layer.age == 0, 0, age + 1))
        assert layer.num_replaced >= total > 0


def test_layers_without_bias_affine_free_norms_and_grouped_convolutions():
    torch.manual_seed(0)
    conv1, conv2 = nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.Conv2d(8, 6, 3, groups=2, bias=False)
    norm1, fc = nn.BatchNorm2d(8, affine=False), nn.Linear(24, 5, bias=False)
    norm3, head = nn.LayerNorm(5, elementwise_affine=False, bias=False), nn.Linear(5, 2)
    options = {"replacement_rate": 1.0, "maturity_threshold": 2}
    one = CBPConv(conv1, conv2, bn_layer=norm1, **options)
    two = CBPConv(conv2, fc, num_last_filter_outputs=4, **options)
    three = CBPLinear(fc, head, ln_layer=norm3, **options)
    model = nn.Sequential(conv1, norm1, nn.ReLU(), one, conv2, two, nn.Flatten(), fc, norm3, three, head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        before = conv1.weight.detach().clone()
        model(torch.randn(5, 4, 6, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (one.num_replaced, two.num_replaced, three.num_replaced) == (8, 6, 5)
    assert not norm1.running_mean.any()
    assert not head.weight.any()
    # drawn as PyTorch draws them: a filter reads 4 / 2 channels of 3 x 3
    bound = (1 / (2 * 9)) ** 0.5
    assert (conv1.weight != before).all()
    assert 0.9 * bound < conv1.weight.abs().max() <= bound


def test_the_hook_for_all_optimizers_goes_with_the_last_layer():
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    gc.collect()
    before = len(hooks)
    model = two_layers()
    model(torch.randn(2, 4))
    assert len(hooks) == before + 1
    twin = copy.deepcopy(model)
    twin(torch.randn(2, 4))
    del model
    gc.collect()
    assert len(hooks) == before + 1
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)

    # in the midst of a step it has to stay, or torch's loop over the hooks would break
    def drop(optimizer, args, kwargs):
        nonlocal twin
        del twin
        gc.collect()

    handle = optimizer.register_step_post_hook(drop)
    optimizer.step()
    handle.remove()
    assert len(hooks) == before + 1
    model = two_layers()
    model(torch.randn(2, 4))
    assert len(hooks) == before + 1
    del model
    gc.collect()
    assert len(hooks) == before


def test_a_layer_of_a_script_is_silent_at_exit():
    code = (
        "import torch\nfrom cbp_fast import CBPLinear\n"
        "one, two = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)\n"
        "layer = CBPLinear(one, two)\n"
        "two(layer(one(torch.randn(2, 3))))\n"
        # in a cycle, so that it goes only when most modules have gone
        "layer.among = [layer]\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert done.stderr == ""


def test_a_loaded_model_steps_in_a_process_that_made_no_layer(trained, tmp_path):
    torch.save(trained[0], tmp_path / "model.pt")
    code = (
        "import sys, torch, test_modules as t\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "t.train(model, torch.optim.SGD(model.parameters(), lr=0.0), 2)\n"
        "assert max(int(layer.age.max()) for layer in t.layers(model)) == int(sys.argv[2]) + 2\n"
    )
    oldest = max(int(layer.age.max()) for layer in layers(trained[0]))
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt"), str(oldest)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CBPLinear(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)),
            "CBPLinear: in_layer is a Conv2d, must be",
        ),
        (lambda: CBPLinear(nn.Linear(3, 4), nn.Conv2d(4, 2, 3)), "CBPLinear: out_layer is a Conv2d, must be a Linear"),
        (lambda: CBPConv(nn.Linear(3, 4), nn.Linear(4, 2)), "CBPConv: in_layer is a Linear, must be a convolution"),
        (lambda: CBPConv(nn.Conv2d(3, 4, 3), nn.ReLU()), "out_layer is a ReLU, must be a convolution or a Linear"),
    ],
    ids=["convolutions", "reader", "linear", "activation"],
)
def test_layers_of_another_kind_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CBPLinear(nn.Linear(4, 5), nn.Linear(6, 2)), "6"),
        (lambda: CBPLinear(nn.Linear(4, 5), nn.Linear(5, 2), bn_layer=nn.BatchNorm1d(4)), "bn_layer"),
        (lambda: CBPLinear(nn.Linear(4, 5), nn.Linear(5, 2), util_type="best"), "utility is 'best'"),
        (lambda: CBPLinear(nn.Linear(4, 5), nn.Linear(5, 2), replacement_rate=2), "replacement_rate is 2"),
        (lambda: CBPConv(nn.Conv2d(3, 4, 3), nn.Linear(16, 2)), "num_last_filter_outputs is 1"),
    ],
    ids=["widths", "norm", "utility", "rate", "outputs"],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Placed(nn.Module):
    """Two linear layers and what stands between them."""

    def __init__(self, called=True):
        super().__init__()
        self.fc1, self.fc2, self.called = nn.Linear(4, 8), nn.Linear(8, 2), called
        self.cbp = CBPLinear(self.fc1, self.fc2, replacement_rate=0.0)

    def forward(self, x):
        h = self.fc1(x).relu()
        return self.fc2(self.cbp(h) if self.called else h)


def warned(model, *optimizers, steps):
    """Warnings of so many steps, by the number of the step; each must be where the optimizer's step was called."""
    said = {}
    for i in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(torch.randn(2, 4)).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for optimizer in optimizers:
                optimizer.step()
        assert all(w.filename == __file__ for w in caught)
        if caught:
            (said[i],) = (str(w.message) for w in caught)
    return said


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-4)


@pytest.mark.parametrize("called", [0, 3])
def test_a_layer_that_no_forward_calls_says_so_once(called):
    model = Placed()
    optimizer = sgd(model)
    assert not warned(model, optimizer, steps=called)
    model.called = False
    assert not warned(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))]), steps=110)
    (step, said), *more = warned(model, optimizer, steps=210).items()
    assert 99 <= step <= 100
    assert not more
    assert re.match(r"CBPLinear number \d+, from Linear.* saw no training forward in 100 steps.* is it called\?", said)


def test_a_layer_that_is_not_called_yet_stops_no_step():
    models = nn.ModuleList([Placed(), Placed()]).to(torch.bfloat16)
    optimizer = sgd(models)
    for i in range(4):
        optimizer.zero_grad()
        models[i // 2](torch.randn(2, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
    assert [model.cbp.age.tolist() for model in models] == [[2] * 8] * 2
    model = Placed()
    optimizer = sgd(model)
    del model.fc2
    model.fc1.weight.grad = torch.ones(8, 4)
    optimizer.step()


@pytest.mark.parametrize("replaced", [("fc1",), ("fc2",), ("fc1", "fc2")])
@pytest.mark.parametrize("anew", [True, False], ids=["new optimizer", "same optimizer"])
def test_a_layer_whose_layers_were_replaced_says_so_once(replaced, anew):
    model = Placed()
    optimizer = sgd(model)
    assert not warned(model, optimizer, steps=3)
    for name in replaced:
        setattr(model, name, copy.deepcopy(getattr(model, name)))
    if anew:
        optimizer = sgd(model)
    (step, said), *more = warned(model, optimizer, steps=210).items()
    assert 98 <= step <= 100
    assert not more
    name = {"fc1": "in_layer", "fc2": "out_layer"}[replaced[0]]
    assert f"{name}.weight was not trained in 100 steps" in said
    model.cbp = CBPLinear(model.fc1, model.fc2)
    assert not warned(model, sgd(model), steps=110)


def test_what_is_trained_in_turns_or_frozen_is_no_reason_to_say_anything():
    model, other = Placed(), Placed()
    halves = [sgd(layer) for layer in (model.fc1, model.fc2)]
    assert not warned(model, *halves, steps=110)
    # a model that waits for its turn, as one of two adversaries
    mine, theirs = sgd(model), sgd(other)
    for _ in range(3):
        assert not warned(model, mine, steps=1)
        model(torch.randn(2, 4))
        assert not warned(other, theirs, steps=60)
    # tasks of one optimizer, with gradients that are gone when the layers look
    towers = nn.ModuleList([Placed(), Placed()])
    optimizer = sgd(towers)
    optimizer.register_step_post_hook(lambda optimizer, args, kwargs: optimizer.zero_grad())
    for tower in (*towers, *towers):
        assert not warned(tower, optimizer, steps=110)
    assert [int(tower.cbp.age[0]) for tower in towers] == [220, 220]
    # a frozen part, and a frozen teacher
    model.fc1.requires_grad_(False)
    teacher = copy.deepcopy(model).requires_grad_(False)
    for _ in range(120):
        teacher(torch.randn(2, 4))
        assert not warned(other, theirs, steps=1)


@pytest.mark.parametrize("turns", [1, 2], ids=["in one forward", "in turns"])
def test_two_layers_over_the_same_units_say_so_once(turns):
    model = Placed()
    first, second = model.cbp, CBPLinear(model.fc1, model.fc2)
    model.cbp = nn.Sequential(first, second)
    optimizer, said = sgd(model), []
    for _ in range(10):
        for turn in range(turns):
            if turns > 1:
                model.cbp = (first, second)[turn]
            said += warned(model, optimizer, steps=1).values()
    (message,) = said
    assert re.search(r"from Linear.*: CBPLinear .* re-initialises its units, too; take one of them out", message)


def test_a_layer_may_take_the_place_of_another():
    model = Placed()
    optimizer = sgd(model)
    assert not warned(model, optimizer, steps=2)
    old, model.cbp = model.cbp, CBPLinear(model.fc1, model.fc2)
    assert not warned(model, optimizer, steps=2)
    assert model.cbp.age.tolist() == [2] * 8 == old.age.tolist()


def test_a_layer_over_the_units_of_an_attached_object_says_so():
    model = Placed()
    model.cbp = nn.Identity()
    cbp = ContinualBackprop(model, groups=UnitGroup("units", "fc1", "fc2"))
    model.cbp = CBPLinear(model.fc1, model.fc2)
    ((_, said),) = warned(model, sgd(model), steps=3).items()
    assert "an attached ContinualBackprop re-initialises its units, too" in said
    cbp.remove()


def test_a_copy_takes_part_whatever_address_it_gets():
    model = Placed()
    for _ in range(100):
        model = copy.deepcopy(copy.deepcopy(model))
        assert not warned(model, sgd(model), steps=1)
        assert int(model.cbp.age[0]) == _ + 1


def test_units_of_a_layer_are_not_attached_again():
    fc1, fc2 = nn.Linear(5, 8), nn.Linear(8, 3)
    model = nn.Sequential(fc1, nn.ReLU(), CBPLinear(fc1, fc2), fc2)
    with pytest.raises(ValueError, match=r"continual backprop attached already .*take the layer out"):
        ContinualBackprop(model)
