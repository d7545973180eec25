"""Discovery: what is found, what is left out and why, and that rows, norm entries and columns belong to each other."""

import copy
import functools
import random
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import Net, mlp
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

from cbp_fast.discovery import finding as discovery
from cbp_fast.discovery.finding import explain, find_unit_groups
from cbp_fast.discovery.verification import verify_unit_group, verify_unit_groups
from cbp_fast.groups.resolving import check_disjoint, resolve
from cbp_fast.groups.spec import Part, UnitGroup


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
# name: (network, shape of one input, groups as (name, outgoing, norms))
NETWORKS = {
    "mlp": (lambda: mlp(nn.ReLU()), FLAT, MLP),
    "mlp on sequences": (lambda: mlp(nn.ReLU()), (7, 5), MLP),
    "one unit": (lambda: mlp(nn.ReLU(), width=1), FLAT, MLP),
    "no bias": (lambda: nn.Sequential(nn.Linear(5, 6, False), nn.GELU(), nn.Linear(6, 3, False)), FLAT, MLP),
    "sigmoid": (lambda: mlp(nn.Sigmoid()), FLAT, MLP),
    "nothing between": (lambda: mlp(), FLAT, [("0", ["1"], [])]),
    "deep": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ELU(), nn.Dropout(0.2), nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 3)),
        FLAT,
        [("0", ["3"], []), ("3", ["5"], [])],
    ),
    "nested": (nested, FLAT, [("body.0.0", ["body.1.0"], []), ("body.1.0", ["head"], [])]),
    "two heads": (two_heads, FLAT, [("body", ["actor", "critic"], ["norm"])]),
    "functional": (lambda: functional_mlp(lambda m, h: F.dropout(F.relu(h), 0.2)), FLAT, FC),
    "with scalars": (lambda: functional_mlp(lambda m, h: 1 - 2 * h.sigmoid() / 3), FLAT, FC),
    "with its own sizes": (lambda: functional_mlp(lambda m, h: h / h.size(-1) + h.dim()), FLAT, FC),
    "to the dtype of a weight": (lambda: functional_mlp(lambda m, h: h.to(m.fc2.weight.dtype)), FLAT, FC),
    "own swish": (lambda: functional_mlp(lambda m, h: h * torch.sigmoid(h)), FLAT, FC),
    "activation used twice": (lambda: functional_mlp(lambda m, h: m.act(m.act(h)), act=nn.Tanh()), FLAT, FC),
    "shared slope": (lambda: mlp(nn.PReLU()), FLAT, MLP),
    "batch norm": (lambda: mlp(nn.BatchNorm1d(6), nn.ReLU()), FLAT, [("0", ["3"], ["1"])]),
    "layer norm": (lambda: mlp(nn.LayerNorm(6), nn.ReLU()), FLAT, [("0", ["3"], ["1"])]),
    "rms norm": (lambda: mlp(nn.ReLU(), nn.RMSNorm(6)), FLAT, [("0", ["3"], ["2"])]),
    "group norm on features": (lambda: mlp(nn.GroupNorm(2, 6)), FLAT, [("0", ["2"], ["1"])]),
    "two norms": (lambda: mlp(nn.BatchNorm1d(6), nn.ReLU(), nn.LayerNorm(6)), FLAT, [("0", ["4"], ["1", "3"])]),
    "conv 1d": (lambda: conv_net(1), (2, 4), [("0", ["4"], ["1"]), ("4", ["7"], [])]),
    "conv 2d": (lambda: conv_net(2), (2, 4, 4), [("0", ["4"], ["1"]), ("4", ["7"], [])]),
    "conv 3d": (lambda: conv_net(3), (2, 4, 4, 4), [("0", ["4"], ["1"]), ("4", ["7"], [])]),
    "grouped reader": (grouped_reader, IMAGE, [("0", ["2"], []), ("2", ["4"], [])]),
    "depthwise producer": (depthwise_producer, IMAGE, MLP),
    "group norm": (lambda: two_convs(nn.GroupNorm(3, 6), nn.ReLU()), IMAGE, [("0", ["3"], ["1"])]),
    "instance norm": (lambda: two_convs(nn.InstanceNorm2d(6, affine=True)), IMAGE, [("0", ["2"], ["1"])]),
    "layer norm on positions": (lambda: two_convs(nn.LayerNorm((6, 4, 4))), IMAGE, [("0", ["2"], ["1"])]),
    "layer norm on flattened": (
        lambda: cnn(lambda m, h: m.norm(h.flatten(1)), norm=nn.LayerNorm(96)),
        IMAGE,
        [("conv", ["fc"], ["norm"])],
    ),
    "dropout of channels": (
        lambda: cnn(lambda m, h: F.dropout(m.drop(h).flatten(1), 0.3), drop=nn.Dropout2d(0.3)),
        IMAGE,
        CONV,
    ),
    "batch named first": (batch_named_first, IMAGE, CONV),
    "shape unpacked": (lambda: cnn(shape_unpacked), IMAGE, CONV),
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
    name: (lambda p=pool, n=n: cnn(lambda m, h: p(h).flatten(1), n), IMAGE, CONV)
    for name, (pool, n) in POOLS.items()
    if not isinstance(pool, nn.Module)
}
NETWORKS |= {
    name: (lambda p=pool, n=n: cnn(lambda m, h: m.pool(h).flatten(1), n, pool=p), IMAGE, CONV)
    for name, (pool, n) in POOLS.items()
    if isinstance(pool, nn.Module)
}
NETWORKS |= {name: (lambda f=flatten: cnn(lambda m, h: f(h)), IMAGE, CONV) for name, flatten in FLATTENS.items()}


def build(name):
    """A network in double precision, and its input."""
    torch.manual_seed(0)
    make, shape, groups = NETWORKS[name]
    return make().double(), torch.randn(3, *shape, dtype=torch.float64), groups


def as_rows(groups):
    return [(g.name, list(g.outgoing), list(g.norms)) for g in groups]


@pytest.mark.parametrize("guess", [True, False], ids=["guessed", "given"])
@pytest.mark.parametrize("name", NETWORKS)
def test_groups_of_a_network(name, guess):
    model, x, expected = build(name)
    groups = find_unit_groups(model, None if guess else x)
    assert as_rows(groups) == expected
    assert all(g.incoming == (g.name,) for g in groups)
    check_disjoint([resolve(model, g) for g in groups])


def shifted(model, group):
    """A group whose rows and norm entries are those of the next unit."""
    found = resolve(model, group)

    def parts(members, by):
        return [Part(m.name, m.block.start + by * m.block.unit_stride, *m.block[2:0:-1], m.block[3]) for m in members]

    incoming, norms = parts(found.incoming, 1), parts(found.norms, 1)
    return UnitGroup(group.name, incoming, parts(found.outgoing, 0), norms, found.num_units - 1)


