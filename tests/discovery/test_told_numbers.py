"""Numbers of the data that Python reads and gives back, or that a forward has stored, are data."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: F401 expressions use it
from known_networks import FC, ROWS, as_rows
from networks import Net
from torch import nn

from cbp_fast.discovery import find_unit_groups, verify_unit_group
from cbp_fast.groups.spec import UnitGroup

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


def updated(m, x):
    with torch.no_grad():
        return m.statistic.mul_(0.9).add_(x.mean())


def replaced(m, x):
    m.statistic.data = x.mean().reshape(1)
    return m.statistic


def normalised(m, x):
    m.batch_norm(x)
    return m.batch_norm.running_mean.mean()


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
