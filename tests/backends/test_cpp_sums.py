"""The compiled backend against the reference: random numbers, sums, whole steps, instruction sets, threads, memory."""

import math
import resource
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cbp_fast import _C, ContinualBackprop, Rule, UnitGroup
from cbp_fast.backends import reference
from cbp_fast.groups.resolving import resolve
from cbp_fast.step.engine import Engine

SEED = 0x9E3779B97F4A7C15
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
CONVOLUTIONS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
RULES = {
    "nature": Rule.nature(),
    "nature transfer": Rule.nature(transfer_bias=True),
    "clarena": Rule.clarena(),
    **{utility: Rule.gnt(utility) for utility in Rule.UTILITIES},
    "all": Rule.gnt(accrual="all", init="default"),
    "coin": Rule.gnt(accumulate=False, init="xavier"),
    "centred transfer": Rule.gnt("zero_contribution", transfer_bias=True, init="lecun"),
}
FIELDS = (
    "step",
    "pending",
    "num_replaced",
    "count",
    "activation",
    "feature",
    "running_mean",
    "utility",
    "age",
    "num_chosen",
)
# partial sums are handed on to double after at most 512 rows (columns), or after 2048 / 16 additions a lane and a tree
# of four (rows); some more for the terms themselves
ADDITIONS = 128 + 4 + 8


def gamma(additions, dtype):
    """Relative error of a sum of numbers of one sign after so many roundings (Higham, section 3.1)."""
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    return additions * unit / (1 - additions * unit)


# random numbers