def assert_verified(model, groups, x):
    for group in groups:
        verify_unit_group(model, group, x)
        if resolve(model, group).num_units > 1:
            with pytest.raises(ValueError, match=r"does not pass the check|side by side"):
                verify_unit_group(model, shifted(model, group), x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_norm_entries_and_columns_belong_to_each_other(name, training):
    model, x, _ = build(name)
    model.train(training)
    assert_verified(model, find_unit_groups(model, x), x)


# networks of the kinds that people train


IMAGES, TOKENS, ROWS, SEQUENCE = (
    torch.randn(2, 3, 8, 8),
    torch.arange(14).view(2, 7) % 11,
    torch.randn(4, 5),
    torch.randn(4, 2, 5),
)
TOKEN_ROWS = torch.randn(16, 5)
RESNET = """3.conv1: 3.conv1 -> 3.conv2 | 3.bn1
4.conv1: 4.conv1 -> 4.conv2 | 4.bn1
5.conv1: 5.conv1 -> 5.conv2 | 5.bn1
6.conv1: 6.conv1 -> 6.conv2 | 6.bn1
7.conv1: 7.conv1 -> 7.conv2 | 7.bn1
8.conv1: 8.conv1 -> 8.conv2 | 8.bn1
9.conv1: 9.conv1 -> 9.conv2 | 9.bn1
10.conv1: 10.conv1 -> 10.conv2 | 10.bn1
* 0: 0 3.conv2 4.conv2 -> 3.conv1 4.conv1 5.conv1 5.down.0 | 1 3.bn2 4.bn2
* 5.conv2: 5.conv2 5.down.0 6.conv2 -> 6.conv1 7.conv1 7.down.0 | 5.bn2 5.down.1 6.bn2
* 7.conv2: 7.conv2 7.down.0 8.conv2 -> 8.conv1 9.conv1 9.down.0 | 7.bn2 7.down.1 8.bn2
* 9.conv2: 9.conv2 9.down.0 10.conv2 -> 10.conv1 13 | 9.bn2 9.down.1 10.bn2"""
TRANSFORMER = """blocks.0.attention.qkv:16-23: blocks.0.attention.qkv[16] -> blocks.0.attention.out
blocks.0.mlp.0: blocks.0.mlp.0 -> blocks.0.down
blocks.1.attention.qkv:16-23: blocks.1.attention.qkv[16] -> blocks.1.attention.out
blocks.1.mlp.0: blocks.1.mlp.0 -> blocks.1.down"""
STREAM = (
    "blocks.0.attention.out blocks.0.down blocks.1.attention.out blocks.1.down -> "
    "blocks.0.attention.qkv blocks.0.mlp.0 blocks.1.attention.qkv blocks.1.mlp.0 head | "
    "blocks.0.norm1 blocks.0.norm2 blocks.1.norm1 blocks.1.norm2 norm"
)
# name: (network, example inputs, groups; those with a star are coupled)
ZOO = {
    "resnet18": (networks.resnet18, IMAGES, RESNET),
    "convnext": (
        networks.convnext,
        IMAGES,
        """1.up: 1.up -> 1.down
        2.up: 2.up -> 2.down
        * 0: 0 1.down 2.down 1.depthwise 2.depthwise -> 1.up 2.up 6 | 1.norm 2.norm 5""",
    ),
    "mobilenet": (
        networks.mobilenet,
        IMAGES,
        """1.body.0: 1.body.0 1.body.3 -> 1.body.6 | 1.body.1 1.body.4
        * 0: 0 1.body.6 -> 1.body.0 4 | 1.body.7""",
    ),
    "vit": (networks.ViT, IMAGES, f"{TRANSFORMER}\n* patches: patches {STREAM}"),
    "gpt": (networks.GPT, TOKENS, TRANSFORMER),
    "gpt with a head of its own": (
        lambda: networks.GPT(tied=False),
        TOKENS,
        f"{TRANSFORMER}\n* tokens: tokens positions {STREAM}",
    ),
    "llama": (
        lambda: networks.Llama(depth=1),
        TOKENS,
        """blocks.0.gate: blocks.0.gate blocks.0.up -> blocks.0.down
        blocks.0.v:0-3: blocks.0.v -> blocks.0.o
        blocks.0.v:4-7: blocks.0.v[4] -> blocks.0.o[8]""",
    ),
    "encoder layer": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3)),
        SEQUENCE,
        "1.linear1: 1.linear1 -> 1.linear2",
    ),
    "actor and critic": (networks.actor_critic, ROWS, "body: body -> policy critic\npolicy: policy -> actor"),
    "heads": (networks.multi_head, [(ROWS, "a"), (ROWS, "b")], "body: body -> heads.a heads.b"),
    "one head": (networks.multi_head, ROWS, ""),
    "tied autoencoder": (networks.tied_autoencoder, ROWS, ""),
    "lstm": (networks.lstm, SEQUENCE, ""),
    "lstm in double precision": (lambda: networks.lstm().double(), SEQUENCE.double(), ""),
    "rnn by hand": (networks.hand_rnn, SEQUENCE, "inputs: inputs -> inner"),
    "weight norm": (networks.weight_norm, ROWS, "4: 4 -> 6"),
    "lora": (networks.lora, ROWS, "0.a: 0.a -> 0.b\n2.a: 2.a -> 2.b"),
    "one branch": (networks.python_if, ROWS.abs(), "fc2: fc2 -> fc3"),
    "both branches": (networks.python_if, [ROWS.abs(), -ROWS.abs()], "fc1: fc1 -> fc2 short\nfc2: fc2 -> fc3"),
    "experts": (
        networks.MoE,
        TOKEN_ROWS,
        """experts.0.0: experts.0.0 -> experts.0.2
        experts.1.0: experts.1.0 -> experts.1.2
        * inputs: inputs experts.0.2 experts.1.2 -> router experts.0.0 experts.1.0 head""",
    ),
    "squeeze and excite": (
        networks.squeeze_excite,
        IMAGES,
        "1.fc1: 1.fc1 -> 1.fc2\n* 0: 0 1.fc2 -> 1.fc1 2",
    ),
    "gate and up": (networks.gated, ROWS, "gate: gate up -> down"),
    "glu": (networks.fused_glu, ROWS, "both: both both[6] -> down"),
    "fused gate and up": (networks.fused_swiglu, ROWS, "both: both both[6] -> down"),
    "spatial gate": (networks.spatial_gate, SEQUENCE, "both:0-5: both -> down"),
    "u-net": (
        networks.UNet,
        IMAGES,
        "first: first -> deep last[5]\ndeep: deep -> up\nup: up -> last",
    ),
    "cat with the input": (networks.with_raw_input, ROWS, "a: a -> b[5]"),
    "twins": (networks.siamese, ROWS, "body.0: body.0 -> body.2\nbody.2: body.2 -> head"),
    "both signs": (networks.crelu, ROWS, "a: a -> b"),
    "channels last, flattened": (
        lambda: Net(lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(3, 6, 3), b=nn.Linear(216, 3)),
        IMAGES,
        "a: a -> b",
    ),
    "tokens joined": (
        lambda: Net(lambda m, x: m.b(m.a(x).flatten(1)), a=nn.Linear(5, 6), b=nn.Linear(12, 3)),
        SEQUENCE,
        "a: a -> b",
    ),
    "halves to different readers": (
        lambda: Net(
            lambda m, x: m.b(m.a(x)[:, :2]) + m.c(m.a(x)[:, 2:]),
            a=nn.Linear(5, 6),
            b=nn.Linear(2, 3),
            c=nn.Linear(4, 3),
        ),
        ROWS,
        "a:0-1: a -> b\na:2-5: a[2] -> c",
    ),
}


def shown(parts):
    return " ".join(
        part if isinstance(part, str) else f"{part.layer}[{part.start}]" if part.start else part.layer for part in parts
    )


def lines(groups):
    rows = (f"{g.name}: {shown(g.incoming)} -> {shown(g.outgoing)} | {shown(g.norms)}" for g in groups)
    return {row.removesuffix(" | ") for row in rows}


def zoo(name):
    torch.manual_seed(0)
    make, inputs, expected = ZOO[name]
    rows = [row.strip() for row in expected.splitlines()]
    return make(), inputs, {row for row in rows if row[0] != "*"}, {row.removeprefix("* ") for row in rows}


@pytest.mark.parametrize("name", ZOO)
def test_groups_of_networks_that_people_train(name):
    model, inputs, safe, with_coupled = zoo(name)
    assert lines(find_unit_groups(model, inputs)) == safe
    groups = find_unit_groups(model, inputs, include_coupled=True)
    assert lines(groups) == with_coupled
    check_disjoint([resolve(model, group) for group in groups])


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "resnet18" else n for n in ZOO])
def test_groups_of_networks_that_people_train_pass_the_check(name):
    model, inputs, _, _ = zoo(name)
    model = model.double()
    double = [i.double() if isinstance(i, torch.Tensor) and i.is_floating_point() else i for i in [inputs]]
    if isinstance(inputs, list):
        double = [
            tuple(t.double() if isinstance(t, torch.Tensor) else t for t in (i if isinstance(i, tuple) else (i,)))
            for i in inputs
        ]
    groups = find_unit_groups(model, double, include_coupled=True)
    assert_verified(model, groups, double)


def test_units_that_are_left_out_are_named_one_by_one():
    def forward(m, x):
        return m.b(m.a(x)[:, torch.tensor([0, 0, 2, 3, 4, 5, 6, 7, 8, 8])])

    model = Net(forward, a=nn.Linear(5, 10), b=nn.Linear(10, 3))
    assert lines(find_unit_groups(model, ROWS)) == {"a:2-7: a[2] -> b[2]"}
    text = explain(model, ROWS)
    assert "units 0, 8: the features of" in text
    assert "units 1, 9: no layer reads it" in text


