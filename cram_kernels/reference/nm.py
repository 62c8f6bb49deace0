"""N of M along the input channels (contract: N:M)."""

import torch
from torch import Tensor

from .key import NAN_KEY, entry, flat, magnitude_key, pack_bits
from .perturb import save_, uphill, write_


def nm_keep(w: Tensor, n: int, m: int) -> Tensor:
    """Which weights of w [K, C, ...] stay, bool, the shape of w: n of every m along C, stable ascending by key."""
    keys = magnitude_key(w).movedim(1, -1)  # [K, ..., C]
    groups = keys.reshape(-1, m)
    order = groups.argsort(dim=1, stable=True)
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(1, order[:, : m - n], False)
    return (keep & (groups < NAN_KEY)).reshape(keys.shape).movedim(-1, 1)


def memory_order(keep: Tensor, like: Tensor) -> Tensor:
    """keep (any strides) as bool [numel] in the memory order of `like`."""
    out = torch.empty_like(like, dtype=torch.bool)  # keeps the strides of a dense tensor
    return flat(out.copy_(keep))


@torch.no_grad()
def prune_nm_(weights, masks, prune, n, m):
    for i, w in enumerate(weights):
        if not prune[i]:
            continue
        keep = memory_order(nm_keep(w, n, m), w)
        write_(w, w, keep)
        if (mask := entry(masks, i)) is not None:
            mask.copy_(pack_bits(keep))


@torch.no_grad()
def perturb_nm_(params, grads, saved, masks, perturbed, rho, prune, n, m, *, inv_scale=None, found_inf=None, masters=()):
    save_(params, saved, perturbed)
    for p, u in zip(params, uphill(params, grads, rho, inv_scale, found_inf, masters), strict=True):
        write_(p, u, None)
    prune_nm_(params, masks, prune, n, m)
