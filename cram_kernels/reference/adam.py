"""Restore + Adam / AdamW (contract: Updates; torch.optim.Adam, torch.optim.AdamW)."""

import torch
from torch import Tensor

from .key import canonical, flat, fp32, value
from .restore import restored


def power(base: float, exponent: int) -> float:
    """base ** exponent in float64 by square-and-multiply: the same bits everywhere, unlike pow()."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def root(x: Tensor) -> Tensor:
    """The square root, rounded to float32 to nearest.

    torch's own float32 sqrt on the CPU is off by one ulp in a fifth of all cases; a float64 root rounded once is exact, since no root of a
    float32 comes that close to the middle of two.
    """
    return x.double().sqrt().float()


def store_state(state: Tensor, new: Tensor) -> None:
    state.copy_(canonical(new.to(state.dtype)))


@torch.no_grad()
def restore_adam_(
    params,
    saved,
    grads,
    first_grads,
    masks,
    perturbed,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    steps,
    lr,
    *,
    beta1=(0.9,),
    beta2=(0.999,),
    eps=(1e-8,),
    weight_decay=(0.0,),
    decoupled=False,
    amsgrad=(0,),
    maximize=(0,),
    inv_scale=None,
    first_inv_scale=None,
    found_inf=None,
    masters=(),
):
    for x in restored(params, saved, grads, first_grads, masks, perturbed, inv_scale, first_inv_scale, found_inf, masters):
        i, w, G = x.i, x.weight, x.gradient
        b1, b2, wd, rate = value(beta1, i), value(beta2, i), fp32(value(weight_decay, i), w), value(lr, i)
        steps[i] += 1
        step = int(steps[i])
        if value(maximize, i):
            G = -G
        if wd != 0 and decoupled:
            w = w - (rate * wd) * w
        elif wd != 0:
            G = G + wd * w
        exp_avg, exp_avg_sq = flat(exp_avgs[i]), flat(exp_avg_sqs[i])
        m = fp32(b1, w) * exp_avg.to(torch.float32) + fp32(1 - b1, w) * G
        v = fp32(b2, w) * exp_avg_sq.to(torch.float32) + fp32(1 - b2, w) * (G * G)
        store_state(exp_avg, m)
        store_state(exp_avg_sq, v)
        if value(amsgrad, i):
            max_exp_avg_sq = flat(max_exp_avg_sqs[i])
            v = torch.maximum(max_exp_avg_sq.to(torch.float32), v)  # NaN if either is
            store_state(max_exp_avg_sq, v)
        c1, c2 = fp32(1 - power(b1, step), w), fp32(1 - power(b2, step), w)
        x.store(w - (rate / c1) * (m / (root(v) / root(c2) + fp32(value(eps, i), w))))
