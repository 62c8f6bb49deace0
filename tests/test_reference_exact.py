"""The reference's arithmetic against exact rationals: every operation of the contract, rounded once, on every kind of number."""

import itertools
import math

import pytest
import torch
from calls import f32, flag
from cases import DTYPES, VALUES
from compare import assert_bitwise_equal
from exact import add, div, floats, mul, rounded, sqrt, sub, tensor

from cram_kernels import reference

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def numbers(dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Three lists of numbers [n]: all pairs of the special ones, then random bits, denormals and normal ones; the third is shuffled."""
    info = torch.finfo(dtype)
    tiny, eps = info.smallest_normal, info.eps
    special = [0.0, tiny * eps, tiny * (1 - eps), tiny, 1.0, 1 + eps, 3.0, 1e-3, info.max, math.inf]
    signed = torch.tensor([s * x for x in special for s in (1.0, -1.0)] + [math.nan], dtype=torch.float64).to(dtype)
    pairs = torch.tensor(list(itertools.product(signed.tolist(), repeat=2)), dtype=torch.float64).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    random = [[VALUES[kind](50, dtype, generator) for kind in ("bits", "denormal", "normal", "range")] for _ in range(3)]
    a, b, c = (torch.cat([first, *others]) for first, others in zip((*pairs.T, pairs[:, 0]), random, strict=True))
    return [a, b, c[torch.randperm(c.numel(), generator=generator)]]


def test_rounding_is_that_of_ieee() -> None:
    """`exact.rounded` itself, where the answer is known by definition: the halfway cases, both ends, and every float16."""
    for dtype in DTYPES.values():
        info = torch.finfo(dtype)
        assert rounded(1 + info.eps / 2, dtype) == 1.0  # a tie goes to the even neighbour
        assert rounded(1 + 1.5 * info.eps, dtype) == 1 + 2 * info.eps
        halfway = info.max * (1 + info.eps / 2 / (2 - info.eps))  # to the next power of two, exact in float64
        assert rounded(halfway, dtype) == math.inf and rounded(math.nextafter(halfway, 0), dtype) == info.max
        smallest = info.smallest_normal * info.eps
        assert math.copysign(1, rounded(-smallest / 2, dtype)) == -1 and rounded(-smallest / 2, dtype) == 0
        assert rounded(smallest * 0.75, dtype) == smallest
    half = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).double().tolist()
    assert [rounded(x, torch.float16) for x in half] == half
    roots = [*torch.rand(1000, generator=torch.Generator().manual_seed(0)).tolist(), 9.0, 1e-45, 3e38]
    assert [sqrt(x) for x in roots] == [rounded(math.sqrt(x)) for x in roots]  # 53 bits are enough to round twice


@DTYPE
@pytest.mark.parametrize("rho", [0.05, 0.0, -1.0, 1e-40, 3e38, math.inf, math.nan])
@pytest.mark.parametrize("inv_scale", [None, 1 / 3])
@pytest.mark.parametrize("master", [False, True])
def test_perturb(dtype: torch.dtype, rho: float, inv_scale: float | None, master: bool) -> None:
    w, g, _ = numbers(dtype, 1)
    masters = [numbers(torch.float32, 2)[0]] if master else []
    rho_t, inv_t, found_inf = f32(rho), None if inv_scale is None else f32(inv_scale), torch.zeros(1)
    expected = []
    for weight, gradient in zip(floats(masters[0] if master else w), floats(g), strict=True):
        unscaled = gradient if inv_t is None else mul(gradient, float(inv_t))
        expected.append(rounded(add(weight, mul(float(rho_t), unscaled)), dtype))
    p, saved, perturbed = w.clone(), torch.full_like(w, 7), flag(0)
    reference.perturb_masked_(
        [p], [g], [] if master else [saved], [], perturbed, rho_t, inv_scale=inv_t, found_inf=found_inf, masters=masters
    )
    assert_bitwise_equal(p, tensor(expected, p), "u")
    assert_bitwise_equal(saved, torch.full_like(w, 7) if master else w, "saved")
    assert int(perturbed) == 1 and float(found_inf) == 1


def update_gradients(g1: list[float], g2: list[float], keep: list[bool], scale1: float, scale2: float) -> list[float]:
    return [add(mul(a, scale1), mul(b, scale2) if m else 0.0) for a, b, m in zip(g1, g2, keep, strict=True)]


@DTYPE
def test_restore_combine(dtype: torch.dtype) -> None:
    saved, g1, g2 = numbers(dtype, 3)
    keep = torch.rand(saved.numel(), generator=torch.Generator().manual_seed(0)) < 0.5
    expected = update_gradients(floats(g1), floats(g2), keep.tolist(), float(f32(0.3)), float(f32(1e-3)))
    p, grad, perturbed = torch.full_like(saved, 7), g2.clone(), flag(1)
    reference.restore_combine_(
        [p], [saved], [grad], [g1], [reference.key.pack_bits(keep)], perturbed, first_inv_scale=f32(0.3), inv_scale=f32(1e-3)
    )
    assert_bitwise_equal(p, saved, "restored")
    assert_bitwise_equal(grad, tensor([rounded(x, dtype) for x in expected], grad), "combined")
    assert int(perturbed) == 0


SGD_OPTIONS = [
    dict(momentum=mu, dampening=damp, weight_decay=wd, nesterov=nesterov, maximize=maximize, fresh=fresh)
    for mu in (0.0, 0.9)
    for damp in (0.0, 1 / 3)  # 1 - damp rounds otherwise if damp is rounded first
    for wd in (0.0, 5e-4, 1e-60)
    for nesterov in (0, 1)
    for maximize in (0, 1)
    for fresh in (0, 1)
    if mu != 0 or damp == nesterov == fresh == 0
]


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=lambda o: "-".join(f"{v:g}" for v in o.values()))
def test_sgd(options: dict) -> None:
    dtype = list(DTYPES.values())[SGD_OPTIONS.index(options) % 3]
    w, g1, buffer = numbers(dtype, 4)
    mu, damp, wd = (rounded(options[name]) for name in ("momentum", "dampening", "weight_decay"))
    lr, one_less = float(f32(0.1)), rounded(1 - options["dampening"])
    new_w, new_b = [], []
    for x, G, b in zip(floats(w), floats(g1), floats(buffer), strict=True):
        if options["maximize"]:
            G = -G
        if wd != 0:  # after rounding: 1e-60 is absent
            G = add(G, mul(wd, x))
        if mu != 0:
            b = G if options["fresh"] else add(mul(mu, b), mul(one_less, G))
            G = add(G, mul(mu, b)) if options["nesterov"] else b
        new_w.append(rounded(sub(x, mul(lr, G)), dtype))
        new_b.append(rounded(b, dtype))
    assert damp == rounded(options["dampening"])
    p, perturbed = torch.full_like(w, 7), flag(1)
    named = {name: [value] for name, value in options.items() if name != "fresh"}
    reference.restore_sgd_([p], [w], [], [g1], [], perturbed, [buffer], [options["fresh"]], f32(0.1), **named)
    assert_bitwise_equal(p, tensor(new_w, p), "params")
    if mu != 0:
        assert_bitwise_equal(buffer, tensor(new_b, buffer), "momentum_buffers")


def power(base: float, exponent: int) -> float:
    """By square-and-multiply, lowest bit first."""
    result = 1.0
    for bit in reversed(f"{exponent:b}"):
        result = result * base if bit == "1" else result
        base *= base
    return result


ADAM_OPTIONS = [
    dict(decoupled=decoupled, weight_decay=wd, amsgrad=amsgrad, maximize=maximize, eps=eps)
    for decoupled in (False, True)
    for wd in (0.0, 0.01)
    for amsgrad in (0, 1)
    for maximize in (0, 1)
    for eps in (1e-8, 0.0)
]


@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=lambda o: "-".join(f"{v:g}" for v in o.values()))
def test_adam(options: dict) -> None:
    case = ADAM_OPTIONS.index(options)
    dtype, step = list(DTYPES.values())[case % 3], [1, 2, 7, 1000, 2**20 + 3][case % 5]
    w, g, m = numbers(dtype, 5)
    v, top = (t.abs() for t in numbers(dtype, 6)[1:])
    lr, wd, eps, b1, b2 = map(rounded, (1e-3, options["weight_decay"], options["eps"], 0.9, 0.999))
    less1, less2 = rounded(1 - 0.9), rounded(1 - 0.999)
    c1, c2 = rounded(1 - power(0.9, step)), sqrt(rounded(1 - power(0.999, step)))
    new: list[list[float]] = [[], [], [], []]
    for x, G, mi, vi, ti in zip(*map(floats, (w, g, m, v, top)), strict=True):
        if options["maximize"]:
            G = -G
        if wd != 0 and options["decoupled"]:
            x = sub(x, mul(mul(lr, wd), x))
        elif wd != 0:
            G = add(G, mul(wd, x))
        mi = add(mul(b1, mi), mul(less1, G))
        vi = add(mul(b2, vi), mul(less2, mul(G, G)))
        ti = math.nan if math.isnan(ti) or math.isnan(vi) else max(ti, vi)
        root = div(sqrt(ti if options["amsgrad"] else vi), c2)
        x = sub(x, mul(div(lr, c1), div(mi, add(root, eps))))
        for values, value in zip(new, (x, mi, vi, ti), strict=True):
            values.append(rounded(value, dtype))
    p, count = torch.full_like(w, 7), f32(float(step - 1))
    named = {name: value if name == "decoupled" else [value] for name, value in options.items()}
    reference.restore_adam_([p], [w], [g], [], [], flag(1), [m], [v], [top], [count], f32(1e-3), **named)
    for name, actual, values in zip(("params", "exp_avgs", "exp_avg_sqs"), (p, m, v), new, strict=False):
        assert_bitwise_equal(actual, tensor(values, actual), name)
    if options["amsgrad"]:
        assert_bitwise_equal(top, tensor(new[3], top), "max_exp_avg_sqs")
    assert float(count) == step


@pytest.mark.parametrize("lengths", [[], [0], [1], [1023], [1024], [1025], [3000, 1, 0, 5000, 17]], ids=str)
@pytest.mark.parametrize("inv_scale", [None, 1 / 3])
def test_norm_folds_in_the_fixed_order(lengths: list[int], inv_scale: float | None) -> None:
    """Plain float64 additions in the contract's order; and within the rounding of the additions of the exact sum (math.fsum)."""
    generator = torch.Generator().manual_seed(7)
    grads = [VALUES["range"](n, list(DTYPES.values())[i % 3], generator).nan_to_num(0, 0, 0) * 2.0**-70 for i, n in enumerate(lengths)]
    scale = None if inv_scale is None else float(f32(inv_scale))
    squares = [[(x if scale is None else mul(x, scale)) ** 2 for x in floats(g)] for g in grads]

    def fold(x: list[float]) -> float:
        while len(x) > 1:
            x = [a + b for a, b in zip(x[: len(x) // 2], x[len(x) // 2 :], strict=True)]
        return x[0]

    chunks = [(s[i : i + 1024] + [0.0] * 1024)[:1024] for s in squares for i in range(0, len(s), 1024)]
    sums = [fold(chunk) for chunk in chunks]
    size = 1
    while size < len(sums):
        size *= 2
    total = fold((sums + [0.0] * size)[: max(size, 1)])
    norm = reference.grad_norm(grads, inv_scale=None if inv_scale is None else f32(inv_scale))
    assert_bitwise_equal(norm, torch.tensor(rounded(math.sqrt(total)), dtype=torch.float32), "grad_norm")
    exact = math.fsum(itertools.chain(*squares))
    # one rounding of at most 2^-53 an addition, 10 + log2(size) additions deep, all terms positive
    assert abs(total - exact) <= (10 + math.log2(size)) * 2.0**-53 * exact


def test_norm_of_what_is_not_finite() -> None:
    inf, nan = f32(math.inf, 1), torch.tensor([-math.nan, math.inf], dtype=torch.float16)
    assert float(reference.grad_norm([inf])) == math.inf
    assert_bitwise_equal(reference.grad_norm([inf, nan]), torch.tensor(math.nan), "grad_norm")
    big = torch.full((4,), 3e38)
    assert float(reference.grad_norm([big])) == math.inf  # 6e38 in float64, beyond float32