def test_the_oracle_has_the_published_answers(philox):
    # kat_vectors of Random123, philox4x32 10
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox.words((0,) * 4, (0,) * 2) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox.words((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox.words(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


words = st.integers(0, 2**32 - 1)
seeds = st.integers(0, 2**64 - 1)
# beyond 2 ** 34 the block number needs its high word
firsts = st.one_of(st.integers(0, 200), st.integers(2**34 - 100, 2**34 + 100), st.integers(0, 2**60))


@settings(max_examples=60)
@given(seed=seeds, step=words, stream=words, first=firsts, n=st.integers(1, 8))
@example(seed=SEED, step=1, stream=2**31, first=2**34 - 4, n=8)
def test_reference_draws_philox(philox, seed, step, stream, first, n):
    signed = seed if seed < 2**63 else seed - 2**64
    elements = torch.arange(first, first + n)
    drawn = reference.philox(elements, torch.tensor([signed]), torch.tensor([step]), stream)
    assert drawn.tolist() == [philox.word(seed, step, stream, first + i) for i in range(n)]


@settings(max_examples=60)
@given(seed=seeds, step=words, stream=words, first=firsts, n=st.integers(0, 300))
@example(seed=SEED, step=1, stream=2**31, first=2**34 - 100, n=300)
@example(seed=SEED, step=1, stream=2**31, first=2**34 - 39, n=80)
def test_compiled_draws_are_those_of_the_reference(every_isa, seed, step, stream, first, n):
    signed = seed if seed < 2**63 else seed - 2**64
    elements = torch.arange(first, first + n)
    expected = reference.unit_uniform(elements, torch.tensor([signed]), torch.tensor([step]), stream).tolist()
    for name, drawn in every_isa(lambda: _C.philox_uniform(seed, step, stream, first, n)).items():
        assert drawn == expected, name


def test_draws_are_uniform():
    n, bins = 2**18, 256
    r = np.array(_C.philox_uniform(SEED, 1, 2, 0, n))
    assert 0 <= r.min() <= r.max() < 1
    counts = np.bincount((r * bins).astype(int), minlength=bins)
    # chi-squared with 255 degrees of freedom: 5 standard deviations from its mean
    assert abs(((counts - n / bins) ** 2 / (n / bins)).sum() - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("change", ["seed", "step", "stream", "first"])
def test_other_counters_give_unrelated_draws(change):
    n = 2**16
    one = {"seed": SEED, "step": 1, "stream": 2, "first": 0}
    other = {**one, change: one[change] + (n if change == "first" else 1)}
    x, y = (np.array(_C.philox_uniform(**arguments, n=n)) for arguments in (one, other))
    # the standard deviation of a correlation of n unrelated pairs is 1 / sqrt(n)
    assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("rule", [Rule.nature(), Rule.clarena()], ids=lambda rule: rule.name)
def test_drawn_weights_are_the_same_bits_everywhere(backend, philox, rule, dtype):
    # 1030 columns: more than are drawn at once
    incoming, reader = nn.Linear(1030, 3, dtype=dtype), nn.Linear(3, 2, dtype=dtype)
    model = nn.Sequential(incoming, reader)
    cbp = ContinualBackprop(
        model,
        rule=rule,
        replacement_rate=1,
        maturity_threshold=0,
        groups=[UnitGroup("g", [incoming], [reader])],
        seed=SEED,
        backend=backend,
    )
    model(torch.ones(1, 1030, dtype=dtype))
    cbp.step()
    (*_, unit) = cbp.last_replaced["g"].tolist()
    elements, stream = range(unit * 1030, (unit + 1) * 1030), philox.stream("0.weight")
    if rule.name == "clarena":
        drawn = philox.unit(SEED, 1, stream, elements)
    else:
        drawn = philox.uniform(SEED, 1, stream, elements, math.sqrt(2) * math.sqrt(3 / 1030))
    assert torch.equal(incoming.weight[unit], torch.from_numpy(drawn).to(dtype))


def test_normal_draws_agree_to_a_millionth(philox):
    drawn = {}
    for backend in ("reference", "cpp"):
        model = nn.Sequential(nn.Linear(300, 8), nn.ReLU(), nn.Linear(8, 2))
        options = {"replacement_rate": 1, "maturity_threshold": 0, "seed": SEED, "backend": backend}
        cbp = ContinualBackprop(model, rule=Rule.nature(init="normal"), **options)
        model(torch.ones(1, 300))
        cbp.step()
        drawn[backend] = model[0].weight.detach().double()
    deviation = math.sqrt(2) * math.sqrt(1 / 300)
    # Box-Muller on the words of a pair
    r = philox.unit(SEED, 1, philox.stream("0.weight"), range(2400)).astype(np.float64).reshape(-1, 2)
    radius, angle = np.sqrt(-2 * np.log1p(-r[:, 0])), 2 * np.pi * r[:, 1]
    expected = deviation * np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(8, 300)
    for weight in drawn.values():
        np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-6 * deviation)
    # 2400 draws: mean and deviation within 5 standard errors
    assert abs(expected.mean()) < 5 * deviation / math.sqrt(2400)
    assert abs(expected.std() / deviation - 1) < 5 / math.sqrt(2 * 2400)


# one step on any shape, type and memory layout


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory: its axes from the outermost in, the step along each, elements before the first."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int
    repeated: int | None = None  # an axis of stride 0

    def place(self, values):
        """A tensor of these values, and the memory that it lies in, NaN wherever it has no element."""
        kept = values if self.repeated is None or not values.numel() else values.narrow(self.repeated, 0, 1)
        sizes = [kept.shape[axis] * self.steps[axis] for axis in self.order]
        memory = torch.full((self.offset + math.prod(sizes),), math.nan, dtype=values.dtype)
        tensor = memory[self.offset :].view(sizes)[tuple(slice(None, None, self.steps[axis]) for axis in self.order)]
        tensor = tensor.permute(tuple(np.argsort(self.order)))
        tensor.copy_(kept)
        return tensor.expand(values.shape), memory


def layouts(draw, dims, may_repeat=False):
    return Layout(
        tuple(draw(st.permutations(range(dims)))),
        tuple(draw(st.lists(st.sampled_from((1, 1, 2)), min_size=dims, max_size=dims))),
        draw(st.sampled_from((0, 1, 5))),
        draw(st.sampled_from((None, None, *range(dims)))) if may_repeat else None,
    )


@dataclass(frozen=True)
class Case:
    """A unit group, the forwards of some steps, and where everything lies."""

    rule: str
    spatial: int  # 0: linear producers
    flattened: bool  # convolution producers, linear readers
    units: int
    fan_in: int
    fan_out: int
    kernel: tuple[int, ...]
    columns: int  # a unit
    conv_groups: int
    producers: int
    readers: int
    dtype: torch.dtype
    activations: torch.dtype
    samples: tuple[int, ...]  # axes of h that are no features
    forwards: tuple[int, ...]  # for each step and reader, how many
    weights: tuple[Layout, ...]
    inputs: Layout
    slots: Layout
    hyper: dict[str, float]
    deferred: bool
    spoilt: bool  # some numbers are not finite
    numbers: int


SIZES = (1, 2, 3, 4, 5, 15, 16, 17, 31, 33)


@st.composite
def cases(draw, powers_of_two=False):
    """`powers_of_two`: numbers of samples and of columns a unit that any mean can be divided by without rounding."""
    spatial = draw(st.sampled_from((0, 0, 1, 2, 3)))
    flattened = spatial > 0 and draw(st.booleans())
    name = draw(st.sampled_from([r for r in RULES if spatial == 0 or r != "clarena"]))
    units, fan_in, fan_out = (draw(st.sampled_from(SIZES)) for _ in range(3))
    dims = 0 if flattened else spatial
    conv_groups = 1
    if dims:
        fits = [g for g in (1, 2, 3, 4) if units % g == 0 and fan_out % g == 0 and not g == units > 1]
        conv_groups = draw(st.sampled_from(fits))
    lengths = (1, 2, 4) if powers_of_two else (1, 2, 3, 5, 7)
    batch_axes = draw(st.integers(0, 1 if dims else 3))
    samples = tuple(draw(st.sampled_from(lengths)) for _ in range(batch_axes + dims))
    if batch_axes and draw(st.integers(0, 9)) == 0:
        samples = (0, *samples[1:])
    producers, readers = draw(st.sampled_from((1, 1, 2))), draw(st.sampled_from((1, 1, 2)))
    reader_dims, producer_dims = 2 + dims, 2 + spatial
    steps = draw(st.integers(1, 3))
    rule = RULES[name]
    return Case(
        rule=name,
        spatial=spatial,
        flattened=flattened,
        units=units,
        fan_in=fan_in,
        fan_out=fan_out,
        kernel=tuple(draw(st.sampled_from((1, 2, 3))) for _ in range(spatial)),
        columns=draw(st.sampled_from((1, 2, 4) if powers_of_two else (1, 2, 3, 4, 6))) if flattened else 1,
        conv_groups=conv_groups,
        producers=producers,
        readers=readers,
        dtype=draw(st.sampled_from(DTYPES)),
        activations=draw(st.sampled_from(DTYPES)),
        samples=samples,
        forwards=tuple(draw(st.sampled_from((1, 1, 2, 0))) for _ in range(steps * readers)),
        weights=tuple(layouts(draw, d) for d in (producer_dims,) * producers + (reader_dims,) * readers),
        inputs=layouts(draw, len(samples) + 1, may_repeat=True),
        slots=layouts(draw, reader_dims),
        hyper={
            "replacement_rate": draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))),
            "maturity_threshold": draw(st.sampled_from((0, 1, 2))),
            # a mean is corrected by 1 - decay ** age, which two libraries may round differently; not so here
            "decay_rate": 0.0 if rule.keeps_mean else draw(st.sampled_from((0.0, 0.5, 0.9, 0.99))),
        },
        deferred=draw(st.booleans()),
        spoilt=draw(st.sampled_from((False, False, True))),
        numbers=draw(st.integers(0, 2**31)),
    )


