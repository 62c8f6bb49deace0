"""Restore + SGD (contract: Updates; torch.optim.SGD)."""

import torch

from .key import canonical, flat, fp32, value
from .restore import restored


@torch.no_grad()
def restore_sgd_(
    params,
    saved,
    grads,
    first_grads,
    masks,
    perturbed,
    momentum_buffers,
    fresh,
    lr,
    *,
    momentum=(0.0,),
    dampening=(0.0,),
    weight_decay=(0.0,),
    nesterov=(0,),
    maximize=(0,),
    inv_scale=None,
    first_inv_scale=None,
    found_inf=None,
    masters=(),
):
    for x in restored(params, saved, grads, first_grads, masks, perturbed, inv_scale, first_inv_scale, found_inf, masters):
        i, w, G = x.i, x.weight, x.gradient
        mu, wd = fp32(value(momentum, i), w), fp32(value(weight_decay, i), w)
        if value(maximize, i):
            G = -G
        if wd != 0:
            G = G + wd * w
        if mu != 0:
            buffer = flat(momentum_buffers[i])
            b = G
            if not value(fresh, i):
                b = mu * buffer.to(torch.float32) + fp32(1 - value(dampening, i), w) * G
            buffer.copy_(canonical(b.to(buffer.dtype)))
            G = G + mu * b if value(nesterov, i) else b
        x.store(w - value(lr, i) * G)
