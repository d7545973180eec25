"""Random numbers of an element, by seed, step and stream; no state."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import log


@triton.jit
def _word(element, seed, step, stream):
    """The random words of `element`, uint32: Philox4x32-10, as `reference.philox` says, `step` an int64."""
    quad = element >> 2
    low, high = (quad & 0xFFFFFFFF).to(tl.uint32), (((quad >> 32) ^ (step >> 32 << 16)) & 0xFFFFFFFF).to(tl.uint32)
    step = low * 0 + (step & 0xFFFFFFFF).to(tl.uint32)
    stream = low * 0 + (stream & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, step, stream)
    word = element & 3
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@triton.jit
def unit_uniform(element, seed, step, stream):
    """U[0, 1) with 24 bits, float32 exactly."""
    return (_word(element, seed, step, stream) >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def normal(element, seed, step, stream):
    """Box-Muller on the words of a pair, float64: the even element takes the cosine, the odd one the sine."""
    radius = unit_uniform(element & -2, seed, step, stream).to(tl.float64)
    turns = unit_uniform(element | 1, seed, step, stream).to(tl.float64)
    # 1 - r is exact
    radius = tl.sqrt(-2.0 * log(1.0 - radius))
    # the nearest quarter turn, and Taylor's series of sine and cosine within an eighth of a turn from it
    quarter = tl.floor(4.0 * turns + 0.5)
    x = (4.0 * turns - quarter) * tl.full([], 1.5707963267948966, tl.float64)
    sine, cosine = tl.full(x.shape, 1.0, tl.float64), tl.full(x.shape, 1.0, tl.float64)
    for n in tl.static_range(16, 0, -2):
        cosine = 1.0 - x * x * (1.0 / (n * (n - 1))) * cosine
        sine = 1.0 - x * x * (1.0 / (n * (n + 1))) * sine
    # a sine is the cosine of a quarter turn less
    turn = quarter.to(tl.int64) - (element & 1)
    value = tl.where(turn & 1 == 0, cosine, -sine * x)
    return radius * tl.where(turn & 2 == 0, value, -value)