class Numbers:
    """Numbers for tensors, the same for every object made with the same seed."""

    def __init__(self, seed, spoilt=False):
        self.generator, self.spoilt = torch.Generator().manual_seed(seed), spoilt

    def any(self, shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def whole(self, shape, bad=(math.inf, -math.inf)):
        values = torch.randint(-4, 5, tuple(shape), generator=self.generator).double()
        if self.spoilt:
            for value in bad:
                values[torch.rand(shape, generator=self.generator) < 0.01] = value
        return values


class Bench:
    """One case in one backend: a group of its own with momentum in an optimizer."""

    def __init__(self, case, backend, dtype=None, **hyper):
        self.case, self.memories, self.laid_out = case, [], backend != "reference"
        dtype = dtype or case.dtype
        kind, width = CONVOLUTIONS[case.spatial], case.units * case.columns
        kernel = {"kernel_size": case.kernel} if case.spatial else {}
        producers = [kind(case.fan_in, case.units, dtype=dtype, **kernel) for _ in range(case.producers)]
        if case.flattened:
            kind, kernel = nn.Linear, {}
        elif case.spatial:
            kernel["groups"] = case.conv_groups
        readers = [kind(width, case.fan_out, dtype=dtype, **kernel) for _ in range(case.readers)]
        norms = []
        if case.rule != "clarena":
            norms = [nn.LayerNorm(width, dtype=dtype) if case.columns > 1 else nn.GroupNorm(1, width, dtype=dtype)]
        self.layers = producers + readers
        for module, layout in zip(self.layers, case.weights, strict=True):
            module.weight = nn.Parameter(self.place(layout, module.weight.detach()))
        self.model = nn.ModuleList([*self.layers, *norms])
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        for p in self.model.parameters():
            slot = torch.empty_like(p)
            slot = self.place(case.slots, slot) if p.shape == readers[0].weight.shape else slot
            self.optimizer.state[p]["momentum_buffer"] = slot
        self.engine = Engine(
            RULES[case.rule],
            [resolve(self.model, UnitGroup("g", producers, readers, norms))],
            backend=backend,
            capture="deferred" if case.deferred else "inline",
            seed=SEED,
            **{**case.hyper, **hyper},
        )

    def place(self, layout, values):
        if not self.laid_out:
            return values.contiguous()
        tensor, memory = layout.place(values)
        self.memories.append((memory, values.numel()))
        return tensor

    def fill(self, numbers):
        """The same numbers for every bench of a case: parameters and momenta."""
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(numbers(p.shape))
                self.optimizer.state[p]["momentum_buffer"].copy_(numbers(p.shape))

    def record(self, step, numbers):
        case = self.case
        at = len(case.samples) - (0 if case.flattened else case.spatial)
        shape = (*case.samples[:at], case.units * case.columns, *case.samples[at:])
        for slot in range(case.readers):
            for _ in range(case.forwards[step * case.readers + slot]):
                h = numbers(shape, bad=(math.inf, math.nan)).to(case.activations)
                if case.inputs.repeated is not None and h.numel():
                    h = h.narrow(case.inputs.repeated, 0, 1).expand(shape)
                self.engine.record(slot, case.inputs.place(h)[0] if self.laid_out else h)

    def untouched_gaps(self):
        return all(memory.isnan().sum() == memory.numel() - used for memory, used in self.memories)


def assert_same_state(mine, expected, context):
    for name in FIELDS:
        a, b = getattr(mine, name), getattr(expected, name)
        assert torch.equal(a, b), f"{context}: {name}: {a} is not {b}"
    for layout, n in zip(mine.layouts, mine.num_chosen.tolist(), strict=True):
        a, b = (state.chosen[layout.units][:n] for state in (mine, expected))
        assert torch.equal(a, b), f"{context}: chosen: {a} is not {b}"


def check_step_on_whole_numbers(case, backend):
    """Sums of small integers do not round: the compiled step has the bits of the reference's."""
    mine, expected = Bench(case, backend), Bench(case, "reference")
    benches = {bench: Numbers(case.numbers, case.spoilt) for bench in (mine, expected)}
    for step in range(len(case.forwards) // case.readers):
        for bench, numbers in benches.items():
            bench.fill(numbers.whole)
            bench.record(step, numbers.whole)
        chosen = [bench.engine.select() for bench in benches]
        assert chosen[0] == chosen[1]
        assert_same_state(mine.engine.state, expected.engine.state, "after the choice")
        for bench in benches:
            if chosen[0]:
                bench.engine.reinit(*bench.engine.collect([bench.optimizer]))
            bench.engine.finish()
        assert_same_state(mine.engine.state, expected.engine.state, "after re-initialisation")
        for (name, a), b in zip(mine.model.named_parameters(), expected.model.parameters(), strict=True):
            assert torch.equal(a, b), name
            slots = (bench.optimizer.state[p]["momentum_buffer"] for bench, p in ((mine, a), (expected, b)))
            assert torch.equal(*slots), f"momentum of {name}"
    assert mine.untouched_gaps()


def check_compiled_step(case):
    check_step_on_whole_numbers(case, "cpp")


test_step_on_whole_numbers = settings(max_examples=250)(given(cases(powers_of_two=True))(check_compiled_step))
test_many_steps_on_whole_numbers = pytest.mark.slow(
    settings(max_examples=5000)(given(cases(powers_of_two=True))(check_compiled_step))
)


def check_utility_from_sums(case):
    """From the same sums over activations, the utility is as near the one in float64 as sums of weights allow."""
    rule, hyper = RULES[case.rule], {"replacement_rate": 0.0, "maturity_threshold": 1, "decay_rate": 0.9}
    mine, exact = Bench(case, "cpp", **hyper), Bench(case, "reference", torch.float64, **hyper)
    generator = torch.Generator().manual_seed(case.numbers)
    count = torch.tensor(case.forwards[: case.readers])
    columns = count.repeat_interleave(case.units * case.columns)
    activation = torch.rand(columns.shape, generator=generator, dtype=torch.float64) * columns
    prior = torch.rand(case.units, generator=generator)
    for bench in (mine, exact):
        bench.fill(Numbers(case.numbers).any)
        state = bench.engine.state
        state.count.copy_(count)
        state.activation.copy_(activation)
        state.utility.copy_(prior)
        state.age.copy_(torch.arange(case.units) % 4)
    with torch.no_grad():
        # both see what is left of the numbers in the case's type
        for a, b in zip(mine.model.parameters(), exact.model.parameters(), strict=True):
            b.copy_(a)
    for bench in (mine, exact):
        bench.engine.select()
    a, b = mine.engine.state, exact.engine.state
    for name in ("step", "age", "pending", "num_chosen"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    elements = max(layer.weight.numel() for layer in mine.layers) if case.dtype == torch.float64 else 0
    # incoming and outgoing weights, then the few roundings of the average
    error = 2 * gamma(ADDITIONS + elements, case.dtype) + gamma(8, case.dtype)
    scale = b.utility.abs()
    if rule.name == "clarena" and count.any():
        rows = sum(layer.weight.detach().double().abs().sum(1) for layer in mine.layers[: case.producers])
        y = activation.view(case.readers, -1).sum(0) * rows
        # relative to the greatest, as seen through the distance from the least to it
        scale = scale + 2 * y.amax() / (y.amax() - y.amin()).clamp(min=1e-300)
    assert ((a.utility.double() - b.utility).abs() <= error * scale).all()


test_utility_from_sums = settings(max_examples=150)(given(cases())(check_utility_from_sums))
test_many_utilities_from_sums = pytest.mark.slow(settings(max_examples=3000)(given(cases())(check_utility_from_sums)))


@dataclass(frozen=True)
class Forwards:
    """What one reader of a group sees before a step."""

    centred: bool
    units: int
    columns: int  # a unit
    spatial: int
    samples: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    layout: Layout
    numbers: int


@st.composite
def forwards(draw):
    spatial = draw(st.sampled_from((0, 0, 1, 2, 3)))
    axes = draw(st.integers(spatial, spatial + 1)) if spatial else draw(st.integers(0, 3))
    lengths = st.sampled_from((1, 2, 3, 5, 16, 33))
    return Forwards(
        centred=draw(st.booleans()),
        units=draw(st.sampled_from((1, 2, 3, 15, 16, 17, 31, 33))),
        columns=1 if spatial else draw(st.sampled_from((1, 1, 3, 4))),
        spatial=spatial,
        samples=tuple(tuple(draw(lengths) for _ in range(axes)) for _ in range(draw(st.integers(1, 2)))),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=layouts(draw, axes + 1, may_repeat=True),
        numbers=draw(st.integers(0, 2**31)),
    )


def check_activation_sums(case):
    """Sums over activations are as near those in float64 as their additions allow, whatever lies in memory where."""
    features = case.units * case.columns
    kind = max(case.spatial, int(case.columns > 1))
    incoming = CONVOLUTIONS[kind](1, case.units, *[1] * (kind > 0))
    reader = CONVOLUTIONS[case.spatial](features, 1, *[1] * (case.spatial > 0))
    model = nn.ModuleList([incoming, reader])
    rule = Rule.gnt("zero_contribution" if case.centred else "contribution", transfer_bias=True)
    options = {"replacement_rate": 0.0, "maturity_threshold": 0, "decay_rate": 0.9, "seed": 0, "capture": "inline"}
    engine = Engine(rule, [resolve(model, UnitGroup("g", [incoming], [reader]))], backend="cpp", **options)
    generator = torch.Generator().manual_seed(case.numbers)
    before = torch.randn(features, generator=generator, dtype=torch.float64)
    age = torch.arange(case.units, dtype=torch.float64) % 5
    engine.state.running_mean.copy_(before)
    engine.state.age.copy_(age)

    seen, total, magnitude, distance, furthest = 0, *torch.zeros(4, features, dtype=torch.float64)
    for samples in case.samples:
        at = len(samples) - case.spatial
        h = torch.randn(*samples[:at], features, *samples[at:], generator=generator).to(case.dtype)
        repeated = case.layout.repeated
        h = h if repeated is None else h.narrow(repeated, 0, 1).expand(h.shape)
        engine.record(0, case.layout.place(h)[0])
        x = h.double().movedim(at, -1).reshape(-1, features)
        seen, total, magnitude = seen + len(x), total + x.sum(0), magnitude + x.abs().sum(0)
        h_hat = (0.9 * before + 0.1 * total / seen).view(case.units, -1) / (1 - 0.9 ** (age + 1))[:, None]
        h_hat = h_hat.mean(1, keepdim=True).expand(-1, case.columns).flatten()
        distance, furthest = distance + (x - h_hat).abs().sum(0), torch.maximum(furthest, h_hat.abs())

    error = gamma(ADDITIONS + (seen if case.dtype == torch.float64 else 0), case.dtype)
    assert engine.state.count.item() == seen
    assert ((engine.state.feature - total).abs() <= error * magnitude).all()
    if case.centred:
        # h_hat itself is rounded, and is off by what its unit's means are
        widest = magnitude.view(case.units, -1).amax(1, keepdim=True).expand(-1, case.columns).flatten()
        assert ((engine.state.activation - distance).abs() <= error * (distance + seen * furthest + widest)).all()
    else:
        assert ((engine.state.activation - magnitude).abs() <= error * magnitude).all()


test_activation_sums = settings(max_examples=150)(given(forwards())(check_activation_sums))
test_many_activation_sums = pytest.mark.slow(settings(max_examples=3000)(given(forwards())(check_activation_sums)))


# the edges of blocks, and what only large tensors do


class Chain:
    """Two groups around one middle weight, which is read by rows and by columns in one pass."""

    def __init__(self, backend, inputs, outputs, dtype=torch.float32, rule="adaptable_contribution", **options):
        layers = [nn.Linear(1, inputs), nn.Linear(inputs, outputs), nn.Linear(outputs, 1)]
        self.model = nn.Sequential(*layers).to(dtype)
        options = {"replacement_rate": 0.01, "maturity_threshold": 0, "decay_rate": 0.0, **options}
        groups = [UnitGroup(str(i), [layers[i]], [layers[i + 1]]) for i in range(2)]
        options["seed"] = SEED
        rule = Rule.gnt(rule, transfer_bias=True)
        self.cbp = ContinualBackprop(self.model, rule=rule, groups=groups, backend=backend, **options)
        self.engine, self.dtype = self.cbp._engine, dtype

    def fill(self, numbers):
        for p in self.model.parameters():
            p.data.copy_(numbers(p.shape))

    def step(self, numbers, samples, place=lambda h: h):
        for slot, layer in enumerate((self.model[1], self.model[2])):
            self.engine.record(slot, place(numbers((samples, layer.in_features)).to(self.dtype)))
        self.cbp.step()
        return self.bits()

    def bits(self):
        state = self.engine.state
        # beyond the units chosen, the list of them holds what is left of other steps
        fields = {name: getattr(state, name).clone() for name in FIELDS}
        chosen = {f"chosen {name}": units for name, units in self.cbp.last_replaced.items()}
        return {**fields, **chosen, **{name: p.detach().clone() for name, p in self.model.named_parameters()}}


def assert_same_bits(results):
    (first, expected), *others = results.items()
    for name, found in others:
        for key, value in expected.items():
            assert torch.equal(found[key], value), f"{key}: {name} is not {first}"


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(511, 2047), (512, 2048), (513, 2049), (3, 4097), (1, 1023), (515, 1024), (4, 1025), (1030, 5)],
    ids=str,
)
def test_edges_of_blocks(outputs, inputs, transposed, dtype):
    results = {}
    for backend in ("cpp", "reference"):
        chain = Chain(backend, inputs, outputs, dtype)
        if transposed:
            middle = chain.model[1]
            middle.weight = nn.Parameter(middle.weight.detach().T.contiguous().T)
        numbers = Numbers(0).whole
        chain.fill(numbers)
        results[backend] = chain.step(numbers, 512)
    assert_same_bits(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    "order",
    [(0, 1, 2, 3), (0, 2, 3, 1), (2, 3, 0, 1), (1, 0, 2, 3)],
    ids=["dense", "channels last", "batch late", "channels first"],
)
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 16, 33, 63), (65, 5, 1, 128), (4, 2, 2049, 1)], ids=str)
def test_edges_of_runs_along_the_positions_of_a_convolution(shape, order, dtype):
    # whole numbers, and powers of two of them: exact
    h = Numbers(0).whole(shape).to(dtype).permute(order).contiguous().permute(tuple(np.argsort(order)))
    results = {}
    for backend in ("cpp", "reference"):
        model = nn.Sequential(nn.Conv2d(1, shape[1], 1), nn.Conv2d(shape[1], 1, 1))
        options = {"replacement_rate": 0.0, "decay_rate": 0.0, "capture": "inline", "backend": backend}
        cbp = ContinualBackprop(model, rule=Rule.nature(transfer_bias=True), **options)
        cbp._engine.record(0, h)
        state = cbp._engine.state
        results[backend] = {name: getattr(state, name).clone() for name in ("count", "activation", "feature")}
    assert_same_bits(results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("shape", [(2**18, 3), (3, 2**18)], ids=str)
def test_long_sums_are_as_good_as_short_ones(shape, dtype):
    # in one float32, 2 ** 18 times nearly 0.1 is off by a thousandth
    rows, columns = shape
    model = nn.Sequential(nn.Linear(1, columns), nn.Linear(columns, rows), nn.Linear(rows, 1)).to(dtype)
    tenth = torch.tensor(0.1, dtype=dtype).item()
    for p in model.parameters():
        nn.init.constant_(p, tenth)
    options = {"replacement_rate": 0.0, "decay_rate": 0.0, "backend": "cpp"}
    cbp = ContinualBackprop(model, rule=Rule.gnt("adaptable_contribution"), **options)
    cbp._engine.record(0, torch.full((2, columns), tenth, dtype=dtype) * torch.tensor([[0], [2]], dtype=dtype))
    cbp._engine.record(1, torch.ones(2, rows, dtype=dtype) * torch.tensor([[0], [2]], dtype=dtype))
    cbp.step()
    # distances of 0 and 0.2 from 0.1, or of 0 and 2 from 1; all means over weights are 0.1
    close = {"rtol": 4 * gamma(ADDITIONS, dtype), "atol": 0}
    torch.testing.assert_close(cbp.utility["0"], torch.full((columns,), tenth), **close)
    torch.testing.assert_close(cbp.utility["1"], torch.ones(rows), **close)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["features late", "samples late"])
