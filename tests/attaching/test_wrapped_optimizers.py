"""Optimizers that wrap another: refused with what to pass, or followed where their hooks run."""

import pytest
import torch
from two_groups import hooks_of, mlp, train

from cbp_fast import ContinualBackprop


class Borrowed(torch.optim.Optimizer):
    """A subclass only for isinstance, as accelerate's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class SharesHooks(Borrowed):
    """Has the attributes of the other, its dict of hooks among them, as Lightning's."""

    def __init__(self, optimizer):
        vars(self).update({k: v for k, v in vars(optimizer).items() if k not in ("param_groups", "state")})
        self._optimizer = optimizer

    optimizer = property(lambda self: self._optimizer)


class NoOptimizer:
    """As DeepSpeed's and apex': no subclass."""

    def __init__(self, optimizer):
        self.inner = [optimizer]
        self.param_groups = optimizer.param_groups

    def step(self):
        self.inner[0].step()


@pytest.mark.parametrize(
    ("wrapper", "path"), [(Borrowed, "optimizer"), (SharesHooks, "optimizer"), (NoOptimizer, "inner")]
)
@pytest.mark.parametrize("several", [False, True])
def test_a_wrapper_whose_hooks_do_not_run_is_named_and_what_to_pass(wrapper, path, several):
    model = mlp()
    inner = torch.optim.Adam(model.parameters())
    optimizer = wrapper(inner)
    before = hooks_of(model, inner)
    with pytest.raises(TypeError, match=rf"is a {wrapper.__name__}, .* pass what it wraps, optimizer\.{path} \(Adam\)"):
        ContinualBackprop(model, [optimizer] if several else optimizer)
    assert hooks_of(model, inner) == before
    cbp = ContinualBackprop(model, inner)
    train(model, inner)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert int(cbp.age["0"].max()) == 2


def test_an_optimizer_without_anything_to_wrap_is_refused():
    class Alone(torch.optim.Optimizer):
        def __init__(self, params):
            self.param_groups = [{"params": list(params)}]

        def step(self):
            pass

    model = mlp()
    with pytest.raises(TypeError, match=r"is a Alone, .* pass the torch.optim.Optimizer that does the steps"):
        ContinualBackprop(model, Alone(model.parameters()))


class SAM(torch.optim.Optimizer):
    """Steps another optimizer, which keeps the moments."""

    def __init__(self, params):
        super().__init__(params, {})
        self.base_optimizer = torch.optim.Adam(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure=None):
        self.base_optimizer.step()


def test_state_of_an_optimizer_inside_another_is_reset_and_its_steps_are_no_strangers():
    model = mlp()
    optimizer = SAM(model.parameters())
    cbp = ContinualBackprop(model, optimizer, replacement_rate=1, maturity_threshold=0)
    train(model, optimizer)
    assert cbp.num_replaced == {"0": 8, "2": 8}
    assert not optimizer.base_optimizer.state[model[2].weight]["exp_avg"].any()
    train(model, optimizer, 2)
    assert cbp.state_dict()["step"] == 3


def test_steps_of_the_inner_optimizer_alone_are_said():
    model = mlp()
    optimizer = SAM(model.parameters())
    ContinualBackprop(model, optimizer)
    model(torch.randn(2, 6)).sum().backward()
    with pytest.warns(UserWarning, match=r"\(Adam\) that was not given .* refresh\(optimizer="):
        optimizer.base_optimizer.step()
