"""Global top-k (contract: Top-k): a full sort, where the backends sample, verify and fix up."""

import torch
from torch import Tensor

from .key import KEEP_ALL, NAN_KEY, entry, flat, magnitude_key, pack_bits, value
from .perturb import save_, uphill, write_


def kth_largest(keys: Tensor, k: int) -> int:
    """The k-th largest of keys [n]: NAN_KEY where k < 1, KEEP_ALL where k > n."""
    if k < 1:
        return NAN_KEY
    if k > keys.numel():
        return KEEP_ALL
    return int(keys.sort(descending=True).values[k - 1])


@torch.no_grad()
def topk_threshold(weights: list[Tensor], sets: list[int], k: Tensor) -> Tensor:
    """Threshold keys, int32 [num_sets], like k (int64 [num_sets])."""
    thresholds = []
    for s in range(k.numel()):
        keys = [magnitude_key(flat(w)) for w, own in zip(weights, sets, strict=True) if own == s]
        thresholds.append(kth_largest(torch.cat(keys) if keys else k.new_empty(0, dtype=torch.int32), int(k[s])))
    return torch.tensor(thresholds, dtype=torch.int32, device=k.device)


@torch.no_grad()
def topk_histogram(params, grads, rho, sets, prefix, shift, bits, *, inv_scale=None, masters=()):
    bins = torch.zeros(prefix.numel(), 2**bits, dtype=torch.int64, device=prefix.device)
    for i, s in enumerate(sets):
        if s < 0:
            continue
        u = params[i]
        if entry(grads, i) is not None:
            u = next(uphill([u], [grads[i]], value(rho, i), inv_scale, None, masters[i : i + 1]))
        keys = magnitude_key(flat(u)).long()
        digits = (keys[keys >> (shift + bits) == prefix[s]] >> shift) & (2**bits - 1)
        bins[s] += torch.bincount(digits, minlength=2**bits)
    return bins


def prune_(weights: list[Tensor], masks: list[Tensor], sets: list[int], k: Tensor) -> tuple[Tensor, Tensor]:
    thresholds = topk_threshold(weights, sets, k)
    stats = torch.zeros(k.numel(), 3, dtype=torch.int64, device=k.device)
    for i, w in enumerate(weights):
        if sets[i] < 0:
            continue
        keys = magnitude_key(flat(w))
        keep = (keys > thresholds[sets[i]]) & (keys < NAN_KEY)
        write_(w, w, keep)
        stats[sets[i], 0] += keep.sum()
        if (mask := entry(masks, i)) is not None:
            mask.copy_(pack_bits(keep))
    return thresholds, stats


@torch.no_grad()
def prune_topk_(weights, masks, sets, k):
    return prune_(weights, masks, sets, k)


@torch.no_grad()
def perturb_topk_(params, grads, saved, masks, perturbed, rho, sets, k, *, inv_scale=None, found_inf=None, masters=()):
    save_(params, saved, perturbed)
    for p, u in zip(params, uphill(params, grads, rho, inv_scale, found_inf, masters), strict=True):
        write_(p, u, None)
    return prune_(params, masks, sets, k)
