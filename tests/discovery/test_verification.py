"""The check of unit groups by changing weights: nothing wrong passes, nothing right fails, nothing stays changed."""

import contextlib
import copy
import random
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import known_networks
import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Net, multi_head
from torch import nn
from torch._subclasses import FakeTensorMode

from cbp_fast import UnitGroup, explain, find_unit_groups, verify_unit_group
from cbp_fast.discovery import verify_unit_groups
from cbp_fast.discovery.verification.watching import Uncoupled
from cbp_fast.groups.spec import Part

ROWS = torch.randn(5, 4)
GROUP = UnitGroup("g", "a", "b")
LEAKS = "its units reach the output by another way"
READS = "the columns of its outgoing layers read something else than its units"
NOTHING = "so that the check shows nothing"


def net(function, units=6, columns=None, **layers):
    """4 inputs, units from a linear layer 'a', and `function` of the model, the input and the units; 'b' reads."""
    torch.manual_seed(1)
    layers = {"a": nn.Linear(4, units), "b": nn.Linear(columns or units, 3), **layers}
    return Net(lambda m, x, *more: function(m, x, m.a(x), *more), **layers)


# what is wrong does not pass


def one_of(i):
    def forward(m, x, h):
        return m.b(F.relu(h)) + m.c(F.relu(h)[:, i : i + 1])

    return forward


def swapped(i, j):
    def forward(m, x, h):
        order = list(range(h.shape[1]))
        order[i], order[j] = j, i
        return m.b(F.relu(h)[:, order])

    return forward


@dataclass
class Holder:
    value: object


WRONG = {
    **{f"unit {i} has a second reader": one_of(i) for i in range(6)},
    **{f"units {i} and {j} are swapped": swapped(i, j) for i in range(6) for j in range(i)},
    "columns are turned round": lambda m, x, h: m.b(F.relu(h).roll(2, -1)),
    "columns are in reverse": lambda m, x, h: m.b(F.relu(h).flip(-1)),
    "a unit is part of the output": lambda m, x, h: (m.b(F.relu(h)), h[:, 3]),
    "only where it is positive": lambda m, x, h: m.b(F.relu(h)) + F.relu(h[:, 3:4]),
    "only where it is negative": lambda m, x, h: m.b(F.relu(h)) + F.relu(-h[:, 3:4]),
    "only beside other units": lambda m, x, h: m.b(F.relu(h)) * h[:, :1] if h[0, 5] > 0 else m.b(F.relu(h)),
    "decides with an index": lambda m, x, h: m.b(F.relu(h)) + m.e(h[:, 2:].argmax(-1)),
    "an index comes out": lambda m, x, h: {"action": h.argmax(-1), "value": m.b(h)},
    "a truth comes out": lambda m, x, h: (m.b(h), h[:, 2] > 0),
    "a number of Python comes out": lambda m, x, h: (m.b(h), float(h[0, 3])),
    "an array comes out": lambda m, x, h: (m.b(h).detach(), h[:, 1].detach().numpy().copy()),
    "an object comes out": lambda m, x, h: Holder([m.b(h), Holder(h[:, 4])]),
    "complex": lambda m, x, h: torch.complex(m.b(h), 0 * m.b(h)) + h[:, 2:3],
    "minus infinity where it is negative": lambda m, x, h: m.b(h).masked_fill(h[:, 1:2] < 0, -torch.inf),
    "a small part of the output": lambda m, x, h: m.b(h) + 1e-4 * h[:, 2:3],
    "a norm by hand": lambda m, x, h: m.b(h / h.pow(2).mean(-1, keepdim=True).sqrt()),
    "a mean by hand": lambda m, x, h: m.b(h - h.mean(-1, keepdim=True)),
    "a softmax over units": lambda m, x, h: m.b(h.softmax(-1)),
    "a dictionary of attributes": lambda m, x, h: (m.kept.update(h=h[:, 2]), m.b(h))[1],
    "in training only now and then": lambda m, x, h: m.b(h) + (F.relu(h[:, 3:4]) if torch.rand(()) < 0.5 else 0),
}


