"""What an operation makes of units: what keeps them apart, what factors and indices claim, what mixes."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from known_networks import FC, MLP, ROWS, as_rows, functional_mlp
from networks import Net, mlp
from torch import nn

from cbp_fast.discovery import explain, find_unit_groups, verify_unit_group
from cbp_fast.groups.spec import UnitGroup

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


X = torch.randn(4, 6)


def net(function, **layers):
    return Net(function, **layers)


def layers(*sizes, **more):
    return {name: nn.Linear(*size) for name, size in zip("abcd", sizes, strict=False)} | more


# x [4, 6]; what is a group of a: 6 -> 6 that head: 6 -> 3 reads
GATES = {
    "tanh": (torch.tanh, True),
    "silu": (F.silu, True),
    "relu": (F.relu, True),
    "of a comparison that zero fails": (lambda h: h > 0, True),
    "clamped around zero": (lambda h: h.clamp(-1, 1), True),
    "of a comparison that zero passes": (lambda h: h >= 0, False),
    "sigmoid": (torch.sigmoid, False),
    "one minus": (lambda h: 1 - torch.tanh(h), False),
    "exp": (torch.exp, False),
    "softplus": (F.softplus, False),
    "clamped above zero": (lambda h: h.clamp(min=0.1), False),
    "to the power of zero": (lambda h: h**0, False),
    "with a constant": (lambda h: h + torch.ones(6), False),
    "with a parameter": (lambda h: h + nn.Parameter(torch.ones(6)), False),
    "softmax over the batch": (lambda h: h.softmax(0), False),
    "layer norm": (lambda h: F.layer_norm(h, (6,)), False),
    "log-sum-exp of the batch": (lambda h: h.logsumexp(0, keepdim=True), False),
    "mean of the batch": (lambda h: h.mean(0, keepdim=True), True),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_claims_data_where_it_vanishes_with_its_unit(name):
    gate, vanishes = GATES[name]
    model = net(lambda m, x: m.b(gate(m.a(x)) * x), **layers((6, 6), (6, 3)))
    assert [g.name for g in find_unit_groups(model, X)] == ["a"] * vanishes
    # units gate each other whatever they are at zero
    model = net(lambda m, x: m.b(gate(m.a(x)) * m.c(x)), **layers((6, 6), (6, 3), (6, 6)))
    assert [g.name for g in find_unit_groups(model, X)] == ["a"]


CHOICES = {
    "batch by data": (lambda h, x: h[(x[:, 0] > 0).long()], True),
    "batch by data, masked": (lambda h, x: F.pad(h[x[:, 0] > -9], (0, 0, 0, 0)), True),
    "batch at random": (lambda h, x: h[torch.randperm(4)], True),
    "features by data": (lambda h, x: h.gather(1, (x.abs() * 2).long().clamp(0, 5)), False),
    "features by data, as index": (lambda h, x: h[:, (x[0].abs() * 2).long().clamp(0, 5)], False),
    "features at random": (lambda h, x: h[:, torch.randperm(6)], False),
    "features of a random half, others next to them": (
        lambda h, x: torch.where(torch.rand(6) > 0.5, h, h.roll(1, 1)),
        False,
    ),
    "features in a fixed order, reversed": (lambda h, x: h[:, torch.arange(5, -1, -1)].flip(1), True),
    "written where data says": (lambda h, x: torch.zeros(4, 6).index_put(((x[:, 0] > 0).long(),), h), True),
    "written to features where data says": (
        lambda h, x: torch.zeros(4, 6).index_put((torch.arange(4)[:, None], (x.abs() * 2).long().clamp(0, 5)), h),
        False,
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_an_index_of_data_chooses_may_be_any(name):
    choose, right = CHOICES[name]
    model = net(lambda m, x: m.b(choose(m.a(x), x)), **layers((6, 6), (6, 3)))
    assert [g.name for g in find_unit_groups(model, X)] == ["a"] * right


# trunk features that many units make, [4, 6]
MIXES = {
    "maxout": lambda m, x: m.a(x).view(4, 6, 3).amax(-1),
    "attention without projections": lambda m, x: (m.c(x) @ m.c(x).T).softmax(-1) @ m.c(x),
    "gram matrix": lambda m, x: x @ (m.c(x).T @ m.c(x)),
    "norm by hand": lambda m, x: m.c(x) / m.c(x).norm(dim=-1, keepdim=True),
    "hypernetwork": lambda m, x: (m.c(x)[:, None] @ m.weights(x).view(4, 6, 6))[:, 0],
    "pooled features": lambda m, x: F.avg_pool1d(m.a(x), 3),
}


@pytest.mark.parametrize("name", MIXES)
def test_a_column_of_a_mix_is_no_unit_s(name):
    model = net(
        lambda m, x: m.head((t := MIXES[name](m, x)) + m.down(F.relu(m.up(t)))),
        a=nn.Linear(6, 18),
        c=nn.Linear(6, 6),
        weights=nn.Linear(6, 36),
        up=nn.Linear(6, 8),
        down=nn.Linear(8, 6),
        head=nn.Linear(6, 3),
    )
    names = [g.name for g in find_unit_groups(model, X, include_coupled=True, unreached_ok=True)]
    assert names == ["up"]


SHARED = {
    "query and key": lambda m, x: F.scaled_dot_product_attention(m.a(x), m.a(x), m.b(x)),
    "key and value": lambda m, x: F.scaled_dot_product_attention(m.b(x), m.a(x), m.a(x)),
    "all three": lambda m, x: F.scaled_dot_product_attention(m.a(x), m.a(x), m.a(x)),
    "a mask": lambda m, x: F.scaled_dot_product_attention(x, x, m.a(x), attn_mask=(m.a(x) @ x.mT) > 0),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_layer_that_decides_the_attention_is_refused(name):
    model = net(lambda m, x: m.c(SHARED[name](m, x)), a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3))
    x = torch.randn(2, 5, 6)
    assert "a" not in [g.name for g in find_unit_groups(model, x, unreached_ok=True)]
    assert "its features are mixed by" in explain(model, x)


SECOND = {
    "bias": (lambda m: m.a.bias, "'a.bias' is used in two ways: bias, sum"),
    "scale of a norm": (lambda m: m.norm.weight, "'norm.weight' is used in two ways: norm, sum"),
    "shift of a norm": (lambda m: m.norm.bias, "'norm.bias' is used in two ways: norm, sum"),
    "statistics": (lambda m: m.norm.running_var, "'norm.running_var' is used in two ways: norm, sum"),
    "weight": (lambda m: m.a.weight, "'a.weight' is used in two ways: matrix product, sum"),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_uses_are_refused(name):
    use, reason = SECOND[name]
    model = net(lambda m, x: m.b(m.norm(m.a(x))) + use(m).sum(), **layers((6, 6), (6, 3)), norm=nn.BatchNorm1d(6))
    assert find_unit_groups(model, X) == []
    assert reason in explain(model, X)


def test_two_halves_of_one_parameter_are_no_bias_of_each_other():
    model = net(
        lambda m, x: m.b(F.relu(m.a(x))) + m.c(sum(m.queries.weight.split(6, 1))).sum(),
        **layers((6, 6), (6, 3), (6, 6)),
        queries=nn.Embedding(5, 12),
    )
    assert "a" in [g.name for g in find_unit_groups(model, X)]


class NormAct(nn.BatchNorm1d):
    """As timm's: a norm with an activation in it."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training).relu()