def test_long_sums_over_samples_are_as_good_as_short_ones(order):
    model = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1))
    cbp = ContinualBackprop(model, rule=Rule.nature(transfer_bias=True), backend="cpp", capture="inline")
    h = torch.full((2**18, 3), 0.1).permute(order).contiguous().permute(order)
    cbp._engine.record(0, h)
    state, expected = cbp._engine.state, torch.full((3,), 2**18 * h[0, 0].item(), dtype=torch.float64)
    for sums in (state.activation, state.feature):
        torch.testing.assert_close(sums, expected, rtol=gamma(ADDITIONS, h.dtype), atol=0)


@pytest.mark.parametrize("stride", [0, 1, 7])
def test_stride_of_an_axis_of_length_one_means_nothing(backend, stride):
    # numpy gives a new axis the stride 0
    weight = torch.arange(24.0).as_strided((8, 1, 3), (3, stride, 1))
    incoming, reader = nn.Conv1d(2, 1, 1), nn.Conv1d(1, 8, 3)
    reader.weight = nn.Parameter(weight)
    options = {"replacement_rate": 0.0, "decay_rate": 0.0, "backend": backend}
    cbp = ContinualBackprop(nn.Sequential(incoming, reader), groups=[UnitGroup("g", [incoming], [reader])], **options)
    cbp._engine.record(0, torch.ones(1, 1, 5))
    cbp.step()
    assert cbp.utility["g"].item() == 23 * 24 / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("step", [1, 2], ids=["dense", "every other"])
