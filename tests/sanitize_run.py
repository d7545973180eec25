"""Some hundred steps of the compiled backend on shapes, types and memory layouts at random; run by make sanitize.

A plain script, so that nothing but the kernels is slow under the sanitizers. Results must be the reference's.
"""

import random

import torch
from torch import nn

from cbp_fast import _C, ContinualBackprop, Rule, UnitGroup
from cbp_fast.groups.resolving import resolve
from cbp_fast.step.engine import Engine

GROUPS = 1000
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
RULES = [
    Rule.nature(),
    Rule.nature(init="normal", transfer_bias=True),
    Rule.clarena(),
    *(Rule.gnt(utility) for utility in Rule.UTILITIES),
    Rule.gnt(accrual="all"),
    Rule.gnt("zero_contribution", accumulate=False, transfer_bias=True),
]
FIELDS = ("step", "pending", "num_replaced", "count", "running_mean", "utility", "age", "num_chosen")


def strewn(rng, values):
    """The same values anywhere in memory that ends right behind the last of them."""
    strides, length = [0] * values.dim(), 1
    for axis in rng.sample(range(values.dim()), values.dim()):
        # an axis of length 1 may have any stride
        strides[axis] = rng.choice((0, 1, 9)) if values.shape[axis] == 1 else length * rng.choice((1, 1, 2))
        length = max(length, strides[axis] * (values.shape[axis] - 1) + length)
    offset = rng.choice((0, 1, 5))
    end = offset + sum(stride * (size - 1) for stride, size in zip(strides, values.shape, strict=True)) + 1
    return torch.empty(end, dtype=values.dtype).as_strided(values.shape, strides, offset).copy_(values)


class Shape:
    """A unit group at random: sizes, types, rule, numbers of layers and of steps."""

    def __init__(self, rng):
        self.spatial = rng.choice((0, 0, 0, 1, 2, 3))
        self.flattened = self.spatial > 0 and rng.random() < 0.4
        self.rule = rng.choice([rule for rule in RULES if self.spatial == 0 or rule.name != "clarena"])
        self.units, self.fan_in, self.fan_out = (rng.choice((1, 2, 3, 8, 15, 16, 17, 33)) for _ in range(3))
        if rng.random() < 0.05 and self.spatial == 0:
            self.fan_in, self.fan_out = rng.choice((1025, 2049)), rng.choice((1, 511, 513))
        self.columns = rng.choice((1, 2, 4)) if self.flattened else 1
        self.kernel = [rng.choice((1, 2, 3)) for _ in range(self.spatial)]
        divides = [g for g in (1, 2, 4) if self.units % g == self.fan_out % g == 0 and not g == self.units > 1]
        self.conv_groups = rng.choice(divides) if self.spatial and not self.flattened else 1
        self.producers, self.readers = rng.choice((1, 1, 2)), rng.choice((1, 1, 2))
        self.dtype, self.activations = rng.choice(DTYPES), rng.choice(DTYPES)
        axes = 0 if self.flattened else self.spatial
        # powers of two, by which whole numbers are divided without rounding, and not too many of them: the sums of
        # distances from such a mean fit float32
        self.positions = [rng.choice((1, 2, 4, 8)) for _ in range(axes)]
        axes = rng.choice((0, 1)) if axes else rng.choice((0, 1, 2))
        self.batch = [rng.choice((1, 2, 4, 16, 0)) for _ in range(axes)]
        self.capture = rng.choice(("inline", "deferred"))
        self.halves = self.units % 3
        self.hyper = {
            "replacement_rate": rng.choice((0.0, 0.1, 0.5, 1.0)),
            "maturity_threshold": rng.choice((0, 1)),
            # so that two libraries' 1 - decay ** age cannot differ
            "decay_rate": 0.0 if self.rule.keeps_mean else rng.choice((0.0, 0.9)),
        }

    def engine(self, backend):
        width = self.units * self.columns
        kind, reader_kind = LAYERS[self.spatial], LAYERS[0 if self.flattened else self.spatial]
        kernel = [self.kernel] if self.spatial else []
        reader_options = {"groups": self.conv_groups} if reader_kind is not nn.Linear else {}
        reader_kernel = kernel if reader_kind is not nn.Linear else []
        producers = [kind(self.fan_in, self.units, *kernel) for _ in range(self.producers)]
        readers = [reader_kind(width, self.fan_out, *reader_kernel, **reader_options) for _ in range(self.readers)]
        norms = [] if self.rule.name == "clarena" else [nn.LayerNorm(width)]
        model = nn.ModuleList([*producers, *readers, *norms]).to(self.dtype)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        group = resolve(model, UnitGroup("g", producers, readers, norms))
        options = {"backend": backend, "capture": self.capture, "seed": 2**64 - 1, **self.hyper}
        return model, optimizer, lambda: Engine(self.rule, [group], **options)


