"""The Triton backend in Triton's interpreter (see conftest.py), against the reference and the compiled backend."""

import contextlib
import itertools
import math
import random
import re
import threading
import time

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from test_kernels import RULES, cases, check_step_on_whole_numbers, gamma
from torch import nn
from triton.runtime import interpreter

from cbp_fast import ContinualBackprop, Part, Rule, UnitGroup
from cbp_fast.backends.registry import backend_for
from cbp_fast.backends.triton import backend as triton_backend
from cbp_fast.backends.triton import kernels as triton_kernels
from cbp_fast.step import engine

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


pytestmark = pytest.mark.usefixtures("interpreter")


def check_on_triton(case):
    check_step_on_whole_numbers(case, "triton")


test_step_on_whole_numbers = settings(max_examples=15)(given(cases(powers_of_two=True))(check_on_triton))
test_many_steps_on_whole_numbers = pytest.mark.slow(
    settings(max_examples=200)(given(cases(powers_of_two=True))(check_on_triton))
)


def mlp(widths, dtypes=(torch.float32,), seed=0):
    """Linear layers and ReLUs, each layer of the next type in turn."""
    torch.manual_seed(seed)

    class Cast(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def forward(self, x):
            return x.to(self.dtype)

    layers = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        dtype = dtypes[i % len(dtypes)]
        layers += [nn.Linear(fan_in, fan_out, dtype=dtype), nn.ReLU()]
        if len(dtypes) > 1:
            layers.append(Cast(dtypes[(i + 1) % len(dtypes)]))
    return nn.Sequential(*layers)


def linear_groups(model):
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    return [UnitGroup(f"g{i}", [a], [b]) for i, (a, b) in enumerate(itertools.pairwise(layers))]


def attach(model, backend, *, optimizer=None, **options):
    options = {"replacement_rate": 0.2, "maturity_threshold": 1, "seed": 7, **options}
    return ContinualBackprop(model, optimizer, backend=backend, **options)


def train(backend, rule, widths=(9, 17, 12, 3), steps=3, dyadic=False, dtypes=(torch.float32,), **options):
    """A short training run; all that it leaves and chose. Dyadic: every step on new whole numbers, no learning."""
    model = mlp(widths, dtypes)
    optimizer = torch.optim.SGD(model.parameters(), 0.0 if dyadic else 0.05, momentum=0.5)
    options.setdefault("groups", linear_groups(model))
    cbp = attach(model, backend, optimizer=optimizer, rule=rule, **options)
    generator = torch.Generator().manual_seed(1)
    chosen = []
    for _ in range(steps):
        shape = (8, widths[0])
        x = torch.randint(-2, 3, shape, generator=generator) if dyadic else torch.randn(shape, generator=generator)
        for p in model.parameters() if dyadic else ():
            p.data.copy_(torch.randint(-2, 3, p.shape, generator=generator))
        optimizer.zero_grad()
        model(x.to(dtypes[0])).float().square().mean().backward()
        optimizer.step()
        chosen.append({name: units.tolist() for name, units in cbp.last_replaced.items()})
    return model, optimizer, cbp, chosen


def assert_same_run(mine, theirs, rtol=0.0):
    (a, a_optimizer, a_cbp, a_chosen), (b, b_optimizer, b_cbp, b_chosen) = mine, theirs
    assert a_chosen == b_chosen
    # a bias is given sums of means where units are transferred
    moved = 2.0**-20 if a_cbp.rule.transfer_bias else 0.0
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=moved * name.endswith("bias"))
        assert torch.equal(a_optimizer.state[p]["momentum_buffer"], b_optimizer.state[q]["momentum_buffer"]), name
    for name, utility in a_cbp.utility.items():
        torch.testing.assert_close(utility, b_cbp.utility[name], rtol=rtol, atol=0)
        assert torch.equal(a_cbp.age[name], b_cbp.age[name])
    for field in ("step", "num_replaced", "count"):
        assert torch.equal(getattr(a_cbp._engine.state, field), getattr(b_cbp._engine.state, field)), field


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


