"""What is left out and why; and what fails is said truly."""

from __future__ import annotations

import copy
import gc
import weakref

import networks
import pytest
import torch
import torch.nn.functional as F
from known_networks import FC, FLAT, IMAGE, MLP, ROWS, as_rows, functional_mlp, lines, two_convs
from looked_at import X, names
from networks import Net, mlp
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import _disable_current_modes

from cbp_fast.discovery import explain, find_unit_groups, report, verify_unit_group
from cbp_fast.discovery.following import following
from cbp_fast.groups.resolving import resolve


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
    assert report._spans([torch.tensor(rows) for rows in ([8, 9], [0, 1, 2, 3], [4, 5], [2, 3])]) == "units 0-5, 8-9"
    assert report._spans([torch.tensor([[7]])]) == "unit 7"
    assert report._spans([torch.arange(0, 40, 2)]) == "units 0, 2, 4, 6, 8, 10, 12, 14, and 12 more parts"


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


@pytest.mark.parametrize("shared", [0, 1])
def test_weights_that_share_elements_are_refused_and_neighbours_in_one_buffer_are_not(shared):
    model = mlp(nn.ReLU())
    flat, n = torch.randn(5 * 6 + 6 * 3), 30 - shared
    model[0].weight, model[2].weight = nn.Parameter(flat[:30].view(6, 5)), nn.Parameter(flat[n : n + 18].view(3, 6))
    assert as_rows(find_unit_groups(model, ROWS)) == ([] if shared else MLP)
    assert ("'0.weight' is tied: it shares its memory with '2.weight'" in explain(model, ROWS)) == bool(shared)


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_scripted_submodules_are_left_out_alone():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.mid = torch.jit.script(nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 8)))

        def forward(self, x):
            return self.c(self.b(self.mid(self.a(x).relu()).relu()).relu())

    text = explain(Half(), X)
    assert names(Half()) == ["b"]
    assert "'mid.0.weight' reads it, but not in a call of 'mid.0' (RecursiveScriptModule)" in text
    assert "'mid.2' (RecursiveScriptModule)" in text


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_units_in_nested_tensors_are_refused(layout):
    def forward(m, x):
        h = m.a(x).relu()
        if layout == torch.jagged:
            many = torch.nested.nested_tensor_from_jagged(h, torch.tensor([0, 1, 4]))
            h = m.b(many).relu().values()
        else:
            many = torch._nested_tensor_from_tensor_list([h[:1], h[1:]])
            h = torch.cat(torch.unbind(m.b(many).relu()))
        return m.d(m.c(h).relu())

    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8), "d": nn.Linear(8, 3)}
    model = Net(forward, **layers)
    assert names(model) == ["c"]
    text = explain(model, X)
    assert "takes or makes a nested tensor, which cannot be followed" in text
    assert "'b' (Linear)  its weights go into" in text


def test_fake_tensors_are_named():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        assert "'0' (Linear)  '0.weight' is a FakeTensor" in explain(model, torch.randn(4, 6))
        assert find_unit_groups(model) == []


def test_what_runs_but_cannot_be_followed_is_not_blamed_on_the_inputs():
    def forward(m, x):
        h = m.a(x)
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("not under a mode")
        return m.c(h)

    model = Net(forward, a=nn.Linear(6, 8), c=nn.Linear(8, 3))
    says = r"Net\.forward\(\) runs, but cannot be followed \(at or after addmm in 'a' \(Linear\)\): not under a mode"
    for inputs in (X, None):
        with pytest.raises(ValueError, match=says):
            find_unit_groups(model, inputs)
    with pytest.raises(ValueError, match=r"does not run on the example_inputs given: "):
        find_unit_groups(model, X[:, 1:])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc")], ids=["Python", "torch"])
def test_a_look_that_runs_out_of_memory_does_not_blame_the_forward(monkeypatch, error):
    """Before the forward is tried by itself, what was followed so far has gone."""
    looks = []

    class Tracer(following.Tracer):
        def __init__(self, model):
            super().__init__(model)
            looks.append(weakref.ref(self))

    class Big(nn.Module):
        def forward(self, x):
            following = torch.utils._python_dispatch._get_current_dispatch_mode() is not None
            if following:
                raise error
            gc.collect()
            if any(look() for look in looks):
                raise MemoryError
            return x

    monkeypatch.setattr(following, "Tracer", Tracer)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), Big())
    with pytest.raises(ValueError, match=r"runs, but cannot be followed"):
        find_unit_groups(model, X)
    assert looks
