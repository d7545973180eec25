"""The Triton kernels compiled ahead of time: their text, and runs of their PTX on a machine without an order."""

import functools
import itertools
import re
from typing import NamedTuple

import pytest
import torch
import triton
from ahead_of_time import AMD, TARGETS, Specialisation, compiled
from ptx_assembler import Assembler
from ptx_machine import Launch
from ptx_values import MachineError
from torch import nn

from cbp_fast import ContinualBackprop, Part, Rule, UnitGroup
from cbp_fast.backends.triton import launching, tables
from cbp_fast.backends.triton.rows import DISTANCES
from cbp_fast.backends.triton.specialising import kernels_of

BFLOAT16, FLOAT32, FLOAT64, EVERY_TYPE = 1 << 1, 1 << 2, 1 << 3, 2**4 - 1
RULES = {
    "nature": Rule.nature(),
    "clarena": Rule.clarena(),
    "random": Rule.gnt("random", accumulate=False, accrual="all", init="normal"),
    "mean": Rule.gnt("adaptable_contribution", accumulate=False, transfer_bias=True),
}


def specialisations(rule, types=FLOAT32, wide=False, target="sm_90"):
    """All that a rule's steps may launch."""
    kernels = kernels_of(RULES[rule], wide, types, previous=wide)
    return [Specialisation.of(kernel.fn.__name__, target, **meta) for kernel, meta in kernels]


def everything(target):
    """Each rule, each type, both utilities; together as they may come, not all products."""
    found = [*itertools.chain.from_iterable(specialisations(rule, target=target) for rule in RULES)]
    found += specialisations("mean", BFLOAT16 | FLOAT64, wide=True, target=target)
    found += [Specialisation.of("rank", target), *specialisations("nature", EVERY_TYPE, target=target)]
    return list(dict.fromkeys(found))


def check_text(kernel, specialisation):
    """Counters order memory for the whole GPU, between barriers; what others wrote is not read from the first cache."""
    lines = [re.sub(r"\s*//.*", "", line).strip() for line in kernel.ptx.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("$", ".", "{", "}", "("))]
    atomics = [i for i, line in enumerate(lines) if "atom.global" in line or "red.global" in line]
    expected = {"select": 3 if dict(specialisation.meta).get("MIN_MAX") else 5, "score": 2, "capture": 1}
    expected = expected.get(specialisation.kernel, 0)
    # a loop that is unrolled or turned round has copies of it
    assert len(atomics) >= expected
    assert bool(atomics) == bool(expected)
    memory = re.compile(r"(ld|st|atom|red)\.(?:\w+\.)*global|ld\.global|st\.global")
    for i in atomics:
        assert ".gpu.acq_rel.add" in lines[i].replace(".acq_rel.gpu.", ".gpu.acq_rel.")
        before = next(line for line in reversed(lines[:i]) if memory.search(line) or "bar.sync" in line)
        after = next(line for line in lines[i + 1 :] if memory.search(line) or "bar.sync" in line)
        assert "bar.sync" in before, f"{lines[i]} after {before}"
        assert "bar.sync" in after, f"{lines[i]} before {after}"
    assert ".nc" not in kernel.ptx
    assert "LDG.E.CONSTANT" not in kernel.sass
    # Triton 3.6 needs a few registers too many where a running mean is kept as well
    tight = triton.__version__.startswith("3.6.") and dict(specialisation.meta).get("MEAN")
    assert kernel.stack <= (40 if tight else 0)
    assert tight or not kernel.spills


def check_vectors(kernel, specialisation):
    """Every type's two aligned kinds read 16 bytes at a time, several tiles at once and then what is left of them."""
    meta = dict(specialisation.meta)
    ahead = meta.get("SUM") != DISTANCES.value
    count = [2 * ((4 if ahead else 0) + 1)] * 2 + [4 * ((2 if ahead else 0) + 1)] * 2
    expected = sum(2 * count[i] for i in range(4) if meta["TYPES"] >> i & 1)
    assert len(re.findall(r"\bLDG\.E\.128\b", kernel.sass)) >= expected
    assert len(re.findall(r"ld\.global\.v[24]\.b(?:32|64)", kernel.ptx)) == expected


