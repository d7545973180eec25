"""The machine that the compiled kernels are tested on, by texts of a few instructions."""

import numpy as np
import pytest
import torch
from ptx_assembler import Assembler
from ptx_machine import Launch
from ptx_values import MachineError

HEAD = """
.visible .entry test(.param .u64 test_param_0, .param .u64 test_param_1)
.reqntid 32
{
ld.param.b64 %rd1, [test_param_0];
ld.param.b64 %rd2, [test_param_1];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, SIZE;
add.s64 %rd4, %rd1, %rd3;
add.s64 %rd5, %rd2, %rd3;
"""


def run(text, x, y, programs=1):
    """`text` by one warp whose lanes have the addresses of their elements in %rd4 and %rd5."""
    kernel = Assembler(HEAD.replace("SIZE", str(x.element_size())) + text + "\nret;\n}")
    return Launch(kernel, programs, (x, y), (), 0)


def lanes(x, text):
    """What a warp stores to its second tensor."""
    y = torch.zeros_like(x)
    run(text, x, y)
    return y.tolist()


WORDS = [0, 1, 2, 3, 0x80000000, 0xFFFFFFFF, 0x12345678, 0x00FF00F0] * 4


def on_words(*instructions):
    """%r3 of %r2, a word a lane."""
    x = torch.from_numpy(np.array(WORDS, "u4").view("i4").copy())
    text = ["ld.global.b32 %r2, [%rd4]", *instructions, "st.global.b32 [%rd5], %r3"]
    return [word & 0xFFFFFFFF for word in lanes(x, ";\n".join(text) + ";")]


def test_votes():
    yes = "setp.gt.u32 %p1, %r2, 2"
    mask = sum(1 << i for i, word in enumerate(WORDS) if word > 2)
    assert set(on_words(yes, "vote.sync.ballot.b32 %r3, %p1, -1")) == {mask}
    assert set(on_words(yes, "vote.sync.any.pred %p2, %p1, 7", "selp.b32 %r3, 1, 0, %p2")) == {0}
    assert set(on_words(yes, "vote.sync.all.pred %p2, !%p1, 7", "selp.b32 %r3, 1, 0, %p2")) == {1}


def test_bits():
    signed = [word - 2**32 if word >> 31 else word for word in WORDS]
    assert on_words("popc.b32 %r3, %r2") == [word.bit_count() for word in WORDS]
    assert on_words("clz.b32 %r3, %r2") == [32 - word.bit_length() for word in WORDS]
    assert on_words("bfind.u32 %r3, %r2") == [word.bit_length() - 1 & 0xFFFFFFFF for word in WORDS]
    highest = [(~word if word < 0 else word).bit_length() - 1 & 0xFFFFFFFF for word in signed]
    assert on_words("bfind.s32 %r3, %r2") == highest
    assert on_words("prmt.b32 %r3, %r2, 0, 0x0123") == [int.from_bytes(w.to_bytes(4, "little"), "big") for w in WORDS]
    signs = [0xFF if word >> 31 else 0 for word in WORDS]
    assert on_words("prmt.b32 %r3, %r2, 0, 0x444B") == signs
    for table, function in ((0xC0, lambda a, b: a & b), (0x3C, lambda a, b: a ^ b), (0xFC, lambda a, b: a | b)):
        expected = [function(word, i) for i, word in enumerate(WORDS)]
        assert on_words(f"lop3.b32 %r3, %r2, %r1, 0, {table:#x}") == expected


def test_shuffles():
    text = "shfl.sync.down.b32 %r3|%p1, %r1, 4, 31, -1"
    assert on_words(text) == [min(i + 4, i if i > 27 else 31) for i in range(32)]
    assert on_words(text, "selp.b32 %r3, 1, 0, %p1") == [int(i < 28) for i in range(32)]


def test_products_are_rounded_once():
    a = torch.full((32,), 1 + 2.0**-12)
    text = "ld.global.b32 %r2, [%rd4]; {} st.global.b32 [%rd5], %r3;"
    # -(1 + 2^-11), the rounded square
    once = lanes(a, text.format("fma.rn.f32 %r3, %r2, %r2, 0fBF801000;"))
    assert set(once) == {2.0**-24}
    assert set(lanes(-a, text.format("copysign.f32 %r3, %r2, 0f3F800000;"))) == {-1.0}


@pytest.mark.parametrize(
    ("name", "dtype", "function"),
    [
        ("min.s64", torch.int64, min),
        ("max.u32", torch.int32, max),
        ("add.s64", torch.int64, lambda a, b: a + b),
        ("or.b32", torch.int32, lambda a, b: a | b),
        ("exch.b64", torch.int64, lambda a, b: b),
    ],
)
def test_atomics(name, dtype, function):
    x, y = torch.arange(32, dtype=dtype), torch.full((32,), 9, dtype=dtype)
    r, bits = ("%rd", 64) if dtype == torch.int64 else ("%r", 32)
    text = f"ld.global.b{bits} {r}8, [%rd4]; atom.global.gpu.relaxed.{name} {r}9, [%rd5], {r}8;"
    run(f"{text} st.global.b{bits} [%rd4], {r}9;", x, y)
    assert x.tolist() == [9] * 32
    assert y.tolist() == [function(9, i) for i in range(32)]


