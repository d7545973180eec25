"""Random numbers of `CBPLinear` and `CBPConv`: the same again, shared by no two, the same wherever they are made."""

import copy

import pytest
import torch
from layer_networks import ALL, drawn, two_layers
from torch import nn

from cbp_fast import CBPConv, CBPLinear


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