REASONS = {
    ("vit", "head"): "it makes the model's output",
    (
        "vit",
        "patches",
    ): "its readers see different combinations of units (of a residual stream, into which several layers add, "
    "or one of them is shared); include_coupled=True takes them together",
    ("vit", "blocks.0.attention.qkv"): "units 0-15: its features are mixed by ",
    ("gpt", "tokens"): "'tokens.weight' is tied: it shares its memory with 'head.weight'",
    ("gpt", "head"): "'head.weight' is tied: it shares its memory with 'tokens.weight'",
    ("llama", "blocks.0.q"): "its features are mixed by bmm in 'blocks.0' (LlamaBlock)",
    ("encoder layer", "0"): "'1.self_attn.in_proj_weight' is not the weight of one of Linear, ",
    (
        "encoder layer",
        "1.self_attn",
    ): "'1.self_attn.out_proj.weight' reads it, but not in a call of '1.self_attn.out_proj'",
    ("actor and critic", "actor"): "it makes the model's output [0].loc",
    ("one head", "body"): "'heads.b' (Linear) is not reached but has its width, and may share its units elsewhere",
    ("one head", "heads.b"): "forward() does not reach it",
    (
        "tied autoencoder",
        "encoder",
    ): "'encoder.weight' is used in two ways: matrix product, matrix product with its transpose",
    ("lstm", "fc"): "mkldnn_rnn_layer in 'lstm' (LSTM) has no rule",
    ("lstm", "lstm"): "its weights go into mkldnn_rnn_layer in 'lstm' (LSTM), which makes no units",
    ("lstm in double precision", "lstm"): "'lstm.weight_hh_l0' both makes and reads it (recurrent,",
    ("rnn by hand", "recurrent"): "'recurrent.weight' both makes and reads it (recurrent,",
    (
        "weight norm",
        "0",
    ): "addmm in '2' (ParametrizedLinear) multiplies it by a weight that is computed, not a parameter",
    ("weight norm", "2"): "its weight is computed (parametrized, pruned), not a parameter",
    ("lora", "0.b"): "'0.base.weight' is frozen (requires_grad is False)",
    ("one branch", "fc1"): "'short' (Linear) is not reached but has its width",
    ("experts", "router"): "its features are mixed by _softmax in the model",
}


@pytest.mark.parametrize(("name", "layer"), REASONS, ids=" ".join)
def test_reason_of_a_layer_left_out(name, layer):
    model, inputs, _, _ = zoo(name)
    (line,) = [line for line in explain(model, inputs).splitlines() if line.startswith(f"'{layer}' (")]
    assert REASONS[name, layer] in line


@pytest.mark.parametrize("name", ["vit", "mobilenet", "gpt with a head of its own"])
def test_groups_do_not_depend_on_how_the_model_runs(name):
    model, inputs, _, _ = zoo(name)

    def found(model=model, inputs=inputs):
        return find_unit_groups(model, inputs, include_coupled=True)

    expected = found()
    assert found(copy.deepcopy(model).eval()) == expected
    for context in (
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
    ):
        with context:
            assert found() == expected
    with torch.autocast("cpu", torch.bfloat16):
        # the copies of weights that this forward leaves in autocast's cache are not taken for weights
        model(inputs)
        assert found() == expected
    assert found(copy.deepcopy(model).to("meta"), inputs.to("meta")) == expected
    assert (
        found(copy.deepcopy(model).bfloat16(), inputs.bfloat16() if inputs.is_floating_point() else inputs) == expected
    )
    if inputs.dim() == 4:
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        assert found(last, inputs.to(memory_format=torch.channels_last)) == expected
    assert found(inputs=lambda m: m(inputs).sum().backward()) == expected
    assert all(p.grad is None for p in model.parameters())
    assert found(torch.compile(model, backend="eager")) == expected
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager")
    assert found(compiled) == expected


def test_groups_of_a_model_in_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = mlp(nn.ReLU())
        assert as_rows(find_unit_groups(nn.parallel.DistributedDataParallel(model), ROWS)) == MLP
    finally:
        torch.distributed.destroy_process_group()


# refusals


