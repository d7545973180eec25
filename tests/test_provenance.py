"""What the trace makes of one operation: which factors claim data, which indices choose, what is a mix."""

import ctypes

import networks
import pytest
import torch
import torch.nn.functional as F
from networks import Net
from torch import nn

from cbp_fast.discovery import finding as discovery
from cbp_fast.discovery import nodes
from cbp_fast.discovery.finding import explain, find_unit_groups
from cbp_fast.discovery.running import forwards

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


def test_a_scan_takes_time_in_proportion(monkeypatch):
    # mixes of mixes were walked anew for each: counted in nodes, which repeat where times do not
    looked_at = []
    leaves = nodes.Nodes.leaves
    monkeypatch.setattr(nodes.Nodes, "leaves", lambda self, ids: (looked_at.append(len(ids)), leaves(self, ids))[1])

    def forward(m, x):
        u, (b, c), h, ys = F.silu(m.a(x)), m.c(x).chunk(2, -1), 0, []
        for t in range(x.shape[1]):
            h = torch.exp(-F.softplus(m.d(u[:, t]))[..., None]) * h + u[:, t, :, None] * b[:, t, None]
            ys.append((h * c[:, t, None]).sum(-1))
        return m.b(torch.stack(ys, 1))

    counts = []
    for length in (8, 16, 32):
        model = net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 3), c=nn.Linear(6, 8), d=nn.Linear(8, 8))
        looked_at.clear()
        find_unit_groups(model, torch.randn(2, length, 6))
        counts.append(sum(looked_at))
    assert counts[2] - counts[1] <= 2.2 * (counts[1] - counts[0])


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


def test_small_tables_are_kept_as_large_ones_are(monkeypatch):
    """Of few ids Python makes the nodes, of many operations on tensors: the same sets, bare parts and mixes."""
    tables = []
    for quick in (0, nodes.QUICK):
        monkeypatch.setattr(nodes, "QUICK", quick)
        torch.manual_seed(0)
        table = nodes.Nodes()
        ids = torch.cat([*(table.source(name, 0, 20) for name in "ab"), table.source("bias", None, 1)])
        for _ in range(30):
            some = [ids[torch.randint(len(ids), (n,))] for n in (6, 6)]
            found = [table.join(*some), table.product(*some), table.with_one(some[0])]
            # one at a time: mixes are numbered as they are made
            for row in ids[torch.randint(len(ids), (4, 1, 5))]:
                row[0, : int(torch.randint(3, ()))] = 0
                found.append(table.merge(row))
            ids = torch.cat([ids, *found])

        def leaves(node, table=table):
            _, found = table.leaves(torch.tensor([node]))
            return sorted(-int(table.mix[leaf]) or int(leaf) for leaf in found)

        tables.append([(leaves(node), leaves(int(table.bare[node]))) for node in ids.tolist()])
        assert len(table.mixes) > 50
    assert tables[0] == tables[1]


def test_the_table_grows_with_the_units_and_not_with_pairs_of_them():
    sizes = []
    for tokens, width in ((8, 16), (80, 160)):
        model = networks.spatial_gate(tokens, width)
        trace = discovery._run(model, forwards(torch.randn(2, tokens, 5)), ())
        sizes.append(trace.nodes.size / sum(source.size for source in trace.nodes.sources))
    assert sizes[1] < 1.2 * sizes[0]