def check_all(specialisations):
    for specialisation, kernel in zip(specialisations, compiled(*specialisations), strict=True):
        check_text(kernel, specialisation)
        if "TYPES" in dict(specialisation.meta):
            check_vectors(kernel, specialisation)


def test_text_of_one_step():
    check_all(specialisations("nature"))


# some slow tests run under other Tritons than the newest, too: under each, or under the oldest
@pytest.mark.parametrize(
    "target",
    [pytest.param(t, marks=pytest.mark.slow(triton="each" if t == "sm_90" else "oldest")) for t in TARGETS],
)
def test_text_of_every_specialisation(target):
    check_all(everything(target))


@pytest.mark.slow
def test_amd_compiles():
    for kernel in compiled(*everything(AMD)):
        assert ".amdgcn_target" in kernel.ptx
        assert "global_load_dwordx4" in kernel.ptx or "global_load" in kernel.ptx


class OnMachine:
    """In the place of `launch`: the compiled kernels on the machine, with a change to their text."""

    def __init__(self, tensors, seed=0, change=lambda ptx: ptx):
        self.tensors, self.seed, self.change = tensors, seed, change

    def launch(self, kernel, grid, args, meta):
        (built,) = compiled(Specialisation.of(kernel.fn.__name__, **meta))
        ptx = self.change(built.ptx) if kernel.fn.__name__ == "select" else built.ptx
        Launch(assembled(ptx), grid[0], args, self.tensors(), built.shared, seed=self.seed)


assembled = functools.cache(Assembler)


class Net(NamedTuple):
    """Layers, their groups, and what the readers of each group see."""

    layers: list[nn.Module]
    groups: list[UnitGroup]
    held: list[torch.Tensor]


def whole(*shape):
    return torch.randint(-3, 4, shape)


def chain(widths, samples, dtypes, positions=1):
    """Linear layers one after the other; the first group's units may have several columns each."""
    layers = [nn.Linear(a, b, dtype=t) for a, b, t in zip(widths, widths[1:], dtypes, strict=False)]
    if positions > 1:
        layers[:2] = [nn.Conv1d(*widths[:2], 1), nn.Linear(positions * widths[1], widths[2])]
        widths = (widths[0], positions * widths[1], *widths[2:])
    groups = [UnitGroup(f"g{i}", a, b) for i, (a, b) in enumerate(itertools.pairwise(layers))]
    return Net(layers, groups, [whole(samples, w).to(t) for w, t in zip(widths[1:-1], dtypes[1:], strict=False)])


def embeddings_and_parts():
    """Embeddings, drawn normal beside a linear layer, and a convolution read from within one of its groups on."""
    table, part, linear, conv = (
        nn.Embedding(9, 20),
        nn.Embedding(7, 50),
        nn.Linear(5, 20),
        nn.Conv1d(48, 8, 3, groups=4),
    )
    within, across = Part(conv, 14, 1), Part(conv, 1)
    groups = [
        UnitGroup("g0", [table, linear, Part(part, 3, 2)], within),
        UnitGroup("g1", Part(part, 43), across, num_units=7),
    ]
    return Net([table, part, linear, conv], groups, [whole(2, 48, 5).float(), whole(3, 48, 4).float()])


def step(backend, rule, replacement_rate, net, *args):
    """One step on whole numbers; everything that it leaves."""
    torch.manual_seed(0)
    layers, groups, held = net(*args)
    for layer in layers:
        layer.weight.data.copy_(whole(*layer.weight.shape))
    model = nn.Sequential(*layers)
    options = {"replacement_rate": replacement_rate, "maturity_threshold": 0, "decay_rate": 0.5, "seed": 3}
    cbp = ContinualBackprop(model, rule=rule, groups=groups, backend="reference", **options)
    engine = cbp._engine
    engine.use(backend)
    for i, h in enumerate(held):
        engine.record(i, h)
    REACHED[:] = [*model.parameters(), *held, engine.state.buffer]
    cbp.step()
    state = engine.state
    fields = [state.utility, state.age, state.pending, state.num_chosen, state.count, state.step]
    return [*fields, *cbp.last_replaced.values(), *(p.detach() for p in model.parameters())]