class LinearPlusOne(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def frozen(layer):
    layer.weight.requires_grad_(False)
    return layer


def tied():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
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
        return m.fc2(h), {"hidden": h}

    return Net(forward, fc1=nn.Linear(5, 6), fc2=nn.Linear(6, 3))


def hidden_is_kept():
    def forward(m, x):
        m.last = torch.relu(m.fc1(x))
        return m.fc2(m.last)

    return Net(forward, fc1=nn.Linear(5, 6), fc2=nn.Linear(6, 3))


def hidden_in_buffer():
    def forward(m, x):
        h = m.fc1(x) + m.state
        m.state.copy_(h.detach())
        return m.fc2(h)

    model = Net(forward, fc1=nn.Linear(5, 6), fc2=nn.Linear(6, 3))
    model.register_buffer("state", torch.zeros(3, 6))
    return model


def weight_used(function):
    return Net(lambda m, x: m.fc2(m.fc1(x)) + function(m), fc1=nn.Linear(5, 6), fc2=nn.Linear(6, 3))


def branches(function):
    return Net(lambda m, x: m.fc2(m.fc1(x)) + function(m.fc1(x)), fc1=nn.Linear(5, 6), fc2=nn.Linear(6, 3))


def embedding(**options):
    return nn.Sequential(nn.Embedding(7, 6, **options), nn.Linear(6, 3))


class Hidden(torch.autograd.Function):
    """A sum over features by a kernel that PyTorch does not see, as of an extension."""

    @staticmethod
    def forward(ctx, h):
        out = torch.empty(len(h), 1)
        with _disable_current_modes():
            out.copy_(h.sum(1, keepdim=True))
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad.expand(-1, 6)


INDICES = torch.tensor([[1, 2], [3, 4]])
MIXED = "its features are mixed by {}"
COMPUTED = "multiplies it by a weight that is computed, not a parameter"
TWO_WAYS = "'{}.weight' is used in two ways: "
APART = "takes several of its units for one"
# name: (network, shape of one input or the batch, layer left out, reason)
REFUSED = {
    "last layer": (lambda: mlp(nn.ReLU()), FLAT, "2", "it makes the model's output"),
    "hidden units returned": (
        hidden_is_returned,
        FLAT,
        "fc1",
        "its units are part of the model's output [1]['hidden']",
    ),
    "hidden units kept": (hidden_is_kept, FLAT, "fc1", "its units are kept in the attribute 'last'"),
    "hidden units in a buffer": (hidden_in_buffer, FLAT, "fc1", "writes it to 'state' that outlives the forward"),
    "no reader": (
        lambda: Net(lambda m, x: m.fc2((m.fc1(x), x)[1]), fc1=nn.Linear(5, 6), fc2=nn.Linear(5, 3)),
        FLAT,
        "fc1",
        "no layer reads it",
    ),
    "not called": (
        lambda: Net(lambda m, x: m.b(x), a=nn.Linear(5, 6), b=nn.Linear(5, 3)),
        FLAT,
        "a",
        "forward() does not reach it",
    ),
    "head not called": (
        lambda: Net(lambda m, x: m.body(x), body=mlp(nn.ReLU()), other=nn.Linear(6, 7)),
        FLAT,
        "body.0",
        "'other' (Linear) is not reached but has its width, and may share its units elsewhere: give ",
    ),
    "softmax": (lambda: mlp(nn.Softmax(-1)), FLAT, "0", MIXED.format("_softmax in '1' (Softmax)")),
    "sum over features": (lambda: branches(lambda h: h.sum(-1, keepdim=True)), FLAT, "fc1", MIXED.format("sum")),
    "sum added": (lambda: functional_mlp(lambda m, h: h + h.sum(-1, keepdim=True)), FLAT, "fc1", MIXED.format("sum")),
    "norm by hand": (
        lambda: functional_mlp(lambda m, h: (h - h.mean(-1, keepdim=True)) / h.std(-1, keepdim=True)),
        FLAT,
        "fc1",
        MIXED.format("mean in the model"),
    ),
    "cumsum": (lambda: functional_mlp(lambda m, h: h.cumsum(-1)), FLAT, "fc1", MIXED.format("cumsum")),
    "fft": (
        lambda: functional_mlp(lambda m, h: torch.fft.fft(h).real),
        FLAT,
        "fc1",
        "_fft_r2c in the model has no rule",
    ),
    "sort": (lambda: functional_mlp(lambda m, h: h.sort(-1).values), FLAT, "fc1", "sort in the model has no rule"),
    "number handed to Python": (
        lambda: functional_mlp(lambda m, h: h / h[0, 0].item()),
        FLAT,
        "fc1",
        "unit 0: _local_scalar_dense in the model has no rule",
    ),
    "numpy": (
        lambda: branches(lambda h: torch.from_numpy(h.detach().numpy()).sum(-1, keepdim=True)),
        FLAT,
        "fc1",
        "numpy() takes its values out of the model's operations",
    ),
    "list": (
        lambda: branches(lambda h: max(h.detach().tolist()[0])),
        FLAT,
        "fc1",
        "tolist() takes its values out of the model's operations",
    ),
    "kernel past the dispatcher": (
        lambda: branches(lambda h: Hidden.apply(h).sin()),
        FLAT,
        "fc1",
        "sin in the model takes what was made by code that cannot be followed",
    ),
    "read as bytes": (
        lambda: functional_mlp(lambda m, h: (h.view(torch.int16) + 0).view(torch.float32)),
        FLAT,
        "fc1",
        "reinterprets its bytes",
    ),
    "other order": (
        lambda: functional_mlp(lambda m, h: h[:, [3, 1, 4, 0, 5, 2]]),
        FLAT,
        "fc1",
        "'fc2' reads its units in no regular order",
    ),
    "pooled features": (lambda: mlp(nn.MaxPool1d(3, 1, 1)), FLAT, "0", MIXED.format("max_pool2d_with_indices in '1'")),
    "residual branch of one layer": (residual, FLAT, "fc2", "'fc2.weight' both makes and reads it"),
    "added to the input": (
        lambda: Net(lambda m, x: m.b(x + m.a(x)), a=nn.Linear(5, 5), b=nn.Linear(5, 3)),
        FLAT,
        "a",
        "its columns hold data that no unit makes, too",
    ),
    "rows of the input": (
        lambda: Net(lambda m, x: m.b(torch.cat([x, m.a(x)])), a=nn.Linear(5, 5), b=nn.Linear(5, 3)),
        FLAT,
        "a",
        "its columns hold data that no unit makes, too",
    ),
    "two producers in turn": (
        lambda: Net(
            lambda m, x: m.c(torch.cat([m.a(x), m.b(x)])), a=nn.Linear(5, 6), b=nn.Linear(5, 6), c=nn.Linear(6, 3)
        ),
        FLAT,
        "b",
        "readers see different combinations of units",
    ),
    "conv read without flatten": (lambda: two_convs(nn.Linear(4, 3)), IMAGE, "0", APART),
    "layer norm on one spatial axis": (lambda: two_convs(nn.LayerNorm(4)), IMAGE, "0", APART),
    "batch norm of tokens": (
        lambda: mlp(nn.BatchNorm1d(7)),
        (7, 5),
        "0",
        MIXED.format("native_batch_norm in '1' (BatchNorm1d)"),
    ),
    "no batch": (
        lambda: nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Flatten(), nn.Linear(16, 3)),
        torch.randn(IMAGE),
        "0",
        APART,
    ),
    "functional linear": (
        lambda: Net(lambda m, x: F.linear(m.fc1(x), m.w), fc1=nn.Linear(5, 6), w=nn.Parameter(torch.ones(3, 6))),
        FLAT,
        "fc1",
        "'w' is not the weight of one of Linear, ",
    ),
    "layer used by its weight": (
        lambda: Net(lambda m, x: F.linear(m.a(x), m.b.weight), a=nn.Linear(5, 6), b=nn.Linear(6, 3)),
        FLAT,
        "a",
        "'b.weight' reads it, but not in a call of 'b' (Linear), so that its features cannot be observed there",
    ),
    "slice of a weight": (
        lambda: Net(lambda m, x: F.linear(m.a(x), m.b.weight[:2]), a=nn.Linear(5, 6), b=nn.Linear(6, 3)),
        FLAT,
        "a",
        "it is read through a slice or a reshape of 'b.weight'",
    ),
    "weight of the layer used": (
        lambda: weight_used(lambda m: m.fc1.weight.sum()),
        FLAT,
        "fc1",
        TWO_WAYS.format("fc1"),
    ),
    "weight of the reader used": (
        lambda: weight_used(lambda m: m.fc2.weight.norm()),
        FLAT,
        "fc1",
        TWO_WAYS.format("fc2"),
    ),
    "reader called again": (
        lambda: Net(lambda m, x: m.c(m.b(m.b(m.a(x)))), a=nn.Linear(5, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3)),
        FLAT,
        "a",
        "'b.weight' both makes and reads it (recurrent, applied twice, or a residual branch of one layer)",
    ),
    "tied": (tied, FLAT, "0", "'0.weight' is tied: it shares its memory with '2.weight'"),
    "frozen": (lambda: nn.Sequential(frozen(nn.Linear(5, 6)), nn.Linear(6, 3)), FLAT, "0", "'0.weight' is frozen"),
    "frozen reader": (
        lambda: nn.Sequential(nn.Linear(5, 6), frozen(nn.Linear(6, 3))),
        FLAT,
        "0",
        "'1.weight' is frozen",
    ),
    "frozen norm": (lambda: mlp(frozen(nn.LayerNorm(6))), FLAT, "0", "'1.weight' is frozen"),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Linear(6, 3)),
        FLAT,
        "0",
        "its weight is computed (parametrized, pruned), not a parameter",
    ),
    "pruned reader": (
        lambda: nn.Sequential(nn.Linear(5, 6), prune.l1_unstructured(nn.Linear(6, 3), "weight", 0.5)),
        FLAT,
        "0",
        COMPUTED,
    ),
    "convolution with a computed weight": (
        lambda: nn.Sequential(nn.Conv2d(2, 6, 1), parametrizations.weight_norm(nn.Conv2d(6, 3, 1))),
        IMAGE,
        "0",
        COMPUTED,
    ),
    "forward overridden": (
        lambda: nn.Sequential(LinearPlusOne(5, 6), nn.Linear(6, 3)),
        FLAT,
        "0",
        "'0' (LinearPlusOne) overrides forward(), so what its weight means is not known",
    ),
    "grouped transposed": (
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.ConvTranspose1d(6, 4, 1, groups=2)),
        (2, 8),
        "0",
        "transposed convolutions with groups are not supported",
    ),
    "padding index": (lambda: embedding(padding_idx=0), INDICES, "0", "has padding_idx or max_norm"),
    "norm of embeddings": (lambda: embedding(max_norm=1.0), INDICES, "0", "is used in two ways: "),
    "complex": (
        lambda: nn.Sequential(nn.Linear(5, 6, dtype=torch.complex64), nn.Linear(6, 3, dtype=torch.complex64)),
        torch.randn(3, 5, dtype=torch.complex64),
        "0",
        "'0.weight' is torch.complex64",
    ),
    "attention": (
        lambda: functional_mlp(lambda m, h: m.attention(h, h, h)[0], attention=nn.MultiheadAttention(6, 2)),
        FLAT,
        "fc1",
        "it is read through a slice or a reshape of 'attention.in_proj_weight'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_says_why(name):
    make, shape, layer, reason = REFUSED[name]
    torch.manual_seed(0)
    model = make()
    x = shape if isinstance(shape, torch.Tensor) else torch.randn(3, *shape)
    text = explain(model, x)
    assert layer not in [group.name for group in find_unit_groups(model, x)], text
    (line,) = [line for line in text.splitlines() if line.startswith(f"'{layer}' (")]
    assert reason in line


def test_a_path_that_chance_does_not_change_is_followed_once(monkeypatch):
    """Each layer of a transformer asks whether it is left out, which by default it never is."""
    followed, look = [], discovery._look
    monkeypatch.setattr(discovery, "_look", lambda *args: (followed.append(1), look(*args))[1])
    for dropped, once in ((0.0, True), (0.5, False)):

        def forward(m, x, dropped=dropped):
            h = torch.relu(m.a(x))
            return m.b(h if torch.rand(()) < dropped else torch.tanh(h))

        model = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 2))
        followed.clear()
        assert [g.name for g in find_unit_groups(model, torch.randn(3, 4))] == ["a"]
        assert (len(followed) == 1) == once


