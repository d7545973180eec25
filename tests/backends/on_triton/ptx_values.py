"""What PTX computes on the values of a warp's lanes, in NumPy: every operation rounds by itself."""

from fractions import Fraction

import numpy as np

# lanes
WARP = 32
TYPES = {
    "pred": np.dtype(bool),
    **{f"{name}{8 * size}": np.dtype(f"{kind}{size}") for name, kind in ("bu", "uu", "si") for size in (1, 2, 4, 8)},
    **{f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
}
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


class MachineError(Exception):
    """The program does what no program may, or what this machine cannot."""


def unsigned(size):
    return np.dtype(f"u{size}")


def wide_product(a, b, dtype):
    return a.astype(f"{dtype.kind}{2 * dtype.itemsize}") * b.astype(f"{dtype.kind}{2 * dtype.itemsize}")


def _quotient(a, b):
    """Towards zero; what no lane asks for may divide by zero."""
    b = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a)) if a.dtype.kind == "i" else quotient


def shifted(a, b, left):
    bits = 8 * a.dtype.itemsize
    over, amount = b >= bits, np.minimum(b, bits - 1).astype(a.dtype)
    result = a << amount if left else a >> amount
    rest = a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" and not left else a.dtype.type(0)
    return np.where(over, rest, result).astype(a.dtype)


def _extreme(function, float_function):
    return lambda a, b: (float_function if a.dtype.kind == "f" else function)(a, b)


def bits_of(values):
    """Bits of each value, the lowest first."""
    bits = np.unpackbits(np.ascontiguousarray(values).view(np.uint8), bitorder="little")
    return bits.reshape(len(values), 8 * values.dtype.itemsize).astype(bool)


def highest(values, dtype):
    """Place of the highest bit that is set, or, of a negative value, that is not; -1 where there is none."""
    values = np.where(values < 0, ~values, values) if dtype.kind == "i" else values
    places = np.arange(8 * dtype.itemsize)
    return np.where(bits_of(values), places, -1).max(1)


def _fused(a, b, c):
    """a * b + c, rounded once."""
    result = a * b + c
    for i in np.flatnonzero(np.isfinite(result)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if exact:
            # rounded twice for float32, which may be off by one; of two that are as near, the even one is right
            x = a.dtype.type(float(exact))
            around = [x, *(np.nextafter(x, x.dtype.type(end)) for end in (-np.inf, np.inf))]
            around = [y for y in around if np.isfinite(y)]
            result[i] = min(around, key=lambda y: (abs(Fraction(float(y)) - exact), y.view(unsigned(y.itemsize)) & 1))
    return result


# what an atomic makes of what there is and its operands
ATOMIC = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": lambda old, expected, new: new if old == expected else old,
}
REDUCTIONS = {name: ATOMIC[name] for name in ("add", "min", "max", "and", "or", "xor")}
ELEMENTWISE = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "div": lambda a, b: a / b if a.dtype.kind == "f" else _quotient(a, b),
    "rem": lambda a, b: a - _quotient(a, b) * b,
    "min": _extreme(np.minimum, np.fmin),
    "max": _extreme(np.maximum, np.fmax),
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "mov": lambda a: a,
    "fma": _fused,
    "copysign": lambda a, b: np.copysign(b, a),
}
ROUNDINGS = {"rmi": np.floor, "rpi": np.ceil, "rni": np.rint, "rzi": np.trunc}