def test_an_atomic_comes_after_the_store_of_its_own_warp():
    x, y = torch.zeros(32, dtype=torch.int32), torch.full((32,), 9, dtype=torch.int32)
    run("st.global.b32 [%rd5], %r1; red.global.gpu.relaxed.add.u32 [%rd5], 1;", x, y)
    assert y.tolist() == list(range(1, 33))


@pytest.mark.parametrize(
    "text", ["sin.approx.f32 %r3, %r2;", "cvt.rz.f32.f64 %r3, %rd2;", "setp.eq.and.s32 %p1, %r1, %r2, %p2;"]
)
def test_what_it_cannot_do_is_named(text):
    with pytest.raises(MachineError, match=text.split()[0]):
        run(text, torch.zeros(32), torch.zeros(32))


def times(*instructions, programs=1):
    """When a launch has begun to store, and is over; the tensors hold addresses of themselves."""
    x = torch.zeros(32, dtype=torch.int64)
    x += x.data_ptr()
    launch = run("\n".join(instructions), x, torch.zeros(64, dtype=torch.int64), programs)
    return launch.summed, launch.finished


FOLLOW = "ld.global.b64 %rd1, [%rd1];"
STORE = "st.global.b64 [%rd5], %rd1;"


def test_the_clock_counts_loads_that_wait_for_each_other():
    assert times(*[FOLLOW] * 5, STORE) == (5, 5)
    # of two chains, the longer one, whatever the order they are written in
    assert times(*["ld.global.b64 %rd8, [%rd2];", FOLLOW] * 5, STORE) == (5, 5)
    assert times(*(f"ld.global.b64 %rd{i}, [%rd1];" for i in range(6, 12)), "add.s64 %rd1, %rd6, %rd11;", STORE) == (
        1,
        1,
    )
    # what is not used is not waited for
    assert times("ld.global.b64 %rd8, [%rd1];") == (0, 0)


LOOP = ("mov.b32 %r2, 0;", "$loop:", "{}", "add.s32 %r2, %r2, 1;", "setp.lt.s32 %p1, %r2, 7;", "@%p1 bra $loop;")


def test_the_clock_counts_turns_of_a_loop():
    text = "\n".join(LOOP)
    assert times(text.format("ld.global.b64 %rd8, [%rd1]; add.s64 %rd9, %rd9, %rd8;")) == (0, 7)
    # used a turn later: two of them on their way at a time
    assert times(text.format("add.s64 %rd9, %rd9, %rd8; ld.global.b64 %rd8, [%rd1];")) == (0, 3)
    assert times(text.format("ld.global.b64 %rd8, [%rd1];")) == (0, 0)


def test_the_clock_waits_for_other_programs():
    """At an atomic that releases a store the warp waits for the store, and then for its own answer."""
    count = "atom.global.gpu.{}.add.u32 %r5, [%rd2 + 256], 1;"
    assert times(FOLLOW, STORE, count.format("acq_rel")) == (1, 3)
    assert times(FOLLOW, STORE, count.format("relaxed")) == (1, 1)
    assert times(FOLLOW, STORE, count.format("relaxed"), "mov.b32 %r6, %r5;") == (1, 2)
    # all set out at once
    assert times(STORE, count.format("acq_rel"), programs=5) == (0, 2)
    # whoever comes last comes after the program that had to load
    first = "mov.b32 %r9, %ctaid.x; setp.eq.s32 %p1, %r9, 0; @!%p1 bra $on;"
    last = "$on: atom.global.gpu.acq_rel.add.u32 %r5, [%rd2 + 256], 1;"
    assert times(first, *[FOLLOW] * 5, STORE, last, programs=2) == (5, 7)


def test_the_clock_of_a_shared_memory():
    """What was stored there is ready when it was, by registers of other names too."""
    assert times(FOLLOW, "st.shared.b64 [%r9], %rd1; ld.shared.b64 %rd8, [%r9]; st.global.b64 [%rd5], %rd8;") == (1, 1)


def test_matrices_go_to_shared_memory_and_back():
    """Lane l has pair l % 4 of row l // 4; rows may lie anywhere."""
    x = torch.arange(32, dtype=torch.int32)
    kernel = (
        """
.extern .shared .align 16 .b8 memory[];
"""
        + HEAD.replace("SIZE", "4")
        + """
ld.global.b32 %r2, [%rd4];
mov.b32 %r3, memory;
mul.lo.u32 %r4, %r1, 32;
and.b32 %r4, %r4, 255;
add.u32 %r4, %r4, %r3;
stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {%r2};
bar.sync 0;
ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r4];
st.global.b32 [%rd5], %r5;
ret;
}"""
    )
    y = torch.zeros_like(x)
    Launch(Assembler(kernel), 1, (x, y), (), 256)
    assert torch.equal(x, y)
