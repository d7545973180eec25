"""The compiled backend: the same bits on every instruction set and number of threads, whole runs as the reference's."""

import pytest
import torch
from group_cases import ADDITIONS, DTYPES, FIELDS, NAMES, RULES, SEED, Chain, Numbers, assert_same_bits, gamma
from torch import nn

from cbp_fast import _C, ContinualBackprop, Rule


def settings_of_a_machine():
    """Every instruction set with one and two threads; puts both back."""
    before = _C.get_isa(), torch.get_num_threads()
    try:
        for name in _C.isa_levels():
            for threads in (1, 2):
                _C.set_isa(name)
                torch.set_num_threads(threads)
                yield f"{name}, {threads} threads"
    finally:
        _C.set_isa(before[0])
        torch.set_num_threads(before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    ("outputs", "inputs", "samples"),
    # shared by parts of a weight, of the samples, and by groups: each more than 2 ** 17 elements
    [(1030, 519, 301), (40, 4100, 70)],
    ids=str,
)
def test_same_bits_on_every_instruction_set_and_number_of_threads(outputs, inputs, samples, dtype):
    results = {}
    for machine in settings_of_a_machine():
        chain = Chain("cpp", inputs, outputs, dtype, decay_rate=0.9)
        numbers = Numbers(1).any
        chain.fill(numbers)
        for _ in range(4):
            chain.step(numbers, samples)
        results[machine] = chain.step(numbers, samples, place=lambda h: h.T.contiguous().T)
        assert min(chain.cbp.num_replaced.values()) > 0
    assert len(results) == 2 * len(_C.isa_levels())
    assert_same_bits(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["dense", "channels last"]
)
def test_same_bits_for_convolutions(memory_format, dtype):
    results = {}
    for machine in settings_of_a_machine():
        model = nn.Sequential(nn.Conv2d(3, 96, 3), nn.Conv2d(96, 200, 3, groups=2)).to(dtype)
        model = model.to(memory_format=memory_format)
        options = {"replacement_rate": 0.1, "maturity_threshold": 0, "backend": "cpp", "seed": SEED}
        cbp = ContinualBackprop(model, rule=Rule.gnt("adaptable_contribution"), **options)
        numbers = Numbers(2).any
        for p in model.parameters():
            p.data.copy_(numbers(p.shape))
        h = numbers((4, 96, 19, 21)).to(dtype).contiguous(memory_format=memory_format)
        cbp._engine.record(0, h)
        cbp.step()
        state = cbp._engine.state
        fields = {name: getattr(state, name).clone() for name in FIELDS}
        results[machine] = {**fields, **{name: p.detach().clone() for name, p in model.named_parameters()}}
        assert cbp.num_replaced["0"] == 9
    assert_same_bits(results)


# whole runs


def mlp(generator):
    layers = [nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 4)]
    return nn.Sequential(*layers), torch.randn(16, 32, generator=generator)


def cnn(generator):
    layers = [nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(12, 16, 3, groups=2, bias=False), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten()]
    layers += [nn.Linear(64, 24), nn.RMSNorm(24), nn.GELU(), nn.Linear(24, 4)]
    return nn.Sequential(*layers), torch.randn(8, 2, 8, 8, generator=generator)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.003),
}


def run(make, rule, optimizer, backend, dtype=torch.float32, steps=200):
    """Train on a target that moves: the units replaced in every step, and what is there at the end."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model, x = make(generator)
    model, x = model.to(dtype), x.to(dtype)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    # clarena counts whole units only
    rate = 0.05 if rule == "clarena" else 0.02
    options = {"replacement_rate": rate, "maturity_threshold": 15, "decay_rate": 0.9, "seed": SEED}
    cbp = ContinualBackprop(model, optimizer, rule=RULES[rule], backend=backend, **options)
    replaced = []
    for _ in range(steps):
        y = torch.randn(len(x), 4, generator=generator).to(dtype)
        loss = (model(x + 0.1 * y.mean()) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        replaced.append({name: units.tolist() for name, units in cbp.last_replaced.items()})
    assert sum(cbp.num_replaced.values()) >= steps / 5
    return replaced, cbp.utility, model.state_dict(), optimizer.state_dict()["state"]


RUNS = [
    (mlp, "nature", "adam", torch.float32),
    (mlp, "clarena", "sgd", torch.float32),
    (mlp, "adaptable_contribution", "sgd", torch.bfloat16),
    (cnn, "zero_contribution", "adam", torch.float32),
]
MORE_RUNS = [
    (mlp, "coin", "sgd", torch.float32),
    (mlp, "feature_by_input", "adam", torch.float64),
    (mlp, "random", "adam", torch.float32),
    (cnn, "nature", "sgd", torch.float32),
    (cnn, "all", "adam", torch.float32),
    (cnn, "adaptable_contribution", "sgd", torch.float64),
]


@pytest.mark.parametrize(
    ("make", "rule", "optimizer", "dtype"),
    [*RUNS, *(pytest.param(*r, marks=pytest.mark.slow) for r in MORE_RUNS)],
    ids=lambda value: NAMES.get(value) or getattr(value, "__name__", value),
)
def test_a_run_replaces_what_the_reference_replaces(make, rule, optimizer, dtype):
    runs = [run(make, rule, optimizer, backend, dtype) for backend in ("cpp", "reference")]
    (mine, utility, *rest), (expected, other_utility, *other_rest) = runs
    assert mine == expected
    # the same units and the same draws: what was trained has the same bits
    torch.testing.assert_close(rest, other_rest, rtol=0, atol=0)
    torch.testing.assert_close(utility, other_utility, rtol=4 * gamma(ADDITIONS, dtype), atol=1e-6)


def test_a_run_has_the_same_bits_on_every_instruction_set(every_isa):
    results = every_isa(lambda: run(cnn, "adaptable_contribution", "adam", "cpp", steps=100))
    (_, expected), *others = results.items()
    assert len(others) == len(_C.isa_levels()) - 1
    for name, found in others:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)
