"""The Triton backend in Triton's interpreter (see conftest.py), against the reference and the compiled backend."""

import math

import pytest
import torch
import triton
import triton.language as tl
from group_cases import RULES, cases, check_step_on_whole_numbers, gamma
from hypothesis import given, settings
from torch import nn
from triton_runs import assert_same_run, attach, engine_of, linear_groups, train

from cbp_fast import Part, Rule
from cbp_fast.backends.triton.kernels.arithmetic import bias_correction

pytestmark = pytest.mark.usefixtures("interpreter")


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_on_triton(case):
    check_step_on_whole_numbers(case, "triton")


test_step_on_whole_numbers = settings(max_examples=15)(given(cases(powers_of_two=True))(check_on_triton))
test_many_steps_on_whole_numbers = pytest.mark.slow(
    settings(max_examples=100)(given(cases(powers_of_two=True))(check_on_triton))
)


@pytest.mark.parametrize(
    ("rule", "capture"), [*((rule, "deferred") for rule in RULES), ("nature", "inline"), ("centred transfer", "inline")]
)
def test_training_is_that_of_the_compiled_backend(rule, capture):
    widths = (20, 20, 17, 3)
    runs = [train(b, RULES[rule], widths, capture=capture, maturity_threshold=0) for b in ("triton", "cpp")]
    assert sum(len(units) for step in runs[0][3] for units in step.values()) > 3
    # a chain of at most 33 additions in float32, and of as many steps in the average
    assert_same_run(*runs, rtol=4 * gamma(40, torch.float32))


@pytest.mark.parametrize(
    "dtypes",
    [*(pytest.param((t,), marks=pytest.mark.slow) for t in (torch.bfloat16, torch.float64)), DTYPES],
    ids=["bf16", "f64", "mixed"],
)
@pytest.mark.parametrize("rule", ["nature", pytest.param("clarena", marks=pytest.mark.slow)])
def test_training_in_other_types(rule, dtypes):
    runs = [
        train(b, RULES[rule], (20, 20, 17, 16, 3), dtypes=dtypes, steps=2, maturity_threshold=0)
        for b in ("triton", "cpp")
    ]
    assert_same_run(*runs, rtol=4 * gamma(40, torch.float32))


@pytest.mark.parametrize("rule", ["nature", "contribution", "adaptation"])
def test_training_on_whole_numbers_has_the_same_bits(rule):
    runs = [train(b, RULES[rule], dyadic=True, decay_rate=0.5) for b in ("triton", "cpp")]
    assert_same_run(*runs)


