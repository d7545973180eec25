"""Taking it off, within a step as well: nothing of it stays on a model or an optimizer."""

import pickle

import pytest
from stream import hooks_of, mlp, momentum, same

from cbp_fast import ContinualBackprop


def test_remove_leaves_no_trace(backend):
    model = mlp()
    optimizer = momentum(model)
    model[2].register_forward_pre_hook(lambda module, args: None)
    optimizer.register_step_post_hook(lambda *_: None)
    before = hooks_of(model, optimizer)
    cbp = ContinualBackprop(model, optimizer, backend=backend)
    assert hooks_of(model, optimizer) != before
    cbp.remove()
    assert hooks_of(model, optimizer) == before


def test_a_removed_object_does_not_step(attached, everything):
    model, optimizer, cbp, stream = attached
    cbp.remove()
    cbp.remove()
    before = everything(cbp)
    stream.train(3)
    assert everything(cbp) == before
    with pytest.raises(RuntimeError, match="removed"):
        cbp.step()
    ContinualBackprop(model, optimizer)


def remove_in_a_step(cbp, optimizer, stream, first):
    """Take it off inside a hook of the optimizer, before or after its own; which hooks ran in that step."""
    ran = []

    def remove(*_):
        if not ran:
            cbp.remove()
        ran.append("remove")

    handles = [optimizer.register_step_post_hook(remove), optimizer.register_step_post_hook(lambda *_: ran.append(1))]
    if first:
        optimizer._optimizer_step_post_hooks.move_to_end(handles[0].id, last=False)
    stream.train()
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("first", [True, False], ids=["before its own", "after its own"])
def test_remove_inside_a_step_breaks_no_loop(attached, everything, first):
    model, optimizer, cbp, stream = attached
    age = cbp.state_dict()["step"]
    assert remove_in_a_step(cbp, optimizer, stream, first) == ["remove", 1]
    assert cbp.state_dict()["step"] == age + (not first)
    before = everything(cbp)
    stream.train()
    assert everything(cbp) == before
    assert not any(hooks for owner in hooks_of(model, optimizer) for kind, hooks in owner.items() if "step" not in kind)
    assert not optimizer._optimizer_step_post_hooks


def test_a_model_can_be_saved_right_after_a_remove_inside_a_step(attached):
    model, optimizer, cbp, stream = attached
    remove_in_a_step(cbp, optimizer, stream, first=False)
    restored = pickle.loads(pickle.dumps(model))
    same(restored.state_dict(), model.state_dict())