# what the step in progress reaches by addresses in tables
REACHED = []


def reached():
    return [*REACHED, *(tensor for t in tables._tables.values() for tensor in (t.is_chosen, t.hat))]


FLOATS = (torch.float32,) * 3
CASES = {
    "one group": (Rule.nature(), 0.3, chain, (8, 40, 8), 150, FLOATS),
    "three groups": (
        *(Rule.nature(), 0.3, chain, (5, 140, 16, 17, 3), 20),
        (torch.float32, torch.bfloat16, torch.float16) * 2,
    ),
    "clarena": (Rule.clarena(), 0.5, chain, (16, 16, 16, 4), 8, FLOATS),
    "many chosen": (Rule.gnt(), 0.9, chain, (4, 300, 2), 4, (torch.float64, torch.float32)),
    "several chosen": (Rule.nature(), 0.02, chain, (2, 260, 20), 4, FLOATS),
    "mean": (RULES["mean"], 0.4, chain, (4, 40, 16, 3), 8, (torch.float32, torch.bfloat16, torch.float32)),
    "random": (RULES["random"], 0.04, chain, (4, 140, 16), 8, FLOATS),
    "flattened": (Rule.nature(), 0.3, chain, (4, 20, 16, 3), 8, FLOATS, 37),
    "embeddings and parts": (Rule.nature(), 0.5, embeddings_and_parts),
}


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=() if (name, seed) == ("one group", 0) else slow)
        for name in CASES
        for seed, slow in enumerate((pytest.mark.slow(triton="oldest"), pytest.mark.slow, pytest.mark.slow))
    ],
)
def test_compiled_code_on_the_machine(name, seed, monkeypatch):
    expected = step("reference", *CASES[name])
    monkeypatch.setattr(launching, "launch", OnMachine(reached, seed).launch)
    for a, b in zip(step("triton", *CASES[name]), expected, strict=True):
        # of normal draws the last bit is not promised
        tolerance = 1e-6 if name == "embeddings and parts" else 0.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def relaxed(lines, i):
    lines[i] = lines[i].replace(".gpu.acq_rel.", ".relaxed.gpu.").replace(".acq_rel.gpu.", ".relaxed.gpu.")


def without_barrier(before):
    """The text without what barriers there are between a counter and the next access to tensors."""

    def change(lines, i):
        for k in range(i - 1, -1, -1) if before else range(i + 1, len(lines)):
            if re.search(r"(ld|st|atom)\.global", lines[k]):
                break
            if "bar.sync" in lines[k]:
                lines[k] = ""

    return change


MUTANTS = {"relaxed": relaxed, "no barrier before": without_barrier(True), "no barrier after": without_barrier(False)}
COUNTERS = ("parts", "other blocks of units", "block of units", "group")


# a group's counter needs no barrier of its own before it: the last one of the reductions comes after all stores but
# those of the thread that counts
NEEDED = [pair for pair in itertools.product(MUTANTS, COUNTERS) if pair != ("no barrier before", "group")]


@pytest.mark.slow
@pytest.mark.parametrize(("mutant", "counter"), NEEDED)
def test_the_machine_finds_what_is_missing(mutant, counter, monkeypatch):
    """Without the order that a counter makes, some run goes wrong: one in eight of those for the rarest."""
    case = CASES[{"parts": "one group", "other blocks of units": "flattened"}.get(counter, "several chosen")]

    def change(ptx):
        lines = ptx.splitlines()
        atomics = [i for i, line in enumerate(lines) if "atom.global" in line]
        assert len(atomics) == len(COUNTERS) + 1
        MUTANTS[mutant](lines, atomics[COUNTERS.index(counter)])
        return "\n".join(lines)

    expected = step("reference", *case)
    for seed in range(60):
        monkeypatch.setattr(launching, "launch", OnMachine(reached, seed, change).launch)
        try:
            result = step("triton", *case)
        except MachineError as error:
            if "unknown" in str(error):
                raise
            return
        if not all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)):
            return
    pytest.fail("every run was right")
