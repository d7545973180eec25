"""The Triton kernels compiled ahead of time: their text, and runs of their PTX on a machine without an order."""

import functools
import itertools
import re

import pytest
import torch
import triton
from ahead_of_time import AMD, TARGETS, Specialisation, compiled
from ptx_machine import Assembler, Launch, MachineError
from torch import nn

from cbp_fast import ContinualBackprop, Rule, UnitGroup, triton_backend, triton_kernels
from cbp_fast.triton_backend import meta_of

# bit 4 * type + 2 * along + aligned
FLOAT32_ALIGNED, EVERY_KIND = 1 << 9 | 1 << 11, 2**16 - 1
RULES = {
    "nature": Rule.nature(),
    "contribution": Rule.gnt(),
    "weight": Rule.gnt("weight"),
    "adaptation": Rule.gnt("adaptation"),
    "coin": Rule.gnt(accumulate=False, accrual="all"),
    "clarena": Rule.clarena(),
}


def select(rule, kinds=FLOAT32_ALIGNED, wide=False, flattened=False, target="sm_90"):
    return Specialisation.of("select", target, KINDS=kinds, **meta_of(RULES[rule], wide, flattened))


def reinit(distribution, wide=False, target="sm_90"):
    return Specialisation.of("reinit", target, WIDE_UTILITY=wide, DISTRIBUTION=distribution)


def everything(target):
    """Each rule, each kind of sum, each distribution, both utilities; together as they may come, not all products."""
    return [
        *(select(rule, target=target) for rule in RULES),
        select("nature", EVERY_KIND, flattened=True, target=target),
        select("clarena", EVERY_KIND, wide=True, target=target),
        Specialisation.of("capture", target, KINDS=EVERY_KIND),
        *(reinit(distribution, wide, target) for distribution in range(3) for wide in (False, True)),
    ]


def check_text(kernel, specialisation):
    """Counters order memory for the whole GPU, between barriers; what others wrote is not read from the first cache."""
    lines = [re.sub(r"\s*//.*", "", line).strip() for line in kernel.ptx.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("$", ".", "{", "}", "("))]
    atomics = [i for i, line in enumerate(lines) if "atom.global" in line or "red.global" in line]
    expected = {"select": 3, "capture": 1, "reinit": 0}[specialisation.kernel]
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
    # Triton 3.6 needs a few registers too many for float64 that neither is aligned nor summed along memory
    tight = triton.__version__.startswith("3.6.") and dict(specialisation.meta).get("KINDS", 0) >> 12 & 1
    assert kernel.stack <= (136 if tight else 0)
    assert tight or kernel.spills == 0


def check_vectors(kernel, kinds):
    """Every aligned kind reads 16 bytes at a time."""
    count = {0: 2, 1: 2, 2: 4, 3: 8}
    expected = sum(count[kind // 4] for kind in range(1, 16, 2) if kinds >> kind & 1)
    assert len(re.findall(r"\bLDG\.E\.128\b", kernel.sass)) >= expected
    assert len(re.findall(r"ld\.global\.v[24]\.b(?:32|64)", kernel.ptx)) == expected


def test_text_of_one_step():
    specialisations = [select("nature"), reinit(0)]
    for specialisation, kernel in zip(specialisations, compiled(*specialisations), strict=True):
        check_text(kernel, specialisation)
    check_vectors(compiled(*specialisations)[0], FLOAT32_ALIGNED)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_text_of_every_specialisation(target):
    specialisations = everything(target)
    for specialisation, kernel in zip(specialisations, compiled(*specialisations), strict=True):
        check_text(kernel, specialisation)
        if specialisation.kernel != "reinit":
            check_vectors(kernel, dict(specialisation.meta)["KINDS"])


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


def step(backend, rule, widths, samples, dtypes, replacement_rate=0.3):
    """One step on whole numbers; everything that it leaves."""
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, dtype=t) for a, b, t in zip(widths, widths[1:], dtypes, strict=False)]
    for layer in layers:
        layer.weight.data.copy_(torch.randint(-3, 4, layer.weight.shape))
    groups = [UnitGroup(f"g{i}", a, b) for i, (a, b) in enumerate(itertools.pairwise(layers))]
    model = nn.Sequential(*layers)
    options = {"replacement_rate": replacement_rate, "maturity_threshold": 0, "decay_rate": 0.5, "seed": 3}
    cbp = ContinualBackprop(model, rule=rule, groups=groups, backend="reference", **options)
    engine = cbp._engine
    engine.use(backend)
    held = [torch.randint(-3, 4, (samples, w)).to(t) for w, t in zip(widths[1:-1], dtypes[1:], strict=False)]
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
    tables = triton_backend._tables.values()
    return [*REACHED, *(t.is_chosen for t in tables)]


CASES = {
    "one group": (Rule.nature(), (8, 40, 8), 150, (torch.float32, torch.float32)),
    "three groups": (Rule.nature(), (5, 140, 16, 17, 3), 20, (torch.float32, torch.bfloat16, torch.float16) * 2),
    "clarena": (Rule.clarena(), (16, 16, 16, 4), 8, (torch.float32,) * 3, 0.5),
    "many chosen": (Rule.gnt(), (4, 300, 2), 4, (torch.float64, torch.float32), 0.9),
}


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        pytest.param(name, seed, marks=() if (name, seed) == ("one group", 0) else pytest.mark.slow)
        for name in CASES
        for seed in range(3)
    ],
)
def test_compiled_code_on_the_machine(name, seed, monkeypatch):
    expected = step("reference", *CASES[name])
    monkeypatch.setattr(triton_kernels, "launch", OnMachine(reached, seed).launch)
    for a, b in zip(step("triton", *CASES[name]), expected, strict=True):
        assert torch.equal(a, b)


def relaxed(ptx):
    return ptx.replace(".gpu.acq_rel.", ".relaxed.gpu.").replace(".acq_rel.gpu.", ".relaxed.gpu.")


def without_barrier(before):
    """The text without what barriers there are between each counter and the next access to tensors."""

    def change(ptx):
        lines = ptx.splitlines()
        for i in [i for i, line in enumerate(lines) if "atom.global" in line]:
            for k in range(i - 1, -1, -1) if before else range(i + 1, len(lines)):
                if re.search(r"(ld|st|atom)\.global", lines[k]):
                    break
                if "bar.sync" in lines[k]:
                    lines[k] = ""
        return "\n".join(lines)

    return change


MUTANTS = {"relaxed": relaxed, "no barrier before": without_barrier(True), "no barrier after": without_barrier(False)}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_machine_finds_what_is_missing(mutant, monkeypatch):
    """Without the order that counters make, some run of a few goes wrong."""
    expected = step("reference", *CASES["one group"])
    wrong = 0
    for seed in range(8):
        monkeypatch.setattr(triton_kernels, "launch", OnMachine(reached, seed, MUTANTS[mutant]).launch)
        try:
            result = step("triton", *CASES["one group"])
        except MachineError:
            wrong += 1
        else:
            wrong += not all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
        if wrong:
            break
    assert wrong
