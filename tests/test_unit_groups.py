"""Unit groups: what is found, what is refused and why, and that rows, norm entries and columns belong to each other."""

import copy
import dataclasses
import random
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from cbp_fast.unit_groups import _ELEMENTWISE, UnitGroup, check_disjoint, explain, find_unit_groups, resolve

COUPLING = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@pytest.fixture(autouse=True)
def one_thread():
    # hundreds of tiny forward passes: threads would only wait for each other
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """A hand-written network: its layers by name, and forward(self, x) as a function."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def mlp(*between, width=6):
    return nn.Sequential(nn.Linear(5, width), *between, nn.Linear(width, 3))


def functional_mlp(function, **layers):
    return Net(lambda m, x: m.fc2(function(m, m.fc1(x))), fc1=nn.Linear(5, 6), **layers, fc2=nn.Linear(6, 3))


def cnn(function, positions=16, **layers):
    """conv (6 channels on 4 x 4 positions) -> function -> fc."""
    conv, fc = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6 * positions, 3)
    return Net(lambda m, x: m.fc(function(m, m.conv(x))), conv=conv, **layers, fc=fc)


def two_convs(*between):
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), *between, nn.Conv2d(6, 4, 3))


def conv_net(d):
    conv, norm, pool = (getattr(nn, f"{kind}{d}d") for kind in ("Conv", "BatchNorm", "MaxPool"))
    first = (conv(2, 6, 3, padding=1, bias=False), norm(6), nn.ReLU(), pool(2))
    return nn.Sequential(*first, conv(6, 4, 1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 2**d, 3))


def nested():
    body = nn.Sequential(nn.Sequential(nn.Linear(5, 6), nn.ReLU()), nn.Sequential(nn.Linear(6, 4), nn.Tanh()))
    return Net(lambda m, x: m.head(m.body(x)), body=body, head=nn.Linear(4, 3))


def two_heads():
    def forward(m, x):
        h = torch.relu(m.body(x))
        return m.actor(h), m.critic(m.norm(h))

    return Net(forward, body=nn.Linear(5, 6), norm=nn.LayerNorm(6), actor=nn.Linear(6, 3), critic=nn.Linear(6, 1))


def grouped_reader():
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 2, groups=2), nn.Flatten(), nn.Linear(4, 3))


def depthwise_producer():
    return nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.ReLU(), nn.Conv2d(2, 4, 2))


def batch_named_first():
    def forward(m, x):
        batch = x.size(0)
        return m.fc(F.relu(m.conv(x)).reshape([batch, -1]))

    return Net(forward, conv=nn.Conv2d(2, 6, 3, padding=1), fc=nn.Linear(96, 3))


def shape_unpacked(m, h):
    b, c, height, width = h.shape
    return h.view(b, c * height * width)


FLAT, IMAGE = (5,), (2, 4, 4)
MLP, FC, CONV = [("0", ["2"], [])], [("fc1", ["fc2"], [])], [("conv", ["fc"], [])]
# name: (network, shape of one input, groups as (name, outgoing, norms), whether zero units stay zero on their way)
NETWORKS = {
    "mlp": (lambda: mlp(nn.ReLU()), FLAT, MLP, True),
    "mlp on sequences": (lambda: mlp(nn.ReLU()), (7, 5), MLP, True),
    "one unit": (lambda: mlp(nn.ReLU(), width=1), FLAT, MLP, True),
    "no bias": (lambda: nn.Sequential(nn.Linear(5, 6, False), nn.GELU(), nn.Linear(6, 3, False)), FLAT, MLP, True),
    "sigmoid": (lambda: mlp(nn.Sigmoid()), FLAT, MLP, False),
    "nothing between": (lambda: mlp(), FLAT, [("0", ["1"], [])], True),
    "deep": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ELU(), nn.Dropout(0.2), nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 3)),
        FLAT,
        [("0", ["3"], []), ("3", ["5"], [])],
        True,
    ),
    "nested": (nested, FLAT, [("body.0.0", ["body.1.0"], []), ("body.1.0", ["head"], [])], True),
    "two heads": (two_heads, FLAT, [("body", ["actor", "critic"], ["norm"])], True),
    "functional": (lambda: functional_mlp(lambda m, h: F.dropout(F.relu(h), 0.2)), FLAT, FC, True),
    "with scalars": (lambda: functional_mlp(lambda m, h: 1 - 2 * h.sigmoid() / 3), FLAT, FC, False),
    "with its own sizes": (lambda: functional_mlp(lambda m, h: h / h.size(-1) + h.dim()), FLAT, FC, False),
    "to the dtype of a weight": (lambda: functional_mlp(lambda m, h: h.to(m.fc2.weight.dtype)), FLAT, FC, True),
    "own swish": (lambda: functional_mlp(lambda m, h: h * torch.sigmoid(h)), FLAT, FC, True),
    "activation used twice": (lambda: functional_mlp(lambda m, h: m.act(m.act(h)), act=nn.Tanh()), FLAT, FC, True),
    "shared slope": (lambda: mlp(nn.PReLU()), FLAT, MLP, True),
    "batch norm": (lambda: mlp(nn.BatchNorm1d(6), nn.ReLU()), FLAT, [("0", ["3"], ["1"])], True),
    "layer norm": (lambda: mlp(nn.LayerNorm(6), nn.ReLU()), FLAT, [("0", ["3"], ["1"])], True),
    "rms norm": (lambda: mlp(nn.ReLU(), nn.RMSNorm(6)), FLAT, [("0", ["3"], ["2"])], True),
    "group norm on features": (lambda: mlp(nn.GroupNorm(2, 6)), FLAT, [("0", ["2"], ["1"])], True),
    "two norms": (lambda: mlp(nn.BatchNorm1d(6), nn.ReLU(), nn.LayerNorm(6)), FLAT, [("0", ["4"], ["1", "3"])], True),
    "conv 1d": (lambda: conv_net(1), (2, 4), [("0", ["4"], ["1"]), ("4", ["7"], [])], True),
    "conv 2d": (lambda: conv_net(2), (2, 4, 4), [("0", ["4"], ["1"]), ("4", ["7"], [])], True),
    "conv 3d": (lambda: conv_net(3), (2, 4, 4, 4), [("0", ["4"], ["1"]), ("4", ["7"], [])], True),
    "grouped reader": (grouped_reader, IMAGE, [("0", ["2"], []), ("2", ["4"], [])], True),
    "depthwise producer": (depthwise_producer, IMAGE, MLP, True),
    "group norm": (lambda: two_convs(nn.GroupNorm(3, 6), nn.ReLU()), IMAGE, [("0", ["3"], ["1"])], True),
    "instance norm": (lambda: two_convs(nn.InstanceNorm2d(6, affine=True)), IMAGE, [("0", ["2"], ["1"])], True),
    "layer norm on positions": (lambda: two_convs(nn.LayerNorm((6, 4, 4))), IMAGE, [("0", ["2"], ["1"])], True),
    "layer norm on flattened": (
        lambda: cnn(lambda m, h: m.norm(h.flatten(1)), norm=nn.LayerNorm(96)),
        IMAGE,
        [("conv", ["fc"], ["norm"])],
        True,
    ),
    "dropout of channels": (
        lambda: cnn(lambda m, h: F.dropout(m.drop(h).flatten(1), 0.3), drop=nn.Dropout2d(0.3)),
        IMAGE,
        CONV,
        True,
    ),
    "batch named first": (batch_named_first, IMAGE, CONV, True),
    "shape unpacked": (lambda: cnn(shape_unpacked), IMAGE, CONV, True),
}
POOLS = {
    "nn.MaxPool2d": (nn.MaxPool2d(2), 4),
    "nn.AvgPool2d": (nn.AvgPool2d(2), 4),
    "nn.AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d(1), 1),
    "nn.AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d(3), 9),
    "nn.LPPool2d": (nn.LPPool2d(2, 2), 4),
    "F.max_pool2d": (lambda h: F.max_pool2d(h, 2), 4),
    "torch.max_pool2d": (lambda h: torch.max_pool2d(h, 2), 4),
    "F.avg_pool2d": (lambda h: F.avg_pool2d(h, kernel_size=2), 4),
    "F.adaptive_avg_pool2d": (lambda h: F.adaptive_avg_pool2d(h, (1, 1)), 1),
    "F.adaptive_max_pool2d": (lambda h: F.adaptive_max_pool2d(h, 2), 4),
    "F.lp_pool2d": (lambda h: F.lp_pool2d(h, 2, 2), 4),
}
FLATTENS = {
    "torch.flatten": lambda h: torch.flatten(h, 1),
    "torch.flatten by name": lambda h: torch.flatten(h, start_dim=1),
    "x.flatten": lambda h: h.flatten(1),
    "x.flatten by name": lambda h: h.flatten(start_dim=1, end_dim=-1),
    "x.view size(0)": lambda h: h.view(h.size(0), -1),
    "x.view shape[0]": lambda h: h.view(h.shape[0], -1),
    "x.view size()[0]": lambda h: h.view(h.size()[0], -1),
    "x.view tuple": lambda h: h.view((h.size(0), -1)),
    "x.view all sizes": lambda h: h.view(h.size(0), 96),
    "x.reshape": lambda h: h.reshape(h.shape[0], -1),
    "torch.reshape": lambda h: torch.reshape(h, (h.shape[0], -1)),
    "torch.reshape by name": lambda h: torch.reshape(h, shape=(h.shape[0], -1)),
    "contiguous": lambda h: h.contiguous().view(h.size(0), -1),
}
NETWORKS |= {
    name: (lambda p=pool, n=n: cnn(lambda m, h: p(h).flatten(1), n), IMAGE, CONV, True)
    for name, (pool, n) in POOLS.items()
    if not isinstance(pool, nn.Module)
}
NETWORKS |= {
    name: (lambda p=pool, n=n: cnn(lambda m, h: m.pool(h).flatten(1), n, pool=p), IMAGE, CONV, True)
    for name, (pool, n) in POOLS.items()
    if isinstance(pool, nn.Module)
}
NETWORKS |= {name: (lambda f=flatten: cnn(lambda m, h: f(h)), IMAGE, CONV, True) for name, flatten in FLATTENS.items()}


def build(name):
    """A network in double precision, and its input."""
    torch.manual_seed(0)
    make, shape, groups, zeros_stay = NETWORKS[name]
    return make().double(), torch.randn(3, *shape, dtype=torch.float64), groups, zeros_stay


def as_rows(groups):
    return [(g.name, list(g.outgoing), list(g.norms)) for g in groups]


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_of_a_network(name):
    model, _, expected, _ = build(name)
    groups = find_unit_groups(model)
    assert as_rows(groups) == expected
    assert all(g.incoming == (g.name,) for g in groups)
    check_disjoint([resolve(model, g) for g in groups])


@pytest.mark.parametrize("name", NETWORKS)
def test_example_inputs_find_the_same_groups(name):
    model, x, expected, _ = build(name)
    assert as_rows(find_unit_groups(model, x)) == expected


# the oracle: it changes rows, norm entries and columns by hand, and looks at the output


def rows_of(group, units):
    for _, layer, _ in group.incoming:
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                yield parameter, units


def norm_entries_of(group, units):
    """(tensor, indices, value of a reset) for each affine parameter and statistic."""
    resets = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}
    for _, norm, _ in group.norms:
        for key, value in resets.items():
            tensor = getattr(norm, key, None)
            if tensor is not None:
                coupling = key == "weight" and isinstance(norm, COUPLING)
                flat = tensor.detach().view(group.num_units, -1)
                # a norm that couples units gives a zero unit its mean: only weight 0 silences it
                yield flat, units, 0 if coupling else value


def columns_of(group, units, shift=0):
    n, p = group.num_units, group.columns_per_unit
    for _, layer, _ in group.outgoing:
        for column in ((j * p + i + shift) % (n * p) for j in units for i in range(p)):
            blocks = getattr(layer, "groups", 1)
            weight = layer.weight.detach().view(blocks, -1, *layer.weight.shape[1:])
            block, index = divmod(column, weight.shape[2])
            yield weight[block, :, index]


@torch.no_grad()
def output(model, x):
    torch.manual_seed(1)
    y = model(x)
    return torch.cat([part.flatten() for part in (y if isinstance(y, tuple) else (y,))])


@torch.no_grad()
def moved(model, x, before, after):
    """How far the output moves by `after`, once `before` is done; the model is put back."""
    state = copy.deepcopy(model.state_dict())
    before()
    middle = copy.deepcopy(model.state_dict())
    y = output(model, x)
    model.load_state_dict(middle)
    after()
    change = (output(model, x) - y).abs().max().item()
    model.load_state_dict(state)
    return change


def zero_columns(group, units, shift=0):
    for column in columns_of(group, units, shift):
        column.zero_()


def randomise_columns(group, units, shift=0):
    for column in columns_of(group, units, shift):
        column.normal_()


def reset_units(group, units):
    for tensor, index in rows_of(group, units):
        tensor[index] = 0
    for tensor, index, value in norm_entries_of(group, units):
        tensor[index] = value


def randomise_units(group, units):
    # what enters a norm that couples units moves the others too: then only that norm's own entries can be told apart
    coupling = tuple(member for member in group.norms if isinstance(member.module, COUPLING))
    if coupling:
        group = dataclasses.replace(group, norms=coupling)
    else:
        for tensor, index in rows_of(group, units):
            tensor[index] = torch.randn_like(tensor[index])
    for tensor, index, _ in norm_entries_of(group, units):
        tensor[index] = torch.rand_like(tensor[index]) + 0.1


def uncoupled(model):
    """The model without the norms that couple units, so that its rows can be told apart."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, COUPLING):
            model.set_submodule(name, nn.Identity())
    return model


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_norm_entries_and_columns_belong_to_each_other(name, training):
    model, x, _, zeros_stay = build(name)
    models = [model, uncoupled(model)] if any(isinstance(m, COUPLING) for m in model.modules()) else [model]
    for net, group in ((m, resolve(m, g)) for m in models for g in find_unit_groups(m)):
        net.train(training)
        units = list(range(0, group.num_units, 2))

        def change(function, shift=(), group=group, units=units):
            return lambda: function(group, units, *shift)

        # A: units whose columns are zero reach the output by no other way
        assert moved(net, x, lambda: None, change(randomise_units)) > 1e-3
        assert moved(net, x, change(zero_columns), change(randomise_units)) == 0
        if group.num_units > 1:
            assert moved(net, x, change(zero_columns, (1,)), change(randomise_units)) > 1e-3
        # B: nothing else reaches the columns of units that are zero
        if zeros_stay:
            assert moved(net, x, lambda: None, change(randomise_columns)) > 1e-3
            assert moved(net, x, change(reset_units), change(randomise_columns)) < 1e-12
            if group.num_units > 1:
                assert moved(net, x, change(reset_units), change(randomise_columns, (1,))) > 1e-3


