"""What is said, once each, of optimizers, parameters and layers that nobody told it of."""

import warnings

import pytest
import torch
import two_groups
from torch import nn
from two_groups import EAGER, Net, mlp, net_inputs, sgd, train

from cbp_fast import ContinualBackprop


def test_the_step_of_an_optimizer_that_was_not_given_is_said_once():
    model, bystander = mlp(), mlp()
    optimizer = sgd(model)
    cbp = ContinualBackprop(model, optimizer, **EAGER)
    train(bystander, sgd(bystander))
    train(model, optimizer)
    for _ in range(2):
        optimizer = torch.optim.Adam(model.parameters())
        with pytest.warns(UserWarning, match=r"\(Adam\) that was not given .* Call refresh\(optimizer=") as said:
            train(model, optimizer)
        assert said[0].filename == two_groups.__file__
        train(model, optimizer, 2)
        cbp.refresh(optimizer=optimizer)
        train(model, optimizer)
    assert int(cbp.age["0"].max()) == 3
    # disabled or removed it is none of our business
    cbp.enabled = False
    train(model, sgd(model))
    cbp.remove()
    train(model, sgd(model))


def test_a_new_optimizer_is_said_before_the_groups_are_found():
    model = Net()
    ContinualBackprop(model, sgd(model))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match="was not given"):
        sgd(model).step()


def test_an_optimizer_that_was_forgotten_is_said_once():
    def train(cbp, step, steps=150):
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(steps):
                model(torch.randn(2, 6)).sum().backward()
                optimizer.step()
                step()
        return [str(w.message) for w in said if "continual backprop" in str(w.message)]

    model = mlp()
    cbp = ContinualBackprop(model)
    (line,) = train(cbp, lambda: None)
    assert "(SGD) has stepped 100 times" in line
    assert "refresh(optimizer=...), or step()" in line
    cbp.remove()
    # which is called, by the loop or before it
    cbp = ContinualBackprop(model)
    assert train(cbp, cbp.step) == []
    assert train(cbp, lambda: None) == []
    # when step() was called by the optimizer so far, which is followed no more
    cbp.refresh(optimizer=[])
    assert train(cbp, cbp.step) == []
    cbp.refresh(optimizer=[])
    assert train(cbp, lambda: None) == []
    cbp.remove()
    optimizer = sgd(model)
    cbp = ContinualBackprop(model, optimizer)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    cbp.refresh(optimizer=[])
    assert len(train(cbp, lambda: None)) == 1
    cbp.remove()
    cbp = ContinualBackprop(model)
    cbp.enabled = False
    assert train(cbp, lambda: None) == []


def test_without_an_optimizer_any_may_step():
    model = mlp()
    cbp = ContinualBackprop(model)
    train(model, sgd(model))
    cbp.step()
    assert cbp.state_dict()["step"] == 1


def test_a_forward_that_never_comes_is_said():
    model = Net()
    optimizer = sgd(model)
    ContinualBackprop(model, optimizer)
    with pytest.warns(
        UserWarning, match=r"no training forward .* does not call Net\.forward\(\), give example_inputs=lambda"
    ):
        optimizer.step()
    optimizer.step()


@pytest.mark.parametrize("way", ["assign", "load"])
def test_a_parameter_that_no_optimizer_holds_is_said_once(way):
    model = mlp()
    optimizer = sgd(model)
    cbp = ContinualBackprop(model, optimizer, **EAGER)
    train(model, optimizer)
    if way == "assign":
        model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    else:
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    name = "2.weight" if way == "assign" else "0.weight"
    with pytest.warns(UserWarning, match=rf"{name} was assigned anew .* call refresh\(optimizer="):
        train(model, optimizer)
    train(model, optimizer)
    optimizer = sgd(model)
    cbp.refresh(optimizer=optimizer)
    train(model, optimizer)
    # one that is in an optimizer, or frozen, is no news
    model[0].bias = nn.Parameter(torch.zeros(8))
    optimizer.add_param_group({"params": [model[0].bias]})
    train(model, optimizer)
    assert cbp.state_dict()["step"] == 5


def test_a_new_head_is_said_once():
    model = Net()
    optimizer = sgd(model)
    cbp = ContinualBackprop(model, optimizer, example_inputs=net_inputs(), **EAGER)
    train(model, optimizer, 1, net_inputs)
    # reads nothing, or not the units
    model.dropout, model.metric = nn.Dropout(), nn.Linear(3, 1)
    train(model, optimizer, 1, net_inputs)
    model.second = nn.Sequential(nn.ReLU(), nn.Linear(8, 2))
    with pytest.warns(UserWarning, match=r"'second\.1' was added .* call refresh\(\)"):
        train(model, optimizer, 1, net_inputs)
    train(model, optimizer, 1, net_inputs)
    model.third = nn.Linear(8, 2)
    cbp.refresh(unreached_ok=True)
    train(model, optimizer, 1, net_inputs)
    assert int(cbp.age["body.0"].max()) == 5


def test_a_layer_frozen_between_two_fits_is_mended_by_refresh():
    model = mlp()
    optimizer = sgd(model)
    cbp = ContinualBackprop(model, optimizer, **{**EAGER, "replacement_rate": 1.0})
    train(model, optimizer)
    model[4].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"was frozen .* call refresh"):
        train(model, optimizer, 5)
    cbp.refresh()
    train(model, optimizer)
    assert list(cbp.age) == ["0"]
    model[4].requires_grad_(True)
    cbp.refresh()
    train(model, optimizer)
    assert list(cbp.age) == ["0", "2"]
