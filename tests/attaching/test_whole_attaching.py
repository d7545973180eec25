"""Attaching and refreshing: all of it or nothing, what is refused, what is said, and what copies take along."""

import copy
import gc
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.module import _global_module_registration_hooks as module_hooks
from torch.optim.optimizer import _global_optimizer_post_hooks as step_hooks

import cbp_fast
from cbp_fast import ContinualBackprop, UnitGroup, attached
from cbp_fast.hooks.registry import everyone

EAGER = {"replacement_rate": 0.1, "maturity_threshold": 2, "decay_rate": 0.9, "seed": 7}
GROUPS = [UnitGroup("a", "0", "2"), UnitGroup("b", "2", "4")]


def mlp(width=8):
    torch.manual_seed(0)
    layers = [nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)]
    return nn.Sequential(*layers)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def train(model, optimizer, steps=1, inputs=lambda: (torch.randn(4, 6),)):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(*inputs()) - 1).square().mean().backward()
        optimizer.step()


def hooks_of(*objects):
    """Every hook on modules and optimizers, and what is set on the dicts that hold them."""
    owners = [owner for o in objects for owner in (o.modules() if isinstance(o, nn.Module) else [o])]
    return [
        {
            kind: (dict(hooks), dict(vars(hooks)))
            for kind, hooks in vars(owner).items()
            if kind.endswith(("hooks", "kwargs"))
        }
        for owner in owners
    ]


