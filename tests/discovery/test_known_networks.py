"""What is found in networks of every kind, and that rows, norm entries and columns belong to each other."""

import copy

import pytest
import torch
import torch.nn.functional as F
from known_networks import (
    CONV,
    FC,
    FLAT,
    IMAGE,
    MLP,
    ROWS,
    TOKENS,
    ZOO,
    as_rows,
    assert_verified,
    cnn,
    functional_mlp,
    lines,
    two_convs,
    zoo,
)
from networks import Net, mlp
from torch import nn

from cbp_fast.discovery import explain, find_unit_groups
from cbp_fast.groups.resolving import check_disjoint, resolve


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


@pytest.mark.parametrize("guess", [True, False], ids=["guessed", "given"])
@pytest.mark.parametrize("name", NETWORKS)
def test_groups_of_a_network(name, guess):
    model, x, expected = build(name)
    groups = find_unit_groups(model, None if guess else x)
    assert as_rows(groups) == expected
    assert all(g.incoming == (g.name,) for g in groups)
    check_disjoint([resolve(model, g) for g in groups])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_norm_entries_and_columns_belong_to_each_other(name, training):
    model, x, _ = build(name)
    model.train(training)
    assert_verified(model, find_unit_groups(model, x), x)


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
