"""What is attached is found by its model, and no layer belongs to two; with the last object PyTorch's hooks go."""

import copy
import gc

import pytest
from torch import nn
from torch.nn.modules.module import _global_module_registration_hooks as module_hooks
from torch.optim.optimizer import _global_optimizer_post_hooks as step_hooks
from two_groups import hooks_of, mlp, sgd, train

import cbp_fast
from cbp_fast import ContinualBackprop, attached
from cbp_fast.hooks.registry import everyone


def test_what_is_attached_is_found_though_nobody_keeps_it():
    model = mlp()
    optimizer = sgd(model)
    before = hooks_of(model, optimizer)
    ContinualBackprop(model, optimizer, include="0")
    ContinualBackprop(model, optimizer, include="2")
    gc.collect()
    one, other = attached(model)
    assert [c.groups[0].name for c in (one, other)] == ["0", "2"]
    with pytest.raises(
        ValueError, match=r"attached already \(with '0' in `incoming` of its group '0'\); cbp_fast\.attached"
    ):
        ContinualBackprop(model, optimizer)
    # of a part, of what holds it, of what it is wrapped in
    assert attached(model[4]) == [other]
    assert attached(nn.Sequential(model)) == attached(nn.DataParallel(model)) == [one, other]
    assert attached(copy.deepcopy(model)) == attached(model[1]) == attached(mlp()) == []
    for cbp in attached(model):
        cbp.remove()
        cbp.remove()
        assert "removed" in repr(cbp)
    assert attached(model) == []
    assert hooks_of(model, optimizer) == before
    ContinualBackprop(model, optimizer).remove()
    with pytest.raises(TypeError, match="model is a str"):
        attached("model")


def test_it_is_found_when_its_reader_was_replaced():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = sgd(model)
    ContinualBackprop(model, optimizer)
    model[2] = nn.Linear(8, 4)
    assert len(attached(model)) == 1
    with pytest.raises(ValueError, match="attached already"):
        ContinualBackprop(model, sgd(model))
    attached(model)[0].remove()
    ContinualBackprop(model, sgd(model))


def test_a_layer_shared_by_two_models_belongs_to_one():
    body = nn.Linear(6, 8)
    one, other = (nn.Sequential(body, nn.ReLU(), nn.Linear(8, n)) for n in (2, 3))
    ContinualBackprop(one, sgd(one))
    with pytest.raises(ValueError, match=r"attached already \(with '0' in `incoming`"):
        ContinualBackprop(other, sgd(other))
    attached(one)[0].remove()
    layered = nn.Sequential(body, cbp_fast.CBPLinear(body, one[2]), one[2])
    train(layered, sgd(layered))
    with pytest.raises(ValueError, match=r"attached already \(by CBPLinear .* of group '0'\); take the layer out"):
        ContinualBackprop(other, sgd(other))


def test_with_the_last_object_torchs_hooks_go():
    gc.collect()
    for other in everyone():
        other.remove()
    modules, steps = dict(module_hooks), dict(step_hooks)
    one, other = mlp(), mlp()
    objects = [ContinualBackprop(one), ContinualBackprop(other)]
    assert len(module_hooks) == len(modules) + 1
    objects[0].remove()
    assert len(module_hooks) == len(modules) + 1
    objects[1].remove()
    assert (module_hooks, step_hooks) == (modules, steps)
    objects = [ContinualBackprop(one)]
    del objects, one
    gc.collect()
    assert (module_hooks, step_hooks) == (modules, steps)