class Net(nn.Module):
    """Its forward takes what cannot be guessed."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x, task):
        return self.head(self.body(x)) * task


def net_inputs():
    return torch.randn(4, 6), 1.0


# all of it or nothing


class Injected(BaseException):
    pass


FILES = ("cbp_fast/continual_backprop.py", "cbp_fast/attaching.py", "torch/utils/hooks.py", "torch/optim/optimizer.py")


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


# optimizers that wrap another


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


# models that cannot be run, and options


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


# what is said


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
        assert said[0].filename == __file__
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


# finding it, and taking it off


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


# copies, pickles, and what is made of a model


def attach(**options):
    model = mlp()
    optimizer = sgd(model)
    return model, optimizer, ContinualBackprop(model, optimizer, **{**EAGER, **options})


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "protocol 2": lambda model: pickle.loads(pickle.dumps(model, 2)),
    "python": lambda model: pickle._loads(pickle._dumps(model)),
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("take", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("lazy", [False, True])
def test_copies_carry_hooks_of_the_user_and_none_of_ours(take, lazy):
    model = Net() if lazy else mlp()
    theirs = [
        model.register_forward_pre_hook(print),
        model.register_forward_hook(print),
        next(model.children()).register_forward_pre_hook(print, with_kwargs=True),
    ]
    before = hooks_of(model)
    cbp = ContinualBackprop(model)
    assert hooks_of(take(model)) == before
    more = model.register_forward_pre_hook(id)
    cbp.remove()
    more.remove()
    # the dicts are those that the handles know
    assert hooks_of(model) == before
    for handle in theirs:
        handle.remove()
    assert not any(hooks[0] for owner in hooks_of(model) for hooks in owner.values())


def test_a_pickle_needs_no_cbp_fast(tmp_path):
    # the second waits for a forward
    now, later = attach()[0], nn.Bilinear(2, 3, 4)
    ContinualBackprop(later)
    # a dict that was copied by itself has the hooks still
    strays = []
    for owner in (now[2], later):
        stray = nn.Linear(2, 2)
        stray._forward_pre_hooks = owner._forward_pre_hooks.copy()
        stray._forward_pre_hooks_with_kwargs = owner._forward_pre_hooks_with_kwargs.copy()
        strays.append(stray)
    torch.save([now, later, *strays], tmp_path / "models")
    code = (
        "import sys, torch; sys.modules['cbp_fast'] = None\n"
        f"now, later, *strays = torch.load({str(tmp_path / 'models')!r}, weights_only=False)\n"
        "assert not any(m._forward_pre_hooks for model in (now, later) for m in model.modules())\n"
        "assert all(stray._forward_pre_hooks for stray in strays)\n"
        "[stray(torch.zeros(1, 2)).sum().backward() for stray in strays]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_asks_for_a_copy_or_for_remove():
    model, _, cbp = attach()
    for whole in (model, nn.Sequential(model)):
        with pytest.raises(AttributeError, match=r"TorchScript cannot compile its hooks; call its remove\(\) first"):
            torch.jit.script(whole)
    torch.jit.script(copy.deepcopy(model))
    cbp.remove()
    torch.jit.script(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_of_a_model_is_no_forward_and_has_nothing_of_ours():
    model, _, cbp = attach(capture="inline", backend="reference")
    traced = torch.jit.trace(model, torch.randn(2, 6))
    assert not cbp._engine.has_data
    plain = torch.jit.trace(copy.deepcopy(model), torch.randn(2, 6))
    one, other = (re.sub(r"\.___torch_mangle_\d+", "", str(graph)) for graph in (traced.graph, plain.graph))
    assert one == other


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_exported_in_training_mode_has_nothing_of_ours(strict):
    x = torch.randn(2, 6)
    model, _, cbp = attach()
    model.insert(4, cbp_fast.CBPLinear(nn.Linear(8, 8), nn.Linear(8, 8)))
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        programs = [torch.export.export(m, (x,), strict=strict) for m in (model, plain)]
    names = [[node.name for node in program.graph.nodes] for program in programs]
    assert names[0] == names[1]
    assert programs[0].constants == programs[1].constants == {}
    assert list(programs[0].state_dict) == list(programs[1].state_dict)
    assert not cbp._engine.has_data


def test_a_call_with_other_parameters_is_no_forward_of_the_model():
    model, optimizer, cbp = attach()
    own = dict(model.named_parameters())
    torch.func.functional_call(model, {k: v * 2 for k, v in own.items()}, torch.randn(4, 6))
    torch.func.functional_call(model, {k: nn.Parameter(v * 2) for k, v in own.items()}, torch.randn(4, 6))
    assert not cbp._engine.has_data
    torch.func.functional_call(model, own, torch.randn(4, 6)).sum().backward()
    assert cbp._engine.has_data
    optimizer.step()
    # nor is it looked at for groups
    model = Net()
    cbp = ContinualBackprop(model)
    torch.func.functional_call(model, {k: v * 2 for k, v in model.named_parameters()}, net_inputs())
    assert cbp.groups == []


def test_modules_that_take_over_its_hooks_are_named_and_cleaned():
    quantization = pytest.importorskip("torch.ao.quantization")
    model, optimizer, cbp = attach()
    prepared = nn.Sequential(quantization.QuantStub(), model, quantization.DeQuantStub()).train()
    prepared.qconfig = quantization.get_default_qat_qconfig("x86")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied = quantization.prepare_qat(prepared)
        assert not any(module._forward_pre_hooks for module in copied.modules())
        copied(torch.randn(4, 6)).sum().backward()
        quantization.prepare_qat(prepared, inplace=True)
    prepared(torch.randn(4, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"'0' was replaced after attaching; call refresh\(\)"):
        optimizer.step()
    cbp.remove()
    assert not any(module._forward_pre_hooks for module in prepared.modules())
    optimizer.step()


@pytest.mark.parametrize("compiled", ["module", "function"])
def test_a_model_that_was_compiled_before_is_compiled_anew(compiled):
    model = mlp()
    optimizer = sgd(model)
    run = torch.compile(model if compiled == "module" else lambda x: model(x), backend="eager")
    train(run, optimizer, 2)
    cbp = ContinualBackprop(model, optimizer, **EAGER)
    train(run, optimizer, 3)
    assert int(cbp.age["0"].max()) == 3
    # a reader that had no hook when it was compiled
    model[4] = nn.Linear(8, 3)
    optimizer.add_param_group({"params": model[4].parameters()})
    run(torch.randn(4, 6))
    cbp.refresh()
    train(run, optimizer, 2)
    assert {int(age.max()) for age in cbp.age.values()} == {5}