class OnePlus(nn.LayerNorm):
    """Its entries mean something else."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias)


def test_norms_that_add_something_are_norms():
    model = nn.Sequential(nn.Linear(6, 6), NormAct(6), nn.Linear(6, 3))
    (group,) = find_unit_groups(model, X)
    assert group.norms == ("1",)
    model = nn.Sequential(nn.Linear(6, 6), OnePlus(6), nn.Linear(6, 3))
    assert find_unit_groups(model, X) == []
    assert "'1.weight' is used in two ways: norm, add in '1' (OnePlus)" in explain(model, X)


@pytest.mark.parametrize("reduce", [torch.amin, torch.sum, torch.mean, torch.logsumexp, torch.cumsum, torch.softmax])
def test_one_number_can_be_reduced(reduce):
    model = net(lambda m, x: m.b(torch.tanh(m.a(x)) * reduce(x.sum(), 0)), **layers((6, 6), (6, 3)))
    assert [g.name for g in find_unit_groups(model, X)] == ["a"]


def test_one_number_can_be_chosen_by_data():
    def forward(m, x):
        by_data = (x.sum() > 1e9).long()
        chosen = x.sum().gather(0, by_data) + x.sum().index_select(0, by_data) + x.sum().scatter(0, by_data, 2.0)
        return m.b(torch.tanh(m.a(x)) * chosen.sum())

    assert [g.name for g in find_unit_groups(net(forward, **layers((6, 6), (6, 3))), X)] == ["a"]


def test_memory_that_no_operation_has_written_may_hold_anything():
    """A kernel that is called by an address writes to what was made for it."""

    def forward(m, x):
        h = torch.tanh(m.a(x)).contiguous()
        out = torch.empty_like(h)
        ctypes.memmove(out.data_ptr(), h.data_ptr(), h.nbytes)
        return m.b(h) + m.c(out)

    assert find_unit_groups(net(forward, **layers((6, 6), (6, 3), (6, 3))), X) == []

    def written(m, x):
        out = torch.empty(4, 6)
        out[:, :3] = torch.ones(4, 3)
        return m.b(torch.tanh(m.a(x))) + m.c(out)

    assert [g.name for g in find_unit_groups(net(written, **layers((6, 6), (6, 3), (6, 3))), X)] == ["a"]


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_memory_that_a_kernel_resizes_unseen_may_hold_anything():
    def forward(m, x):
        h = torch.tanh(m.a(x))
        with torch.no_grad():
            out = h[0].clone()
            torch.addbmm(out[:1], torch.ones(2, 5, 3), torch.ones(2, 3, 8), out=out)
        return m.b(h) + out.sum()

    assert find_unit_groups(net(forward, **layers((6, 6), (6, 3))), X) == []