@pytest.mark.parametrize("name", WRONG)
def test_units_that_reach_the_output_by_another_way_are_noticed(name):
    model = net(WRONG[name], c=nn.Linear(1, 3), e=nn.Embedding(4, 3))
    model.kept = {}
    with pytest.raises(ValueError, match=rf"{LEAKS}|{READS}"):
        verify_unit_group(model, GROUP, ROWS)


def test_the_last_of_many_units_is_noticed():
    model = net(lambda m, x, h: m.b(F.relu(h)) + m.c(F.relu(h)[:, -1:]), 300, c=nn.Linear(1, 3))
    with pytest.raises(ValueError, match=LEAKS):
        verify_unit_group(model, GROUP, ROWS)
    model = net(swapped(17, 230), 300)
    with pytest.raises(ValueError, match=rf"{LEAKS}|{READS}"):
        verify_unit_group(model, GROUP, ROWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", ["model", "autocast"])
def test_low_precision_hides_nothing_and_invents_nothing(dtype, cast):
    def run(function):
        model = net(function, 64)
        model.norm = nn.LayerNorm(64)
        if cast == "model":
            model, x = model.to(dtype), ROWS.to(dtype)
            return lambda: verify_unit_group(model, UnitGroup("g", "a", "b", "norm"), x)

        def forward(m):
            with torch.autocast("cpu", dtype):
                return m(ROWS)

        return lambda: verify_unit_group(model, UnitGroup("g", "a", "b", "norm"), forward)

    run(lambda m, x, h: m.b(m.norm(torch.sigmoid(h))))()
    # one unit of 64 in a mean
    for wrong in (lambda m, x, h: m.b(h - 0.1 * h.mean(-1, keepdim=True)), lambda m, x, h: m.b(h) + 0.02 * h[:, 7:8]):
        with pytest.raises(ValueError, match=LEAKS):
            run(lambda m, x, h, wrong=wrong: m.b(0 * m.norm(h)) + wrong(m, x, h))()


def test_columns_of_data_are_noticed():
    def verify(function, inputs, **layers):
        with pytest.raises(ValueError, match=READS):
            verify_unit_group(net(function, **layers), GROUP, inputs)

    verify(lambda m, x, h: m.b(h + x.sum(-1, keepdim=True)), ROWS)
    verify(lambda m, x, h: m.b(torch.cat([h[:, :4], x[:, :2]], 1)), ROWS)
    verify(lambda m, x, h, t: m.b(h + m.e(t)), (ROWS, torch.arange(5)), e=nn.Embedding(5, 6))
    verify(lambda m, x, h, t: m.b(h + m.e(t)), (ROWS, torch.arange(5) // 4), e=nn.Embedding(5, 6))
    verify(lambda m, x, h, t: m.b(h.masked_fill(t[:, None], 1.0)), (ROWS, torch.arange(5) > 2))
    verify(lambda m, x, h, t: m.b(h + t.value[:, None]), (ROWS, Holder(ROWS[:, 0])))


def test_data_that_a_function_joins_is_noticed():
    model = net(None)
    joined = lambda m: m.b(torch.cat([m.a(ROWS)[:, :4], ROWS[:, :2]], 1))  # noqa: E731
    with pytest.raises(ValueError, match=READS):
        verify_unit_group(model, GROUP, joined)
    made = lambda m: m.b(m.a(torch.ones(5, 4)) + m.c(torch.ones(5, 4)))  # noqa: E731
    model.c = nn.Linear(4, 6)
    with pytest.raises(ValueError, match=READS):
        verify_unit_group(model, GROUP, made)


def test_wrong_norm_entries_are_noticed():
    model = net(lambda m, x, h: m.b(m.norm(h).roll(1, -1)), norm=nn.BatchNorm1d(6))
    group = UnitGroup("g", Part("a", 0), Part("b", 1), Part("norm", 1), num_units=5)
    with pytest.raises(ValueError, match=rf"{LEAKS}|{READS}"):
        verify_unit_group(model, group, ROWS)


# what is right passes


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Sequential(nn.Tanh(), nn.LayerNorm(6)))


def stateful(m, x, h):
    m.calls += 1
    m.total.add_(h.detach().mean(0))
    return m.b(F.relu(h)) * m.calls


def strict(m, x, h):
    # on other inputs and weights it raises, or takes another way
    if not torch.equal(x, ROWS):
        raise RuntimeError("not these")
    return m.b(F.relu(h))


def force(m, x, h):
    y = m.b(torch.tanh(h)).sum()
    return torch.autograd.grad(y, x, create_graph=True)[0] if x.requires_grad else y


def nested(m, x, h):
    h = torch.nested.nested_tensor([h[:2], h[2:]], layout=torch.jagged)
    return m.b(F.relu(h))


RIGHT = {
    "a layer norm that is viewed": lambda m, x, h: m.b(
        m.norm(h[None].transpose(1, 2).contiguous().transpose(1, 2)).view(5, 6)
    ),
    "a norm called past torch.nn": lambda m, x, h: m.b(torch.native_layer_norm(h, (6,), None, None, 1e-5)[0]),
    "norms called by other names": lambda m, x, h: m.b(torch.rms_norm(torch.layer_norm(h, (6,)), (6,))),
    "a norm with names": lambda m, x, h: m.b(F.layer_norm(input=h, normalized_shape=(6,))),
    "a norm without entries": lambda m, x, h: m.b(F.layer_norm(h, (6,)).mul_(2)),
    "a norm whose input is used again": lambda m, x, h: m.b(F.layer_norm(h, (6,)).relu_() + h),
    "several axes": lambda m, x, h: m.b(F.layer_norm(h.view(5, 2, 3), (2, 3), torch.ones(2, 3)).flatten(1)),
    "groups": lambda m, x, h: m.b(F.group_norm(h[..., None], 2, torch.ones(6), torch.zeros(6))[..., 0]),
    "vmap": lambda m, x, h: torch.vmap(lambda h: m.b(F.rms_norm(m.norm(h).relu(), (6,))))(h),
    "vjp": lambda m, x, h: torch.func.vjp(lambda h: m.b(F.group_norm(h, 2)), h)[0],
    "a scripted part": lambda m, x, h: m.b(m.scripted(h)),
    "other states of batch norm": lambda m, x, h: m.b(m.batch(h)),
    "counts its calls": stateful,
    "a path at random": lambda m, x, h: m.c(x) + (m.b(h) if torch.rand(()) < 0.4 else 0),
    "a path by Python": lambda m, x, h: m.c(x) + (m.b(h) if random.random() < 0.4 else 0),
    "a path by NumPy": lambda m, x, h: m.c(x) + (m.b(h) if np.random.rand() < 0.4 else 0),
    "noise": lambda m, x, h: m.b(F.dropout(torch.sigmoid(h), 0.5)) + torch.randn(5, 3),
    "the smaller of two": lambda m, x, h: torch.min(m.b(h) + 50 * m.bias, m.c(x)),
    "some units are masked": lambda m, x, h: m.b(h * torch.tensor([0.0, 1.0] * 3)),
    "masked with infinity": lambda m, x, h: m.b(F.relu(h)).masked_fill(x[:, :1] < 0, -torch.inf),
    "nothing finite for some": lambda m, x, h: m.b(F.relu(h)) / (x[:, :1] > 0),
    "overflow": lambda m, x, h: m.b(torch.exp(30 * h)),
    "weighted by data": lambda m, x, h: m.b((x @ x.T).softmax(-1) @ torch.sigmoid(h)),
    "only indices come out": lambda m, x, h: m.b(F.relu(h)).argmax(-1),
    "complex": lambda m, x, h: torch.fft.fft(m.b(F.relu(h))),
    "sparse": lambda m, x, h: m.b(F.relu(h)).to_sparse(),
    "an object": lambda m, x, h: torch.distributions.Categorical(logits=m.b(F.relu(h))),
    "derivatives": force,
    "forces itself": strict,
    "nested": nested,
    "in place": lambda m, x, h: m.b(h.relu_()).tanh_(),
    "only positive": lambda m, x, h: torch.distributions.Normal(m.b(F.relu(h)), m.scale),
}


def right(name):
    layers = {"c": nn.Linear(4, 3), "norm": nn.LayerNorm(6), "batch": nn.BatchNorm1d(6), "scripted": scripted()}
    model = net(RIGHT[name], **layers, bias=nn.Parameter(torch.ones(3)), scale=nn.Parameter(torch.ones(3)))
    model.register_buffer("total", torch.zeros(6))
    model.calls = 0
    norms = {"batch": ["batch"], "norm": ["norm"]}
    used = "batch" if "batch" in name else "norm" if name in ("vmap", "a layer norm that is viewed") else ""
    return model, UnitGroup("g", "a", "b", norms.get(used, ()))


@pytest.mark.parametrize("name", RIGHT)
def test_right_groups_pass_and_nothing_changes(name):
    model, group = right(name)
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    state, own = copy.deepcopy(model.state_dict()), {k: v for k, v in vars(model).items() if k[0] != "_"}
    versions = [p._version for p in model.parameters()]
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    x = ROWS.clone().requires_grad_(name == "derivatives")
    shows_nothing = pytest.raises(ValueError, match=r"ran on no inputs but the given ones.*not these")
    with shows_nothing if name == "forces itself" else contextlib.nullcontext():
        verify_unit_group(model, group, x, ignore_outputs=("calls", "total"))
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert versions == [p._version for p in model.parameters()]
    assert all(bool((p.grad == 2).all()) for p in model.parameters())
    assert own == {k: v for k, v in vars(model).items() if k[0] != "_"}
    assert torch.equal(x, ROWS)
    assert torch.equal(drawn[0], torch.get_rng_state())
    assert drawn[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_stand_in_for_norms_has_the_layout_and_type_of_the_norm():
    h = torch.randn(2, 6, 4, 4).to(memory_format=torch.channels_last)
    for function in (
        lambda: F.layer_norm(h, (4,)),
        lambda: F.layer_norm(h.transpose(1, 2), (6, 4), torch.ones(6, 4)),
        lambda: F.group_norm(h, 3, torch.ones(6)),
        lambda: F.rms_norm(h.transpose(1, 3), (6,)),
        lambda: F.layer_norm(h.bfloat16(), (4,), torch.ones(4), torch.zeros(4)),
    ):
        for cast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                real = function()
                with Uncoupled():
                    stand_in = function()
            assert (stand_in.stride(), stand_in.dtype) == (real.stride(), real.dtype)
            assert stand_in.data_ptr() != h.data_ptr()


@pytest.mark.parametrize("inputs", [ROWS, lambda m: m.head(m.body(ROWS)), lambda m: m.head(m.body(torch.zeros(2, 4)))])
def test_functions_and_inputs_say_the_same(inputs):
    body = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
    model = Net(lambda m, x: m.head(m.body(x)), body=body, head=nn.Linear(6, 3))
    assert [g.name for g in find_unit_groups(model, inputs, verify=True)] == ["body.0", "body.2"]


def test_functions_that_transform_the_model():
    def verify(function, run):
        verify_unit_group(net(function), GROUP, run)

    for run in (
        lambda m: torch.vmap(m)(ROWS),
        lambda m: torch.func.grad(lambda x: m(x).square().sum())(ROWS),
        lambda m: torch.func.functional_call(m, dict(m.named_parameters()), (ROWS,)),
        lambda m: F.cross_entropy(m(ROWS), torch.arange(5) % 3).item(),
        lambda m: F.cross_entropy(m(ROWS), torch.arange(5) % 3).backward(),
    ):
        if "backward" not in run.__code__.co_names:
            verify(lambda m, x, h: m.b(torch.tanh(h)), run)
            with pytest.raises(ValueError, match=LEAKS):
                verify(
                    lambda m, x, h: m.b(torch.tanh(h)) + torch.tanh(h[..., 2:3]) * torch.tensor([1.0, 0.0, 2.0]), run
                )
            with pytest.raises(ValueError, match=READS):
                verify(lambda m, x, h: m.b(torch.tanh(h) + x.sum(-1, keepdim=True)), run)
        else:
            # what comes out are gradients, which are put back
            with pytest.raises(ValueError, match=NOTHING):
                verify(lambda m, x, h: m.b(torch.tanh(h)), run)


@pytest.mark.parametrize("function", [F.relu, F.leaky_relu, torch.abs, torch.square, lambda h: F.relu(-h)])
def test_one_sample_and_one_unit_are_enough(function):
    leak = net(lambda m, x, h: m.b(function(h)) + function(h)[..., 4:5])
    for x in (ROWS[:1], ROWS[0], -ROWS[:1]):
        with pytest.raises(ValueError, match=LEAKS):
            verify_unit_group(leak, GROUP, x)
        verify_unit_group(net(lambda m, x, h: m.b(function(h)), 1), GROUP, x)


def test_every_run_is_looked_at():
    model = multi_head()
    x = torch.randn(4, 5)
    model.function = lambda m, x, task: m.heads[task](h := F.relu(m.body(x))) + (h[:, 3:4] if task == "b" else 0)
    group = UnitGroup("g", "body", ["heads.a", "heads.b"])
    verify_unit_group(model, group, (x, "a"))
    with pytest.raises(ValueError, match=LEAKS):
        verify_unit_group(model, group, [(x, "a"), (x, "b")])


def test_attributes_and_outputs_may_be_ignored():
    def forward(m, x, h):
        m.last = h
        return m.b(F.relu(h)), h

    model = net(forward)
    with pytest.raises(ValueError, match=LEAKS):
        verify_unit_group(model, GROUP, ROWS)
    ignored = ("[1]", "last")
    verify_unit_group(model, GROUP, ROWS, ignore_outputs=ignored)
    assert [g.name for g in find_unit_groups(model, ROWS, ignore_outputs=ignored, verify=True)] == ["a"]


# where nothing is shown


def test_groups_of_which_nothing_was_shown_are_kept_and_said():
    model = net(lambda m, x, h: m.c(x) + 0 * m.b(F.relu(h)), c=nn.Linear(4, 3))
    assert [g.name for g in find_unit_groups(model, ROWS, verify=True)] == ["a"]
    note = "the check showed nothing: the output does not depend on its units"
    assert note in explain(model, ROWS, verify=True)
    with pytest.raises(ValueError, match=NOTHING):
        verify_unit_group(model, GROUP, ROWS)


@pytest.mark.parametrize("leak", [0.0, 1.0])
def test_a_model_that_is_never_the_same_twice_is_no_verdict(leak):
    # a generator that the model kept would be put back
    model = net(lambda m, x, h: m.b(F.relu(h)) + leak * h[:, 3:4] + float(np.random.default_rng().normal()))
    with pytest.raises(ValueError, match=f"another result each time.*{NOTHING}"):
        verify_unit_group(model, GROUP, ROWS)


def test_a_model_that_does_not_run_is_no_verdict():
    def forward(m, x, h):
        raise RuntimeError("on purpose")

    model = net(forward)
    with pytest.raises(ValueError, match=rf"does not run, .*\(RuntimeError: on purpose\).*{NOTHING}"):
        verify_unit_group(model, GROUP, ROWS)


def test_what_was_seen_before_a_model_raised_counts():
    eye = torch.eye(400)[:4]

    def forward(m, x):
        h = m.fc1(x).relu()
        if h.max() > 0.35:
            raise ValueError("too large")
        return m.fc2(h + len(x[x > 0.5]) / 10)

    model = Net(forward, fc1=nn.Linear(400, 6), fc2=nn.Linear(6, 3))
    assert find_unit_groups(model, eye, verify=True) == []


def test_a_model_without_memory_is_refused():
    def sentence(model, x):
        with pytest.raises(ValueError, match=r"the check runs the model on numbers, and '0\.weight'"):
            verify_unit_group(model, UnitGroup("g", "0", "2"), x)
        with pytest.raises(ValueError, match=r"the check runs the model on numbers, and '0\.weight'"):
            find_unit_groups(model, x, verify=True)

    def mlp():
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

    with torch.device("meta"):
        sentence(mlp(), torch.empty(5, 4))
    with FakeTensorMode():
        sentence(mlp(), torch.empty(5, 4))


def test_weights_of_the_check_do_not_stay_in_a_context_of_autocast():
    model = net(lambda m, x, h: m.b(F.relu(h)))
    with torch.autocast("cpu", torch.bfloat16):
        before = model(ROWS)
        verify_unit_group(model, GROUP, ROWS)
        assert torch.equal(model(ROWS), before)


# a global, because what a model's function holds is put back
RUNS = []


@pytest.mark.parametrize("name", ["in the first forward", "later"])
def test_an_interrupt_leaves_the_model_as_it_was(name):
    def forward(m, x, h):
        m.calls.append(1)
        if len(RUNS) >= (1 if name == "in the first forward" else 7):
            raise KeyboardInterrupt
        RUNS.append(1)
        return m.b(m.batch(F.relu(h)))

    RUNS.clear()
    model = net(forward, batch=nn.BatchNorm1d(6))
    model.calls = []
    RUNS.extend([1] * (name == "in the first forward"))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        verify_unit_group(model, UnitGroup("g", "a", "b", "batch"), ROWS)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert model.calls == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_forwards_are_counted():
    def forward(m, x, h):
        RUNS.append(1)
        return m.b(F.relu(h))

    RUNS.clear()
    counts = []
    for units in (6, 63, 1000):
        verify_unit_group(net(forward, units), GROUP, ROWS)
        counts.append(len(RUNS))
        RUNS.clear()
    # five for each binary digit of the number of units, and one
    assert counts == [21, 31, 51]


def test_check_of_right_groups_passes():
    model, x = networks.gated().double(), known_networks.ROWS.double()
    verify_unit_groups(model, [UnitGroup("hidden", ["gate", "up"], "down")], x)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (UnitGroup("g", "gate", "down"), "the columns of its outgoing layers read something else than its units"),
        (UnitGroup("g", ["gate", "up"], "other"), "its units reach the output by another way"),
        (UnitGroup("g", "unused", "down"), "the output does not depend on its units, so that the check shows nothing"),
        (UnitGroup("g", ["gate", Part("up", 1)], [Part("down", 0)], num_units=3), "6 units"),
    ],
)
def test_check_of_wrong_groups_says_what_is_wrong(group, message):
    def forward(m, x):
        return m.down(m.gate(x) + m.up(x)) + m.other(x.new_ones(6))

    layers = {"gate": nn.Linear(5, 6), "up": nn.Linear(5, 6), "other": nn.Linear(6, 3), "unused": nn.Linear(5, 6)}
    model = networks.gated(forward, **layers).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        verify_unit_group(model, group, known_networks.ROWS.double())
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_groups_that_fail_the_check_are_left_out(monkeypatch):
    def refuse(model, group, runs, ignored):
        return SimpleNamespace(failure="so it is" if group.name == "2" else "", unshown="")

    monkeypatch.setattr("cbp_fast.discovery.finding.check", refuse)
    x = known_networks.ROWS
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    assert [g.name for g in find_unit_groups(model, x)] == ["0", "2"]
    assert [g.name for g in find_unit_groups(model, x, verify=True)] == ["0"]
    assert "'2' (Linear)  unit group '2' does not pass the check: so it is" in explain(model, x, verify=True)