@pytest.mark.parametrize(
    "number",
    [lambda: torch.rand(()).item(), lambda: torch.rand(1).numpy()[0], random.random],
    ids=["item", "numpy", "Python"],
)
def test_what_chance_chooses_beside_the_operations_is_seen(number):
    def forward(m, x):
        by = int(number() * 6)
        order = torch.tensor([(i + by) % 6 for i in range(6)])
        return m.b(torch.relu(m.a(x))[:, order])

    model = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    for seed in range(3):
        random.seed(seed)
        torch.manual_seed(seed)
        assert find_unit_groups(model, torch.randn(3, 4)) == []


def test_path_chosen_at_random_is_taken_both_ways():
    def by_python(m, x):
        h = m.a(x)
        return m.c(m.b(h) if random.random() < 0.5 else h)

    def by_torch(m, x):
        h = m.a(x)
        return m.c(m.b(h) if torch.rand(()) < 0.5 else h)

    for function in (by_python, by_torch):
        for seed in range(5):
            random.seed(seed)
            torch.manual_seed(seed)
            model = Net(function, a=nn.Linear(5, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3))
            assert find_unit_groups(model, ROWS) == []
            assert "only what was taken was seen" in explain(model, ROWS)


def test_sparse_matrices_are_data():
    graph = torch.eye(4).to_sparse()
    model = functional_mlp(lambda m, h: torch.sparse.mm(graph, h).relu())
    assert as_rows(find_unit_groups(model, ROWS)) == FC
    model = functional_mlp(lambda m, h: torch.sparse.mm(h.to_sparse(), torch.eye(6)))
    assert find_unit_groups(model, ROWS) == []


def test_options_that_take_what_is_refused():
    model = hidden_is_returned()
    assert as_rows(find_unit_groups(model, ROWS, ignore_outputs="[1]")) == FC
    model = hidden_is_kept()
    assert as_rows(find_unit_groups(model, ROWS, ignore_outputs=["[1]", "last"])) == FC
    model = networks.multi_head()
    assert as_rows(find_unit_groups(model, ROWS, unreached_ok=True)) == [("body", ["heads.a"], [])]


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"verify": "a"}, TypeError, "verify is 'a', must be True or False"),
        ({"include_coupled": "yes"}, TypeError, "include_coupled is 'yes'"),
        ({"unreached_ok": 3}, TypeError, "unreached_ok is 3"),
        ({"ignore_outputs": 4}, TypeError, "ignore_outputs is 4, must be beginnings of paths"),
        ({"ignore_outputs": ["[1]", 4]}, TypeError, "ignore_outputs holds 4"),
        ({"ignore_outputs": "h"}, ValueError, r"is 'h', which no output begins with; there are: '\[0\]', "),
    ],
    ids=str,
)
def test_options_that_mean_nothing(option, error, message):
    with pytest.raises(error, match=message):
        find_unit_groups(hidden_is_returned(), ROWS, **option)


def test_all_units_that_are_left_out_are_told():
    def forward(m, x):
        q, k, v = (t.view(3, 2, 4).transpose(0, 1) for t in m.qkv(x).chunk(3, -1))
        attended = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return m.out(attended.transpose(0, 1).reshape(3, 8))

    model = Net(forward, qkv=nn.Linear(5, 24), out=nn.Linear(8, 3))
    assert "'qkv' (Linear)  units 0-15: its features are mixed by bmm" in explain(model, ROWS[:3])
    assert discovery._spans([torch.tensor(rows) for rows in ([8, 9], [0, 1, 2, 3], [4, 5], [2, 3])]) == "units 0-5, 8-9"
    assert discovery._spans([torch.tensor([[7]])]) == "unit 7"
    assert discovery._spans([torch.arange(0, 40, 2)]) == "units 0, 2, 4, 6, 8, 10, 12, 14, and 12 more parts"