# refusals in discovery


class LinearPlusOne(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def frozen(layer):
    layer.weight.requires_grad_(False)
    return layer


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    return model


def residual():
    def forward(m, x):
        h = m.fc1(x)
        return m.fc3(h + m.fc2(torch.relu(h)))

    return Net(forward, fc1=nn.Linear(5, 6), fc2=nn.Linear(6, 6), fc3=nn.Linear(6, 3))


def hidden_is_returned():
    def forward(m, x):
        h = torch.relu(m.fc1(x))
        return m.fc2(h), h

    return Net(forward, fc1=nn.Linear(5, 6), fc2=nn.Linear(6, 3))


def one_path_unknown():
    def forward(m, x):
        h = m.fc1(x)
        return m.fc2(h) + h.softmax(-1).sum(-1, keepdim=True)

    return Net(forward, fc1=nn.Linear(5, 6), fc2=nn.Linear(6, 3))


def weight_used(function):
    return Net(lambda m, x: m.fc2(m.fc1(x)) + function(m), fc1=nn.Linear(5, 6), fc2=nn.Linear(6, 3))


def other_head():
    return Net(lambda m, x: m.body(x), body=mlp(nn.ReLU()), other=nn.Linear(6, 7))


NOT_UNDERSTOOD = "its output goes into {}, which is not understood"
COMBINED = "{} combines its output with another tensor"
OTHER_AXIS = "{} another axis of its output than that of the units"
NOT_APART = "{} is not known to keep the units apart; with example_inputs it may be"
# name: (network, layer left out, reason)
REFUSED = {
    "last layer": (lambda: mlp(nn.ReLU()), "2", "it makes the model's output"),
    "hidden units returned": (hidden_is_returned, "fc1", "its units are part of the model's output"),
    "no reader": (
        lambda: Net(lambda m, x: m.fc2((m.fc1(x), x)[1]), fc1=nn.Linear(5, 6), fc2=nn.Linear(5, 3)),
        "fc1",
        "no layer reads it",
    ),
    "not called": (
        lambda: Net(lambda m, x: m.b(x), a=nn.Linear(5, 6), b=nn.Linear(5, 3)),
        "a",
        "forward() does not call it",
    ),
    "softmax": (lambda: functional_mlp(lambda m, h: h.softmax(-1)), "fc1", NOT_UNDERSTOOD.format("softmax()")),
    "softmax module": (lambda: mlp(nn.Softmax(-1)), "0", NOT_UNDERSTOOD.format("'1' (Softmax)")),
    "glu": (lambda: functional_mlp(lambda m, h: F.glu(h, 0)), "fc1", NOT_UNDERSTOOD.format("glu()")),
    "chunk": (lambda: functional_mlp(lambda m, h: h.chunk(2)[0]), "fc1", NOT_UNDERSTOOD.format("chunk()")),
    "transpose": (lambda: functional_mlp(lambda m, h: h.transpose(0, 1)), "fc1", NOT_UNDERSTOOD.format("transpose()")),
    "property": (lambda: functional_mlp(lambda m, h: h.T), "fc1", NOT_UNDERSTOOD.format("T()")),
    "mean": (lambda: cnn(lambda m, h: h.mean((2, 3)), 1), "conv", NOT_UNDERSTOOD.format("mean()")),
    "index": (lambda: functional_mlp(lambda m, h: h[:, :6]), "fc1", NOT_UNDERSTOOD.format("getitem()")),
    "functional norm": (
        lambda: functional_mlp(lambda m, h: F.layer_norm(h, (6,))),
        "fc1",
        NOT_UNDERSTOOD.format("layer_norm()"),
    ),
    "functional linear": (
        lambda: Net(lambda m, x: F.linear(m.fc1(x), m.w), fc1=nn.Linear(5, 6), w=nn.Parameter(torch.ones(3, 6))),
        "fc1",
        COMBINED.format("linear()"),
    ),
    "user's function": (
        lambda: functional_mlp(lambda m, h: torch.fft.fft(h).real),
        "fc1",
        NOT_UNDERSTOOD.format("fft_fft()"),
    ),
    "attention": (
        lambda: functional_mlp(lambda m, h: m.attention(h, h, h)[0], attention=nn.MultiheadAttention(6, 2)),
        "fc1",
        NOT_UNDERSTOOD.format("'attention' (MultiheadAttention)"),
    ),
    "inside attention": (
        lambda: functional_mlp(lambda m, h: m.attention(h, h, h)[0], attention=nn.MultiheadAttention(6, 2)),
        "attention.out_proj",
        "it is inside 'attention' (MultiheadAttention), which is not understood",
    ),
    "lstm": (lambda: Net(lambda m, x: m.rnn(m.fc(x)), fc=nn.Linear(5, 6), rnn=nn.LSTM(6, 3)), "fc", "'rnn' (LSTM)"),
    "slope for each unit": (
        lambda: mlp(nn.PReLU(6)),
        "0",
        "'1' (PReLU) has a slope for each unit, which is not supported",
    ),
    "residual": (residual, "fc1", COMBINED.format("add()")),
    "residual branch": (residual, "fc2", COMBINED.format("add()")),
    "cat": (
        lambda: Net(lambda m, x: m.b(torch.cat([m.a(x), x], 1)), a=nn.Linear(5, 6), b=nn.Linear(11, 3)),
        "a",
        COMBINED.format("cat()"),
    ),
    "scale of each unit": (
        lambda: functional_mlp(lambda m, h: h * m.scale, scale=nn.Parameter(torch.ones(6))),
        "fc1",
        COMBINED.format("mul()"),
    ),
    "constant tensor": (lambda: functional_mlp(lambda m, h: h + torch.ones(6)), "fc1", COMBINED.format("add()")),
    "one unknown path": (one_path_unknown, "fc1", NOT_UNDERSTOOD.format("softmax()")),
    "pooled features": (lambda: mlp(nn.MaxPool1d(1)), "0", "'1' (MaxPool1d) pools its output over other axes"),
    "pool of other axes": (lambda: two_convs(nn.MaxPool3d(1)), "0", "'1' (MaxPool3d) pools its output over other axes"),
    "indices of a pool": (
        lambda: cnn(lambda m, h: F.max_pool2d(h, 2, return_indices=True)[0].flatten(1), 4),
        "conv",
        NOT_UNDERSTOOD.format("max_pool2d_with_indices()"),
    ),
    "conv read without flatten": (lambda: cnn(lambda m, h: h), "conv", OTHER_AXIS.format("'fc' (Linear) reads")),
    "features read by a conv": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Conv1d(6, 3, 1)),
        "0",
        OTHER_AXIS.format("'1' (Conv1d) reads"),
    ),
    "layer norm on one spatial axis": (
        lambda: two_convs(nn.LayerNorm(6)),
        "0",
        OTHER_AXIS.format("'1' (LayerNorm) normalises"),
    ),
    "instance norm on features": (
        lambda: mlp(nn.InstanceNorm1d(6)),
        "0",
        OTHER_AXIS.format("'1' (InstanceNorm1d) normalises"),
    ),
    "batch norm of another dimension": (
        lambda: two_convs(nn.BatchNorm3d(6)),
        "0",
        OTHER_AXIS.format("'1' (BatchNorm3d) normalises"),
    ),
    "batch norm on flattened": (
        lambda: cnn(lambda m, h: m.norm(h.flatten(1)), norm=nn.BatchNorm1d(96)),
        "conv",
        "'norm' (BatchNorm1d) normalises 96 features but the group has 6 units",
    ),
    "flatten of the batch": (lambda: functional_mlp(lambda m, h: h.flatten()), "fc1", NOT_APART.format("flatten()")),
    "flatten of positions": (lambda: cnn(lambda m, h: h.flatten(2)), "conv", NOT_APART.format("flatten()")),
    "module that flattens less": (
        lambda: cnn(lambda m, h: m.flat(h), flat=nn.Flatten(1, 2)),
        "conv",
        NOT_APART.format("'flat' (Flatten)"),
    ),
    "view of unknown batch": (lambda: cnn(lambda m, h: h.view(-1, 96)), "conv", NOT_APART.format("view()")),
    "view by another axis": (lambda: cnn(lambda m, h: h.view(h.size(1), -1)), "conv", NOT_APART.format("view()")),
    "view by another batch": (
        lambda: Net(
            lambda m, x: m.fc(m.conv(x.view(-1, 2, 4, 4)).view(x.size(0), -1)),
            conv=nn.Conv2d(2, 6, 3, padding=1),
            fc=nn.Linear(192, 3),
        ),
        "conv",
        NOT_APART.format("view()"),
    ),
    "squeeze": (lambda: cnn(lambda m, h: F.max_pool2d(h, 4).squeeze(), 1), "conv", NOT_APART.format("squeeze()")),
    "features joined over positions": (
        lambda: Net(lambda m, x: m.b(m.a(x).flatten(1)), a=nn.Linear(5, 6), b=nn.Linear(42, 3)),
        "a",
        "'b' (Linear) reads 42 features but the group has 6 units",
    ),
    "layer called twice": (
        lambda: Net(lambda m, x: m.c(m.b(m.b(m.a(x)))), a=nn.Linear(5, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3)),
        "b",
        "'b' is called 2 times in forward()",
    ),
    "reader called twice": (
        lambda: Net(lambda m, x: m.c(m.b(m.b(m.a(x)))), a=nn.Linear(5, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3)),
        "a",
        "'b' is called 2 times in forward()",
    ),
    "norm called twice": (
        lambda: functional_mlp(lambda m, h: m.norm(F.relu(m.norm(h))), norm=nn.LayerNorm(6)),
        "fc1",
        "'norm' is called 2 times in forward()",
    ),
    "weight of the layer used": (
        lambda: weight_used(lambda m: m.fc1.weight.sum()),
        "fc1",
        "'fc1.weight' is also used by sum()",
    ),
    "weight of the reader used": (
        lambda: weight_used(lambda m: m.fc2.weight.t().sum()),
        "fc1",
        "'fc2.weight' is also used by t()",
    ),
    "weight handed over": (
        lambda: weight_used(lambda m: 0 * m.fc1.weight.norm()),
        "fc1",
        "'fc1.weight' is also used by norm()",
    ),
    "tied": (tied, "0", "'0.weight' is tied: two modules of the model share it"),
    "frozen": (lambda: nn.Sequential(frozen(nn.Linear(5, 6)), nn.Linear(6, 3)), "0", "'0.weight' is frozen"),
    "frozen reader": (lambda: nn.Sequential(nn.Linear(5, 6), frozen(nn.Linear(6, 3))), "0", "'1.weight' is frozen"),
    "frozen norm": (lambda: mlp(frozen(nn.LayerNorm(6))), "0", "'1.weight' is frozen"),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Linear(6, 3)),
        "0",
        "the weight of '0' (ParametrizedLinear) is computed",
    ),
    "pruned": (
        lambda: nn.Sequential(nn.Linear(5, 6), prune.l1_unstructured(nn.Linear(6, 3), "weight", 0.5)),
        "0",
        "the weight of '1' (Linear) is computed",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 3)), "0", "'0' (LazyLinear) is lazy"),
    "forward overridden": (
        lambda: nn.Sequential(LinearPlusOne(5, 6), nn.Linear(6, 3)),
        "0",
        "'0' (LinearPlusOne) overrides forward()",
    ),
    "read by a transposed convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.ConvTranspose1d(6, 3, 1)),
        "0",
        NOT_UNDERSTOOD.format("'1' (ConvTranspose1d)"),
    ),
    "depthwise reader": (
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.Conv1d(6, 6, 1, groups=6)),
        "0",
        "'1' (Conv1d) is a depthwise convolution",
    ),
    "complex": (
        lambda: nn.Sequential(nn.Linear(5, 6, dtype=torch.complex64), nn.Linear(6, 3)),
        "0",
        "'0.weight' is torch.complex64",
    ),
    "head not called": (other_head, "body.0", "'other' (Linear) is not called here but has its width"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_says_why(name):
    make, layer, reason = REFUSED[name]
    model = make()
    assert layer not in [group.name for group in find_unit_groups(model)]
    lines = [line for line in explain(model).splitlines() if line.startswith(f"'{layer}' (")]
    assert len(lines) == 1
    assert reason in lines[0]


# example_inputs


@pytest.mark.parametrize(
    ("function", "positions"),
    [
        (lambda m, h: h.view(-1, 96), 16),
        (lambda m, h: h.reshape(3, 96), 16),
        (lambda m, h: h.view(-1, h.numel() // h.size(0)), 16),
        (lambda m, h: F.max_pool2d(h, 4).squeeze(), 1),
        (lambda m, h: F.max_pool2d(h, 4).view(-1, 6), 1),
    ],
)
def test_example_inputs_show_that_a_reshape_is_a_flatten(function, positions):
    model = cnn(function, positions)
    assert find_unit_groups(model) == []
    assert as_rows(find_unit_groups(model, torch.randn(3, *IMAGE))) == CONV


@pytest.mark.parametrize("view", [lambda h: h.view(-1, 6), lambda h: h.view(7, 3, 6), lambda h: h.flatten(0, 1)])
def test_example_inputs_show_that_a_reshape_keeps_the_last_axis(view):
    assert as_rows(find_unit_groups(functional_mlp(lambda m, h: view(h)), torch.randn(3, 7, 5))) == FC


@pytest.mark.parametrize("view", [lambda h: h.view(-1, 48), lambda h: h.view(3, -1, 96), lambda h: h.flatten(2)])
def test_example_inputs_do_not_show_what_is_no_flatten(view):
    model = cnn(lambda m, h: view(h).new_zeros(3, 96) + view(h).sum())
    assert find_unit_groups(model, torch.randn(3, *IMAGE)) == []
    assert "is not known to keep the units apart\n" in explain(model, torch.randn(3, *IMAGE))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.GroupNorm(2, 6)])
def test_example_inputs_show_that_a_norm_is_over_a_sequence(norm):
    # 6 tokens of 6 features: the norm takes the tokens for the features
    assert find_unit_groups(mlp(norm), torch.randn(3, 6, 5)) == []
    assert as_rows(find_unit_groups(mlp(norm), torch.randn(3, 5))) == [("0", ["2"], ["1"])]


def test_example_inputs_show_that_there_is_no_batch():
    # [4, 4, 4] becomes [4, 16], and a row of one channel looks like 4 columns of each of 4 units
    conv, fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(16, 3)
    model = Net(lambda m, x: m.fc(m.conv(x).flatten(1)), conv=conv, fc=fc)
    assert find_unit_groups(model, torch.randn(*IMAGE)) == []
    assert "'conv' (Conv2d)  its input has no batch axis" in explain(model, torch.randn(*IMAGE))


class ManyInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, batch, mask, /, *rest, scale=None, features=False, **others):
        h = torch.relu(self.fc1(batch["x"] * mask))
        if features:
            return h
        return self.fc2(h) if scale is None else self.fc2(h) * scale


