"""Stored numbers, rounding and the order of magnitudes (docs/contract.md: Perturb, Order), as csrc/number.h has them.

A stored number is a float32, a float16, or an int16 that holds the bits of a bfloat16: rounding and widening it in integers gives the
contract's bits on every GPU and under the interpreter, whose own bfloat16 conversions truncate.
"""

import torch
import triton
import triton.language as tl

STORED = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.int16}
NAN_KEY = tl.constexpr(0x7FC00000)  # of every NaN, and the bits of the canonical one
INF_KEY = tl.constexpr(0x7F800000)
KEEP_ALL = tl.constexpr(-1)  # the threshold below every key


@triton.jit
def widen(x):
    """Stored numbers -> float32."""
    if x.dtype == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(x, T: tl.constexpr):
    """float32 -> stored numbers of type T, to nearest even; NaN becomes canonical."""
    nan = x != x
    bits = x.to(tl.int32, bitcast=True)
    if T == tl.float32:
        return tl.where(nan, NAN_KEY, bits).to(tl.float32, bitcast=True)
    elif T == tl.float16:
        return tl.where(nan, 0x7E00, x.to(tl.float16).to(tl.int16, bitcast=True)).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return tl.where(nan, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def magnitude_key(x):
    """float32 -> the bits without the sign, int32; all NaNs share NAN_KEY."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(bits > INF_KEY, NAN_KEY, bits)


@triton.jit
def scaled(g, inv_scale):
    """g float32, times the float32 [] inv_scale where it is given."""
    if inv_scale is not None:
        g = g * tl.load(inv_scale)
    return g


@triton.jit
def skipped(found_inf):
    """Whether found_inf is given and not 0."""
    skip = False
    if found_inf is not None:
        skip = tl.load(found_inf) != 0
    return skip


@triton.jit
def negated(x):
    """float32 -> -x. Not as `-x`, which triton 3.6 takes for 0 - x: +0 would stay +0."""
    return x * -1.0
