"""Groups that own a part of a layer: the same steps as with that part cut out as a layer of its own."""

from dataclasses import dataclass, field

import pytest
import torch
from networks import Conv1D
from torch import nn

from cbp_fast import ContinualBackprop, Part, Rule, UnitGroup

N = 4
NORM = ("weight", "bias", "running_mean", "running_var")
RULES = {
    "nature": Rule.nature(transfer_bias=True),
    "adaptable": Rule.gnt("adaptable_contribution", transfer_bias=True),
    "adaptation": Rule.gnt("adaptation", init="default"),
    "clarena": Rule.clarena(),
}


@dataclass
class Case:
    """A group with parts (packed) beside one without (plain), and how tensors and features of the two correspond.

    `same` maps a tensor of the plain model to one of the packed model and a view of it that has the plain one's shape;
    `columns` are the packed reader's features that the plain reader reads, in its order.
    """

    plain: dict[str, nn.Module]
    packed: dict[str, nn.Module]
    plain_group: UnitGroup
    packed_group: UnitGroup
    same: dict[str, tuple[str, object]]
    shape: tuple[int, ...]  # of the packed reader's input
    axis: int
    columns: list[int] | None = None
    rules: tuple[str, ...] = field(default=tuple(RULES))


def fused_rows(starts, stride, rows):
    return Case(
        {"gate": nn.Linear(5, N), "up": nn.Linear(5, N), "out": nn.Linear(N, 3)},
        {"in": nn.Linear(5, rows), "out": nn.Linear(N, 3)},
        UnitGroup("g", ["gate", "up"], "out"),
        UnitGroup("g", [Part("in", start, 1, stride) for start in starts], "out", num_units=N),
        {
            f"{name}.{key}": (f"in.{key}", lambda t, start=start: t[start : start + (N - 1) * stride + 1 : stride])
            for name, start in zip(("gate", "up"), starts, strict=True)
            for key in ("weight", "bias")
        }
        | {"out.weight": ("out.weight", lambda t: t), "out.bias": ("out.bias", lambda t: t)},
        (6, N),
        1,
    )


def concatenated():
    return Case(
        {"in": nn.Linear(5, N), "norm": nn.BatchNorm1d(N), "out": nn.Linear(N, 3)},
        {"in": nn.Linear(5, N), "norm": nn.BatchNorm1d(N + 3), "out": nn.Linear(N + 3, 3)},
        UnitGroup("g", "in", "out", "norm"),
        UnitGroup("g", "in", Part("out", 2), Part("norm", 2)),
        {
            **{f"in.{key}": (f"in.{key}", lambda t: t) for key in ("weight", "bias")},
            **{f"norm.{key}": (f"norm.{key}", lambda t: t[2 : 2 + N]) for key in NORM},
            "out.weight": ("out.weight", lambda t: t[:, 2 : 2 + N]),
            "out.bias": ("out.bias", lambda t: t),
        },
        (2, 3, N + 3),
        2,
        list(range(2, 2 + N)),
    )


def flattened_by_position():
    """[batch, positions, channels] flattened: the columns of a unit lie N apart, after two that are none of its."""
    by_unit = [2 + p * N + j for j in range(N) for p in range(4)]
    return Case(
        {"in": nn.Conv1d(2, N, 3), "out": nn.Linear(4 * N, 3)},
        {"in": nn.Conv1d(2, N, 3), "out": nn.Linear(4 * N + 2, 3)},
        UnitGroup("g", "in", "out"),
        UnitGroup("g", "in", Part("out", 2, 4, 1, N)),
        {
            **{f"in.{key}": (f"in.{key}", lambda t: t) for key in ("weight", "bias")},
            "out.weight": ("out.weight", lambda t: t[:, by_unit]),
            "out.bias": ("out.bias", lambda t: t),
        },
        (6, 4 * N + 2),
        1,
        by_unit,
        rules=("nature", "adaptable", "adaptation"),
    )


