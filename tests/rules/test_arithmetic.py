"""Arithmetic: any combination of its fields, of which no method was ever made, is the same on every backend."""

import itertools
import random

import pytest
import torch
from torch import nn

from cbp_fast import ContinualBackprop, Rule
from cbp_fast.backends.triton.specialising import kernels_of
from cbp_fast.rules.arithmetic import CHOICES, METHODS, Arithmetic, Method, method

FIELDS = [name for name in CHOICES if name != "distribution"]
EVERY = [dict(zip(FIELDS, values, strict=True)) for values in itertools.product(*(CHOICES[name] for name in FIELDS))]
SOME = random.Random(0).sample(EVERY, 60)


@pytest.fixture
def rule_of(monkeypatch):
    """A rule that computes what it is told, by a method of the test's own."""

    def make(**fields):
        arithmetic = Arithmetic(**fields)
        monkeypatch.setitem(METHODS, "mine", Method("mine", (), lambda rule: arithmetic))
        return Rule("mine")

    return make


def run(rule, backend, steps=4):
    """All that some steps leave behind."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cbp = ContinualBackprop(
        model, optimizer, rule=rule, backend=backend, replacement_rate=0.4, maturity_threshold=1, decay_rate=0.5, seed=1
    )
    replaced = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
        replaced.append({name: units.tolist() for name, units in cbp.last_replaced.items()})
    momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    return replaced, [*cbp.utility.values(), *model.parameters(), *momenta]


def check(rule, backend):
    replaced, tensors = run(rule, backend)
    expected, truth = run(rule, "reference")
    assert replaced == expected
    for tensor, true in zip(tensors, truth, strict=True):
        torch.testing.assert_close(tensor, true, rtol=1e-4, atol=1e-6)
    return sum(len(units) for step in replaced for units in step.values())


@pytest.mark.parametrize("fields", SOME, ids=lambda fields: "-".join(map(str, fields.values())))
def test_a_new_combination_is_the_same_on_the_compiled_backend(rule_of, fields):
    check(rule_of(**fields), "cpp")


@pytest.mark.exhaustive
def test_every_combination_is_the_same_on_the_compiled_backend(rule_of):
    assert sum(check(rule_of(**fields), "cpp") > 0 for fields in EVERY) > len(EVERY) / 2


@pytest.mark.parametrize("fields", SOME[:8], ids=lambda fields: "-".join(map(str, fields.values())))
def test_a_new_combination_is_the_same_on_triton(rule_of, fields):
    check(rule_of(**fields), "triton")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("resets", [(), ("bias",), ("norms",), ("outgoing",), ("bias", "outgoing")], ids="-".join)
def test_what_is_set_beside_the_incoming_weights_is_said(rule_of, backend, resets):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    cbp = ContinualBackprop(
        model, rule=rule_of(resets=resets), backend=backend, replacement_rate=1, maturity_threshold=0, decay_rate=0.0
    )
    model(torch.randn(5, 4))
    cbp.step()
    assert cbp.last_replaced["0"].sort().values.tolist() == [0, 1, 2]
    assert not (model[0].weight == 0.5).any()
    assert (model[0].bias == (0 if "bias" in resets else 0.5)).all()
    assert (model[1].weight == (1 if "norms" in resets else 0.5)).all()
    assert (model[1].bias == (0 if "norms" in resets else 0.5)).all()
    assert (model[2].weight == (0 if "outgoing" in resets else 0.5)).all()


@pytest.mark.parametrize("resets_optimizer", [False, True])
def test_whether_the_optimizer_s_state_is_zeroed_is_said(rule_of, resets_optimizer):
    model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rule = rule_of(resets_optimizer=resets_optimizer)
    cbp = ContinualBackprop(model, optimizer, rule=rule, replacement_rate=1, maturity_threshold=0)
    model(torch.ones(5, 4)).sum().backward()
    optimizer.step()
    assert cbp.num_replaced == {"0": 3}
    assert bool((optimizer.state[model[2].weight]["momentum_buffer"] == 0).all()) == resets_optimizer


def test_a_value_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="score is 'best', must be one of corrected, per_step, random"):
        Arithmetic(score="best")


def test_what_cannot_be_set_is_no_reset():
    with pytest.raises(ValueError, match=r"resets has \['biass'\], must be some of bias, norms, outgoing"):
        Arithmetic(resets=("biass",))


def test_a_method_that_there_is_is_not_replaced():
    with pytest.raises(ValueError, match=r"a method 'nature' already, of cbp_fast\.rules\.nature"):

        @method()
        def nature(rule):
            return Arithmetic()

    assert Rule.make("nature").arithmetic.outgoing == "sum"


def test_a_method_is_given_no_options_that_there_are_not(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", Method("mine", ("init", "tau"), lambda rule: Arithmetic()))
    with pytest.raises(ValueError, match="'mine' takes tau, which is no option of Rule"):
        Rule("mine")


@pytest.mark.parametrize("init", ["kaiming", "default", "xavier", "lecun", "normal"])
@pytest.mark.parametrize("convolution", [False, True])
def test_normal_weights_have_the_deviation_of_uniform_ones(monkeypatch, init, convolution):
    for distribution in ("uniform", "normal"):
        arithmetic = Arithmetic(distribution=distribution)
        method = Method(distribution, ("init",), lambda rule, arithmetic=arithmetic: arithmetic)
        monkeypatch.setitem(METHODS, distribution, method)
    uniform, normal = (Rule(name, init=init) for name in ("uniform", "normal"))
    width = uniform.bound(12, 4, convolution) if init != "normal" else 3**0.5 * uniform.bound(12, 4, convolution)
    assert normal.distribution == "normal"
    assert normal.bound(12, 4, convolution) == pytest.approx(width / 3**0.5, rel=1e-15)


@pytest.mark.parametrize("score", ["corrected", "random"])
@pytest.mark.parametrize("activation", [None, "magnitude"])
def test_what_scores_without_sums_is_compiled_ahead(rule_of, score, activation):
    """`select` does all where something is summed, `score` where nothing is."""
    rule = rule_of(activation=activation, outgoing=None, score=score)
    names = [kernel.fn.__name__ for kernel, _ in kernels_of(rule, wide=False, types=4, previous=False)]
    assert ("select" in names, "score" in names) == (activation is not None, activation is None)


def test_a_method_is_asked_for_by_its_name():
    before = dict(METHODS)
    try:

        @method("init")
        def by_weight_alone(rule):
            return Arithmetic(activation=None, distribution="normal" if rule.init == "normal" else "uniform")

        assert Rule.make("by_weight_alone").arithmetic.activation is None
        assert Rule("by_weight_alone", init="normal").arithmetic.distribution == "normal"
        with pytest.raises(ValueError, match="act is no option of rule 'by_weight_alone'"):
            Rule("by_weight_alone", act="tanh")
    finally:
        METHODS.clear()
        METHODS.update(before)
