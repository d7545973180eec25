"""Unit groups given by hand: how they are written, what fits together, and what is refused."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from networks import Net, mlp
from torch import nn
from torch._subclasses import FakeTensorMode

from cbp_fast import ContinualBackprop
from cbp_fast.groups.resolving import check_disjoint, resolve
from cbp_fast.groups.spec import Part, UnitGroup
from cbp_fast.tensors.memory import overlap, own_tensors, shared_memory


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


# groups by names are the groups they are names of


@st.composite
def blocks(draw, n, each, split=True):
    """(start, stride from unit to unit, each, stride from position to position) and how wide an axis it needs."""
    start = draw(st.integers(0, 2))
    if split and draw(st.booleans()):
        return (start, 1, each, n), start + n * each
    gap = draw(st.integers(0, 2)) if each == 1 else 0
    return (start, each + gap, each, 1), start + (n - 1) * (each + gap) + each


@st.composite
def networks_with_groups(draw):
    """Layers whose whole, or some part, makes, normalises or reads n units, in every form that a group can have."""
    n, d = draw(st.integers(1, 5)), draw(st.integers(0, 2))
    wider = st.integers(0, 2)
    layers, group = {}, {"incoming": [], "outgoing": [], "norms": []}

    def add(role, make, each, split=True):
        block, width = draw(blocks(n, each, split))
        if draw(st.booleans()):  # nothing but the units
            block, width = (0, each, each, 1), n * each
        else:
            width += draw(wider)
        layer = make(width)
        if layer is not None:
            name = f"{role}{len(layers)}"
            layers[name] = layer
            group[role].append(Part(name, block[0], block[2], block[1], block[3]))

    conv = (None, nn.Conv1d, nn.Conv2d)[d]
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[d]
    for _ in range(draw(st.integers(1, 2))):
        makers = [lambda w: nn.Linear(3, w), lambda w: nn.Embedding(7, w)]
        makers += [lambda w: conv(2, w, 3), lambda w: conv(w, w, 3, groups=w)] if conv else []
        add("incoming", draw(st.sampled_from(makers)), draw(st.integers(1, 3)), split=False)
    positions = draw(st.integers(1, 3))
    for _ in range(draw(st.integers(1, 2))):
        readers = [lambda w: nn.Linear(w, 2)] + ([lambda w: conv(w, 2, 1)] if conv else [])
        add("outgoing", draw(st.sampled_from(readers)), positions)
    for _ in range(draw(st.integers(0, 2))):
        add("norms", draw(st.sampled_from([norm, nn.LayerNorm])), draw(st.sampled_from([1, positions])))
    return nn.ModuleDict(layers), UnitGroup("g", **group, num_units=n)


@settings(max_examples=150)
@given(networks_with_groups())
def test_names_of_a_resolved_group_resolve_to_it(drawn):
    model, group = drawn
    try:
        resolved = resolve(model, group)
    except ValueError:
        return
    assert resolve(model, resolved.unit_group()) == resolved


def several_rows():
    return nn.ModuleDict({"a": nn.Linear(6, 4), "c": nn.Linear(16, 3)}), {
        "incoming": Part("a", 0, 4),
        "outgoing": Part("c", 0, 16),
        "num_units": 1,
    }


def only_depthwise():
    # by itself its name means six units
    return nn.ModuleDict({"a": nn.Conv2d(6, 6, 3, groups=6), "c": nn.Conv2d(6, 2, 1)}), {
        "incoming": Part("a", 0, 2),
        "outgoing": Part("c", 0, 2),
        "num_units": 3,
    }


def depthwise_beside():
    return nn.ModuleDict({"a": nn.Conv2d(2, 3, 3), "b": nn.Conv2d(3, 6, 3, groups=3), "c": nn.Linear(24, 2)}), {
        "incoming": ["a", Part("b", 0, 2)],
        "outgoing": Part("c", 0, 8),
    }


def tokens_joined():
    return nn.ModuleDict({"a": nn.Linear(5, 6), "b": nn.Linear(12, 3)}), {
        "incoming": "a",
        "outgoing": Part("b", 0, 2, 1, 6),
    }


@pytest.mark.parametrize("case", [several_rows, only_depthwise, depthwise_beside, tokens_joined])
def test_an_object_made_of_the_groups_of_another_has_its_units(case):
    model, group = case()
    first = ContinualBackprop(model, None, groups=UnitGroup("g", **group))
    groups, ages = first.groups, first.age["g"]
    first.remove()
    again = ContinualBackprop(model, None, groups=groups)
    assert again.groups == groups
    assert again.age["g"].shape == ages.shape
    assert resolve(model, groups[0]) == resolve(model, UnitGroup("g", **group))


# what discovery refuses is refused


@pytest.mark.parametrize("options", [{"padding_idx": 0}, {"max_norm": 1.0}])
def test_embedding_that_keeps_something_makes_no_units(options):
    model = nn.Sequential(nn.Embedding(11, 6, **options), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"'0' \(Embedding\) has padding_idx or max_norm"):
        resolve(model, UnitGroup("g", "0", "1"))


def square():
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6))


def by_data(model):
    model[1].weight.data = model[0].weight.data


def by_parameter(model):
    model[1].weight = model[0].weight


def by_part(model):
    flat = torch.randn(66)
    model[0].weight.data, model[1].weight.data = flat[:36].view(6, 6), flat[30:].view(6, 6)


def by_columns(model):
    wide = torch.randn(6, 11)
    model[0].weight.data, model[1].weight.data = wide[:, :6], wide[:, 5:]


def by_another_storage(model):
    model[1].weight.data = torch.from_dlpack(model[0].weight.data)


def by_buffer(model):
    model.register_buffer("average", model[0].weight.data[2])


@pytest.mark.parametrize("share", [by_data, by_parameter, by_part, by_columns, by_another_storage, by_buffer])
def test_layers_with_memory_in_common_are_tied(share):
    model = square()
    share(model)
    with pytest.raises(ValueError, match=r"'0.weight' is tied: it shares its memory with '(1.weight|average)'"):
        resolve(model, UnitGroup("g", "0", "1"))


@pytest.mark.parametrize("device", ["cpu", "meta", "fake"])
def test_neighbours_in_one_memory_are_not_tied(device):
    with FakeTensorMode() if device == "fake" else torch.device(device):
        model = square()
        flat, wide = torch.randn(84), torch.randn(6, 12)
        model[0].weight, model[0].bias = nn.Parameter(flat[:36].view(6, 6)), nn.Parameter(flat[36:42])
        model[1].weight, model[1].bias = nn.Parameter(flat[42:78].view(6, 6)), nn.Parameter(flat[78:])
        assert shared_memory(own_tensors(model)) == {}
        model[0].weight, model[1].weight = nn.Parameter(wide[:, ::2]), nn.Parameter(wide[:, 1::2])
        assert shared_memory(own_tensors(model)) == {}
        if device != "fake":
            assert resolve(model, UnitGroup("g", "0", "1", "2")).num_units == 6
        assert overlap(wide[:, :6], wide[:, 5:])


def test_a_group_is_a_name_and_layers():
    with pytest.raises(TypeError, match="name is 3, must be a string"):
        UnitGroup(3, "a", "b")
    with pytest.raises(TypeError, match="outgoing is 5, must be layers"):
        UnitGroup("g", "a", 5)
    assert UnitGroup("g", (name for name in "ab"), "c").incoming == ("a", "b")
