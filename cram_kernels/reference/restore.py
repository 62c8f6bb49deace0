"""Bring the weights back; form the gradient of the update (contract: Restore, Gradient of an update)."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .key import canonical, entry, flat, unpack_bits
from .perturb import unscale


def update_gradient(
    grad: Tensor | None,
    first_grad: Tensor | None,
    mask: Tensor | None,
    inv_scale: Tensor | None,
    first_inv_scale: Tensor | None,
) -> Tensor | None:
    """g1 + (M ? g2 : +0) as float32 [numel] in memory order; None where there is neither."""
    g1 = None if first_grad is None else unscale(flat(first_grad), first_inv_scale)
    g2 = None if grad is None else unscale(flat(grad), inv_scale)
    if g2 is not None and mask is not None:
        g2 = torch.where(unpack_bits(mask, g2.numel()), g2, torch.zeros((), device=g2.device))
    if g1 is None or g2 is None:
        return g2 if g1 is None else g1
    return g1 + g2


@torch.no_grad()
def restore_(params, saved, perturbed, *, masters=()):
    if int(perturbed) == 0:
        return
    for i, p in enumerate(params):
        if (master := entry(masters, i)) is not None:
            p.copy_(canonical(master.to(p.dtype)))
        elif (s := entry(saved, i)) is not None:
            p.copy_(s)
    perturbed.fill_(0)


@torch.no_grad()
def restore_combine_(
    params,
    saved,
    grads,
    first_grads,
    masks,
    perturbed,
    *,
    inv_scale=None,
    first_inv_scale=None,
    found_inf=None,
    masters=(),
):
    """Every grads[i] that is present becomes the gradient of the update; with found_inf they stay as they are."""
    restore_(params, saved, perturbed, masters=masters)
    if skipped(found_inf):
        return
    for i in range(len(params)):
        if (grad := entry(grads, i)) is not None:
            combined = update_gradient(grad, entry(first_grads, i), entry(masks, i), inv_scale, first_inv_scale)
            assert combined is not None  # there is a gradient
            flat(grad).copy_(canonical(combined.to(grad.dtype)))


class Weight(NamedTuple):
    """One parameter that has a gradient, on its way through an update; everything is [numel] in memory order."""

    i: int  # in the lists
    gradient: Tensor  # float32
    weight: Tensor  # float32, unperturbed
    stores: list[Tensor]  # where the new weight goes: the master, if any, and the parameter

    def store(self, weight: Tensor) -> None:
        for t in self.stores:
            t.copy_(canonical(weight.to(t.dtype)))


def skipped(found_inf: Tensor | None) -> bool:
    return found_inf is not None and float(found_inf) != 0


def restored(params, saved, grads, first_grads, masks, perturbed, inv_scale, first_inv_scale, found_inf, masters) -> Iterator[Weight]:
    """Restore everything, then yield each parameter that is to be updated."""
    restore_(params, saved, perturbed, masters=masters)
    if skipped(found_inf):
        return
    for i, p in enumerate(params):
        gradient = update_gradient(entry(grads, i), entry(first_grads, i), entry(masks, i), inv_scale, first_inv_scale)
        if gradient is not None:
            master = entry(masters, i)
            stores = [flat(p)] if master is None else [flat(master), flat(p)]
            yield Weight(i, gradient, stores[0].to(torch.float32), stores)
