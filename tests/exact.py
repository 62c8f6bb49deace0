"""IEEE arithmetic on plain Python numbers, each result rounded correctly from the exact rational one."""

import math
from fractions import Fraction

import torch
from torch import Tensor

FORMATS = {  # bits of precision, exponents of the smallest and the largest normal number
    torch.float64: (53, -1022, 1023),
    torch.float32: (24, -126, 127),
    torch.bfloat16: (8, -126, 127),
    torch.float16: (11, -14, 15),
}


def rounded(x: Fraction | float, dtype: torch.dtype = torch.float32) -> float:
    """x rounded once to dtype, to nearest even; the sign of a zero that is a float stays."""
    if isinstance(x, float):
        if x == 0 or not math.isfinite(x):
            return x
        x = Fraction(x)
    if x == 0:
        return 0.0
    precision, low, high = FORMATS[dtype]
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, low) - precision + 1)
    size = round(abs(x) / step) * step  # round() of a Fraction is exact and to even
    return math.copysign(math.inf if size >= Fraction(2) ** (high + 1) else float(size), x)


def finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


def add(a: float, b: float, dtype: torch.dtype = torch.float32) -> float:
    if finite(a, b) and (exact := Fraction(a) + Fraction(b)) != 0:
        return rounded(exact, dtype)
    return a + b  # Inf, NaN, or a zero with the right sign


def sub(a: float, b: float) -> float:
    return add(a, -b)


def mul(a: float, b: float) -> float:
    return rounded(Fraction(a) * Fraction(b)) if finite(a, b) and a != 0 and b != 0 else a * b


def div(a: float, b: float) -> float:
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1.0, b)
    return rounded(Fraction(a) / Fraction(b)) if finite(a, b) and a != 0 else a / b


def sqrt(a: float) -> float:
    if a == 0 or math.isnan(a) or a == math.inf:
        return a
    if a < 0:
        return math.nan
    shift = 200  # an even number of extra bits, so that what is cut off matters only as "not exact"
    scaled = Fraction(a) * 4**shift
    root = math.isqrt(math.floor(scaled))
    exact = root * root == scaled
    return rounded(Fraction(2 * root + (not exact), 2 << shift))


def floats(t: Tensor) -> list[float]:
    """The elements in memory order."""
    return t.as_strided((t.numel(),), (1,)).tolist()


def tensor(values: list[float], like: Tensor) -> Tensor:
    """values, all of which the dtype of `like` has, with the shape and strides of `like`; every NaN canonical."""
    exact = torch.tensor(values, dtype=torch.float64)
    out = torch.empty_like(like)
    out.as_strided((out.numel(),), (1,)).copy_(exact).masked_fill_(exact.isnan(), math.nan)
    return out
