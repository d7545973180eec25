"""`CBPLinear` and `CBPConv` as layers in a network: what they take, observe and replace."""

import copy

import pytest
import torch
from layer_networks import EAGER, Net, layers, train, two_layers
from torch import nn

from cbp_fast import CBPConv, CBPLinear, ContinualBackprop, Rule


def test_forward_is_identity():
    layer = CBPLinear(nn.Linear(4, 5), nn.Linear(5, 2))
    x = torch.randn(3, 5, requires_grad=True)
    assert layer(x) is x


def test_all_layers_replace_units(trained):
    model, _ = trained
    # 30 steps of which the first 5 have nothing mature
    assert all(layer.num_replaced >= 0.05 * 5 * 20 for layer in layers(model))


def test_rates_can_be_set_and_the_layers_read(trained):
    model, optimizer = trained
    layer, before = model.cbp3, model.cbp3.num_replaced
    assert (layer.replacement_rate, layer.maturity_threshold, layer.decay_rate) == (0.05, 5, 0.0)
    layer.replacement_rate = 0.0
    train(model, optimizer, 20)
    assert layer.num_replaced == before
    layer.maturity_threshold, layer.decay_rate, layer.replacement_rate = 19, 0.9, 1.0
    mature = int((layer.age >= 19).sum())
    train(model, optimizer, 1)
    assert layer.num_replaced == before + mature > before
    with pytest.raises(ValueError, match="decay_rate is 1"):
        layer.decay_rate = 1
    assert (layer.in_layer, layer.out_layer) == (model.fc1, model.fc2)
    assert not list(layer.parameters())
    assert list(layer.state_dict()) == ["_extra_state"]


# the scores of "random" are random, and a layer draws from a stream of its own
@pytest.mark.parametrize("utility", sorted(set(Rule.UTILITIES) - {"random"}))
def test_same_choices_and_resets_as_the_attached_object(utility):
    """One layer of each kind is the attached object with its one group, but for the random numbers."""

    def run(layer):
        torch.manual_seed(1)
        fc1, fc2 = nn.Linear(6, 9), nn.Linear(9, 2)
        options = {"replacement_rate": 0.1, "maturity_threshold": 3, "decay_rate": 0.5}
        if layer:
            cbp = CBPLinear(fc1, fc2, util_type=utility, **options)
            model = nn.Sequential(fc1, nn.ReLU(), cbp, fc2)
        else:
            model = nn.Sequential(fc1, nn.ReLU(), nn.Identity(), fc2)
            cbp = ContinualBackprop(model, rule=Rule.gnt(utility=utility), **options)
        # without learning or new weights in play, the choice depends on the features alone
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        steps = []
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            model(torch.randn(8, 6, generator=generator)).sum().backward()
            optimizer.step()
            if not layer:
                cbp.step()
            fc1.weight.data.fill_(0.25).mul_(torch.arange(1, 10.0)[:, None])
            fc2.weight.data.fill_(0.5)
            steps.append((cbp.age if layer else cbp.age["0"]).tolist())
        return steps

    assert run(layer=True) == run(layer=False)