def engine_of(groups, rule=None, **options):
    members = [m.layer if isinstance(m, Part) else m for group in groups for role in group for m in role]
    model = nn.ModuleList(dict.fromkeys(members))
    units = [UnitGroup(f"g{i}", *group) for i, group in enumerate(groups)]
    options = {"replacement_rate": 0.5, "maturity_threshold": 0, "seed": 3, **options}
    return ContinualBackprop(model, rule=rule or Rule.nature(), groups=units, **options)


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


def test_sums_that_are_split_among_programs():
    """A long sum is divided; whoever comes last puts the parts together, in their order."""
    for shape in ((600, 40), (3, 50, 7, 40), (2, 40, 9, 301)):
        spatial = len(shape) == 4 and shape[1] == 40
        results = []
        for backend in ("triton", "reference"):
            torch.manual_seed(0)
            reader = nn.Conv2d(40, 2, 1) if spatial else nn.Linear(40, 2)
            with torch.no_grad():
                reader.weight.copy_(torch.randint(-4, 5, reader.weight.shape))
            producer = nn.Conv2d(1, 40, 1) if spatial else nn.Linear(1, 40)
            cbp = engine_of([([producer], [reader])], backend=backend, replacement_rate=0.0)
            h = torch.randint(-4, 5, shape).float()
            cbp._engine.record(0, h)
            # two more, of another type and with a stride between samples
            cbp._engine.record(0, h[::2].half())
            cbp.step()
            results.append(cbp.utility["g0"])
        assert torch.equal(*results)


class Interleaved:
    """Runs the programs of a launch as threads, one at a time, with a change at random loads, stores and atomics.

    In the place of Triton's `GridExecutor`. Without changes, it runs whole programs in a random order.
    """

    def __init__(self, rng, change):
        self.rng, self.change = rng, change

    def launch(self, kernel, grid, args, meta):
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(*grid, 1, 1)
        plain = {
            name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
        }
        patched = interpreter._patch_lang(kernel.fn)
        values = {name: interpreter._implicit_cvt(arg) for name, arg in zip(kernel.arg_names, args, strict=False)}
        for name, function in plain.items():
            setattr(builder, name, self.interrupted(function))
        self.turns = [threading.Semaphore(0) for _ in range(grid[0])]
        self.waiting, self.failed, self.over = list(range(grid[0])), [], threading.Semaphore(0)
        threads = [threading.Thread(target=self.run, args=(i, kernel.fn, {**values, **meta})) for i in self.waiting]
        try:
            for thread in threads:
                thread.start()
            self.resume()
            self.over.acquire()
            for thread in threads:
                thread.join()
        finally:
            for name in plain:
                delattr(builder, name)
            patched.restore()
        if self.failed:
            raise self.failed[0]

    def resume(self):
        if not self.waiting:
            self.over.release()
            return
        self.running = self.waiting.pop(self.rng.randrange(len(self.waiting)))
        interpreter.interpreter_builder.grid_idx = (self.running, 0, 0)
        self.turns[self.running].release()

    def run(self, i, function, arguments):
        self.turns[i].acquire()
        try:
            with np.errstate(all="ignore"):
                function(**arguments)
        except Exception as error:
            self.failed.append(error)
        self.resume()

    def interrupted(self, function):
        def call(*args):
            if self.rng.random() < self.change:
                me = self.running
                self.waiting.append(me)
                self.resume()
                self.turns[me].acquire()
            return function(*args)

        return call


