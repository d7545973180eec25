"""What `CBPLinear` and `CBPConv` keep: in a state_dict, in a copy or file of the model, in another type."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layer_networks import EAGER, Net, layers, train, two_layers


def test_weights_are_listed_once_in_the_state_dict():
    keys = [key for key in Net().state_dict() if not key.startswith("cbp")]
    assert len(keys) == len(set(keys)) == 15
    assert {key for key in Net().state_dict() if key.startswith("cbp")} == {f"cbp{i}._extra_state" for i in (1, 2, 3)}
    assert sum(1 for _ in Net().parameters()) == 12


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


def test_a_loaded_model_steps_in_a_process_that_made_no_layer(trained, tmp_path):
    torch.save(trained[0], tmp_path / "model.pt")
    code = (
        "import sys, torch, layer_networks as t\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "t.train(model, torch.optim.SGD(model.parameters(), lr=0.0), 2)\n"
        "assert max(int(layer.age.max()) for layer in t.layers(model)) == int(sys.argv[2]) + 2\n"
    )
    oldest = max(int(layer.age.max()) for layer in layers(trained[0]))
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt"), str(oldest)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
