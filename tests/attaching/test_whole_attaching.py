"""Attaching and refreshing happen whole or not at all, whatever ends them."""

import gc
import sys

import pytest
import torch
from torch.nn.modules.module import _global_module_registration_hooks as module_hooks
from two_groups import EAGER, GROUPS, Net, hooks_of, mlp, net_inputs, sgd, train

from cbp_fast import ContinualBackprop, UnitGroup, attached


class Injected(BaseException):
    pass


FILES = ("cbp_fast/continual_backprop.py", "cbp_fast/attaching/", "torch/utils/hooks.py", "torch/optim/optimizer.py")


def interrupted(prepare):
    """Prepares anew for one line after the other that the call runs, of ours and of hooks, and raises there.

    Every ninth line here; all of them pass.

    Args:
        prepare: returns the call, and whatever else is to be yielded after it was interrupted.
    """
    for line in range(0, 100_000, 9):
        call, *things = prepare()
        left = line

        def trace(frame, event, arg):
            nonlocal left
            if not any(part in frame.f_code.co_filename for part in FILES):
                return None
            if event == "line":
                left -= 1
                if left == -1:
                    raise Injected
            return trace

        gc.disable()
        sys.settrace(trace)
        try:
            call()
        except Injected:
            pass
        else:
            assert line > 100
            return
        finally:
            sys.settrace(None)
            gc.enable()
        yield things


def test_attaching_that_is_interrupted_anywhere_leaves_nothing():
    # what other tests have attached and left
    gc.collect()
    model = mlp()
    optimizer = sgd(model)
    before = hooks_of(model, optimizer)

    def attach():
        ContinualBackprop(model, optimizer, groups=GROUPS)

    for _ in interrupted(lambda: (attach,)):
        assert hooks_of(model, optimizer) == before
        assert attached(model) == []
        assert not module_hooks
    (cbp,) = attached(model)
    cbp.remove()
    assert hooks_of(model, optimizer) == before


def test_a_refresh_that_is_interrupted_anywhere_is_whole_or_nothing():
    def prepare():
        model = mlp()
        old, new = sgd(model), sgd(model)
        cbp = ContinualBackprop(model, old, groups=GROUPS, **EAGER)
        train(model, old, 3)
        return lambda: cbp.refresh(optimizer=new, groups=GROUPS[:1]), cbp, model, old, new

    outcomes = set()
    for cbp, model, old, new in interrupted(prepare):
        assert attached(model) == [cbp]
        optimizer, other = (old, new) if old._optimizer_step_post_hooks else (new, old)
        assert not other._optimizer_step_post_hooks
        assert len(optimizer._optimizer_step_post_hooks) == 1
        readers = [i for i, module in enumerate(model) if module._forward_pre_hooks]
        assert readers == ([2, 4] if optimizer is old else [2])
        assert [group.name for group in cbp.groups] == (["a", "b"] if optimizer is old else ["a"])
        train(model, optimizer)
        assert int(cbp.age["a"].max()) == 4
        outcomes.add(optimizer is old)
        cbp.remove()
    assert True in outcomes


def test_finding_groups_in_a_forward_that_is_interrupted_anywhere_is_tried_again():
    def prepare():
        model = Net()
        optimizer = sgd(model)
        cbp = ContinualBackprop(model, optimizer, **EAGER)
        # the trace has tests of its own
        cbp._asked = cbp._asked._replace(groups=[UnitGroup("h", "body.0", "body.2")])
        return lambda: model(*net_inputs()), cbp, model, optimizer

    for cbp, model, optimizer in interrupted(prepare):
        train(model, optimizer, 2, net_inputs)
        assert int(cbp.age["h"].max()) == 2
        assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 1
        cbp.remove()
        assert not any(module._forward_pre_hooks for module in model.modules())


class Unhookable(torch.optim.SGD):
    def register_step_post_hook(self, hook):
        super().register_step_post_hook(hook)
        raise RuntimeError("no hooks here")


def test_an_optimizer_that_takes_no_hooks_leaves_none_on_the_model():
    model = mlp()
    optimizers = [sgd(model), Unhookable(model.parameters(), 0.1)]
    before = hooks_of(model, *optimizers)
    with pytest.raises(RuntimeError, match="no hooks here"):
        ContinualBackprop(model, optimizers)
    assert hooks_of(model, *optimizers) == before
    cbp = ContinualBackprop(model, optimizers[0])
    train(model, optimizers[0])
    with pytest.raises(RuntimeError, match="no hooks here"):
        cbp.refresh(optimizer=optimizers)
    assert not optimizers[1]._optimizer_step_post_hooks
    train(model, optimizers[0])
    assert int(cbp.age["0"].max()) == 2
