"""Which forwards are observed, and that what they show is right: held or summed, changed, recomputed, in parts."""

import pytest
import torch
from stream import EAGER, Stream, mlp, momentum, observed, same
from torch import nn
from torch.utils.checkpoint import checkpoint
from two_groups import Net, attach, net_inputs

import cbp_fast
from cbp_fast import ContinualBackprop, Rule, UnitGroup


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients_is_not_observed(backend, context):
    model = mlp()
    cbp = ContinualBackprop(model, backend=backend)
    with context():
        model(torch.randn(4, 6))
    assert not observed(cbp)


def test_a_forward_in_eval_mode_is_not_observed(backend):
    model = mlp().eval()
    cbp = ContinualBackprop(model, backend=backend)
    model(torch.randn(4, 6))
    assert not observed(cbp)
    model.train()
    model(torch.randn(4, 6))
    assert observed(cbp)


def test_a_first_step_without_a_forward_is_said_once(backend):
    model = mlp()
    cbp = ContinualBackprop(model, backend=backend)
    with pytest.warns(UserWarning, match="no training forward of the model was seen before the first step"):
        cbp.step()
    cbp.step()
    assert cbp.state_dict()["step"] == 0


def test_evaluation_between_steps_changes_nothing(backend, everything):
    results = []
    for evaluate in (False, True):
        model = mlp()
        optimizer = momentum(model)
        cbp = ContinualBackprop(model, optimizer, backend=backend, **EAGER)
        stream = Stream(model, optimizer)
        for _ in range(6):
            stream.train()
            if evaluate:
                model.eval()
                model(torch.randn(50, 6) * 100)
                model.train()
        results.append(everything(model, optimizer, cbp))
    assert results[0] == results[1]


def test_an_input_given_by_name_is_observed(backend):
    incoming, reader = nn.Linear(2, 3), nn.Linear(3, 1)
    model = nn.ModuleList([incoming, reader])
    cbp = ContinualBackprop(model, groups=[UnitGroup("g", [incoming], [reader])], backend=backend)
    reader(input=torch.ones(1, 3))
    assert observed(cbp)


def test_disabled_it_neither_observes_nor_steps(backend, everything):
    model = mlp()
    optimizer = momentum(model)
    cbp = ContinualBackprop(model, optimizer, backend=backend, **EAGER)
    stream = Stream(model, optimizer)
    stream.train(5)
    cbp.enabled = False
    before = everything(cbp)
    stream.train(3)
    cbp.step()
    assert everything(cbp) == before
    cbp.enabled = True
    # nothing of the forwards in between is left
    cbp.step()
    assert not any(len(units) for units in cbp.last_replaced.values())
    stream.train()
    assert cbp.state_dict()["step"] == 6


@pytest.mark.parametrize("rule", ["nature", "clarena", Rule.gnt("zero_contribution")], ids=["nature", "clarena", "gnt"])
def test_activations_held_and_summed_at_once_are_the_same_bits(backend, everything, rule):
    results = {}
    for capture in ("deferred", "inline", "auto"):
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p)
        optimizer = momentum(model)
        cbp = ContinualBackprop(model, optimizer, rule=rule, capture=capture, backend=backend, **EAGER)
        stream = Stream(model, optimizer)
        for _ in range(6):
            optimizer.zero_grad()
            for size in (5, 1, 17):
                stream.loss(size).backward()
            optimizer.step()
        results[capture] = everything(model, optimizer, cbp)
    assert results["deferred"] == results["inline"] == results["auto"]


def test_what_is_held_is_summed_before_what_no_longer_fits(backend):
    utility = []
    for capture in ("inline", "auto"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 2))
        cbp = ContinualBackprop(model, rule=Rule.gnt("zero_contribution"), capture=capture, backend=backend)
        for i in range(4):
            # 1.5 MB each; a distance is one from the mean of the forwards so far
            model(torch.randn(6000, 6, generator=torch.Generator().manual_seed(i)) * (i + 1) + i)
        cbp.step()
        utility.append(cbp.utility["0"])
    same(*utility)


