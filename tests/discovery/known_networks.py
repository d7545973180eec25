"""Small networks, and those that people train, with the groups in them; and how groups are written and checked."""

import networks
import pytest
import torch
from networks import Net
from torch import nn

from cbp_fast.discovery import verify_unit_group
from cbp_fast.groups.resolving import resolve
from cbp_fast.groups.spec import Part, UnitGroup


def functional_mlp(function, **layers):
    return Net(lambda m, x: m.fc2(function(m, m.fc1(x))), fc1=nn.Linear(5, 6), **layers, fc2=nn.Linear(6, 3))


def cnn(function, positions=16, **layers):
    """conv (6 channels on 4 x 4 positions) -> function -> fc."""
    conv, fc = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6 * positions, 3)
    return Net(lambda m, x: m.fc(function(m, m.conv(x))), conv=conv, **layers, fc=fc)


def two_convs(*between):
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), *between, nn.Conv2d(6, 4, 3))


FLAT, IMAGE = (5,), (2, 4, 4)
MLP, FC, CONV = [("0", ["2"], [])], [("fc1", ["fc2"], [])], [("conv", ["fc"], [])]


def as_rows(groups):
    return [(g.name, list(g.outgoing), list(g.norms)) for g in groups]


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
