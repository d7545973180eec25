"""How groups are asked for: models that cannot be run, inputs that show nothing, options of finding them."""

import pytest
import torch
from torch import nn
from two_groups import EAGER, GROUPS, Net, hooks_of, mlp, sgd

import cbp_fast
from cbp_fast import ContinualBackprop, UnitGroup


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.actor, self.critic = mlp(), mlp()

    def act(self, x):
        return self.actor(x), self.critic(x)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (Agent(), "'actor', 'critic'"),
        (nn.ModuleDict({"pi": mlp(), "none": nn.ReLU()}), r"\('pi'\)"),
        (nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "'0', '1'"),
    ],
    ids=["agent", "dict", "list"],
)
@pytest.mark.parametrize("inputs", [None, torch.zeros(2, 6), [torch.zeros(2, 6), lambda m: None]], ids=["", "x", "[]"])
def test_a_model_without_forward_is_told_so_at_attach(model, parts, inputs):
    before = hooks_of(model)
    for look in (ContinualBackprop, cbp_fast.explain, cbp_fast.find_unit_groups):
        with pytest.raises(
            ValueError, match=rf"has no forward\(\) .*example_inputs=lambda model.* attach to its parts .*{parts}"
        ):
            look(model, example_inputs=inputs)
    assert hooks_of(model) == before


class Words(nn.Module):
    """What it works on is no tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, words, cache):
        return self.second(self.first(torch.tensor([[float(len(word))] * 3 for word in words])).relu())


def test_an_empty_batch_shows_nothing():
    model = mlp()
    for empty in ([], torch.zeros(0, 6), {"input": torch.zeros(0, 6)}, [torch.zeros(2, 6), torch.zeros(0, 6)]):
        for look in (ContinualBackprop, cbp_fast.explain, cbp_fast.find_unit_groups):
            with pytest.raises(ValueError, match="example_inputs are empty"):
                look(model, example_inputs=empty)
    with pytest.raises(ValueError, match="example_inputs are empty"):
        cbp_fast.verify_unit_group(model, UnitGroup("g", "0", "2"), torch.zeros(0, 6))
    words = cbp_fast.find_unit_groups(Words(), (["a", "bc"], torch.empty(0)))
    assert [group.name for group in words] == ["first"]
    # as the first batch of a training loop it is passed over
    model = Net()
    optimizer = sgd(model)
    cbp = ContinualBackprop(model, optimizer)
    model(torch.zeros(0, 6), 1.0)
    assert not cbp.groups
    model(torch.zeros(2, 6), 1.0)
    assert cbp.groups


def test_a_model_without_forward_runs_by_a_function():
    agent = Agent()
    optimizer = sgd(agent)
    cbp = ContinualBackprop(agent, optimizer, example_inputs=lambda agent: agent.act(torch.zeros(2, 6)), **EAGER)
    sum(out.sum() for out in agent.act(torch.randn(4, 6))).backward()
    optimizer.step()
    assert {name: int(age.max()) for name, age in cbp.age.items()} == dict.fromkeys(
        ("actor.0", "actor.2", "critic.0", "critic.2"), 1
    )
    layers = nn.ModuleList([nn.Linear(2, 4), nn.Linear(4, 2)])
    assert ContinualBackprop(layers, groups=UnitGroup("g", "0", "1")).groups


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.head = (nn.Linear(n, m) for n, m in ((6, 8), (8, 5), (5, 8), (8, 3)))

    def forward(self, x):
        h = self.first(x)
        return self.head(h + self.third(self.second(h).relu()))


def test_options_of_finding_groups_are_remembered():
    model = Residual()
    optimizer = sgd(model)
    assert "include_coupled=True" in cbp_fast.explain(model)
    cbp = ContinualBackprop(model, optimizer, include_coupled=True)
    names = [group.name for group in cbp.groups]
    cbp.refresh()
    assert [group.name for group in cbp.groups] == names == ["first", "second"]
    cbp.refresh(include_coupled=False)
    assert [group.name for group in cbp.groups] == ["second"]
    cbp.refresh(verify=True, unreached_ok=True, include_coupled=True, include="second")
    cbp.refresh()
    assert [group.name for group in cbp.groups] == ["second"]
    assert cbp._asked.finding() == {
        "include_coupled": True,
        "unreached_ok": True,
        "ignore_outputs": (),
        "verify": True,
    }


@pytest.mark.parametrize(
    "option", [{"include_coupled": True}, {"unreached_ok": True}, {"ignore_outputs": ""}, {"verify": True}], ids=str
)
def test_options_of_finding_groups_do_not_go_with_given_ones(option):
    model = mlp()
    with pytest.raises(ValueError, match=f"groups= gives the unit groups, and {next(iter(option))} is for finding"):
        ContinualBackprop(model, groups=GROUPS, **option)
    cbp = ContinualBackprop(model, **option)
    cbp.refresh(groups=GROUPS)
    with pytest.raises(ValueError, match="groups= gives the unit groups"):
        cbp.refresh(**option)
    cbp.refresh()
    assert cbp.groups == ContinualBackprop(mlp(), groups=GROUPS).groups


def test_refresh_may_choose_other_groups():
    model = mlp()
    cbp = ContinualBackprop(model, include="2")
    model[4].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="include='2' matches no unit group"):
        cbp.refresh()
    cbp.refresh(include="0")
    assert [group.name for group in cbp.groups] == ["0"]
