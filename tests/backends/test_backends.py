"""Each backend against the reference on random groups of layers: the same choice, draws, utilities and ages.

A case is all that a number of its own draws; one that fails is told with its number, and in the smallest form that
fails too. `pytest -m slow --cases 20000 tests/backends/test_backends.py` looks at more of them.
"""

import importlib
import itertools
import math
import random
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from group_cases import SEED, Layout, Numbers
from networks import Conv1D
from torch import nn

from cbp_fast import ContinualBackprop, Part, Rule, UnitGroup
from cbp_fast.rules.rule import INITS

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # a step before which nothing was seen is a case like others
    pytest.mark.filterwarnings("ignore:no training forward of the model was seen"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# and how many cases the short form has of each; the interpreter takes its time
BACKENDS = {"cpp": 150, "triton": 50}
# norms of the last axes; all others are of channels
OF_FEATURES = ("LayerNorm", "RMSNorm")
SHORT = 25


class Use(NamedTuple):
    """What a group has of one layer or norm: all of it, or else a `Part`."""

    number: int
    start: int
    per_unit: int
    unit_stride: int
    position_stride: int
    whole: bool = False


@dataclass
class Layer:
    kind: str  # linear, hf, embedding, conv, transposed
    conv_groups: int
    kernel: tuple[int, ...]
    bias: bool
    dtype: torch.dtype
    layout: Layout
    depthwise: bool = False
    made: int = 0
    read: int = 0

    @property
    def spatial(self):
        return len(self.kernel)


class Norm(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Group:
    units: int
    columns: int  # a unit
    incoming: list[Use]
    outgoing: list[Use]
    norms: list[Use]


class Batch(NamedTuple):
    """What one layer reads in a step."""

    forwards: int
    before: tuple[int, ...]  # sizes before the features, and after them
    after: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout


@dataclass
class Case:
    rule: Rule
    layers: list[Layer]
    norms: list[Norm]
    groups: list[Group]
    steps: list[dict[int, Batch]]  # by number of the layer
    hyper: list[dict[str, float]]
    optimizers: tuple[str, ...]
    capture: str
    called: bool  # layers are called; else their inputs are recorded
    whole: bool  # whole numbers, of which no sum is rounded
    spoilt: bool  # some numbers are not finite
    numbers: int


class Draw(random.Random):
    def one_of(self, *options):
        return self.choice(options)

    def chance(self, n):
        return self.randrange(n) == 0

    def layout(self, dims, may_repeat=False):
        order = tuple(self.sample(range(dims), dims)) if self.chance(2) else tuple(range(dims))
        steps = tuple(self.one_of(1, 1, 2) for _ in range(dims)) if self.chance(2) else (1,) * dims
        repeated = self.randrange(dims) if may_repeat and self.chance(6) else None
        return Layout(order, steps, self.one_of(0, 0, 1, 5), repeated)

    def rule(self):
        name = self.one_of("nature", "nature", "gnt", "gnt", "gnt", "clarena")
        if name == "clarena":
            return Rule.clarena()
        options = {"init": self.one_of(*INITS), "act": self.one_of("relu", "tanh", "selu", "swish")}
        options["transfer_bias"] = self.chance(3)
        if name == "gnt":
            options["utility"] = self.one_of(*Rule.UTILITIES)
            options["accumulate"] = not self.chance(3)
            options["accrual"] = self.one_of("eligible", "all")
            options["reset_optimizer"] = not self.chance(5)
        return getattr(Rule, name)(**options)

    def layer(self, kind, dtype):
        dims = self.one_of(1, 2, 2, 3) if kind in ("conv", "depthwise", "transposed") else 0
        return Layer(
            "conv" if kind == "depthwise" else kind,
            self.one_of(1, 2, 3, 4) if kind == "conv" else 1,
            tuple(self.one_of(1, 2, 3) for _ in range(dims)),
            not self.chance(4),
            dtype,
            self.layout(2 + dims),
            depthwise=kind == "depthwise",
        )

    def use(self, number, first, units, per_unit, spread):
        """Some place on an axis from `first` on, and where it ends; what makes or norms units may be `spread`."""
        strides = [(per_unit, 1), (1, units), *([(per_unit + 1, 1), (2 * per_unit, 2)] if spread else [])]
        unit_stride, position_stride = self.choice(strides)
        start = first + self.one_of(0, 0, 0, 1, 2, 5)
        end = start + (units - 1) * unit_stride + (per_unit - 1) * position_stride + 1
        return Use(number, start, per_unit, unit_stride, position_stride), end

    def norm(self, number, group, spatial, dtype):
        kind = self.one_of(*OF_FEATURES, "GroupNorm", "BatchNorm2d", "InstanceNorm1d")
        use, size = self.use(number, 0, group.units, self.one_of(1, group.columns), True)
        shape = (size + self.one_of(0, 0, 2),)
        if kind in OF_FEATURES and spatial and self.chance(2):
            shape += (2,) * spatial
        return use, Norm(kind, shape, dtype)

    def batch(self, layer):
        before = tuple(
            self.one_of(1, 2, 3, 4, 5) for _ in range(self.one_of(*((0, 1, 1) if layer.spatial else (0, 1, 2, 3))))
        )
        if before and self.chance(20):
            before = (0, *before[1:])
        after = tuple(size - 1 + self.one_of(1, 2, 3) for size in layer.kernel)
        dtype = self.one_of(layer.dtype, layer.dtype, *DTYPES)
        layout = self.layout(len(before) + 1 + len(after), may_repeat=True)
        return Batch(self.one_of(0, 1, 1, 1, 2), before, after, dtype, layout)

    def hyper(self):
        return {
            "replacement_rate": self.one_of(0.0, 0.1, 0.3, 0.5, 1.0),
            "maturity_threshold": self.one_of(0, 0, 0, 1),
            "decay_rate": self.one_of(0.0, 0.5, 0.9, 0.99),
        }


def groups_of(draw, types, linear):
    """Layers, norms and groups; a layer may go on from group to group, in one role of each."""
    layers, norms, groups = [], [], []

    def new(*kinds):
        layers.append(draw.layer("linear" if linear else draw.one_of(*kinds), draw.one_of(*types)))
        return len(layers) - 1

    def place(number, axis, *args):
        use, end = draw.use(number, getattr(layers[number], axis), *args)
        setattr(layers[number], axis, end)
        return use

    for _ in range(draw.one_of(1, 1, 2, 2, 3)):
        units = (
            draw.one_of(130, 260) if not groups and draw.chance(30) else draw.one_of(1, 2, 3, 4, 5, 6, 8, 13, 17, 33)
        )
        group = Group(units, 1 if linear or draw.chance(2) else draw.one_of(1, 2, 3, 4), [], [], [])
        for _ in range(draw.one_of(1, 1, 1, 2)):
            old = range(len(layers)) if not draw.chance(3) else ()
            kinds = ("linear", "conv", "transposed", "embedding", "depthwise", "hf")
            number = draw.choice(old) if old else new(*kinds)
            several = not linear and (layers[number].depthwise or draw.chance(6))
            group.incoming.append(place(number, "made", units, draw.one_of(1, 2) if several else 1, not linear))
        makers = {use.number for use in group.incoming}
        for _ in range(draw.one_of(1, 1, 1, 2, 3)):
            old = [i for i, layer in enumerate(layers) if i not in makers and layer.kind != "embedding"]
            number = draw.choice(old) if old and draw.chance(2) else new("linear", "conv", "transposed", "hf")
            group.outgoing.append(place(number, "read", units, group.columns, False))
        spatial = min(layers[number].spatial for number in makers)
        for _ in range(0 if linear else draw.one_of(0, 0, 1, 1, 2)):
            use, norm = draw.norm(len(norms), group, spatial, draw.one_of(*types))
            group.norms.append(use)
            norms.append(norm)
        groups.append(group)
    for layer in layers:
        # what no group has of a layer
        layer.made += 0 if layer.made and not draw.chance(4) else draw.one_of(1, 2, 3, 5)
        layer.read += 0 if layer.read and not draw.chance(4) else draw.one_of(1, 2, 3, 5)
        if linear:
            # of a layer before another one the columns of the other one's units are drawn
            layer.read = max(layer.read, *(group.units for group in groups), 1)
        if layer.depthwise:
            layer.read = layer.conv_groups = max(layer.read, -(-layer.made // 2))
            layer.made = layer.read * (1 if layer.made <= layer.read else 2)
        layer.made += -layer.made % layer.conv_groups
        layer.read += -layer.read % layer.conv_groups
    return layers, norms, groups


def name_whole(draw, layers, norms, group):
    """Give no `Part` where all of a layer or norm is the group's, and it says so by itself."""
    spatial = min(layers[use.number].spatial for use in group.incoming)

    def reads(layer):
        if layer.conv_groups == layer.read > 1:
            # depthwise
            return ()
        return (1, group.columns) if spatial and not layer.spatial else (1,)

    def normalises(norm):
        return (1, group.columns) if norm.kind in OF_FEATURES and len(norm.shape) == 1 else (1,)

    for uses, of, width, sizes in (
        (group.incoming, layers, lambda layer: layer.made, lambda layer: (1,)),
        (group.outgoing, layers, lambda layer: layer.read, reads),
        (group.norms, norms, lambda norm: norm.shape[0], normalises),
    ):
        numbers = [use.number for use in uses]
        for i, use in enumerate(uses):
            number, start, per_unit, unit_stride, position_stride, _ = use
            fits = width(of[number]) == group.units * per_unit and per_unit in sizes(of[number])
            dense = (start, unit_stride, position_stride) == (0, per_unit, 1)
            uses[i] = use._replace(whole=fits and dense and numbers.count(number) == 1 and not draw.chance(4))


def case_of(number):
    draw = Draw(number)
    rule = draw.rule()
    types = draw.one_of(DTYPES[:1], DTYPES[:1], DTYPES[1:2], DTYPES[2:3], DTYPES[3:], DTYPES)
    layers, norms, groups = groups_of(draw, types, rule.name == "clarena")
    for group in groups:
        name_whole(draw, layers, norms, group)
    readers = sorted({use.number for group in groups for use in group.outgoing})
    steps = draw.one_of(1, 1, 2, 3)
    hyper = draw.hyper()
    whole = not draw.chance(3)
    return Case(
        rule,
        layers,
        norms,
        groups,
        [{i: draw.batch(layers[i]) for i in readers} for _ in range(steps)],
        [hyper, *(draw.hyper() if draw.chance(4) else hyper for _ in range(steps - 1))],
        draw.one_of((), ("SGD",), ("Adam",), ("AMSGrad",), ("SGD", "Adam"), ("RMSprop",)),
        draw.one_of("deferred", "auto", "inline"),
        draw.chance(3),
        whole,
        whole and draw.chance(4),
        number,
    )


def smaller(case):
    """The case less one thing."""
    for i in range(len(case.groups) if len(case.groups) > 1 else 0):
        yield replace(case, groups=case.groups[:i] + case.groups[i + 1 :])
    for i, group in enumerate(case.groups):
        for role in ("norms", "outgoing", "incoming"):
            uses = getattr(group, role)
            for k in range(len(uses) if len(uses) > 1 or role == "norms" else 0):
                less = replace(group, **{role: uses[:k] + uses[k + 1 :]})
                yield replace(case, groups=[*case.groups[:i], less, *case.groups[i + 1 :]])
    if len(case.steps) > 1:
        yield replace(case, steps=case.steps[:-1], hyper=case.hyper[:-1])
        yield replace(case, steps=case.steps[1:], hyper=case.hyper[1:])
    if case.optimizers:
        yield replace(case, optimizers=())
    for flag in ("spoilt", "called"):
        if getattr(case, flag):
            yield replace(case, **{flag: False})


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.0, momentum=0.9),
    # an eps that float16 has
    "Adam": lambda p: torch.optim.Adam(p, 0.0, eps=1e-3),
    "AMSGrad": lambda p: torch.optim.AdamW(p, 0.0, eps=1e-3, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.0, eps=1e-3, momentum=0.5),
}


def hugging_face():
    """transformers' linear layer with the weight [in, out]; where that is not installed, one that looks the same."""
    try:
        return importlib.import_module("transformers.pytorch_utils").Conv1D
    except ModuleNotFoundError:
        return Conv1D


def module_of(layer):
    dims, options = layer.spatial, {"bias": layer.bias, "dtype": layer.dtype}
    if layer.kind == "linear":
        return nn.Linear(layer.read, layer.made, **options)
    if layer.kind == "hf":
        return hugging_face()(layer.made, layer.read).to(layer.dtype)
    if layer.kind == "embedding":
        return nn.Embedding(layer.read, layer.made, dtype=layer.dtype)
    kind = getattr(nn, f"Conv{'Transpose' * (layer.kind == 'transposed')}{dims}d")
    return kind(layer.read, layer.made, layer.kernel, groups=layer.conv_groups, **options)


def norm_of(norm):
    if norm.kind == "GroupNorm":
        return nn.GroupNorm(1, *norm.shape, dtype=norm.dtype)
    if norm.kind == "InstanceNorm1d":
        return nn.InstanceNorm1d(*norm.shape, affine=True, track_running_stats=True, dtype=norm.dtype)
    return getattr(nn, norm.kind)(norm.shape if norm.kind in OF_FEATURES else norm.shape[0], dtype=norm.dtype)


class Run:
    """A case on one backend. All is filled anew before each step: no rounding goes from one step to the next."""

    def __init__(self, case, backend):
        self.case, self.laid_out, self.memories = case, backend != "reference", []
        self.numbers = Numbers(case.numbers, case.spoilt)
        torch.manual_seed(0)
        self.layers, self.norms = list(map(module_of, case.layers)), list(map(norm_of, case.norms))
        for module, layer in zip(self.layers, case.layers, strict=True):
            module.weight = nn.Parameter(self.place(layer.layout, module.weight.detach()))
        self.model = nn.ModuleList([*self.layers, *self.norms])
        # a deviation that is not finite is refused
        late = case.spoilt and case.rule.init == "as_attached"
        if not late:
            self.fill()
        parameters, n = list(self.model.parameters()), len(case.optimizers)
        self.optimizers = [OPTIMIZERS[name](parameters[i::n]) for i, name in enumerate(case.optimizers)]
        groups = [self.group(f"g{i}", group) for i, group in enumerate(case.groups)]
        options = {"rule": case.rule, "capture": case.capture, "seed": SEED, **case.hyper[0]}
        self.cbp = ContinualBackprop(self.model, self.optimizers or None, groups=groups, backend=backend, **options)
        if late:
            self.fill()

    def group(self, name, group):
        def named(uses, modules):
            return [modules[use.number] if use.whole else Part(modules[use.number], *use[1:5]) for use in uses]

        roles = (named(group.incoming, self.layers), named(group.outgoing, self.layers), named(group.norms, self.norms))
        return UnitGroup(name, *roles, group.units)

    def place(self, layout, values):
        if not self.laid_out:
            return values.contiguous()
        tensor, memory = layout.place(values)
        self.memories.append((memory, values.numel()))
        return tensor

    def new(self, shape, bad=(math.inf, -math.inf)):
        return self.numbers.whole(shape, bad) if self.case.whole else self.numbers.any(shape)

    @torch.no_grad()
    def fill(self):
        for p in self.model.parameters():
            p.copy_(self.new(p.shape))
        for norm in self.norms:
            for buffer in norm.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.new(buffer.shape).abs())

    def step(self, number, **hyper):
        case = self.case
        if number:
            self.fill()
        for name, value in {**case.hyper[number], **hyper}.items():
            setattr(self.cbp, name, value)
        for i, batch in case.steps[number].items():
            for _ in range(batch.forwards):
                self.forward(i, batch)
        for p in self.model.parameters() if self.optimizers else ():
            p.grad = self.numbers.any(p.shape).to(p.dtype)
        for optimizer in self.optimizers:
            optimizer.step()
        if not self.optimizers:
            self.cbp.step()

    def forward(self, i, batch):
        layer, module = self.case.layers[i], self.layers[i]
        # a layer takes its own type, and a convolution no empty batch
        called = self.case.called and layer.dtype in DTYPES[:2] and 0 not in batch.before
        shape = (*batch.before, layer.read, *batch.after)
        h = self.new(shape, bad=(math.inf, math.nan)).to(layer.dtype if called else batch.dtype)
        if batch.layout.repeated is not None and h.numel():
            h = h.narrow(batch.layout.repeated, 0, 1).expand(shape)
        if self.laid_out:
            h = batch.layout.place(h)[0]
        if called:
            # transformers' takes a view of its input
            module(h.contiguous() if layer.kind == "hf" else h)
            return
        for number, slot in enumerate(self.cbp._engine.state.slots):
            if slot.module is module:
                self.cbp._engine.record(number, h)


def check_state(mine, expected, tolerance):
    assert mine["step"] == expected["step"]
    for name, theirs in expected["groups"].items():
        own = mine["groups"][name]
        assert own.keys() == theirs.keys()
        for key, value in theirs.items():
            if key == "utility":
                torch.testing.assert_close(own[key], value, **tolerance, msg=lambda m: f"utility: {m}")
            elif key == "running_mean":
                torch.testing.assert_close(own[key], value, rtol=1e-5, atol=1e-5, msg=lambda m: f"mean: {m}")
            else:
                same = torch.equal(own[key], value) if isinstance(value, torch.Tensor) else own[key] == value
                assert same, f"{key} of {name}: {own[key]} and not {value}"


def check_tensors(mine, expected):
    """The same bits, but for what is drawn normal, what is transferred, and what an optimizer computes."""
    case = mine.case
    embeddings = {f"{i}.weight" for i, layer in enumerate(case.layers) if layer.kind == "embedding"}
    tensors = zip(mine.model.state_dict().items(), expected.model.state_dict().values(), strict=True)
    for (name, a), b in tensors:
        tolerance = {"rtol": 0, "atol": 0}
        if name in embeddings or (case.rule.init in ("normal", "as_attached") and name.endswith("weight")):
            tolerance = {"rtol": max(torch.finfo(b.dtype).eps, 1e-6), "atol": 1e-6}
        elif case.rule.transfer_bias and name.endswith("bias"):
            tolerance = {"rtol": max(torch.finfo(b.dtype).eps, 1e-5), "atol": 1e-5}
        torch.testing.assert_close(a, b, **tolerance, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(mine.optimizers, expected.optimizers, strict=True):
        for own, theirs in zip(a.state.values(), b.state.values(), strict=True):
            for key, value in theirs.items():
                # of another layout, the same formula may round differently
                torch.testing.assert_close(own[key], value, rtol=1e-2 if value.itemsize == 2 else 1e-5, atol=0)


def units_at(case, backend, number):
    """Utility and age of each unit as step `number` chose by them: of a run in which it replaces nothing."""
    run = Run(case, backend)
    for n in range(number):
        run.step(n)
    run.step(number, replacement_rate=0.0)
    return run.cbp.utility, run.cbp.age


def is_rounding(case, backend, number, mine, theirs, tolerance):
    """Whether units that were chosen in another order have the same score, but for rounding."""
    if any(len(chosen) != len(theirs[name]) for name, chosen in mine.items()):
        return False
    (utility, age), (expected, _) = (units_at(case, b, number) for b in (backend, "reference"))
    for name, chosen in mine.items():
        different = chosen != theirs[name]
        a, b = chosen[different].long(), theirs[name][different].long()
        # where they are equal, the lower one comes first
        if ((utility[name][a] == utility[name][b]) & (age[name][a] == age[name][b])).any():
            return False
        scores = expected[name].double() / (
            age[name] if case.rule.name == "clarena" else 1 - case.hyper[number]["decay_rate"] ** age[name].double()
        )
        if not torch.allclose(scores[a], scores[b], **tolerance):
            return False
    return True


def check(case, backend):
    """Steps side by side with the reference's; what one leaves is compared before the next."""
    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    if case.whole and not case.rule.centred:
        wide = any(layer.dtype == torch.float64 for layer in case.layers)
        tolerance = {"rtol": 1e-12 if wide else 1e-6, "atol": 0.0}
    mine, expected = Run(case, backend), Run(case, "reference")
    for number in range(len(case.steps)):
        for run in (mine, expected):
            run.step(number)
        a, b = mine.cbp.last_replaced, expected.cbp.last_replaced
        if not all(map(torch.equal, a.values(), b.values())):
            assert is_rounding(case, backend, number, a, b, tolerance), f"step {number}: {a} and not {b}"
            return
        check_state(mine.cbp.state_dict(), expected.cbp.state_dict(), tolerance)
        check_tensors(mine, expected)
    # nothing was written beside a weight; the deviation of what is not finite is not a number, and so are draws by it
    if not case.spoilt:
        assert all(memory.isnan().sum() == memory.numel() - used for memory, used in mine.memories)


def fails(case, backend):
    try:
        check(case, backend)
    except Exception as error:
        return error
    return None


def check_numbers(numbers, backend):
    for number in numbers:
        case = case_of(number)
        error = fails(case, backend)
        if error is None:
            continue
        while True:
            found = next((less for less in smaller(case) if fails(less, backend)), None)
            if found is None:
                break
            case = found
        raise AssertionError(f"case_of({number}) on {backend}, and at its smallest\n{case}") from error


@pytest.mark.parametrize(
    ("backend", "first"), [(backend, first) for backend, n in BACKENDS.items() for first in range(0, n, SHORT)]
)
def test_random_groups(backend, first):
    check_numbers(range(first, first + SHORT), backend)


def pytest_generate_tests(metafunc):
    if "end" in metafunc.fixturenames:
        # the short form has had the first ones; the interpreter takes its time
        ends = {"cpp": metafunc.config.getoption("--cases"), "triton": metafunc.config.getoption("--cases") // 10}
        chunks = [
            (b, first, min(first + SHORT, end)) for b, end in ends.items() for first in range(BACKENDS[b], end, SHORT)
        ]
        metafunc.parametrize(("backend", "first", "end"), chunks)


@pytest.mark.slow
def test_many_random_groups(backend, first, end):
    check_numbers(range(first, end), backend)


def test_the_cases_reach_what_they_are_for():
    """Of the short form: every kind of layer in every role, parts, several of each, layers in two groups, all rules."""
    cases = [case_of(number) for number in range(max(BACKENDS.values()))]
    seen = set()
    for case in cases:
        made, read = set(), set()
        for group in case.groups:
            for role, uses in (("makes", group.incoming), ("reads", group.outgoing)):
                for use in uses:
                    layer = case.layers[use.number]
                    kind = "depthwise" if layer.depthwise else "grouped" if layer.conv_groups > 1 else layer.kind
                    seen |= {(role, kind, "whole" if use.whole else "part"), (role, layer.spatial)}
                numbers = [use.number for use in uses]
                seen |= {(role, "twice")} if len(set(numbers)) < len(numbers) else set()
            made |= {use.number for use in group.incoming}
            read |= {use.number for use in group.outgoing}
            seen |= {("norm", case.norms[use.number].kind, use.whole) for use in group.norms}
            seen.add(("columns", group.columns > 1))
        seen |= {("chain", bool(made & read)), ("rule", case.rule.name, case.rule.utility), ("init", case.rule.init)}
        seen |= {(flag, getattr(case, flag)) for flag in ("called", "whole", "spoilt", "capture", "optimizers")}
        seen |= {("type", layer.dtype) for layer in case.layers}
    kinds = ("linear", "hf", "embedding", "conv", "grouped", "depthwise", "transposed")
    expected = {(role, kind, "part") for role in ("makes", "reads") for kind in kinds} - {
        ("reads", "embedding", "part")
    }
    # which of both it was, a step does not see
    expected |= {(role, "linear", "whole") for role in ("makes", "reads")}
    expected |= {("makes", "twice"), ("reads", "twice"), ("chain", True), ("columns", True)}
    expected |= {("rule", "gnt", utility) for utility in Rule.UTILITIES} | {("init", init) for init in INITS}
    expected |= set(itertools.product(("called", "whole", "spoilt"), (False, True))) | {("type", t) for t in DTYPES}
    expected |= {("rule", name, "contribution") for name in ("nature", "clarena")}
    missing = expected - seen
    assert not missing
