"""Discovery: what is found, what is left out and why, and that rows, norm entries and columns belong to each other."""

import copy
import dataclasses
import random
import time
import warnings

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import Net, mlp
from torch import nn
from torch.nn.utils import parametrizations, prune

from cbp_fast.discovery import explain, find_unit_groups
from cbp_fast.unit_groups import Part, UnitGroup, check_disjoint, resolve
from cbp_fast.verification import verify_unit_group, verify_unit_groups


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
            with pytest.raises(ValueError, match="does not pass the check|side by side"):
                verify_unit_group(model, shifted(model, group), x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_norm_entries_and_columns_belong_to_each_other(name, training):
    model, x, _ = build(name)
    model.train(training)
    assert_verified(model, find_unit_groups(model, x), x)


# networks of the kinds that people train


IMAGES, TOKENS, ROWS, SEQUENCE = (torch.randn(2, 3, 8, 8), torch.arange(14).view(2, 7) % 11, torch.randn(4, 5), torch.randn(4, 2, 5))
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
STREAM = """blocks.0.attention.out blocks.0.down blocks.1.attention.out blocks.1.down -> blocks.0.attention.qkv blocks.0.mlp.0 \
blocks.1.attention.qkv blocks.1.mlp.0 head | blocks.0.norm1 blocks.0.norm2 blocks.1.norm1 blocks.1.norm2 norm"""
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
        * tokens: tokens blocks.0.o blocks.0.down -> blocks.0.q blocks.0.k blocks.0.v blocks.0.gate blocks.0.up head""",
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
            lambda m, x: m.b(m.a(x)[:, :2]) + m.c(m.a(x)[:, 2:]), a=nn.Linear(5, 6), b=nn.Linear(2, 3), c=nn.Linear(4, 3)
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


# the check cannot tell a norm that is written by hand from another way to the output
HAND_WRITTEN = {"llama": {"tokens"}}


@pytest.mark.parametrize("name", ZOO)
def test_groups_of_networks_that_people_train_pass_the_check(name):
    model, inputs, _, _ = zoo(name)
    model = model.double()
    double = [i.double() if isinstance(i, torch.Tensor) and i.is_floating_point() else i for i in [inputs]]
    if isinstance(inputs, list):
        double = [tuple(t.double() if isinstance(t, torch.Tensor) else t for t in (i if isinstance(i, tuple) else (i,))) for i in inputs]
    groups = find_unit_groups(model, double, include_coupled=True)
    assert_verified(model, [g for g in groups if g.name not in HAND_WRITTEN.get(name, ())], double)


REASONS = {
    ("vit", "head"): "it makes the model's output",
    ("vit", "patches"): "several layers add into its units, and readers see different sums (a residual stream, or a shared "
    "reader); include_coupled=True takes them together",
    ("vit", "blocks.0.attention.qkv"): "units 0-7: its features are mixed by ",
    ("gpt", "tokens"): "'tokens.weight' is tied: it shares its memory with 'head.weight'",
    ("gpt", "head"): "'head.weight' is tied: it shares its memory with 'tokens.weight'",
    ("llama", "blocks.0.v"): "'blocks.0.o' reads its units in no regular order",
    ("encoder layer", "0"): "'1.self_attn.in_proj_weight' is not the weight of one of Linear, ",
    ("encoder layer", "1.self_attn"): "'1.self_attn.out_proj.weight' reads it, but not in a call of '1.self_attn.out_proj'",
    ("actor and critic", "actor"): "it makes the model's output [0].loc",
    ("one head", "body"): "'heads.b' (Linear) is not reached but has its width, and may share its units elsewhere",
    ("one head", "heads.b"): "forward() does not reach it",
    ("tied autoencoder", "encoder"): "'encoder.weight' is used in two ways: matrix product, matrix product with its transpose",
    ("lstm", "fc"): "mkldnn_rnn_layer in 'lstm' (LSTM) has no rule",
    ("lstm", "lstm"): "its weights go into mkldnn_rnn_layer in 'lstm' (LSTM), which makes no units",
    ("lstm in double precision", "lstm"): "'lstm.weight_hh_l0' both makes and reads it (recurrent,",
    ("rnn by hand", "recurrent"): "'recurrent.weight' both makes and reads it (recurrent,",
    ("weight norm", "0"): "addmm in '2' (ParametrizedLinear) multiplies it by a weight that is computed, not a parameter",
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


@pytest.mark.parametrize("name", ["vit", "mobilenet", "gpt"])
def test_groups_do_not_depend_on_how_the_model_runs(name):
    model, inputs, _, _ = zoo(name)

    def found(model=model, inputs=inputs):
        return find_unit_groups(model, inputs, include_coupled=True)

    expected = found()
    assert found(copy.deepcopy(model).eval()) == expected
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        with context:
            assert found() == expected
    with torch.autocast("cpu", torch.bfloat16):
        # the copies of weights that this forward leaves in autocast's cache are not taken for weights
        model(inputs)
        assert found() == expected
    assert found(copy.deepcopy(model).to("meta"), inputs.to("meta")) == expected
    assert found(copy.deepcopy(model).bfloat16(), inputs.bfloat16() if inputs.is_floating_point() else inputs) == expected
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