def test_what_a_cache_has_held_before_is_no_reason_to_follow_the_forward_twice(monkeypatch):
    held = torch.randn(3, 5)
    looks = []
    look = discovery._look
    monkeypatch.setattr(discovery, "_look", lambda *args: looks.append(1) or look(*args))
    cached = functools.lru_cache(lambda: held * 2)
    model = Net(lambda m, x: m.b(m.a(x + cached()).relu()), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    model(ROWS[:3])
    assert lines(find_unit_groups(model, ROWS[:3])) == {"a: a -> b"}
    assert len(looks) == 1


def test_units_that_all_multiply_each_other_are_one():
    model = Net(
        lambda m, x: m.c((m.a(x)[:, :, None] * m.a(x)[:, None, :]).flatten(1)), a=nn.Linear(5, 4), c=nn.Linear(16, 3)
    )
    (group,) = find_unit_groups(model, ROWS, include_coupled=True)
    assert resolve(model, group).num_units == 1
    verify_unit_group(model, group, ROWS)


def test_what_is_made_anew_where_nothing_sees_it_may_be_of_any_units():
    def forward(m, x):
        h = m.a(x).relu()
        with _disable_current_modes():
            unseen = h.detach() * 2
        return m.b(h) + unseen.sum()

    model = Net(forward, a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    assert find_unit_groups(model, ROWS) == []
    assert "takes what was made by code that cannot be followed" in explain(model, ROWS)


def test_two_parts_of_a_layer_are_refused_for_two_reasons():
    def forward(m, x):
        h = m.a(x)
        return m.b(h[:, :2]), h[:, 2:4], m.c(h[:, 4:].softmax(-1))

    model = Net(forward, a=nn.Linear(5, 8), b=nn.Linear(2, 3), c=nn.Linear(4, 3))
    assert lines(find_unit_groups(model, ROWS)) == {"a:0-1: a -> b"}
    assert (
        "'a' (Linear)  units 2-3: it makes the model's output [1]; "
        "units 4-7: its features are mixed by _softmax in the model"
    ) in explain(model, ROWS)


# example inputs


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


# the model stays as it was


class Careless(nn.Module):
    """A forward() that keeps records in every way there is."""

    def __init__(self, fail):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout())
        self.head = nn.Linear(6, 3)
        self.register_buffer("steps", torch.zeros(()))
        self.outside = torch.zeros(())
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
        np.random.rand()
        self.outside.add_(1)
        if self.fail:
            raise RuntimeError("on purpose")
        return self.head(h) + torch.ones(3)


def snapshot(model):
    modules = {name: {k: v for k, v in vars(m).items() if not isinstance(v, dict)} for name, m in model.named_modules()}
    hooks = [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    versions = {key: value._version for key, value in model.state_dict(keep_vars=True).items()}
    grads = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    where = modules, hooks, len(model.seen), dict(model.last), versions, grads, random.getstate()
    return where, (state, model.outside.clone(), torch.get_rng_state(), torch.tensor(np.random.get_state()[1]))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("example_inputs", [None, torch.randn(3, 5)], ids=["guessed", "given"])
@pytest.mark.parametrize("fail", [False, True])
def test_discovery_leaves_model_and_random_states_alone(fail, example_inputs, verify):
    model = Careless(fail)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    where, values = snapshot(model)
    if fail:
        with pytest.raises(ValueError, match="on purpose" if example_inputs is not None else "pass example_inputs"):
            find_unit_groups(model, example_inputs, verify=verify)
    else:
        found = find_unit_groups(model, example_inputs, verify=verify, ignore_outputs=("new", "seen", "last"))
        assert as_rows(found) == [("body.0", ["head"], ["body.1"])]
    after, now = snapshot(model)
    assert after == where
    torch.testing.assert_close(now, values, rtol=0, atol=0)


def test_discovery_leaves_the_input_alone():
    x = torch.randn(3, 5)
    before = x.clone()
    find_unit_groups(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), x)
    assert torch.equal(x, before)


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


@pytest.mark.parametrize("shared", [0, 1])
def test_weights_that_share_elements_are_refused_and_neighbours_in_one_buffer_are_not(shared):
    model = mlp(nn.ReLU())
    flat, n = torch.randn(5 * 6 + 6 * 3), 30 - shared
    model[0].weight, model[2].weight = nn.Parameter(flat[:30].view(6, 5)), nn.Parameter(flat[n : n + 18].view(3, 6))
    assert as_rows(find_unit_groups(model, ROWS)) == ([] if shared else MLP)
    assert ("'0.weight' is tied: it shares its memory with '2.weight'" in explain(model, ROWS)) == bool(shared)


def test_activation_checkpointing_changes_nothing():
    for reentrant in (False, True):
        model = functional_mlp(lambda m, h, r=reentrant: checkpoint(F.relu, h, use_reentrant=r))
        assert as_rows(find_unit_groups(model, ROWS)) == FC


# operations


ACTIVATIONS = """ReLU ReLU6 LeakyReLU RReLU ELU CELU SELU GELU SiLU Mish Sigmoid LogSigmoid Tanh Softplus Softsign
    Softshrink Hardshrink Tanhshrink Hardtanh Hardsigmoid Hardswish Identity Dropout Dropout1d AlphaDropout
    FeatureAlphaDropout"""
FUNCTIONS = """relu relu_ relu6 leaky_relu rrelu elu celu selu gelu silu mish sigmoid logsigmoid tanh softplus softsign
    softshrink hardshrink tanhshrink hardtanh hardsigmoid hardswish dropout dropout1d alpha_dropout
    feature_alpha_dropout"""
METHODS = "relu relu_ sigmoid tanh_ neg abs exp square contiguous float clone"


@pytest.mark.parametrize("name", ACTIVATIONS.split())
def test_activation_modules_keep_units_apart(name):
    assert as_rows(find_unit_groups(mlp(getattr(nn, name)()))) == MLP


@pytest.mark.parametrize("name", FUNCTIONS.split())
def test_activation_functions_keep_units_apart(name):
    assert as_rows(find_unit_groups(functional_mlp(lambda m, h: getattr(F, name)(h)))) == FC


@pytest.mark.parametrize("name", METHODS.split())
def test_tensor_methods_keep_units_apart(name):
    assert as_rows(find_unit_groups(functional_mlp(lambda m, h: getattr(h, name)()))) == FC


MOVES = {
    "in place": lambda h: h.clone().mul_(2).relu_(),
    "into a buffer": lambda h: torch.empty(4, 6).copy_(h),
    "by parts": lambda h: torch.cat([h[:, :2].relu(), h[:, 2:].tanh()], 1),
    "written by parts": lambda h: torch.zeros(4, 6).index_put((torch.arange(4),), h),
    "slice by slice": lambda h: torch.stack([h[:, i] for i in range(6)], 1),
    "padded rows": lambda h: F.pad(h, (0, 0, 1, 1)),
    "masked": lambda h: h.masked_fill(h < 0, 0) * (torch.rand(4, 1) > 0.5),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "of rows": lambda h: h[torch.tensor([3, 1])],
    "sorted rows": lambda h: h.gather(0, torch.zeros(4, 6, dtype=torch.int64)),
    "rolled": lambda h: h.roll(1, 0).flip(0),
    "transposed": lambda h: h.T.contiguous().T,
    "einsum": lambda h: torch.einsum("ij,kj->ij", h, torch.ones(2, 6)),
    "unfolded": lambda h: h.view(2, 2, 2, 3).permute(2, 3, 0, 1).reshape(6, 4).t(),
    "mean of the batch": lambda h: h - h.mean(0),
    "normalised": lambda h: F.normalize(h, dim=0),
    "constants": lambda h: h + torch.arange(6) * torch.tensor(0.5),
    "weighted by the batch": lambda h: torch.rand(4, 4).softmax(-1) @ h,
    "added at": lambda h: torch.zeros(4, 6).index_add_(0, torch.tensor([1, 1, 0, 2]), h),
    "half precision": lambda h: h.half().float(),
}


@pytest.mark.parametrize("name", MOVES)
def test_units_are_followed_through_what_keeps_them_apart(name):
    model = functional_mlp(lambda m, h: MOVES[name](h))
    assert as_rows(find_unit_groups(model, ROWS)) == FC


# numbers of the data that come back by way of Python, alone or beside units, or as their factors
TOLD = """
    h + torch.full((6,), int(x.sum() * 100))
    h + torch.tensor(int(x.sum() * 100))
    h + torch.tensor([int(v * 100) for v in x[0].tolist()] + [0])
    h + torch.arange(int(x.sum() * 100), int(x.sum() * 100) + 6)
    h + torch.as_tensor((x.numpy() * 100).astype(int).sum())
    h + int(x.argmax() * 0 + 1)
    h + (x > 0).sum().item()
    h + torch.zeros(6).index_fill_(0, torch.arange(6), number(x))
    h + torch.zeros(6).scatter_(0, torch.arange(6), number(x))
    h + F.pad(torch.zeros(5), (0, 1), value=number(x))
    h + np.float32(number(x))
    h + number_elsewhere(x)
    h + number(x)
    h + x.mean().item()
    number(x) - h
    h.add(x.sum().item(), alpha=0.5)
    h + torch.tensor(number(x))
    h + torch.tensor([number(x)]*6)
    h + torch.as_tensor([number(x)]*6)
    h + torch.Tensor([number(x)]*6)
    h + torch.FloatTensor([number(x)]*6)
    h + h.new_tensor([number(x)]*6)
    h + torch.full((6,), number(x))
    h + h.new_full((6,), number(x))
    h + torch.full_like(h, number(x))
    h + torch.zeros(6).fill_(number(x))
    h + torch.ones(6) * number(x)
    h + torch.ones(6).mul_(number(x))
    h + torch.linspace(0., number(x), 6)
    h + torch.arange(6) * number(x)
    h + torch.scalar_tensor(number(x))
    h + torch.as_tensor(np.full(6, number(x), dtype=np.float32))
    h + torch.from_numpy(x.numpy().mean(1, keepdims=True))
    h + torch.from_numpy(np.tile(x.numpy().mean(1, keepdims=True),(1,6)))
    h + torch.tensor(x.tolist()).mean(1, keepdim=True)
    h + torch.tensor(np.asarray(x)).mean(1, keepdim=True)
    torch.where(x[:, :1] > 0, h, number(x))
    torch.where(x[:, :1] > 0, h, torch.tensor(number(x)))
    h.masked_fill(x[:, :1] > 0, number(x))
    h.clamp(min=number(x) + 3)
    h.clone().index_fill_(0, torch.tensor([0]), number(x))
    F.pad(h[:, :, None], (0, 1), value=number(x)).sum(-1)
    torch.cat([h[:2], torch.full((2, 6), number(x))])
    h.sigmoid() * number(x)
    h + (h.sigmoid() * 0 + 1) * number(x)
    torch.addcmul(h, torch.ones(6), torch.ones(6), value=number(x))
    torch.lerp(h, torch.ones(6), number(x))
    h.add_(number(x))
    h + torch.eye(6)[0] * number(x)
    h + torch.diag(torch.tensor([number(x)]*6))[0]
    h + torch.stack([torch.tensor(number(x))]*6)
    h + torch.complex(torch.tensor(number(x)), torch.tensor(0.)).abs()
    h + torch.frombuffer(bytearray(np.float32(number(x)).tobytes()*6), dtype=torch.float32)
    F.threshold(h, 0.1, number(x))
    h ** 0 * number(x)
    h + int(x.sum() * 100)
    h + len(str(number(x)))
    h.where(h > 0.1, number(x))
    torch.full_like(h, number(x)).where(h < 0.1, h)
    h + sum(v for r in x.tolist() for v in r)
    h + torch.logspace(0., number(x), 6)
    h + torch.nn.init.constant_(torch.empty(6), number(x))
    h + torch.empty(6).copy_(torch.tensor([number(x)]*6))
    h + torch.sparse_coo_tensor([[0]], [number(x)], (6,)).to_dense()
    h + torch.rand(6) * 0 + number(x)
    F.hardtanh(h, number(x) + 2, number(x) + 3)
    h.index_put((torch.tensor([0]),), torch.tensor(number(x)))
    h.masked_scatter(x[:, :1] > 0, torch.full((4, 6), number(x)))
    h.scatter(1, torch.zeros(4, 1, dtype=torch.long), number(x))
    torch.nan_to_num(h / 0, nan=number(x), posinf=number(x))
    torch.baddbmm(torch.full((1,4,6), number(x)), h[None], torch.eye(6)[None])[0]
    h.where(h < 0, torch.asarray([number(x)]))
"""
TOLD_FACTORS = """
    torch.where(x[:, :1] > number(x), h, 0.0)
    torch.where(x[:, :1] > number(x), h, torch.tensor(0.0))
    h.masked_fill(x[:, :1] > number(x), 0)
    torch.maximum(h * number(x), torch.tensor(0.0))
    torch.cat([h * number(x), torch.full((2, 6), 0.0)])[:4]
    F.softplus(h * number(x))
    F.elu(h * number(x)) + 1.0
    1.0 - h * number(x)
    h + 0.5 * (torch.rand(1).item() < 2)
    h + 0.5 * (repr(x) != "")
    h * number(x)
    h / (number(x) + 5)
    h * torch.tensor(number(x))
    h * torch.full((6,), number(x))
    F.leaky_relu(h, number(x))
    h * torch.from_numpy(x.numpy().mean(1, keepdims=True))
    0.5 * h * (1 + torch.erf(h / 1.4142)) * number(x)
    F.relu6(h * number(x))
    h + torch.tensor(0.5)
    h + torch.full((6,), 0.5)
    h + 0.5
    h + 0.5 * bool((x > 0).any())
"""


def number(x):
    return float(x.mean())


def number_elsewhere(x):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: x.mean().item()).result()


