"""Unit groups of any shape, type and place in memory, and one step of theirs on a backend and on the reference."""

import math
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import torch
from torch import nn

from cbp_fast import ContinualBackprop, Rule, UnitGroup
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