@pytest.mark.parametrize("change", [pytest.param(0.0, marks=pytest.mark.slow), 0.3], ids=["shuffled", "interleaved"])
def test_any_order_of_programs_gives_the_same_bits(change, monkeypatch):
    """Sums that round, several groups, splits: partial sums are combined in one order, whoever comes last."""

    def run():
        torch.manual_seed(0)
        layers = [nn.Linear(5, 140), nn.Linear(140, 30), nn.Linear(30, 300)]
        groups = [([layers[0]], [layers[1]]), ([layers[1]], [layers[2]])]
        cbp = engine_of(groups, backend="triton", replacement_rate=0.04)
        cbp._engine.record(0, torch.randn(300, 140))
        cbp._engine.record(1, torch.randn(3, 30, dtype=torch.float64))
        cbp.step()
        return [
            *cbp.utility.values(),
            *cbp.last_replaced.values(),
            *(p for layer in layers for p in layer.parameters()),
        ]

    expected = run()
    for seed in range(3):
        monkeypatch.setattr(triton_kernels, "launch", Interleaved(random.Random(seed), change).launch)
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["nature", "weight", "clarena"])
def test_the_halves_of_a_step_in_several_processes(rule, monkeypatch):
    """A slot seen twice, and with samples along more axes than a sum has: no two programs may add to one column."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        layers = [nn.Linear(40, 5), nn.Linear(5, 40), nn.Linear(40, 2)]
        for layer in layers:
            layer.weight.data = torch.randint(-4, 5, layer.weight.shape).float()
        groups = [([layers[0]], [layers[1]]), ([layers[1]], [layers[2]])]
        cbp = engine_of(groups, RULES[rule], backend=backend, replacement_rate=0.3)
        engine = cbp._engine
        # no two axes of the first one are neighbours in memory
        h = torch.randint(-4, 5, (2, 3, 2, 2, 3, 5)).float().permute(3, 1, 4, 0, 2, 5)[..., ::2, :]
        held = [h, torch.randint(-4, 5, (300, 40)).float(), h.half()]
        weights = [ref.get().detach() for ref in engine.state.weights]
        with monkeypatch.context() as patch:
            patch.setattr(triton_kernels, "launch", Interleaved(random.Random(0), 0.3).launch)
            engine._functions.sum_(engine.state, [], held, [0, 1, 0])
            chosen = engine._functions.choose_(engine.state, weights)
        results.append([engine.state.utility, engine.state.age, *cbp.last_replaced.values(), engine.state.count])
        assert chosen == (1 if rule == "clarena" else 13)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_an_aborted_launch_does_not_poison_the_next(monkeypatch):
    results = []
    for abort in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(5, 140), nn.Linear(140, 300)]
        cbp = engine_of([([layers[0]], [layers[1]])], backend="triton", replacement_rate=0.04)
        cbp._engine.record(0, torch.randn(400, 140))
        # half a launch is possible in an interpreter only
        cbp._engine.keep()
        if abort:
            stopped = triton_kernels.launch

            def launch(kernel, grid, args, meta, stopped=stopped):
                stopped(kernel, (grid[0] // 2,), args, meta)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(triton_kernels, "launch", launch)
                with pytest.raises(KeyboardInterrupt):
                    cbp.step()
            cbp._engine.restore()
        cbp.step()
        results.append((cbp.utility["g0"], cbp.last_replaced["g0"]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_step_takes_two_launches(monkeypatch):
    launched = []
    plain = triton_kernels.launch

    def launch(kernel, *args):
        launched.append(kernel.fn.__name__)
        plain(kernel, *args)

    monkeypatch.setattr(triton_kernels, "launch", launch)
    train("triton", Rule.nature(), (4, 5, 6, 7, 2), 2, replacement_rate=1.0, maturity_threshold=0)
    assert launched == ["select", "reinit"] * 2


@pytest.mark.parametrize(
    ("rule", "kernels"),
    [
        ("clarena", ["select", "score", "reinit"]),
        ("random", ["score", "reinit"]),
        ("zero_contribution", ["capture", "hat", "capture", "select", "reinit"]),
        ("nature transfer", ["capture", "capture", "select", "transfer", "reinit"]),
    ],
)
def test_launches_of_other_rules(rule, kernels, monkeypatch):
    launched = []
    plain = triton_kernels.launch
    monkeypatch.setattr(
        triton_kernels, "launch", lambda kernel, *args: launched.append(kernel.fn.__name__) or plain(kernel, *args)
    )
    train("triton", RULES[rule], (6, 6, 6, 2), 1, replacement_rate=1.0, maturity_threshold=0, capture="deferred")
    assert launched == kernels


def test_tables_are_built_once_and_addresses_followed():
    """New activations of the same shape, and a re-assigned weight, take new addresses and no new tables."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Linear(6, 3)]
    cbp = engine_of([([layers[0]], [layers[1]])], backend="triton", replacement_rate=0.0, decay_rate=0.0)
    expected = []
    for _ in range(3):
        h = torch.randint(-3, 4, (5, 6)).float()
        layers[1].weight = nn.Parameter(torch.randint(-3, 4, (3, 6)).float())
        cbp._engine.record(0, h)
        cbp.step()
        expected.append(h.abs().mean(0) * layers[1].weight.abs().sum(0))
        torch.testing.assert_close(cbp.utility["g0"], expected[-1], rtol=1e-6, atol=0)
    (plan,) = triton_backend._tables_of(cbp._engine.state).plans.values()
    assert plan.programs == 2


