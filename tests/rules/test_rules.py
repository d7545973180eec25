"""Rule: what a preset may be asked for, and the bounds of re-drawn weights, worked out by hand."""

import dataclasses
import math

import pytest

from cbp_fast import Rule


@pytest.mark.parametrize("name", ["nature", "gnt", "clarena"])
def test_a_name_is_its_preset_with_defaults(name):
    assert Rule.make(name) == getattr(Rule, name)()


def test_a_rule_is_taken_as_it_is():
    rule = Rule.gnt("weight")
    assert Rule.make(rule) is rule


@pytest.mark.parametrize("rule", ["Nature", "", None, 3, Rule], ids=repr)
def test_an_unknown_rule_is_refused_with_the_known_ones(rule):
    with pytest.raises(ValueError, match="nature, gnt, clarena") as error:
        Rule.make(rule)
    assert repr(rule) in str(error.value)


@pytest.mark.parametrize(
    "option", [{"utility": "contributions"}, {"init": "he"}, {"accrual": "some"}], ids=lambda option: next(iter(option))
)
def test_an_unknown_option_is_refused_by_name(option):
    ((key, value),) = option.items()
    with pytest.raises(ValueError, match=f"{key} is '{value}'"):
        Rule.gnt(**option)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "nature", "utility": "weight"},
        {"name": "nature", "accumulate": False},
        {"name": "nature", "accrual": "all"},
        {"name": "nature", "reset_optimizer": False},
        {"name": "clarena", "utility": "weight"},
        {"name": "clarena", "init": "xavier"},
        {"name": "clarena", "act": "tanh"},
        {"name": "clarena", "transfer_bias": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_an_option_of_gnt_is_refused_elsewhere(options):
    _, option = options
    with pytest.raises(ValueError, match=f"{option}.* '{options['name']}'"):
        Rule(**options)


def test_a_rule_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Rule.nature().init = "xavier"


def test_every_utility_can_be_asked_for():
    assert [Rule.gnt(utility).utility for utility in Rule.UTILITIES] == [
        "contribution",
        "zero_contribution",
        "adaptable_contribution",
        "feature_by_input",
        "weight",
        "adaptation",
        "random",
    ]


@pytest.mark.parametrize(
    ("rule", "keeps_mean"),
    [
        (Rule.nature(), False),
        (Rule.clarena(), False),
        (Rule.gnt("contribution"), False),
        (Rule.gnt("weight"), False),
        (Rule.gnt("adaptation"), False),
        (Rule.gnt("random"), False),
        (Rule.gnt("zero_contribution"), True),
        (Rule.gnt("adaptable_contribution"), True),
        (Rule.gnt("feature_by_input"), True),
        (Rule.nature(transfer_bias=True), True),
        (Rule.gnt("weight", transfer_bias=True), True),
    ],
    ids=lambda value: f"{value.name}-{value.utility}-{value.transfer_bias}" if isinstance(value, Rule) else "",
)
def test_a_mean_is_kept_where_it_is_used(rule, keeps_mean):
    assert rule.keeps_mean is keeps_mean


# fan_in 12, fan_out 4
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({}, math.sqrt(2) * math.sqrt(3 / 12)),
        ({"act": "tanh"}, 5 / 3 * math.sqrt(3 / 12)),
        ({"act": "leaky_relu"}, math.sqrt(2 / (1 + 0.01**2)) * math.sqrt(3 / 12)),
        ({"act": "sigmoid"}, 1 * math.sqrt(3 / 12)),
        ({"act": "gelu"}, math.sqrt(2) * math.sqrt(3 / 12)),
        ({"init": "default"}, math.sqrt(1 / 12)),
        ({"init": "default", "act": "tanh"}, math.sqrt(1 / 12)),
        ({"init": "xavier"}, math.sqrt(2) * math.sqrt(6 / 16)),
        ({"init": "xavier", "act": "tanh"}, 5 / 3 * math.sqrt(6 / 16)),
        ({"init": "lecun"}, math.sqrt(3 / 12)),
        ({"init": "lecun", "act": "tanh"}, math.sqrt(3 / 12)),
        ({"act": "selu"}, math.sqrt(3 / 12)),
        ({"init": "xavier", "act": "selu"}, math.sqrt(3 / 12)),
        ({"init": "normal"}, math.sqrt(2) * math.sqrt(1 / 12)),
        ({"init": "normal", "act": "tanh"}, 5 / 3 * math.sqrt(1 / 12)),
    ],
    ids=lambda value: "-".join(value.values()) or "defaults" if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("rule", [Rule.nature, Rule.gnt])
def test_bound_of_a_linear_layer(rule, options, bound):
    assert rule(**options).bound(12, 4, convolution=False) == pytest.approx(bound, rel=1e-15)


@pytest.mark.parametrize("act", ["relu", "tanh", "selu"])
@pytest.mark.parametrize("init", ["kaiming", "default", "xavier", "lecun"])
def test_a_convolution_is_drawn_as_pytorch_draws_it(init, act):
    assert Rule.gnt(init=init, act=act).bound(12, 4, convolution=True) == math.sqrt(1 / 12)


def test_a_normal_convolution_keeps_its_gain():
    assert Rule.gnt(init="normal").bound(12, 4, convolution=True) == pytest.approx(math.sqrt(2 / 12), rel=1e-15)


@pytest.mark.parametrize("convolution", [False, True])
def test_clarena_draws_from_the_unit_interval(convolution):
    rule = Rule.clarena()
    assert (rule.distribution, rule.bound(12, 4, convolution)) == ("unit", 1.0)


@pytest.mark.parametrize(("init", "distribution"), [("kaiming", "uniform"), ("lecun", "uniform"), ("normal", "normal")])
def test_distribution(init, distribution):
    assert Rule.nature(init=init).distribution == distribution


@pytest.mark.parametrize("act", ["rleu", 3, None])
def test_an_activation_function_is_one(act):
    with pytest.raises(ValueError, match=r"act is .*, must be an activation function"):
        Rule.nature(act=act)


@pytest.mark.parametrize("option", ["accumulate", "transfer_bias", "reset_optimizer"])
def test_a_flag_is_true_or_false(option):
    with pytest.raises(ValueError, match=f"{option} is 'no', must be one of False, True"):
        Rule.gnt(**{option: "no"})
