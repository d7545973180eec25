"""Which steps of which optimizers `CBPLinear` and `CBPConv` follow, and that those are whole."""

import copy
import gc
import os
import subprocess
import sys

import pytest
import torch
from layer_networks import layers, two_layers
from torch import nn

from cbp_fast import CBPLinear


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