def test_every_number_of_16_bits_is_read_right(every_isa, dtype, step):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    h = values.repeat_interleave(step)[::step]
    model = nn.Sequential(nn.Linear(1, len(h)), nn.Linear(len(h), 1))
    cbp = ContinualBackprop(model, backend="cpp", capture="inline")
    state = cbp._engine.state

    def read():
        cbp._engine.forget_forwards()
        cbp._engine.record(0, h)
        return state.activation.clone()

    for name, sums in every_isa(read).items():
        torch.testing.assert_close(sums, values.double().abs(), rtol=0, atol=0, equal_nan=True, msg=name)


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


# memory


def two_wide_layers(backend, width, rate):
    """A model that has done one step and is about to do another."""
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    options = {"replacement_rate": 0.0, "maturity_threshold": 1, "capture": "deferred", "backend": backend}
    cbp = ContinualBackprop(model, rule=Rule.gnt("adaptable_contribution", transfer_bias=True), **options)
    h = torch.randn(256, width)
    cbp._engine.record(0, h)
    cbp.step()
    cbp.replacement_rate = rate
    cbp._engine.record(0, h)
    return cbp


def allocated(cbp):
    """Bytes that the profiler sees PyTorch allocate in a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        cbp.step()
    return sum(max(0, event.self_cpu_memory_usage) for event in record.events())


@pytest.mark.parametrize(("rate", "replaced"), [(0.0, 0), (0.01, 5)])
def test_a_compiled_step_allocates_no_tensors(rate, replaced):
    cbp = two_wide_layers("cpp", 512, rate)
    assert allocated(cbp) < 1024
    assert len(cbp.last_replaced["0"]) == replaced
    # the profiler does see what the reference allocates: one weight has a million bytes
    assert allocated(two_wide_layers("reference", 512, rate)) > 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how much memory is in use")
def test_a_compiled_step_runs_where_room_for_an_eighth_of_a_weight_is_left():
    # 64 MiB a weight: more than malloc keeps for later
    cbp = two_wide_layers("cpp", 4096, 0.001)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**23, before[1]))
    try:
        cbp.step()
        with pytest.raises(RuntimeError, match="alloc"):
            torch.empty(2**26, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert len(cbp.last_replaced["0"]) == 4


@pytest.mark.parametrize("rule", RULES)
def test_a_step_in_two_halves_is_the_step(rule, backend, everything):
    results = []
    for halves in ("", "whole", "split"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
        options = {"replacement_rate": 0.2, "maturity_threshold": 2, "backend": backend, "seed": 3}
        cbp = ContinualBackprop(model, rule=RULES[rule], **options)
        engine = cbp._engine
        for _ in range(8):
            model(torch.randn(7, 12))
            if not halves:
                cbp.step()
                continue
            slots, held = engine._intact()
            weights = [ref.get() for ref in engine.state.weights]
            # where they are split their sums belong to the first half
            first, second = (weights, []) if halves == "split" else ([], weights)
            engine._functions.sum_(engine.state, first, held, slots)
            assert engine._functions.choose_(engine.state, second) == int(engine.state.num_chosen.sum())
            engine.reinit(*engine.collect([]))
            engine.finish()
        assert sum(cbp.num_replaced.values()) > 4
        results.append(everything(model, cbp))
    assert results[0] == results[1] == results[2]


# the operators themselves


@pytest.fixture
def operators():
    engine = Chain("cpp", 5, 4).engine
    return engine.state, [ref.get().detach() for ref in engine.state.weights]


def test_capture_is_a_well_made_operator(operators):
    state, _ = operators
    torch.library.opcheck(torch.ops.cbp_fast.capture_.default, (state.buffer, state.plan, torch.randn(3, 5), 0))


ops = _C
BAD_CALLS = {
    "short plan": lambda s, w: ops.select_(s.buffer, s.plan[:-1], w, [], []),
    "empty plan": lambda s, w: ops.select_(s.buffer, s.plan[:0], w, [], []),
    "plan of another type": lambda s, w: ops.select_(s.buffer, s.plan.int(), w, [], []),
    "plan with gaps": lambda s, w: ops.select_(s.buffer, s.plan.repeat_interleave(2)[::2], w, [], []),
    "short buffer": lambda s, w: ops.select_(s.buffer[:-1], s.plan, w, [], []),
    "buffer of another type": lambda s, w: ops.select_(s.buffer.char(), s.plan, w, [], []),
    "short copy": lambda s, w: ops.copy_(s.backup[:-1], s.buffer),
    "copy of another type": lambda s, w: ops.copy_(s.buffer, s.backup.char()),
    "too few weights": lambda s, w: ops.select_(s.buffer, s.plan, w[:-1], [], []),
    "weight of another shape": lambda s, w: ops.select_(s.buffer, s.plan, [w[0][:-1], *w[1:]], [], []),
    "weight of another rank": lambda s, w: ops.select_(s.buffer, s.plan, [w[0][None], *w[1:]], [], []),
    "weight of another type": lambda s, w: ops.select_(s.buffer, s.plan, [w[0].double(), *w[1:]], [], []),
    "h without its slot": lambda s, w: ops.select_(s.buffer, s.plan, w, [torch.ones(1, 5)], []),
    "h of another width": lambda s, w: ops.select_(s.buffer, s.plan, w, [torch.ones(1, 6)], [0]),
    "h of another type": lambda s, w: ops.select_(s.buffer, s.plan, w, [torch.ones(1, 5).int()], [0]),
    "h without axes": lambda s, w: ops.capture_(s.buffer, s.plan, torch.ones(()), 0),
    "slot beyond": lambda s, w: ops.capture_(s.buffer, s.plan, torch.ones(1, 5), 2),
    "slot before": lambda s, w: ops.select_(s.buffer, s.plan, w, [torch.ones(1, 5)], [-1]),
    "short sums": lambda s, w: ops.sum_(s.buffer, s.plan, s.flat[:-1], w, [], []),
    "sums of another type": lambda s, w: ops.choose_(s.buffer, s.plan, s.flat.float(), w),
    "sums with gaps": lambda s, w: ops.choose_(s.buffer, s.plan, s.flat.repeat_interleave(2)[::2], w),
    "no weights": lambda s, w: ops.select_(s.buffer, s.plan, [], [], []),
    "too few weights to choose": lambda s, w: ops.choose_(s.buffer, s.plan, s.flat, w[:-1]),
    "too few weights to sum": lambda s, w: ops.sum_(s.buffer, s.plan, s.flat, w[:-1], [], []),
    "region beyond": lambda s, w: ops.reinit_(s.buffer, s.plan, [w[0]], [2 * len(s.regions)]),
    "region before": lambda s, w: ops.reinit_(s.buffer, s.plan, [w[0]], [-1]),
    "too few tensors": lambda s, w: ops.reinit_(s.buffer, s.plan, [], [0]),
    "region beyond, checked": lambda s, w: ops.check_reinit(s.buffer, s.plan, [w[0]], [2 * len(s.regions)]),
    "too many tensors": lambda s, w: ops.reinit_(s.buffer, s.plan, [w[0], w[0]], [0]),
    "another tensor": lambda s, w: ops.reinit_(s.buffer, s.plan, [w[1]], [0]),
    "tensor of another type": lambda s, w: ops.reinit_(s.buffer, s.plan, [w[0].int()], [0]),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_an_operator_refuses_what_would_lead_it_astray(operators, call):
    state, weights = operators
    before = state.buffer.clone(), [w.clone() for w in weights]
    with pytest.raises(RuntimeError, match="cbp_fast: "):
        call(state, weights)
    assert torch.equal(state.buffer, before[0])
    assert all(map(torch.equal, weights, before[1]))


WRONG_KINDS = {
    "too few arguments": (lambda s, w: ops.select_(s.buffer, s.plan), "takes 5 arguments, not 2"),
    "an array": (lambda s, w: ops.capture_(s.buffer, s.plan, np.ones((1, 5)), 0), "numpy.ndarray stands for a torch"),
    "nothing": (lambda s, w: ops.select_(s.buffer, s.plan, [None, *w[1:]], [], []), "NoneType stands for a"),
    "a tuple": (lambda s, w: ops.select_(s.buffer, s.plan, tuple(w), [], []), "tuple stands for a list"),
    "a name": (lambda s, w: ops.capture_(s.buffer, s.plan, torch.ones(1, 5), "0"), "'str' object cannot be"),
}


@pytest.mark.parametrize(("call", "message"), WRONG_KINDS.values(), ids=WRONG_KINDS.keys())
def test_a_compiled_function_refuses_arguments_of_a_wrong_kind(operators, call, message):
    state, weights = operators
    before = state.buffer.clone()
    with pytest.raises(TypeError, match=message):
        call(state, weights)
    assert torch.equal(state.buffer, before)


def test_a_compiled_function_says_what_pytorch_does_not_show(operators):
    state, weights = operators
    for odd, error in (
        (torch.ones(1, 5, device="meta"), "meta"),
        (torch.ones(1, 5).to_sparse(), "storage|Sparse|strides"),
        (torch._efficientzerotensor((1, 5)), "no memory"),
    ):
        with pytest.raises((RuntimeError, BufferError), match=error):
            ops.select_(state.buffer, state.plan, weights, [odd], [0])
    assert not state.buffer[state.offsets[4] :].any()


def test_bytes_are_of_memory_on_the_cpu():
    assert _C.nbytes(torch.ones(3, 5)) == 60
    assert _C.nbytes(torch.ones(3, 5, dtype=torch.bfloat16)[::2, :3]) == 12
    assert _C.nbytes(torch.ones(())) == 4
    assert _C.nbytes(torch.ones(0, 5)) == 0
    for nowhere in (torch.ones(3, device="meta"), torch.ones(3).to_sparse(), None, "h"):
        assert _C.nbytes(nowhere) == -1
    torch.func.vmap(lambda h: [h, assert_nowhere(h)][0])(torch.ones(3, 5))
    torch.func.grad(lambda h: [h.sum(), assert_nowhere(h)][0])(torch.ones(5))


def assert_nowhere(h):
    assert _C.nbytes(h) == -1


@pytest.mark.parametrize("name", ["v5", "", "BASELINE"])
def test_an_unknown_instruction_set_is_refused(name):
    before = _C.get_isa()
    with pytest.raises(ValueError, match=f"'{name}'"):
        _C.set_isa(name)
    assert _C.get_isa() == before


def test_a_negative_number_of_draws_is_refused():
    with pytest.raises(ValueError, match="negative"):
        _C.philox_uniform(0, 0, 0, 0, -1)
