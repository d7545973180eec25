"""Unit groups given by hand: how they are written, what fits together, and what is refused."""

import dataclasses

import pytest
from networks import Net, mlp
from torch import nn

from cbp_fast.unit_groups import UnitGroup, check_disjoint, resolve


class LinearPlusOne(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_layers_are_given_by_name_or_as_modules():
    model = mlp(nn.LayerNorm(6))
    by_name = UnitGroup("hidden", incoming=["0"], outgoing=["2"], norms=["1"])
    by_module = UnitGroup("hidden", [model[0]], (model[2],), [model[1]])
    assert by_name.incoming == ("0",)
    assert by_name == UnitGroup("hidden", "0", "2", "1")
    assert UnitGroup("hidden", model[0], model[2], model[1]) == by_module
    assert resolve(model, by_name) == resolve(model, by_module)
    group = resolve(model, by_name)
    assert (group.name, group.num_units, group.columns_per_unit) == ("hidden", 6, 1)
    found = [[(name, module) for name, module, _ in part] for part in (group.incoming, group.outgoing, group.norms)]
    assert found == [[("0", model[0])], [("2", model[2])], [("1", model[1])]]
    assert group.unit_group() == by_name


def test_unit_group_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        UnitGroup("g", "0", "1").name = "h"


def gated():
    layers = {"gate": nn.Linear(5, 6), "up": nn.Linear(5, 6), "down": nn.Linear(6, 3), "conv": nn.Conv2d(2, 6, 3)}
    layers |= {"flat": nn.Linear(24, 3), "wide": nn.Linear(5, 7), "norm": nn.LayerNorm(24), "relu": nn.ReLU()}
    layers |= {"patches": nn.LayerNorm((6, 2, 2)), "other": nn.BatchNorm1d(7), "odd": nn.Linear(25, 3)}
    layers |= {
        "transposed": nn.ConvTranspose1d(6, 6, 1, groups=2),
        "plus": LinearPlusOne(6, 3),
        "point": nn.Conv2d(6, 3, 1),
    }
    layers |= {
        "twelve": nn.LayerNorm(12),
        "depthwise": nn.Conv2d(6, 6, 1, groups=6),
        "grouped": nn.Conv2d(6, 4, 1, groups=2),
    }
    return Net(lambda m, x: m.down(m.gate(x).relu() * m.up(x)), **layers)


@pytest.mark.parametrize(
    ("group", "columns_per_unit"),
    [
        (UnitGroup("g", ["gate", "up"], ["down"]), 1),
        (UnitGroup("g", "conv", "flat", ["norm", "patches"]), 4),
        (UnitGroup("g", "conv", ["point", "down", "grouped"]), 1),
    ],
)
def test_explicit_groups_resolve(group, columns_per_unit):
    resolved = resolve(gated(), group)
    assert (resolved.num_units, resolved.columns_per_unit) == (6, columns_per_unit)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"name": "g"}, TypeError, "a unit group must be a UnitGroup, not dict"),
        (UnitGroup("g", "gte", "down"), ValueError, "the model has no module 'gte'; did you mean 'gate'?"),
        (UnitGroup("g", "xyz", "down"), ValueError, "the model has no module 'xyz'$"),
        (UnitGroup("g", nn.Linear(5, 6), "down"), ValueError, "the Linear given is not a module of the model"),
        (UnitGroup("g", [3], "down"), TypeError, "a layer must be given as a module or its name, not as int"),
        (UnitGroup("g", [], "down"), ValueError, "`incoming` names no layer"),
        (UnitGroup("g", "gate", []), ValueError, "`outgoing` names no layer"),
        (UnitGroup("g", "gate", "gate"), ValueError, "'gate' is named twice; a layer has one role in a group"),
        (UnitGroup("g", ["gate", "gate"], "down"), ValueError, "'gate' is named twice"),
        (
            UnitGroup("g", "relu", "down"),
            TypeError,
            "'relu' (ReLU) is not supported as a layer: it must be one of Linear,",
        ),
        (UnitGroup("g", "gate", "transposed"), TypeError, "transposed convolutions with groups are not supported"),
        (UnitGroup("g", "gate", "plus"), TypeError, "'plus' (LinearPlusOne) overrides forward()"),
        (
            UnitGroup("g", "gate", "down", "relu"),
            TypeError,
            "'relu' (ReLU) is not supported as a norm: it must be one of B",
        ),
        (UnitGroup("g", ["gate", "wide"], "down"), ValueError, "'gate' makes 6 units but 'wide' makes 7"),
        (UnitGroup("g", "wide", "down"), ValueError, "'down' (Linear) reads 6 features but the group has 7 units$"),
        (UnitGroup("g", "gate", "flat"), ValueError, "'flat' (Linear) reads 24 features but the group has 6 units$"),
        (
            UnitGroup("g", "conv", "odd"),
            ValueError,
            "reads 25 features but the group has 6 units, of which that is no mu",
        ),
        (
            UnitGroup("g", "conv", ["point", "flat"]),
            ValueError,
            "'point' reads 1 columns of each unit but 'flat' reads 4",
        ),
        (
            UnitGroup("g", "conv", "depthwise"),
            ValueError,
            "'depthwise' (Conv2d) is a depthwise convolution: it does not mix units",
        ),
        (
            UnitGroup("g", "gate", "down", "other"),
            ValueError,
            "'other' (BatchNorm1d) normalises 7 features but the group",
        ),
        (
            UnitGroup("g", "gate", "down", "norm"),
            ValueError,
            "'norm' (LayerNorm) normalises 24 features but the group ha",
        ),
        (
            UnitGroup("g", "conv", "flat", "twelve"),
            ValueError,
            "'twelve' (LayerNorm) normalises 12 features but the grou",
        ),
        (
            UnitGroup("g", "gate", "down", "patches"),
            ValueError,
            "'patches' (LayerNorm) normalises (6, 2, 2) features but",
        ),
    ],
    ids=str,
)
def test_explicit_group_that_does_not_fit_is_an_error(group, error, message):
    with pytest.raises(error) as raised:
        resolve(gated(), group)
    text = str(raised.value) + "$"
    assert message in text
    assert isinstance(group, dict) or text.startswith("unit group 'g': ")


def test_groups_of_one_object_are_disjoint():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)), nn.LayerNorm(6))

    def check(*groups):
        check_disjoint([resolve(model, UnitGroup(*group)) for group in groups])

    check(("a", "0", "1"), ("b", "1", "2"))
    with pytest.raises(ValueError, match="two unit groups are called 'a'"):
        check(("a", "0", "1"), ("a", "1", "2"))
    with pytest.raises(ValueError, match="'0' is in `incoming` of two unit groups, 'a' and 'b'"):
        check(("a", "0", "1"), ("b", "0", "2"))
    with pytest.raises(ValueError, match="'1' is in `outgoing` of two unit groups, 'a' and 'b'"):
        check(("a", "0", "1"), ("b", "2", "1"))
    with pytest.raises(ValueError, match="'4' is in `norms` of two unit groups, 'a' and 'b'"):
        check(("a", "0", "1", "4"), ("b", "1", "2", "4"))
