"""The inputs that a model is looked at by, given in every way or guessed; and which models there are to look at."""

import networks
import pytest
import torch
import torch.nn.functional as F
from known_networks import FC, MLP, RESNET, ROWS, TRANSFORMER, as_rows, cnn, functional_mlp, lines
from networks import Net, mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

from cbp_fast.discovery import explain, find_unit_groups


class ManyInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, batch, mask, /, *rest, scale=None, features=False, **others):
        h = torch.relu(self.fc1(batch["x"] * mask))
        if features:
            return h
        return self.fc2(h) if scale is None else self.fc2(h) * scale


def test_example_inputs_are_the_arguments_of_forward():
    x = torch.randn(3, 5)
    assert as_rows(find_unit_groups(ManyInputs(), ({"x": x}, x))) == FC
    model = mlp(nn.ReLU())
    expected = find_unit_groups(model, x)
    assert as_rows(expected) == MLP
    for inputs in ((x,), {"input": x}, [x], [x, (x,), {"input": x}], lambda m: m(x), lambda m: m[2](m[1](m[0](x)))):
        assert find_unit_groups(model, inputs) == expected


@pytest.mark.parametrize(
    "inputs", [torch.randn(3, 4), (torch.randn(3, 5),) * 2, {"y": torch.randn(3, 5)}, "x"], ids=str
)
def test_wrong_example_inputs_are_an_error(inputs):
    with pytest.raises(ValueError, match=r"Sequential\.forward\(\) does not run on the example_inputs given: "):
        find_unit_groups(mlp(nn.ReLU()), inputs)


@pytest.mark.parametrize(
    "model",
    [
        ManyInputs(),
        nn.Sequential(nn.ReLU()),
        cnn(lambda m, h: h, 17),
        Net(lambda m, x: m.b(x), a=nn.Linear(5, 6), b=nn.Linear(4, 3)),
        # runs on batches of two, and joins samples there
        Net(lambda m, x: m.b(m.a(x).view(-1, 12)), a=nn.Linear(5, 6), b=nn.Linear(12, 3)),
    ],
)
def test_inputs_that_cannot_be_guessed_are_asked_for(model):
    with pytest.raises(ValueError, match=r"cannot be told from its layers: pass example_inputs, a small batch that it"):
        find_unit_groups(model)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (networks.GPT, TRANSFORMER),
        (networks.resnet18, RESNET.partition("\n*")[0]),
        (
            lambda: nn.Sequential(nn.Conv2d(4, 6, 8, 4), nn.Conv2d(6, 5, 4, 2), nn.Flatten(), nn.Linear(405, 3)),
            "0: 0 -> 1\n1: 1 -> 3",
        ),
        (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(40, 3)), "0: 0 -> 2"),
        (lambda: nn.Sequential(nn.ConvTranspose1d(2, 6, 3), nn.Conv1d(6, 3, 1)), "0: 0 -> 1"),
    ],
    ids=["gpt", "resnet18", "84 pixels", "10 tokens", "transposed"],
)
def test_inputs_are_guessed(make, expected):
    assert lines(find_unit_groups(make())) == set(expected.splitlines())


@pytest.mark.parametrize("find", [find_unit_groups, explain])
def test_what_is_no_model_to_look_at_is_an_error(find):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, not list"):
        find([])
    with pytest.raises(ValueError, match=r"DataParallel wraps the model: pass the model itself, model\.module"):
        find(nn.DataParallel(mlp()))
    with pytest.raises(ValueError, match=r"'0' \(LazyLinear\) is lazy and has no weight yet: run the model once"):
        find(nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 3)), ROWS)


def test_forward_set_on_the_instance_is_the_one_that_runs():
    model = functional_mlp(lambda m, h: h)
    model.forward = lambda x: model.fc2(torch.softmax(model.fc1(x), -1))
    assert find_unit_groups(model, ROWS) == []


def test_subclass_that_keeps_forward_is_the_layer():
    named = type("Named", (nn.Linear,), {})
    assert as_rows(find_unit_groups(nn.Sequential(named(5, 6), named(6, 3)))) == [("0", ["1"], [])]


def test_lazy_layers_that_have_run_are_found():
    model = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.LazyLinear(3))
    model(torch.randn(3, 5))
    assert as_rows(find_unit_groups(model)) == [("0", ["2"], ["1"])]


def test_activation_checkpointing_changes_nothing():
    for reentrant in (False, True):
        model = functional_mlp(lambda m, h, r=reentrant: checkpoint(F.relu, h, use_reentrant=r))
        assert as_rows(find_unit_groups(model, ROWS)) == FC