def test_optional_arguments_stay_at_their_defaults():
    assert as_rows(find_unit_groups(ManyInputs())) == FC


def test_example_inputs_are_the_arguments_of_forward():
    x = torch.randn(3, 5)
    assert as_rows(find_unit_groups(ManyInputs(), ({"x": x}, x))) == FC
    assert find_unit_groups(mlp(nn.ReLU()), (x,)) == find_unit_groups(mlp(nn.ReLU()), {"input": x})


@pytest.mark.parametrize(
    "inputs", [torch.randn(3, 4), (torch.randn(3, 5),) * 2, {"y": torch.randn(3, 5)}, "x"], ids=str
)
def test_wrong_example_inputs_are_an_error(inputs):
    with pytest.raises(ValueError, match=r"Sequential\.forward\(\) (does not run on|cannot be traced)"):
        find_unit_groups(mlp(nn.ReLU()), inputs)


# what cannot be traced


def branch(m, x):
    return m.fc(x) if x.sum() > 0 else x


def layer_drop(m, x):
    return m.fc(x) if random.random() < 2 else x


def layer_drop_by_torch(m, x):
    return m.fc(x) if torch.rand(()) < 2 else x


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            branch,
            r"Net\.forward\(\) cannot be traced \(.*control flow.*\); pass groups=\[UnitGroup\(\.\.\.\)\] instead",
        ),
        (layer_drop, r"Net\.forward\(\) draws random numbers, so one trace may not show every path; pass groups="),
        (layer_drop_by_torch, r"Net\.forward\(\) draws random numbers"),
    ],
)
@pytest.mark.parametrize("find", [find_unit_groups, explain])
def test_forward_that_cannot_be_traced_is_an_error(find, function, message):
    with pytest.raises(ValueError, match=message):
        find(Net(function, fc=nn.Linear(5, 3)))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, r"DataParallel wraps the model.*model\.module"),
        (lambda m: torch.compile(m, backend="eager"), r"OptimizedModule wraps the model.*model\._orig_mod"),
    ],
)
def test_wrapped_model_is_an_error(wrap, message):
    for function in (find_unit_groups, explain, lambda model: resolve(model, UnitGroup("g", "0", "2"))):
        with pytest.raises(ValueError, match=message):
            function(wrap(mlp(nn.ReLU())))