def count_tables(monkeypatch):
    made = []
    plain = triton_backend.upload
    monkeypatch.setattr(triton_backend, "upload", lambda *args: made.append(1) or plain(*args))
    return made


@pytest.mark.parametrize("readers", [3, 24])
def test_tables_of_readers_that_are_captured_inline_are_kept(readers, monkeypatch):
    """However many there are, with the shapes of a few batches in turn."""
    layers = [nn.Linear(2, 2) for _ in range(readers + 1)]
    groups = [([a], [b]) for a, b in itertools.pairwise(layers)]
    cbp = engine_of(groups, backend="triton", capture="inline", replacement_rate=0.0)

    def forward(samples):
        for i in range(readers):
            cbp._engine.record(i, torch.ones(samples, 2))

    for samples in (1, 2, 3):
        forward(samples)
    made = count_tables(monkeypatch)
    for samples in (3, 1, 2, 1):
        forward(samples)
    assert not made
    forward(4)
    assert made


def test_tables_that_were_not_used_for_long_are_forgotten(monkeypatch):
    cbp = engine_of([([nn.Linear(2, 2)], [nn.Linear(2, 2)])], backend="triton", capture="inline")
    for samples in range(1, triton_backend._KEPT + 3):
        cbp._engine.record(0, torch.ones(samples, 2))
        cbp._engine.record(0, torch.ones(1, 2))
    made = count_tables(monkeypatch)
    cbp._engine.record(0, torch.ones(1, 2))
    cbp._engine.record(0, torch.ones(triton_backend._KEPT + 2, 2))
    assert not made
    cbp._engine.record(0, torch.ones(2, 2))
    assert made


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"serves CPU tensors only in Triton's interpreter \(TRITON_INTERPRET=1\)"):
        attach(mlp((4, 5, 2)), "triton")