def with_number(expression):
    function = eval(f"lambda h, x: {expression}")
    return Net(lambda m, x: m.fc2(function(m.fc1(x).relu(), x)), fc1=nn.Linear(5, 6), fc2=nn.Linear(6, 3))


@pytest.mark.parametrize("expression", TOLD.strip().split("\n    "))
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_numbers_that_python_read_are_data(expression):
    assert find_unit_groups(with_number(expression), ROWS) == []


@pytest.mark.parametrize("expression", TOLD_FACTORS.strip().split("\n    "))
def test_numbers_that_python_read_may_be_factors(expression):
    model = with_number(expression)
    assert as_rows(find_unit_groups(model, ROWS)) == FC
    verify_unit_group(model, UnitGroup("g", "fc1", "fc2"), ROWS)


@pytest.mark.parametrize(
    "given", [lambda x: 3.5, lambda x: np.float32(3.5), lambda x: x.numpy()], ids=["number", "scalar", "array"]
)
def test_what_is_given_as_no_tensor_is_data(given):
    body = {"fc1": nn.Linear(5, 6), "fc2": nn.Linear(6, 3)}
    model = Net(lambda m, x, y: m.fc2(m.fc1(x).relu() + torch.as_tensor(y).mean()), **body)
    assert find_unit_groups(model, (ROWS, given(ROWS))) == []
    model = Net(lambda m, x, y: m.fc2(m.fc1(x).relu() * torch.as_tensor(y).mean()), **body)
    assert as_rows(find_unit_groups(model, (ROWS, given(ROWS)))) == FC


def test_the_one_of_a_gate_is_no_number_of_the_data():
    def forward(m, x, c, *rest):
        scale, shift = m.ada(m.time(c).relu()).chunk(2, -1)
        return m.fc2((m.norm(m.fc1(x)) * (1 + scale) + shift).relu())

    layers = {"time": nn.Linear(3, 8), "ada": nn.Linear(8, 12), "norm": nn.LayerNorm(6)}
    model = Net(forward, fc1=nn.Linear(5, 6), **layers, fc2=nn.Linear(6, 3))
    inputs = ROWS, torch.randn(4, 3)
    with_number = find_unit_groups(model, (*inputs, 0.5), include_coupled=True)
    assert with_number == find_unit_groups(model, inputs, include_coupled=True)
    assert [group.name for group in with_number] == ["time", "ada"]


# constants that data picks or puts somewhere, and units beside or without any
PICKED = """
    h + m.buf[i]
    h + m.buf.index_select(0, i)
    h + m.buf.gather(0, i[:, None].expand(4, 6))
    h + F.embedding(i, m.buf)
    h + m.buf.take(i)[:, None]
    h + torch.zeros(7).index_add(0, i, torch.ones(4))[0]
    h + torch.zeros(7).scatter_add(0, i, torch.ones(4))[0]
    h + torch.zeros(7).scatter(0, i, 1.0)[0]
    h + torch.zeros(7).scatter(0, i, torch.ones(4))[0]
    h + torch.zeros(7).index_put((i,), torch.ones(4))[0]
    h + torch.zeros(7).index_put((i,), torch.ones(4), accumulate=True)[0]
    h + torch.zeros(7).index_fill(0, i, 1.0)[0]
    h + torch.zeros(7).index_copy(0, i, torch.ones(4))[0]
    h + torch.zeros(7).scatter_reduce(0, i, torch.ones(4), 'sum')[0]
    h + torch.zeros(7).index_reduce(0, i, torch.ones(4), 'mean')[0]
    h + torch.bincount(i, minlength=7)[0]
    h + torch.where(i > 2, 1.0, 0.0)[:, None]
    h + torch.zeros(4).masked_fill(i > 2, 1.0)[:, None]
    h + (i > 2).float()[:, None]
    h + torch.zeros(4).masked_scatter(i > 2, torch.ones(4))[:, None]
    h + torch.take_along_dim(m.buf, i[:, None].expand(4, 6), 0)
    h + torch.ones(7).put(i, torch.zeros(4))[0]
    h + torch.bucketize(x[:, :1], torch.tensor([0., .5]))
    h + torch.searchsorted(torch.tensor([0., .5]), x[:, :1].contiguous())
    h + torch.ones(4, 6)[i > 2].sum()
    h + torch.nonzero(i > 2).float().sum()
    h + F.embedding_bag(i[:, None], m.buf)
    h + F.embedding(i, m.par)
    h + m.par[i]
    h + F.grid_sample(m.buf[None, None, :6, :6], x[:, :2].reshape(1, 4, 1, 2))[0, 0]
    h + torch.zeros(7).put_(i, torch.ones(4))[0]
    h + torch.repeat_interleave(torch.ones(4), i).sum()
    h + torch.polar(torch.ones(4), x[:, 0]).real[:, None]
    h + (m.buf[i] * 0 + 1)
    (h + 1) * m.buf[i]
    (h + m.const) * torch.zeros(7).index_add(0, i, torch.ones(4))[i][:, None]
    torch.where(x[:, :1] > 0, h, 1.0)
    h.masked_fill(x[:, :1] > 0, 1.0)
    torch.where(x[:, :1] > 0, h, m.buf[0])
    torch.where(x[:, :1] > 0, m.buf[0], m.buf[1]) + h
    torch.where(x[:, :1] > 0, m.const, m.const * 2) + h
    h.sigmoid() * (x[:, :1] > 0)
    torch.lerp(h, m.buf[0], x[:, :1])
    torch.maximum(h, x[:, :1])
    h.index_put((i % 4,), m.buf[0])
    m.buf[:4].index_put((i % 4,), h)
    torch.ones(4, 6).index_put((i % 4,), h)
    torch.zeros(4, 6).index_add(0, i % 4, h + m.buf[0])
    torch.zeros(4, 6).index_add(0, i % 4, h.sigmoid())
    h.masked_scatter(x[:, :1] > 0, m.buf)
    (h + m.buf[:4])[i % 4]
    torch.cat([h, torch.ones(1, 6)])[i % 5]
    F.pad(h, (0, 0, 0, 1), value=1.0)[i % 5]
    F.grid_sample(h.sigmoid().t().reshape(1, 6, 4, 1), x[:, :2].view(1, 4, 1, 2))[0, :, :, 0].t()
"""
PICKED_UNITS = """
    torch.where(x[:, :1] > 0, h, 0.0)
    h.index_put((i % 4,), torch.zeros(6))
    torch.zeros(4, 6).index_put((i % 4,), h)
    torch.zeros(4, 6).index_add(0, i % 4, h)
    torch.ones(4, 6).index_add(0, i % 4, h)
    torch.zeros(4, 6).scatter_add(0, (i % 4)[:, None].expand(4, 6), h)
    h[i % 4]
    h[x[:, 0] > 0]
    torch.cat([h, torch.zeros(1, 6)])[i % 5]
    h * m.buf[i, :1]
    h + m.buf[torch.tensor([1, 2, 3, 3])]
    h + m.par[torch.tensor([1, 2, 3, 3])]
    h + m.par[torch.randint(7, (4,))]
    h + torch.ones(7)[torch.randperm(7)][:6]
    F.grid_sample(h.t().reshape(1, 6, 4, 1), x[:, :2].view(1, 4, 1, 2))[0, :, :, 0].t()
"""