def grouped_reader():
    """A convolution of three groups that reads other channels besides: the units are those of groups 1 and 2."""
    return Case(
        {"in": nn.Conv1d(2, N, 3), "out": nn.Conv1d(N, 4, 2, groups=2)},
        {"in": nn.Conv1d(2, N, 3), "out": nn.Conv1d(N + 2, 6, 2, groups=3)},
        UnitGroup("g", "in", "out"),
        UnitGroup("g", "in", Part("out", 2)),
        {
            **{f"in.{key}": (f"in.{key}", lambda t: t) for key in ("weight", "bias")},
            "out.weight": ("out.weight", lambda t: t[2:]),
            "out.bias": ("out.bias", lambda t: t[2:]),
        },
        (2, N + 2, 4),
        1,
        list(range(2, 2 + N)),
        rules=("nature", "adaptable", "adaptation"),
    )


def transposed_weights(kind):
    def linear(out, fan_in):
        return Conv1D(out, fan_in) if kind == "Conv1D" else nn.ConvTranspose1d(fan_in, out, 2)

    plain = {
        "in": nn.Linear(5, N) if kind == "Conv1D" else nn.Conv1d(5, N, 2),
        "out": nn.Linear(N, 3) if kind == "Conv1D" else nn.Conv1d(N, 3, 2),
    }
    return Case(
        plain,
        {"in": linear(N, 5), "out": linear(3, N)},
        UnitGroup("g", "in", "out"),
        UnitGroup("g", "in", "out"),
        {
            f"{name}.{key}": (f"{name}.{key}", (lambda t: t.transpose(0, 1)) if key == "weight" else lambda t: t)
            for name in ("in", "out")
            for key in ("weight", "bias")
        },
        (6, N) if kind == "Conv1D" else (3, N, 2),
        1,
        rules=("nature", "adaptable", "adaptation"),
    )


def depthwise():
    """Two channels of a depthwise convolution for each unit, both read by a linear layer."""
    return Case(
        {"in": nn.Linear(5, N), "wise": nn.Linear(2, N, bias=False), "out": nn.Linear(2 * N, 3)},
        {"in": nn.Conv1d(5, N, 1), "wise": nn.Conv1d(N, 2 * N, 1, groups=N, bias=False), "out": nn.Linear(2 * N, 3)},
        UnitGroup("g", ["in", "wise"], Part("out", 0, 2)),
        UnitGroup("g", ["in", "wise"], Part("out", 0, 2)),
        {
            "in.weight": ("in.weight", lambda t: t[..., 0]),
            "wise.weight": ("wise.weight", lambda t: t.view(N, 2)),
            "out.weight": ("out.weight", lambda t: t),
            "in.bias": ("in.bias", lambda t: t),
            "out.bias": ("out.bias", lambda t: t),
        },
        (6, 2 * N),
        1,
        rules=("nature", "adaptable", "adaptation"),
    )


CASES = {
    "two halves": lambda: fused_rows((0, N), 1, 2 * N),
    "alternating": lambda: fused_rows((1, 0), 2, 2 * N + 1),
    "concatenated": concatenated,
    "flattened by position": flattened_by_position,
    "grouped reader": grouped_reader,
    "Conv1D": lambda: transposed_weights("Conv1D"),
    "ConvTranspose1d": lambda: transposed_weights("ConvTranspose1d"),
    "depthwise": depthwise,
}