def test_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr("cbp_fast.backends.registry.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="backend 'triton' needs Triton: pip install triton"):
        attach(mlp((4, 5, 2)), "triton")


def test_the_interpreter_serves_no_gpu():
    device = torch.device("cuda")
    assert backend_for(device, None, Rule.nature()) == "reference"
    with pytest.raises(ValueError, match=r"cannot reach a GPU's memory from Triton's interpreter \(unset TRITON_INT"):
        backend_for(device, "triton", Rule.nature())


@pytest.mark.parametrize("version", ["3.5.1", "2.3.0+git1a2b", "3.2.0.post11"])
def test_an_old_triton_is_refused_before_it_is_used(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr("cbp_fast.backends.registry._module_of", None)
    assert backend_for(torch.device("cuda"), None, Rule.nature()) == "reference"
    with pytest.raises(ValueError, match=rf"must be 3.6 or newer and is {re.escape(version)} \(pip install \"triton>="):
        backend_for(torch.device("cpu"), "triton", Rule.nature())


@pytest.mark.parametrize("version", ["3.6.0+git9844da95", "3.7.1.post25", "3.9.2"])
def test_a_covered_triton_is_used_without_a_word(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    assert backend_for(torch.device("cpu"), "triton", Rule.nature()) == "triton"


@pytest.mark.parametrize("version", ["3.10.0", "4.0.0", "unknown"])
def test_another_triton_is_used_with_one_warning(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.warns(UserWarning, match=f"Triton {version} is none of those that the tests cover \\(3.6 to 3.9\\)"):
        assert backend_for(torch.device("cpu"), "triton", Rule.nature()) == "triton"
    assert backend_for(torch.device("cpu"), "triton", Rule.nature()) == "triton"


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
    tl.store(out + i, triton_kernels._bias_correction(tl.load(ages + i), tl.load(log_decay)))


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.99999, 1 - 2.0**-40])
def test_bias_correction_is_precise(decay):
    """1 - decay^age in double, also where float32 would be off by a thousandth."""
    ages = [0, 1, 2, 3, 10, 49, 50, 51, 68, 69, 100, 34657, 50000, 69314, 10**6, 2**31 - 1]
    out = torch.empty(16, dtype=torch.float64)
    log_decay = torch.tensor([math.log(decay)], dtype=torch.float64)
    corrections[(1,)](torch.tensor(ages, dtype=torch.int32), log_decay, out)
    expected = [-math.expm1(age * math.log(decay)) for age in ages]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=4 * 2.0**-52, atol=0)


def test_addresses_are_sent_on_the_device_of_the_launch(monkeypatch):
    """Events and copies are of the current device, as launches are."""
    inside = []

    class Device:
        def __enter__(self):
            inside.append(1)

        def __exit__(self, *error):
            inside.pop()

    sent, launched = [], []
    send, launch = triton_backend._Sender.send, triton_kernels.launch
    monkeypatch.setattr(triton_backend._Tables, "on_device", lambda tables: Device())
    monkeypatch.setattr(triton_backend._Sender, "send", lambda *args: sent.append(bool(inside)) or send(*args))
    monkeypatch.setattr(triton_kernels, "launch", lambda *args: launched.append(bool(inside)) or launch(*args))
    for rule, capture in (("nature", "deferred"), ("mean transfer", "inline")):
        rule = RULES.get(rule, Rule.gnt("zero_contribution", transfer_bias=True))
        train("triton", rule, (4, 5, 6, 2), 2, replacement_rate=1.0, maturity_threshold=0, capture=capture)
    assert sent
    assert launched
    assert all(sent + launched)


@pytest.fixture
def with_stream(monkeypatch):
    """A group whose activations were seen on one stream; call it with that and the step's."""

    def step(seen, here):
        cbp = engine_of([([nn.Linear(2, 4)], [nn.Linear(4, 2)])], backend="triton")
        cbp._engine.record(0, torch.ones(3, 4))
        cbp._engine._streams = {engine.Stream(*seen)}
        monkeypatch.setattr(engine, "stream_of", lambda device: engine.Stream(*here))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
        kept = []
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda h, stream: kept.append(stream))
        cbp.step()
        assert cbp.age["g0"].sum() <= 4
        return kept

    return step


def test_activations_of_another_stream_are_kept_for_this_one(with_stream):
    assert with_stream((1, False), (2, False)) == [(2, False)]
    assert with_stream((1, False), (1, False)) == []
    # the whole step is captured
    assert with_stream((1, True), (1, True)) == []


def test_a_graph_of_the_forward_alone_is_an_error(with_stream):
    with pytest.raises(RuntimeError, match=r"captured in a CUDA graph, and the step .* was not.*capture='inline'"):
        with_stream((1, True), (1, False))


