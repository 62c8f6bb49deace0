"""The reference beside torch.optim, every combination of options, one step at a time from the same state.

Both round to float32, but not at the same places: torch adds a product with one rounding (FMA) where we take two, forms lr / c1, 1 - beta
and sqrt(c2) in float64, writes m as m + (1 - beta1) * (G - m), and its CPU square root is not always the nearest. So a step may differ by
a few units in the last place, counted at the largest number that entered the result (a difference of close numbers has fewer digits):
*_ULPS says how many: the number of roundings at which the two differ. Every step starts again from torch's state.
"""

import itertools
from typing import Any

import pytest
import torch
from calls import f32, flag
from cases import DTYPES
from torch import Tensor

from cram_kernels import reference

STEPS = 5
SGD_ULPS = 4  # in the buffer: wd * w fused into G, (1 - damp) * G fused into b; in the weight: mu * b (Nesterov) and lr * G too
ADAM_ULPS = 8  # G with wd, the form of m, the square (v), its root, two divisions, eps, lr / c1


def grads(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.randn(4099, generator=torch.Generator().manual_seed(100 + step))
    return (g * torch.logspace(-4, 1, 4099)).to(dtype)


def start(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """Small weights, so that a step changes many of their digits."""
    return torch.nn.Parameter((0.01 * torch.randn(4099, generator=torch.Generator().manual_seed(99))).to(dtype))


def assert_within(ulps: float, actual: Tensor, expected: Tensor, *operands: Tensor) -> None:
    """|actual - expected| <= ulps steps of the dtype at the largest of the operands and results, for every element."""
    scale = torch.stack([t.detach().abs().double().expand(actual.shape) for t in (actual, expected, *operands)]).amax(0)
    step = torch.exp2(scale.log2().floor()) * torch.finfo(actual.dtype).eps  # 0 at 0
    off = (actual.double() - expected.detach().double()).abs() / step.clamp_min(torch.finfo(actual.dtype).tiny)
    worst = float(off.max())
    assert worst <= ulps, f"{worst:.2f} steps off, at {int(off.argmax())}"


def combinations(**options: tuple) -> list[dict[str, Any]]:
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def name(options: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items() if value) or "defaults"


SGD = [
    o
    for o in combinations(momentum=(0, 0.9), dampening=(0, 0.1), weight_decay=(0, 5e-2), nesterov=(False, True), maximize=(False, True))
    if not (o["nesterov"] and (o["momentum"] == 0 or o["dampening"] != 0))  # torch refuses these
]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("options", SGD, ids=name)
def test_sgd(options: dict[str, Any], fused: bool) -> None:
    p = start()
    base = torch.optim.SGD([p], lr=0.05, fused=fused, foreach=False if not fused else None, **options)
    per_tensor = {key: [value if isinstance(value, float) else float(value)] for key, value in options.items()}
    per_tensor |= {key: [int(options[key])] for key in ("nesterov", "maximize")}
    for step in range(STEPS):
        p.grad = grads(step)
        old = p.detach().clone()
        buffer = base.state[p].get("momentum_buffer")
        fresh, mine = buffer is None, torch.full_like(old, 7) if buffer is None else buffer.clone()
        own = old.clone()
        reference.restore_sgd_([own], [], [], [p.grad.clone()], [], flag(0), [mine], [int(fresh)], f32(0.05), **per_tensor)
        base.step()
        entered = [p.grad, options["weight_decay"] * old, torch.zeros(()) if buffer is None else buffer]  # what G is made of
        assert_within(SGD_ULPS, own, p, old, *(0.05 * x for x in entered))
        if options["momentum"]:
            assert_within(SGD_ULPS, mine, base.state[p]["momentum_buffer"], *entered)


ADAM = combinations(decoupled=(False, True), weight_decay=(0, 5e-2), amsgrad=(False, True), maximize=(False, True))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("options", ADAM, ids=name)
def test_adam(options: dict[str, Any], fused: bool) -> None:
    p = start()
    torch_options = {key: value for key, value in options.items() if key != "decoupled"}
    kind = torch.optim.AdamW if options["decoupled"] else torch.optim.Adam
    base = kind([p], lr=1e-2, betas=(0.9, 0.99), fused=fused, foreach=False if not fused else None, **torch_options)
    per_tensor = {key: [float(value) if key == "weight_decay" else int(value)] for key, value in torch_options.items()}
    for step in range(STEPS):
        p.grad = grads(step)
        old = p.detach().clone()
        state = {key: value.clone() for key, value in base.state[p].items()}
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
        m, v, x, count = (state.get(key, torch.zeros(()) if key == "step" else torch.zeros_like(old)) for key in names)
        entered = [m.clone(), 0.1 * p.grad, 0.1 * options["weight_decay"] * old]  # what m is made of
        own = old.clone()
        reference.restore_adam_(
            [own], [], [], [p.grad.clone()], [], flag(0), [m], [v], [x], [count], f32(1e-2),
            beta1=[0.9], beta2=[0.99], decoupled=options["decoupled"], **per_tensor,
        )  # fmt: skip
        base.step()
        per_m = 1e-2 / (1 - 0.9 ** (step + 1)) / (((x if options["amsgrad"] else v) / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
        assert_within(ADAM_ULPS, own, p, old, *(per_m * x for x in entered))
        assert_within(ADAM_ULPS, m, base.state[p]["exp_avg"], *entered)
        squares = [0.01 * (p.grad.abs() + options["weight_decay"] * old.abs()).square()]  # what v is made of
        assert_within(ADAM_ULPS, v, base.state[p]["exp_avg_sq"], *squares)
        assert float(count) == float(base.state[p]["step"]) == step + 1
        if options["amsgrad"]:
            assert_within(ADAM_ULPS, x, base.state[p]["max_exp_avg_sq"], *squares)


@pytest.mark.parametrize("dtype", [DTYPES["bf16"], DTYPES["fp16"]], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_16_bit_parameters_take_the_float32_step_rounded_once(kind: str, dtype: torch.dtype) -> None:
    """torch.optim on the widened weight, gradient and state, then rounded: at most one step of the 16-bit type apart.

    (torch's own 16-bit steps are no judge: the plain ones round after every operation, and the fused SGD of torch 2.13 on the CPU
    leaves every full vector of a 16-bit parameter as it is.)
    """
    weight, state = start(dtype).detach(), {name: torch.zeros(4099, dtype=dtype) for name in ("momentum_buffer", "exp_avg", "exp_avg_sq")}
    p = torch.nn.Parameter(weight.float())
    base = (
        torch.optim.SGD([p], lr=0.01, momentum=0.9, weight_decay=5e-4)
        if kind == "sgd"
        else torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.99))
    )
    for step in range(STEPS):
        g = grads(step, dtype)
        p.grad, old = g.float(), {"weight": weight.clone()} | {key: value.clone() for key, value in state.items()}
        p.data.copy_(weight)
        for key, value in base.state[p].items():
            if key in state:
                value.copy_(state[key])
        if kind == "sgd":
            reference.restore_sgd_(
                [weight], [], [], [g], [], flag(0), [state["momentum_buffer"]], [int(step == 0)], f32(0.01),
                momentum=[0.9], weight_decay=[5e-4],
            )  # fmt: skip
        else:
            reference.restore_adam_(
                [weight], [], [], [g], [], flag(0), [state["exp_avg"]], [state["exp_avg_sq"]], [], [f32(step)], f32(0.01),
                beta1=[0.9], beta2=[0.99], weight_decay=[0.01], decoupled=True,
            )  # fmt: skip
        base.step()
        assert_within(1, weight, p.detach().to(dtype), old["weight"])
        for key, value in base.state[p].items():
            if key in state:
                assert_within(1, state[key], value.to(dtype), old[key])
