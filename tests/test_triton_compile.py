"""The Triton kernels compiled ahead of time: their text, and runs of their PTX on a machine without an order."""

import re

import pytest
import torch
from ahead_of_time import AMD, TARGETS, Specialisation, compiled

from cbp_fast import Rule
from cbp_fast.triton_backend import meta_of

# bit 4 * type + 2 * along + aligned
FLOAT32_ALIGNED, EVERY_KIND = 1 << 9 | 1 << 11, 2**16 - 1
ALIGNED = 0b1010101010101010
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
    assert kernel.spills == kernel.stack == 0


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