@pytest.mark.parametrize("capture", ["deferred", "inline"])
def test_a_graph_is_captured_before_the_first_step(capture, monkeypatch):
    cbp = engine_of([([nn.Linear(2, 4)], [nn.Linear(4, 2)])], backend="triton", capture=capture)

    def step():
        cbp._engine.record(0, torch.ones(3, 4))
        cbp.step()

    with monkeypatch.context() as patch:
        patch.setattr(triton_backend, "is_capturing", lambda device: True)
        with pytest.raises(
            RuntimeError, match="run a step with inputs of the same shape before each capture of a CUDA"
        ):
            step()
    step()
    assert cbp.age["g0"].tolist().count(1) == 2


def test_kernels_are_compiled_when_attaching_and_once(monkeypatch, caplog):
    compiled = []

    def compile_(kernel, device, meta):
        compiled.append(kernel.fn.__name__)
        time.sleep(0.02)

    monkeypatch.setattr(triton_kernels, "compile_", compile_)
    monkeypatch.setattr(triton_backend, "is_interpreted", lambda: False)
    monkeypatch.setattr("cbp_fast.backends.registry.why_not_triton", lambda *args: None)
    monkeypatch.setattr(triton_backend, "_QUICK", 0.01)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    mlp_cbp = attach(mlp((4, 5, 2)), "triton", capture="deferred")
    assert compiled == ["select", "reinit"]
    (message,) = caplog.messages
    assert re.fullmatch(r"compiling select, reinit for cpu, once; they are kept in .*", message)
    assert mlp_cbp.backend == "triton"
    caplog.clear()
    monkeypatch.setattr(triton_backend, "_QUICK", 60)
    attach(mlp((4, 5, 2)), "triton", rule=RULES["centred transfer"], replacement_rate=0.0)
    assert set(compiled) == {"select", "reinit", "capture", "hat", "transfer"}
    assert not caplog.messages


def test_a_compiled_kernel_is_launched_again_without_triton(monkeypatch):
    """By what it was compiled for and the device; the interpreter compiles nothing."""
    launches = []

    class Compiled:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args: launches.append((self.name, grid, args))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **meta: launches.append(("first", grid, args)) or Compiled(meta["A"])

    monkeypatch.setattr(triton_kernels, "_compiled", {})
    kernel, x = Kernel(), torch.zeros(1, dtype=torch.int64)
    for a in (1, 1, 2, 1):
        triton_kernels.launch(kernel, (7,), (x,), {"A": a, "B": 5})
    assert launches == [
        ("first", (7,), (x,)),
        (1, (7, 1, 1), (x, 1, 5)),
        ("first", (7,), (x,)),
        (1, (7, 1, 1), (x, 1, 5)),
    ]


