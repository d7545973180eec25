"""Pointers from the integers of tables, and counters at which programs meet."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rows import BFLOAT16, FLOAT16


@triton.jit
def pointer(address, dtype: tl.constexpr):
    """An address as a pointer to elements of a type."""
    return address.to(tl.pointer_type(dtype))


@triton.jit
def arrive(counter, amount):
    """What the programs that came here before this one have added; it sees what they stored until then."""
    # triton up to 3.8 puts no barrier round an atomic: the other warps' stores must be over before this program counts
    # itself in, and none of its warps may read before it has
    tl.debug_barrier()
    before = tl.atomic_add(counter, amount, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return before


@triton.jit
def field(addresses, number, dtype: tl.constexpr):
    """A field of the state."""
    return pointer(tl.load(addresses + number), dtype)


@triton.jit
def in_workspace(workspace, place):
    """Where a place in the workspace is that is counted in 8 bytes."""
    return pointer(workspace + place.to(tl.int64) * 8, tl.float64)


@triton.jit
def widened(bits, TYPE: tl.constexpr):
    """What was loaded, in the type that sums run in; bfloat16 comes as int16."""
    if TYPE == BFLOAT16:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif TYPE == FLOAT16:
        return bits.to(tl.float32)
    else:
        return bits
