"""Groups that are found in the first training forward, when attached and when refreshed."""

import pytest
import torch
from stream import same
from torch import nn
from two_groups import EAGER, Net, net_inputs, sgd, train

from cbp_fast import ContinualBackprop, UnitGroup, metrics

# the first forward


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
        optimizer = sgd(model)
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


# refresh of what was found in a forward


def test_what_was_found_in_a_forward_is_found_again_in_the_next(everything):
    model = Net()
    optimizer = sgd(model)
    cbp = ContinualBackprop(model, optimizer, backend="reference", **EAGER)
    train(model, optimizer, 4, net_inputs)
    model.head = nn.Linear(8, 5)
    optimizer = sgd(model)
    before = everything(cbp)
    cbp.refresh(optimizer=optimizer)
    # until then all is as it was, and can be saved, set and looked at
    assert everything(cbp) == before
    state = cbp.state_dict()
    assert "body.2" in repr(cbp)
    cbp.replacement_rate = 0.25
    with torch.no_grad():
        model(*net_inputs())
    optimizer.step()
    assert cbp.state_dict()["step"] == state["step"] == 4
    train(model, optimizer, 1, net_inputs)
    assert int(cbp.age["body.0"].max()) == 5
    assert cbp.replacement_rate == 0.25
    assert cbp.state_dict()["step"] == 5
    assert model.head._forward_pre_hooks
    cbp.refresh(example_inputs=net_inputs())
    assert int(cbp.age["body.0"].max()) == 5


def test_refresh_before_the_groups_were_found():
    model = Net()
    old, new = sgd(model), sgd(model)
    cbp = ContinualBackprop(model, old, **EAGER)
    cbp.refresh(optimizer=new)
    assert cbp.groups == []
    train(model, new, 2, net_inputs)
    assert int(cbp.age["body.0"].max()) == 2
    assert not old._optimizer_step_post_hooks


def test_until_then_it_can_be_looked_at_as_ever():
    model = TwoInputs()
    cbp = ContinualBackprop(model, sgd(model), **EAGER)
    assert (cbp.join_device, cbp.join_process_group, cbp.last_replaced) == (torch.device("cpu"), None, {})
    measured = metrics.Monitor(cbp, every=1).step()
    assert (measured["step"], measured["groups"]) == (0, {})