CHANGES = {
    "frozen": (lambda model, optimizer: model[2].weight.requires_grad_(False), "2.weight was frozen"),
    "shape": (lambda model, optimizer: setattr(model[2].weight, "data", torch.zeros(6, 4)), "2.weight has shape"),
    "dtype": (lambda model, optimizer: setattr(model[0].bias, "data", model[0].bias.data.double()), "0.bias has dtype"),
    "gone": (lambda model, optimizer: setattr(model[0], "bias", None), "0.bias is no longer there"),
    "state": (
        lambda model, optimizer: optimizer.state[model[2].weight].update(exp_avg=torch.zeros(6, 5).to_sparse()),
        "keeps exp_avg of '2.weight' as a torch.sparse_coo",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_many_steps_is_noticed(change, everything):
    """All is looked at again once something is another object, has another layout, or is not trained."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.Adam(model.parameters())
    cbp = attach(model, "triton", optimizer=optimizer, capture="deferred")
    for _ in range(3):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    assert cbp._engine._known.still([optimizer])
    model(torch.randn(3, 4))
    CHANGES[change][0](model, optimizer)
    before = everything(cbp)
    with pytest.raises(RuntimeError, match=CHANGES[change][1]):
        cbp.step()
    assert everything(cbp) == before


def test_state_of_the_optimizer_is_followed():
    """Loaded, cleared, or given anew for one parameter: what it is then is reset."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    optimizer = torch.optim.Adam(model.parameters())
    attach(model, "triton", optimizer=optimizer, replacement_rate=1.0, maturity_threshold=0)

    def new_entry():
        state = optimizer.state[model[0].weight]
        optimizer.state[model[0].weight] = {key: value.clone() for key, value in state.items()}

    def another_memory():
        optimizer.state[model[0].weight]["exp_avg"].data = torch.zeros(5, 4)

    changes = [lambda: None, lambda: optimizer.load_state_dict(optimizer.state_dict()), new_entry, another_memory]
    changes += [optimizer.state.clear, lambda: setattr(model[0].weight, "data", model[0].weight.data.clone())]
    for change in changes:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
            assert not optimizer.state[model[0].weight]["exp_avg"].any()
            assert not optimizer.state[model[2].weight]["exp_avg_sq"].any()
        change()


def test_transfers_in_a_circle_of_layers(monkeypatch):
    """What the first group drew anew is what the second one's replaced units gave: three launches, and two more."""
    results, launched = [], []
    launch = triton_kernels.launch
    monkeypatch.setattr(
        triton_kernels, "launch", lambda kernel, *args: launched.append(kernel.fn.__name__) or launch(kernel, *args)
    )
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        there, back = nn.Linear(4, 8), nn.Linear(8, 4)
        for layer in (there, back):
            layer.weight.data.copy_(torch.randint(-3, 4, layer.weight.shape))
        groups = [([there], [back]), ([back], [there])]
        cbp = engine_of(groups, Rule.nature(transfer_bias=True), backend=backend, decay_rate=0.5)
        for step in range(2):
            for slot, units in enumerate((8, 4)):
                cbp._engine.record(slot, torch.randint(-3, 4, (4, units)).float())
            cbp.step()
            assert len(cbp.last_replaced["g0"]) == 4, step
        results.append([p.detach() for layer in (there, back) for p in layer.parameters()])
    assert launched == ["capture", "capture", "select", "transfer", "reinit", "transfer", "reinit"] * 2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("orders", list(itertools.permutations(["unit by unit", "position by position"])), ids=str)
def test_readers_of_a_group_lie_in_orders_of_their_own(orders, monkeypatch):
    """A block of units waits for what each of its readers has of it, in whatever order the programs run."""
    units, positions = 40, 20
    strides = {"unit by unit": (positions, 1), "position by position": (1, units)}

    def run(backend):
        torch.manual_seed(0)
        producer, *readers = nn.Conv2d(3, units, 1), nn.Linear(units * positions, 3), nn.Linear(units * positions, 3)
        for layer in (producer, *readers):
            layer.weight.data.copy_(torch.randint(-3, 4, layer.weight.shape))
        read = [Part(layer, 0, positions, *strides[order]) for layer, order in zip(readers, orders, strict=True)]
        cbp = engine_of([([producer], read)], backend=backend, replacement_rate=0.1)
        for slot in range(2):
            cbp._engine.record(slot, torch.randint(-2, 3, (4, units * positions)).float())
        cbp.step()
        return [cbp.utility["g0"], cbp.last_replaced["g0"], producer.weight, *(layer.weight for layer in readers)]

    expected = run("reference")
    for seed in range(2):
        monkeypatch.setattr(triton_kernels, "launch", Interleaved(random.Random(seed), 0.0).launch)
        for a, b in zip(run("triton"), expected, strict=True):
            assert torch.equal(a, b)


def test_a_forward_that_sums_what_another_stream_held_keeps_it(monkeypatch):
    cbp = engine_of([([nn.Linear(2, 4)], [nn.Linear(4, 2)])], backend="triton")
    cbp._engine.record(0, torch.ones(3, 4))
    cbp._engine._streams = {engine.Stream(1, False)}
    cbp._engine._inline[0] = True
    kept = []
    monkeypatch.setattr(engine, "stream_of", lambda device: engine.Stream(2, False))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: 2)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda h, stream: kept.append(stream))
    cbp._engine.record(0, torch.ones(3, 4))
    assert kept == [2]
    assert cbp._engine.state.count.tolist() == [6]
