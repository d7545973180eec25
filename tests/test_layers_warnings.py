"""What `CBPLinear` and `CBPConv` say, once, where they cannot do what they are for, and where they say nothing."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from cbp_fast import CBPLinear, ContinualBackprop, UnitGroup


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