def test_accumulated_uneven_batches_give_the_pooled_mean(backend):
    utility = []
    for sizes in ((23,), (5, 1, 17)):
        # no batch norm, which would see the batches by themselves
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        cbp = ContinualBackprop(model, backend=backend)
        x = torch.randn(23, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for part in x.split(sizes):
            model(part)
        cbp.step()
        utility.append(cbp.utility["0"])
    torch.testing.assert_close(*utility, rtol=1e-14, atol=0)


def test_by_default_little_is_held(backend):
    model = mlp(width=256)
    cbp = ContinualBackprop(model, backend=backend)
    model(torch.randn(1024, 6))
    first = cbp._engine.held_bytes
    assert first == 2 * 1024 * 256 * 4
    for _ in range(4):
        model(torch.randn(1024, 6))
    assert cbp._engine.held_bytes <= 4 * 2**20
    cbp.step()
    assert cbp._engine.held_bytes == 0


class InPlace(nn.Module):
    """Changes what its reader has read, after it was read."""

    def __init__(self, change):
        super().__init__()
        self.incoming, self.reader, self.change = nn.Linear(6, 4), nn.Linear(4, 2), change

    def forward(self, x):
        h = self.incoming(x)
        y = self.reader(h.detach())
        if self.change:
            h.data.mul_(1)
            h.detach().mul_(100)
        return y


def attach_in_place(backend, change, **options):
    torch.manual_seed(0)
    model = InPlace(change)
    groups = [UnitGroup("g", ["incoming"], ["reader"])]
    return model, ContinualBackprop(model, groups=groups, backend=backend, **options)


def test_an_activation_changed_in_place_is_not_used(backend):
    model, cbp = attach_in_place(backend, change=True)
    model(torch.ones(3, 6))
    assert not observed(cbp)


@pytest.mark.parametrize("capture", ["auto", "deferred"])
def test_a_reader_whose_input_is_changed_is_summed_at_once_from_then_on(backend, capture):
    model, cbp = attach_in_place(backend, change=True, capture=capture)
    plain, expected = attach_in_place(backend, change=False, capture="inline")
    model(torch.ones(3, 6))
    cbp.step()
    for m, c in ((model, cbp), (plain, expected)):
        m(torch.ones(3, 6))
        c.step()
    same(cbp.utility["g"], expected.utility["g"])
    assert cbp.age["g"].tolist() == [1] * 4


def test_an_activation_changed_in_place_does_not_stop_the_others(backend):
    model, cbp = attach_in_place(backend, change=True)
    model(torch.ones(3, 6))
    model.change = False
    model(torch.ones(2, 6))
    assert observed(cbp)
    h = model.incoming(torch.ones(2, 6))
    expected = (1 - 0.99) * h.abs().mean(0).detach() * model.reader.weight.detach().abs().sum(0)
    torch.testing.assert_close(cbp.utility["g"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forwards_leave_the_mean_right(backend, reentrant):
    utility = []
    for recompute in (False, True):
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p)
        cbp = ContinualBackprop(model, backend=backend)
        x = torch.ones(5, 6, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
        y.sum().backward()
        cbp.step()
        utility.append(cbp.utility["0"])
    same(*utility)


@pytest.mark.parametrize("capture", ["inline", "deferred"])
def test_gradients_of_single_samples_are_not_observed(backend, capture):
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    cbp = ContinualBackprop(model, capture=capture, backend=backend)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    assert gradients(dict(model.named_parameters()), torch.randn(5, 6))["0.weight"].shape == (5, 4, 6)
    assert not observed(cbp)
    model(torch.randn(5, 6))
    assert observed(cbp)


@pytest.mark.parametrize("capture", ["inline", "deferred"])
def test_what_is_stored_as_its_negative_is_read_as_it_is(backend, capture):
    h = torch.randn(5, 4, requires_grad=True)
    utility = []
    for lazy in (False, True):
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
        for layer in model:
            nn.init.ones_(layer.weight)
        group = UnitGroup("g", [model[0]], [model[1]])
        # where the sign is seen: in the mean of both steps
        rule = Rule.gnt(utility="adaptable_contribution")
        cbp = ContinualBackprop(model, groups=group, rule=rule, capture=capture, backend=backend)
        for step in range(2):
            model[1](torch._neg_view(-h) if lazy and step else h)
            cbp.step()
        utility.append(cbp.utility["g"])
    same(*utility)
    assert utility[0].count_nonzero() == 4


class Standing(torch.Tensor):
    """Has no memory of its own: it stands for a tensor, which every function gets in its place."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=True)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        return function(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))


@pytest.mark.parametrize("capture", ["inline", "deferred"])
def test_what_only_stands_for_a_tensor_is_read_as_that(capture):
    h, utility = torch.randn(5, 4), []
    for inner in (h, Standing(h)):
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
        nn.init.ones_(model[1].weight)
        cbp = ContinualBackprop(model, groups=UnitGroup("g", [model[0]], [model[1]]), capture=capture, backend="cpp")
        model[1](inner)
        cbp.step()
        utility.append(cbp.utility["g"])
    same(*utility)
    assert utility[0].count_nonzero() == 4


def test_looking_at_a_model_is_no_forward(backend, everything):
    """Discovery, and the check by changing weights, run a model that is attached already."""
    model = mlp()
    cbp = ContinualBackprop(model, include="0", backend=backend, capture="inline")
    layer = cbp_fast.CBPLinear(model[2], model[5], bn_layer=model[3])
    model.insert(5, layer)
    before = everything(cbp), everything(model)
    example = torch.randn(4, 6)
    (group,) = cbp_fast.find_unit_groups(model, example, verify=True)[:1]
    cbp.refresh(example_inputs=example)
    assert (everything(cbp), everything(model)) == before
    assert not layer._engine.has_data
    assert group.name == "0"


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