def tensors(model):
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_a_part_is_treated_as_a_layer_of_its_own(case, rule, backend):
    torch.manual_seed(3)
    case = CASES[case]()
    if rule not in case.rules:
        with pytest.raises(ValueError, match="'clarena' is defined for linear layers only"):
            ContinualBackprop(nn.ModuleDict(case.packed), groups=[case.packed_group], rule=RULES[rule])
        return
    plain, packed = nn.ModuleDict(case.plain), nn.ModuleDict(case.packed)
    with torch.no_grad():
        for tensor in tensors(packed).values():
            # sums of these are exact
            if tensor.is_floating_point():
                tensor.copy_(torch.randint(-8, 9, tensor.shape) / 8)
        for name, (other, view) in case.same.items():
            tensors(plain)[name].copy_(view(tensors(packed)[other]))
    before = {name: t.detach().clone() for name, t in tensors(packed).items()}
    options = {"rule": RULES[rule], "replacement_rate": 0.3, "maturity_threshold": 1, "backend": backend, "seed": 5}
    one = ContinualBackprop(plain, groups=[case.plain_group], **options)
    two = ContinualBackprop(packed, groups=[case.packed_group], **options)
    drawn = 0
    for _ in range(6):
        h = torch.randint(-8, 9, case.shape) / 8
        seen = h if case.columns is None else h.index_select(case.axis, torch.tensor(case.columns))
        for cbp, x in ((one, seen), (two, h)):
            cbp._engine.record(0, x)
            cbp.step()
        torch.testing.assert_close(one.utility["g"], two.utility["g"], rtol=1e-6, atol=0)
        assert one.age["g"].tolist() == two.age["g"].tolist()
        assert one.last_replaced["g"].tolist() == two.last_replaced["g"].tolist()
        drawn += len(one.last_replaced["g"])
        with torch.no_grad():
            for name, (other, view) in case.same.items():
                mine, theirs = tensors(plain)[name], view(tensors(packed)[other])
                # what is drawn anew depends on a tensor's name and shape: the same entries must have changed
                fresh = (mine.frac() * 8 % 1 != 0) & (mine != theirs)
                torch.testing.assert_close(mine[~fresh], theirs[~fresh], rtol=1e-6, atol=0)
                assert (theirs[fresh] * 8 % 1 != 0).all()
                mine.copy_(theirs)
    assert drawn
    for name, tensor in tensors(packed).items():
        # nothing but what corresponds has been touched
        index = torch.arange(tensor.numel()).view(tensor.shape)
        owned = [view(index).flatten() for other, view in case.same.values() if other == name]
        rest = torch.ones(tensor.numel(), dtype=torch.bool)
        rest[torch.cat([*owned, torch.empty(0, dtype=torch.int64)])] = False
        assert torch.equal(tensor.detach().flatten()[rest], before[name].flatten()[rest]), name


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (UnitGroup("g", Part("a", 3), "b", num_units=4), "reaches index 6 of an axis of 6"),
        (UnitGroup("g", Part("a", 0, 2, 1), "b", num_units=4), "gives one index to two units"),
        (UnitGroup("g", Part("a", 0), "b"), "num_units must be given where every incoming layer is a Part"),
        (UnitGroup("g", "a", "b", num_units=4), "num_units is 4 but 'a' makes 6 units"),
        (
            UnitGroup("g", Part("a", 0, 0), "b", num_units=4),
            "whole numbers, start at least 0 and the others",
        ),
        (UnitGroup("g", "a", Part("c", 0, 2, 3)), "must lie side by side"),
        (UnitGroup("g", "embedding", "embedding"), "'embedding' is named twice"),
        (UnitGroup("g", "a", "embedding"), "reads indices, not units"),
    ],
    ids=str,
)
def test_a_part_that_does_not_fit_is_an_error(group, message):
    layers = {"a": nn.Linear(5, 6), "b": nn.Linear(6, 3), "c": nn.Linear(24, 3), "embedding": nn.Embedding(6, 6)}
    with pytest.raises((TypeError, ValueError), match=message):
        ContinualBackprop(nn.ModuleDict(layers), groups=group)


def test_groups_may_share_a_layer_but_not_its_parts():
    layers = {"a": nn.Linear(5, 6), "b": nn.Linear(5, 4), "out": nn.Linear(10, 3)}
    first, second = UnitGroup("a", "a", Part("out", 0)), UnitGroup("b", "b", Part("out", 6))
    cbp = ContinualBackprop(nn.ModuleDict(layers), groups=[first, second])
    assert cbp.groups == [UnitGroup("a", "a", Part("out", 0, 1, 1)), UnitGroup("b", "b", Part("out", 6, 1, 1))]
    assert "out[6:]" in repr(cbp)
    with pytest.raises(ValueError, match="'out' is in `outgoing` of two unit groups, 'a' and 'b'"):
        ContinualBackprop(nn.ModuleDict(layers), groups=[first, UnitGroup("b", "b", Part("out", 5))])