def picking(expression):
    function = eval(f"lambda m, h, x, i: {expression}")
    layers = {"fc1": nn.Linear(5, 6), "fc2": nn.Linear(6, 3)}
    layers |= {"par": nn.Parameter(torch.randn(7, 6))} if "m.par" in expression else {}
    layers |= {"const": nn.Parameter(torch.randn(6))} if "m.const" in expression else {}
    model = Net(lambda m, x, i: m.fc2(function(m, m.fc1(x).relu(), x, i)), **layers)
    model.register_buffer("buf", torch.randn(7, 6))
    return model, (ROWS, torch.tensor([1, 5, 2, 6]))


@pytest.mark.parametrize("expression", PICKED.strip().split("\n    "))
@pytest.mark.filterwarnings("ignore")
def test_constants_that_data_picks_are_data(expression):
    assert find_unit_groups(*picking(expression)) == []


@pytest.mark.parametrize("expression", PICKED_UNITS.strip().split("\n    "))
@pytest.mark.filterwarnings("ignore")
def test_units_that_data_picks_stay_apart(expression):
    model, inputs = picking(expression)
    assert as_rows(find_unit_groups(model, inputs)) == FC
    verify_unit_group(model, UnitGroup("g", "fc1", "fc2"), inputs)


def updated(m, x):
    with torch.no_grad():
        return m.statistic.mul_(0.9).add_(x.mean())


def replaced(m, x):
    m.statistic.data = x.mean().reshape(1)
    return m.statistic


def normalised(m, x):
    m.batch_norm(x)
    return m.batch_norm.running_mean.mean()


@pytest.mark.parametrize("compute", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("layer", [nn.Linear(6, 7), nn.Conv1d(6, 7, 1, bias=False), nn.Linear(2, 9)], ids=str)
def test_layers_of_computed_weights_may_be_unreached(layer, compute):
    model = Net(
        lambda m, x: m.fc2(m.fc1(x).relu()),
        fc1=nn.Linear(5, 6),
        other=compute(copy.deepcopy(layer)),
        fc2=nn.Linear(6, 3),
    )
    shares = 6 in layer.weight.shape
    assert as_rows(find_unit_groups(model, ROWS)) == ([] if shares else FC)
    assert "is not reached but has its width" in explain(model, ROWS) or not shares
    assert as_rows(find_unit_groups(model, ROWS, unreached_ok=True)) == FC


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
@pytest.mark.parametrize("store", [updated, replaced, normalised])
def test_what_a_forward_stored_of_the_data_is_data(kind, store):
    """Added to units it shares their columns; as a factor, or as it was before the forward, it does not matter."""

    def model(join):
        layers = {"fc1": nn.Linear(5, 6), "batch_norm": nn.BatchNorm1d(5), "fc2": nn.Linear(6, 3)}
        net = Net(lambda m, x: m.fc2(join(m, m.fc1(x).relu(), x)), **layers)
        if kind == "buffer":
            net.register_buffer("statistic", torch.ones(1))
        else:
            net.statistic = nn.Parameter(torch.ones(1), requires_grad=False)
        return net

    assert find_unit_groups(model(lambda m, h, x: h + store(m, x)), ROWS) == []
    evaluated = model(lambda m, h, x: h + normalised(m, x)).eval()
    assert as_rows(find_unit_groups(evaluated, ROWS)) == FC
    for join in (lambda m, h, x: h * store(m, x), lambda m, h, x: (h + m.statistic, store(m, x))[0]):
        net = model(join)
        assert as_rows(find_unit_groups(net, ROWS)) == FC
        verify_unit_group(net, UnitGroup("g", "fc1", "fc2"), ROWS)


def test_notes_of_a_group():
    layers = {"scale": nn.Parameter(torch.ones(6)), "norm": nn.LayerNorm(6)}
    model = functional_mlp(lambda m, h: m.norm(h * m.scale) if h.isfinite().all() else h, **layers)
    assert explain(model, ROWS).splitlines() == [
        "unit group  units  columns  incoming  outgoing  norms",
        "fc1         6      6        fc1       fc2       norm",
        "",
        "left out        because",
        "'fc2' (Linear)  it makes the model's output",
        "",
        "note",
        "fc1        'scale' goes into its units and is left as it is",
        "fc1        'norm' (LayerNorm) couples its units",
        "forward()  the path depends on a value read by Python (_local_scalar_dense in the model): "
        "only what was taken was seen",
    ]
    assert explain(nn.Sequential(nn.ReLU()), ROWS) == "no unit group found"


# the check of a group given by hand


def test_check_of_right_groups_passes():
    model, x = networks.gated().double(), ROWS.double()
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
        verify_unit_group(model, group, ROWS.double())
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_groups_that_fail_the_check_are_left_out(monkeypatch):
    def refuse(model, group, runs, ignored):
        return SimpleNamespace(failure="so it is" if group.name == "2" else "", unshown="")

    monkeypatch.setattr("cbp_fast.discovery.finding.look", refuse)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    assert [g.name for g in find_unit_groups(model, ROWS)] == ["0", "2"]
    assert [g.name for g in find_unit_groups(model, ROWS, verify=True)] == ["0"]
    assert "'2' (Linear)  unit group '2' does not pass the check: so it is" in explain(model, ROWS, verify=True)


# time


def seconds(function):
    best = []
    for _ in range(5):
        start = time.process_time()
        function()
        best.append(time.process_time() - start)
    return min(best)


def test_discovery_is_fast():
    model = nn.Sequential(nn.Linear(784, 2000), nn.ReLU(), nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 10))
    assert len(find_unit_groups(model)) == 2
    assert seconds(lambda: find_unit_groups(model, torch.zeros(2, 784))) < 0.1
    assert seconds(lambda: find_unit_groups(model)) < 0.2


@pytest.mark.slow
def test_discovery_of_large_networks_is_fast():
    resnet, gpt = networks.resnet18(64), networks.GPT(1000, 768, 12, 12, 64)
    assert seconds(lambda: find_unit_groups(resnet, torch.zeros(2, 3, 32, 32), include_coupled=True)) < 2
    assert seconds(lambda: find_unit_groups(gpt, torch.zeros(2, 16, dtype=torch.int64), include_coupled=True)) < 2


# other people's models


@pytest.mark.slow
def test_groups_of_transformers():
    import transformers  # takes seconds

    config = transformers.GPT2Config(vocab_size=17, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).double()
    inputs = {"input_ids": TOKENS, "use_cache": False}
    groups = find_unit_groups(model, inputs)
    assert lines(groups) == {
        "transformer.h.0.attn.c_attn:32-47: transformer.h.0.attn.c_attn[32] -> transformer.h.0.attn.c_proj",
        "transformer.h.0.mlp.c_fc: transformer.h.0.mlp.c_fc -> transformer.h.0.mlp.c_proj",
    }
    assert_verified(model, groups, inputs)
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).double()
    groups = find_unit_groups(model, inputs, include_coupled=True)
    layer = "model.layers.0"
    # the norms of its stream are written by hand, and mix it
    assert lines(groups) == {
        f"{layer}.self_attn.v_proj:0-3: {layer}.self_attn.v_proj -> {layer}.self_attn.o_proj",
        f"{layer}.self_attn.v_proj:4-7: {layer}.self_attn.v_proj[4] -> {layer}.self_attn.o_proj[8]",
        f"{layer}.mlp.gate_proj: {layer}.mlp.gate_proj {layer}.mlp.up_proj -> {layer}.mlp.down_proj",
    }
    assert_verified(model, groups, inputs)


@pytest.mark.slow
def test_groups_of_a_policy_of_stable_baselines():
    from gymnasium import spaces
    from stable_baselines3.common import policies

    box = spaces.Box(-1, 1, (5,))
    model = policies.ActorCriticPolicy(box, box, lambda _: 1e-3, net_arch=[6, 4])
    groups = find_unit_groups(model, (ROWS,))
    extractor = "mlp_extractor"
    assert lines(groups) == {
        f"{extractor}.policy_net.0: {extractor}.policy_net.0 -> {extractor}.policy_net.2",
        f"{extractor}.policy_net.2: {extractor}.policy_net.2 -> action_net",
        f"{extractor}.value_net.0: {extractor}.value_net.0 -> {extractor}.value_net.2",
        f"{extractor}.value_net.2: {extractor}.value_net.2 -> value_net",
    }
    assert_verified(model, groups, (ROWS,))