# bounds of five inputs and eight units: selu is drawn as lecun, and an activation without a gain has that of relu
@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"init": "kaiming", "act_type": "selu"}, (3 / 5) ** 0.5),
        ({"init": "xavier", "act_type": "selu"}, (3 / 5) ** 0.5),
        ({"init": "kaiming", "act_type": "gelu"}, (2 * 3 / 5) ** 0.5),
        ({"init": "xavier", "act_type": "tanh"}, 5 / 3 * (6 / 13) ** 0.5),
        ({"init": "default"}, (1 / 5) ** 0.5),
    ],
    ids=str,
)
def test_new_weights_have_the_bound_of_the_rule(options, bound):
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(5, 8), nn.Linear(8, 2)
    model = nn.Sequential(fc1, CBPLinear(fc1, fc2, replacement_rate=1.0, maturity_threshold=0, **options), fc2)
    model(torch.randn(5, 5)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert 0.9 * bound < fc1.weight.abs().max() <= bound


@pytest.mark.parametrize("utility", Rule.UTILITIES)
def test_every_utility_trains(utility):
    torch.manual_seed(0)
    model = Net(util_type=utility, decay_rate=0.9)
    train(model, torch.optim.Adam(model.parameters()), 20)
    assert all(layer.num_replaced > 1 for layer in layers(model))
    assert all(p.isfinite().all() for p in model.parameters())
    # of a random score nothing is averaged
    assert all(bool(layer.utility.any()) == (utility != "random") for layer in layers(model))


def test_eval_and_no_grad_are_not_observed():
    model = Net(replacement_rate=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        model(torch.randn(2, 3, 8, 8))
    model.eval()(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not any(layer.age.any() for layer in layers(model))


def test_accumulated_and_uneven_batches_are_one_batch():
    """Utility is a mean over all samples since the last step, however they were divided."""
    ages, utilities = [], []
    for parts in ([8], [1, 5, 2]):
        torch.manual_seed(0)
        model = Net(replacement_rate=0.0).double()
        model.norm1.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in torch.randn(3, 8, 3, 8, 8, dtype=torch.float64):
            optimizer.zero_grad()
            for part in x.split(parts):
                model(part).sum().backward()
            optimizer.step()
        ages.append([layer.age.tolist() for layer in layers(model)])
        utilities.append([layer.utility for layer in layers(model)])
    assert ages[0] == ages[1] == [[3] * 6, [3] * 8, [3] * 16]
    torch.testing.assert_close(*utilities)


def test_layers_without_bias_affine_free_norms_and_grouped_convolutions():
    torch.manual_seed(0)
    conv1, conv2 = nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.Conv2d(8, 6, 3, groups=2, bias=False)
    norm1, fc = nn.BatchNorm2d(8, affine=False), nn.Linear(24, 5, bias=False)
    norm3, head = nn.LayerNorm(5, elementwise_affine=False, bias=False), nn.Linear(5, 2)
    options = {"replacement_rate": 1.0, "maturity_threshold": 2}
    one = CBPConv(conv1, conv2, bn_layer=norm1, **options)
    two = CBPConv(conv2, fc, num_last_filter_outputs=4, **options)
    three = CBPLinear(fc, head, ln_layer=norm3, **options)
    model = nn.Sequential(conv1, norm1, nn.ReLU(), one, conv2, two, nn.Flatten(), fc, norm3, three, head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        before = conv1.weight.detach().clone()
        model(torch.randn(5, 4, 6, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (one.num_replaced, two.num_replaced, three.num_replaced) == (8, 6, 5)
    assert not norm1.running_mean.any()
    assert not head.weight.any()
    # drawn as PyTorch draws them: a filter reads 4 / 2 channels of 3 x 3
    bound = (1 / (2 * 9)) ** 0.5
    assert (conv1.weight != before).all()
    assert 0.9 * bound < conv1.weight.abs().max() <= bound


def test_a_compiled_model_is_one_graph_and_trains_alike():
    import torch._dynamo.testing  # takes a second

    fc1, fc2, fc3 = nn.Linear(4, 20), nn.Linear(20, 12), nn.Linear(12, 2)
    one, two = CBPLinear(fc1, fc2, **EAGER), CBPLinear(fc2, fc3, **EAGER)
    original = nn.Sequential(fc1, nn.ReLU(), one, fc2, nn.ReLU(), two, fc3)
    counter = torch._dynamo.testing.CompileCounter()
    results = []
    # the second copy is not observed by what was compiled for the first
    for compiled in (False, True, True):
        model = copy.deepcopy(original)
        forward = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        optimizer = torch.optim.Adam(model.parameters())
        generator = torch.Generator().manual_seed(0)
        for step in range(30):
            optimizer.zero_grad()
            forward(torch.randn(4 + step % 3, 4, generator=generator)).square().sum().backward()
            optimizer.step()
        results.append([model[2].age, model[5].age, *model.parameters()])
    assert min(model[2].num_replaced, model[5].num_replaced) > 5
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    # each for its first batch and for any other
    assert counter.frame_count <= 4


# what torch.jit.trace says of itself
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_what_is_exported_or_traced_has_nothing_of_it_and_observes_nothing():
    model, x = two_layers(replacement_rate=0.0), torch.randn(5, 4)
    program = torch.export.export(model, (x,))
    assert not any("cbp_fast" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(torch.jit.trace(model, (x,))(x), model(x))
    assert model[2]._engine.held_bytes == 4 * 5 * 8
    with pytest.raises(TypeError, match=r"CBPLinear was given a Proxy.*trace model\.eval\(\)"):
        torch.fx.symbolic_trace(model)
    assert torch.equal(torch.fx.symbolic_trace(model.eval())(x), model(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CBPLinear(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)),
            "CBPLinear: in_layer is a Conv2d, must be",
        ),
        (lambda: CBPLinear(nn.Linear(3, 4), nn.Conv2d(4, 2, 3)), "CBPLinear: out_layer is a Conv2d, must be a Linear"),
        (lambda: CBPConv(nn.Linear(3, 4), nn.Linear(4, 2)), "CBPConv: in_layer is a Linear, must be a convolution"),
        (lambda: CBPConv(nn.Conv2d(3, 4, 3), nn.ReLU()), "out_layer is a ReLU, must be a convolution or a Linear"),
    ],
    ids=["convolutions", "reader", "linear", "activation"],
)
def test_layers_of_another_kind_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CBPLinear(nn.Linear(4, 5), nn.Linear(6, 2)), "6"),
        (lambda: CBPLinear(nn.Linear(4, 5), nn.Linear(5, 2), bn_layer=nn.BatchNorm1d(4)), "bn_layer"),
        (lambda: CBPLinear(nn.Linear(4, 5), nn.Linear(5, 2), util_type="best"), "utility is 'best'"),
        (lambda: CBPLinear(nn.Linear(4, 5), nn.Linear(5, 2), replacement_rate=2), "replacement_rate is 2"),
        (lambda: CBPConv(nn.Conv2d(3, 4, 3), nn.Linear(16, 2)), "num_last_filter_outputs is 1"),
    ],
    ids=["widths", "norm", "utility", "rate", "outputs"],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_units_of_a_layer_are_not_attached_again():
    fc1, fc2 = nn.Linear(5, 8), nn.Linear(8, 3)
    model = nn.Sequential(fc1, nn.ReLU(), CBPLinear(fc1, fc2), fc2)
    with pytest.raises(ValueError, match=r"continual backprop attached already .*take the layer out"):
        ContinualBackprop(model)
