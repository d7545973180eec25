"""After refresh() a new optimizer, a frozen or replaced layer, a new head are followed, and what was known is kept."""

import pytest
import torch
from stream import EAGER, momentum, same
from torch import nn

from cbp_fast import ContinualBackprop, Rule, UnitGroup


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
