"""Logarithm and bias correction, with the same bits on every GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log(x):
    """Natural logarithm of a float64 in (0, 1], to a few roundings of the result.

    Of its own, as the compiler's libraries differ from one GPU to the next.
    """
    bits = x.to(tl.int64, bitcast=True)
    # x = m * 2^exponent with m in [sqrt(1/2), sqrt(2))
    exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    # 2 artanh(s); s is at most 0.172
    s = (m - 1.0) / (m + 1.0)
    series = s * 0.0
    for n in tl.static_range(23, 0, -2):
        series = 1.0 / n + s * s * series
    return exponent.to(tl.float64) * 0.6931471805599453 + 2.0 * s * series


@triton.jit
def bias_correction(age, log_decay):
    """1 - exp(age * log_decay) for age >= 0 and log_decay <= 0, float64, to a few roundings of the result."""
    # what is below is 1 in float64
    x = tl.maximum(age.to(tl.float64) * log_decay, -50.0)
    # exp(x) = 2^n * (1 + r * series(r)) with r within log(2) / 2 of zero
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.69314718036912382) - n * 1.9082149292705877e-10
    series = r * 0.0 + 1.0
    for i in tl.static_range(15, 1, -1):
        series = 1.0 + r * (1.0 / i) * series
    power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    # nothing cancels: 1 - 2^n is exact, and 0 where the result is small
    return (1.0 - power) - power * (r * series)