def test_model_that_is_no_module_is_an_error():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, not list"):
        find_unit_groups([])


# the model stays as it was


class Careless(nn.Module):
    """A forward() that keeps records in every way there is."""

    def __init__(self, fail):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout())
        self.head = nn.Linear(6, 3)
        self.register_buffer("steps", torch.zeros(()))
        self.fail, self.calls, self.seen, self.last = fail, 0, [], {}

    def forward(self, x):
        self.calls += 1
        self.steps.add_(1)
        self.new = h = self.body(x)
        self.seen.append(h)
        self.last["h"] = h
        self.train(not self.training)
        random.random()
        torch.rand(())
        if self.fail:
            raise RuntimeError("on purpose")
        return self.head(h) + torch.ones(3)


def snapshot(model):
    modules = {name: {k: v for k, v in vars(m).items() if not isinstance(v, dict)} for name, m in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    versions = {key: value._version for key, value in model.state_dict(keep_vars=True).items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    return modules, len(model.seen), dict(model.last), versions, grads, random.getstate(), state, torch.get_rng_state()


@pytest.mark.parametrize("example_inputs", [None, torch.randn(3, 5)], ids=["trace", "shapes"])
@pytest.mark.parametrize("fail", [False, True])
def test_discovery_leaves_model_and_random_states_alone(fail, example_inputs):
    model = Careless(fail)
    fired = []
    for module in (model, *model.modules()):
        module.register_forward_hook(lambda *args: fired.append(args))
        module.register_forward_pre_hook(lambda *args: fired.append(args))
    before = snapshot(model)
    with pytest.raises(ValueError, match="on purpose" if fail else "draws random numbers"):
        find_unit_groups(model, example_inputs)
    after = snapshot(model)
    assert before[:-2] == after[:-2]
    torch.testing.assert_close(before[-2], after[-2], rtol=0, atol=0)
    assert torch.equal(before[-1], after[-1])
    assert not fired


@pytest.mark.parametrize("example_inputs", [None, torch.randn(3, 2, 4, 4)], ids=["trace", "shapes"])
def test_buffers_hooks_and_random_state_are_untouched(example_inputs):
    model, _, expected, _ = build("conv 2d")
    model.float()
    state = copy.deepcopy(model.state_dict())
    versions = [b._version for b in model.buffers()]
    fired = []
    for module in model.modules():
        module.register_forward_hook(lambda *args: fired.append(args))
    generator = torch.get_rng_state()
    assert as_rows(find_unit_groups(model, example_inputs)) == expected
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert versions == [b._version for b in model.buffers()]
    assert torch.equal(generator, torch.get_rng_state())
    assert not fired


def test_forward_set_on_the_instance_is_the_one_traced():
    model = functional_mlp(lambda m, h: h)
    model.forward = lambda x: model.fc2(torch.softmax(model.fc1(x), -1))
    assert find_unit_groups(model) == []


def test_subclass_that_keeps_forward_is_the_layer():
    named = type("Named", (nn.Linear,), {})
    assert as_rows(find_unit_groups(nn.Sequential(named(5, 6), named(6, 3)))) == [("0", ["1"], [])]


def test_lazy_layers_that_have_run_are_found():
    model = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.LazyLinear(3))
    model(torch.randn(3, 5))
    assert as_rows(find_unit_groups(model)) == [("0", ["2"], ["1"])]


def test_every_elementwise_name_is_an_operation_of_torch():
    spaces = (nn, F, torch, torch._C._nn, torch.Tensor)
    names = {name.lower().replace("_", "") for space in spaces for name in dir(space)}
    assert _ELEMENTWISE - names <= {"truediv", "iadd", "isub", "imul", "itruediv"}


ACTIVATIONS = """ReLU ReLU6 LeakyReLU RReLU ELU CELU SELU GELU SiLU Mish Sigmoid LogSigmoid Tanh Softplus Softsign
    Softshrink Hardshrink Tanhshrink Hardtanh Hardsigmoid Hardswish Identity Dropout Dropout1d AlphaDropout
    FeatureAlphaDropout"""
FUNCTIONS = """relu relu_ relu6 leaky_relu rrelu elu celu selu gelu silu mish sigmoid logsigmoid tanh softplus softsign
    softshrink hardshrink tanhshrink hardtanh hardsigmoid hardswish dropout dropout1d alpha_dropout
    feature_alpha_dropout"""
METHODS = "relu relu_ sigmoid tanh_ clamp_ abs exp square contiguous float clone"


@pytest.mark.parametrize("name", ACTIVATIONS.split())
def test_activation_modules_keep_units_apart(name):
    assert as_rows(find_unit_groups(mlp(getattr(nn, name)()))) == MLP


@pytest.mark.parametrize("name", FUNCTIONS.split())
def test_activation_functions_keep_units_apart(name):
    assert as_rows(find_unit_groups(functional_mlp(lambda m, h: getattr(F, name)(h)))) == FC


@pytest.mark.parametrize("name", METHODS.split())
def test_tensor_methods_keep_units_apart(name):
    assert as_rows(find_unit_groups(functional_mlp(lambda m, h: getattr(h, name)()))) == FC


def test_function_of_the_user_is_not_known_by_its_name():
    def relu(x):
        return x.flip(-1)

    assert find_unit_groups(functional_mlp(lambda m, h: relu(h))) == []


def test_no_layer_means_no_group():
    assert find_unit_groups(nn.Sequential(nn.ReLU())) == []
    assert explain(nn.Sequential(nn.ReLU())) == "no unit group found"


def test_explain_is_two_tables():
    assert explain(two_heads()).splitlines() == [
        "unit group  units  columns  outgoing       norms",
        "body        6      6        actor, critic  norm",
        "",
        "left out           because",
        "'actor' (Linear)   it makes the model's output",
        "'critic' (Linear)  it makes the model's output",
    ]


def test_discovery_is_fast():
    model = nn.Sequential(nn.Linear(784, 2000), nn.ReLU(), nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 10))

    def seconds():
        start = time.perf_counter()
        assert len(find_unit_groups(model)) == 2
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.1


# groups given by hand


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