def whole(generator, shape):
    return torch.randint(-4, 5, tuple(shape), generator=generator)


def select(engine, halves):
    """A step up to the choice; in the two halves that several processes do it in, or at once."""
    if not halves:
        return engine.select()
    weights = [ref.get() for ref in engine.state.weights]
    slots, held = engine._intact()
    first, second = (weights, []) if halves == 1 else ([], weights)
    engine._functions.sum_(engine.state, first, held, slots)
    return engine._functions.choose_(engine.state, second)


def run_group(rng, steps):
    shape, seed = Shape(rng), rng.randrange(2**31)
    ends = []
    for backend in ("cpp", "reference"):
        generator = torch.Generator().manual_seed(seed)
        model, optimizer, make = shape.engine(backend)
        for p in model.parameters():
            slot = torch.empty_like(p)
            if backend == "cpp":
                p.data, slot = strewn(rng, p.data), strewn(rng, slot)
            optimizer.state[p]["momentum_buffer"] = slot
        engine = make()
        history = []
        for _ in range(steps):
            for p in model.parameters():
                p.data.copy_(whole(generator, p.shape))
                optimizer.state[p]["momentum_buffer"].copy_(whole(generator, p.shape))
            for slot in range(shape.readers):
                h = whole(generator, (*shape.batch, shape.units * shape.columns, *shape.positions))
                h = h.to(shape.activations)
                engine.record(slot, strewn(rng, h) if backend == "cpp" and h.numel() else h)
            if select(engine, shape.halves if backend == "cpp" else 0):
                engine.reinit(*engine.collect([optimizer]))
            engine.finish()
            (chosen,) = engine.state.num_chosen.tolist()
            state = [getattr(engine.state, name).clone() for name in FIELDS] + [engine.state.chosen[:chosen].clone()]
            slots = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
            history.append((state + slots, [p.detach().clone() for p in model.parameters()]))
        ends.append(history)
    for (mine, weights), (expected, expected_weights) in zip(*ends, strict=True):
        assert all(map(torch.equal, mine, expected)), vars(shape)
        # two libraries' sines differ in the last place, before one rounding to the weights' type
        close = {"rtol": 2.0**-7, "atol": 1e-6} if shape.rule.init == "normal" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(weights, expected_weights, **close)
    return steps


def cnn():
    layers = [nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(12, 16, 3, groups=2), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 4)), (8, 2, 8, 8)


def mlp():
    layers = [nn.Linear(40, 420), nn.LayerNorm(420), nn.ReLU(), nn.Linear(420, 350), nn.Tanh(), nn.Linear(350, 4)]
    return nn.Sequential(*layers), (380, 40)


def run_training(make, rule, dtype, steps):
    ends = []
    for backend in ("cpp", "reference"):
        torch.manual_seed(0)
        model, shape = make()
        model = model.to(dtype)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        options = {"replacement_rate": 0.02, "maturity_threshold": 2, "backend": backend}
        cbp = ContinualBackprop(model, optimizer, rule=rule, **options)
        replaced = []
        for _ in range(steps):
            loss = (model(torch.randn(shape).to(dtype)) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            replaced += [units.tolist() for units in cbp.last_replaced.values()]
        ends.append((replaced, [p.detach() for p in model.parameters()]))
    assert ends[0][0] == ends[1][0]
    assert all(map(torch.equal, ends[0][1], ends[1][1]))
    return steps


def main():
    rng, steps, levels = random.Random(0), 0, _C.isa_levels()
    # more than 2 ** 17 elements are shared between threads
    for threads, level in zip((1, 2, 2), (levels[0], levels[-1], levels[0]), strict=True):
        torch.set_num_threads(threads)
        _C.set_isa(level)
        steps += run_training(mlp, Rule.gnt("adaptable_contribution"), torch.float64, 6)
    for rule, dtype in ((Rule.nature(), torch.float32), (Rule.gnt("feature_by_input"), torch.float64)):
        steps += run_training(cnn, rule, dtype, 30)
    for group in range(GROUPS):
        _C.set_isa(levels[group % len(levels)])
        torch.set_num_threads(1 + group % 2)
        steps += run_group(rng, 3)
        drawn = _C.philox_uniform(rng.randrange(2**64), 1, 2, rng.randrange(2**60), rng.randrange(100))
        assert all(0 <= r < 1 for r in drawn)
    print(f"{steps} steps on {GROUPS} groups and 5 networks: what the reference does, on {', '.join(levels)}")


if __name__ == "__main__":
    main()