@pytest.mark.parametrize(
    "units", [1, 129, *(pytest.param(n, marks=pytest.mark.slow) for n in (127, 128, 255, 256, 257))]
)
def test_units_round_the_size_of_a_block(units):
    """The k least of many, at and round the sizes where a kernel takes one more block."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(units)
        reader = nn.Linear(units, 3)
        reader.weight.data.copy_(torch.randint(-3, 4, reader.weight.shape))
        cbp = engine_of([([nn.Linear(2, units)], [reader])], backend=backend)
        cbp._engine.record(0, torch.randint(0, 3, (4, units)).float())
        cbp.step()
        results.append((cbp.last_replaced["g0"], cbp.utility["g0"], cbp.age["g0"]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert len(results[0][0]) == units // 2


@pytest.mark.slow
def test_a_group_of_131072_units():
    units, results = 2**17, []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        reader = nn.Linear(units, 1)
        reader.weight.data.copy_(torch.randint(-50, 50, reader.weight.shape))
        cbp = engine_of([([nn.Linear(1, units)], [reader])], backend=backend, replacement_rate=0.001)
        cbp._engine.record(0, torch.randint(-9, 10, (2, units)).float())
        cbp.step()
        results.append((cbp.last_replaced["g0"], cbp.utility["g0"], cbp.age["g0"]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert len(results[0][0]) == 131


@pytest.mark.parametrize(
    ("rate", "tied"),
    [
        (8 / 600, True),
        (257 / 600, True),
        *(pytest.param(rate, False, marks=pytest.mark.slow) for rate in (3 / 600, 8 / 600, 9 / 600, 257 / 600, 1.0)),
        *(pytest.param(rate, True, marks=pytest.mark.slow) for rate in (9 / 600, 1.0)),
    ],
)
def test_choice_is_a_stable_sort(rate, tied):
    """Few are chosen one by one, many by radix; of equals the lower index, -0 as +0, and never what is not finite."""
    units = 600
    reader = nn.Linear(units, 1)
    reader.weight.data.fill_(1.0)
    cbp = engine_of([([nn.Linear(2, units)], [reader])], backend="triton", replacement_rate=rate, decay_rate=0.0)
    # all exponents of float32, in no order
    y = (
        torch.randint(0, 5, (units,)).float()
        if tied
        else 2.0 ** torch.linspace(-140, 120, units)[torch.randperm(units)]
    )
    y[:: units // 7] = 0.0
    y[5], y[77] = math.inf, math.nan
    state = cbp._engine.state
    # a negative zero is a utility that a user may load
    state.utility[: units // 7 + 1] = -0.0
    cbp._engine.record(0, y[None])
    cbp.step()
    finite = y.isfinite().nonzero()[:, 0]
    order = finite[torch.sort(y[finite], stable=True).indices]
    due = math.floor(rate * len(finite))
    assert torch.equal(cbp.last_replaced["g0"], order[:due])


def test_nothing_mature_and_nothing_reached():
    runs = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        layers = [nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)]
        groups = [([layers[0]], [layers[1]]), ([layers[1]], [layers[2]])]
        cbp = engine_of(groups, backend=backend, maturity_threshold=2, replacement_rate=1.0)
        before = [p.clone() for layer in layers for p in layer.parameters()]
        engine = cbp._engine
        engine.record(0, torch.ones(2, 4))
        cbp.step()
        # an empty batch is no forward
        engine.record(1, torch.ones(0, 4))
        cbp.step()
        assert all(
            torch.equal(p, q) for p, q in zip(before, (p for layer in layers for p in layer.parameters()), strict=True)
        )
        state = engine.state
        runs[backend] = [state.age.clone(), state.utility.clone(), state.step.clone(), state.pending.clone()]
        assert state.age.tolist() == [1] * 4 + [0] * 4
        assert state.step.item() == 1
    for a, b in zip(*runs.values(), strict=True):
        assert torch.equal(a, b)


def spread(tensor, step=3):
    """The same values with a gap after each."""
    memory = torch.full((*tensor.shape, step), math.nan, dtype=tensor.dtype)
    memory[..., 0] = tensor
    return memory[..., 0]


VIEWS = {
    "dense": lambda h: h.contiguous(),
    "channels last": lambda h: (
        h.contiguous(memory_format=torch.channels_last) if h.dim() == 4 else h.mT.contiguous().mT
    ),
    "gaps": spread,
    "flipped axes": lambda h: h.permute(*range(h.dim())[::-1]).contiguous().permute(*range(h.dim())[::-1]),
}
KINDS = {
    "linear": lambda: (nn.Linear(16, 24), (2, 3, 16), ()),
    "conv": lambda: (nn.Conv2d(16, 24, 3), (2, 16, 5, 4), ()),
    "grouped": lambda: (nn.Conv2d(16, 8, (2, 3), groups=4), (2, 16, 5, 4), ()),
    "flattened": lambda: (nn.Linear(16 * 5, 8), (4, 80), ()),
    "by position": lambda: (nn.Linear(16 * 5 + 3, 8), (4, 83), (2, 5, 1, 16)),
    # 16 columns from some place on: of one convolution, within a group, across groups, whole groups but not the first
    "part": lambda: (nn.Linear(32, 8), (4, 32), (8,)),
    "part of conv": lambda: (nn.Conv2d(24, 8, 3), (2, 24, 5, 4), (4,)),
    "in a group": lambda: (nn.Conv2d(64, 8, 3, groups=2), (2, 64, 3, 4), (36,)),
    "across groups": lambda: (nn.Conv2d(32, 16, 2, groups=4), (2, 32, 3, 4), (4,)),
    "whole groups": lambda: (nn.Conv2d(24, 12, (1, 3), groups=3), (2, 24, 3, 4), (8,)),
    "from within a group": lambda: (nn.Conv1d(60, 8, 2, groups=4), (2, 60, 5), (7,)),
    "in a group of 1 x 1": lambda: (nn.Conv2d(64, 16, 1, groups=2), (2, 64, 3, 4), (40,)),
    "by position in a part": lambda: (nn.Conv1d(16 * 3 + 16, 8, 1), (2, 64, 4), (16, 3, 1, 16)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["triton", "cpp"])
@pytest.mark.parametrize("rule", ["nature", pytest.param("adaptation", marks=pytest.mark.slow)])
def test_any_memory_layout(kind, view, rule, backend):
    """Sums of whole numbers have the reference's bits, wherever the numbers lie, and whichever of them are read."""
    results = []
    for backend_ in (backend, "reference"):
        torch.manual_seed(0)
        reader, shape, part = KINDS[kind]()
        producer = nn.Linear(8, 16) if kind == "linear" else nn.Conv2d(4, 16, 3)
        h = torch.randint(-4, 5, shape).float()
        out = Part(reader, *part) if part else reader
        for layer in (producer, reader):
            values = torch.randint(-4, 5, layer.weight.shape).float()
            layer.weight = nn.Parameter(VIEWS[view](values) if backend_ != "reference" else values)
        cbp = engine_of([([producer], [out])], RULES[rule], backend=backend_, replacement_rate=0.3)
        cbp._engine.record(0, VIEWS[view](h) if backend_ != "reference" else h)
        cbp.step()
        results.append([cbp.utility["g0"], cbp.last_replaced["g0"], producer.weight, producer.bias, reader.weight])
    assert len(results[0][1]) == 4
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "cpp"])
@pytest.mark.parametrize("init", ["kaiming", "normal"])
def test_each_tensor_has_a_kind_of_draw_of_its_own(init, backend):
    """Embeddings are drawn normal, whatever the layers beside them are drawn by, and a part of one too."""
    results = []
    for backend_ in (backend, "reference"):
        torch.manual_seed(0)
        table, other, linear, reader = nn.Embedding(5, 13), nn.Embedding(3, 40), nn.Linear(4, 13), nn.Linear(13, 2)
        producers = [table, linear, Part(other, 3, 2)]
        cbp = engine_of([(producers, [reader])], Rule.nature(init=init), backend=backend_, replacement_rate=1.0)
        cbp._engine.record(0, torch.ones(2, 13))
        cbp.step()
        results.append([layer.weight.detach() for layer in (table, other, linear)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    if init == "kaiming":
        assert torch.equal(results[0][2], results[1][2])
    redrawn = torch.cat([results[0][0].flatten(), results[0][1][:, 3:29].flatten()])
    # 143 draws: mean and deviation within 4 standard errors
    assert abs(redrawn.mean()) < 4 / math.sqrt(143)
    assert abs(redrawn.std() - 1) < 4 / math.sqrt(2 * 143)


def test_state_goes_from_one_backend_to_the_other():
    """A checkpoint written on one backend resumes on the other with the same choices."""
    results = []
    for first, second in (("triton", "cpp"), ("cpp", "triton")):
        model, optimizer, cbp, _ = train(first, Rule.nature(), dyadic=True, decay_rate=0.5)
        saved = cbp.state_dict()
        cbp.remove()
        cbp = attach(model, second, optimizer=optimizer, groups=linear_groups(model), decay_rate=0.5)
        cbp.load_state_dict(saved)
        for p in model.parameters():
            p.data.fill_(0.5)
        model(torch.ones(8, 9))
        cbp.step()
        results.append([*cbp.last_replaced.values(), *cbp.utility.values(), *(p.detach() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@triton.jit
def corrections(ages, log_decay, out):
    i = tl.arange(0, 16)
    tl.store(out + i, bias_correction(tl.load(ages + i), tl.load(log_decay)))


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.99999, 1 - 2.0**-40])
def test_bias_correction_is_precise(decay):
    """1 - decay^age in double, also where float32 would be off by a thousandth."""
    ages = [0, 1, 2, 3, 10, 49, 50, 51, 68, 69, 100, 34657, 50000, 69314, 10**6, 2**31 - 1]
    out = torch.empty(16, dtype=torch.float64)
    log_decay = torch.tensor([math.log(decay)], dtype=torch.float64)
    corrections[(1,)](torch.tensor(ages, dtype=torch.int32), log_decay, out)
    expected = [-math.expm1(age * math.log(decay)) for age in ages]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=4 * 2.0**-52, atol=0)


@pytest.mark.parametrize("rule", ["nature", "adaptation"])
def test_one_block_of_outputs_reaches_many_blocks_of_units(rule):
    """Units of many columns come in small blocks; 128 of them, made by rows that lie far apart, are summed together."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        producer, reader = nn.Conv2d(3, 140, 1), nn.Linear(140 * 40, 3)
        producer.weight = nn.Parameter(torch.randint(-3, 4, (3, 140)).float().t()[:, :, None, None])
        reader.weight.data.copy_(torch.randint(-3, 4, reader.weight.shape))
        cbp = engine_of([([producer], [reader])], RULES[rule], backend=backend, replacement_rate=0.1)
        cbp._engine.record(0, torch.randint(-2, 3, (4, 5600)).float())
        cbp.step()
        results.append([cbp.utility["g0"], cbp.last_replaced["g0"], producer.weight, reader.weight])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
