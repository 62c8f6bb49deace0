"""Save and move uphill (contract: Perturb), and the perturbation with a mask that is already there."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .key import canonical, entry, flat, unpack_bits, value


def unscale(g: Tensor, inv_scale: Tensor | None) -> Tensor:
    """g as float32, times inv_scale where given."""
    wide = g.to(torch.float32)
    return wide if inv_scale is None else wide * inv_scale.reshape(())


def save_(params: list[Tensor], saved: list[Tensor], perturbed: Tensor) -> None:
    """Copy the weights away, then raise the flag: from here on a restore brings them back."""
    if int(perturbed) != 0:
        raise RuntimeError("perturb: perturbed must be 0, got 1: the weights are perturbed already; restore_ them first")
    for i, p in enumerate(params):
        if (s := entry(saved, i)) is not None:
            s.copy_(p)
    perturbed.fill_(1)


def uphill(
    params: list[Tensor],
    grads: list[Tensor],
    rho: Tensor,
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    masters: list[Tensor],
) -> Iterator[Tensor]:
    """u of each parameter, in its dtype and shape."""
    for i, p in enumerate(params):
        g = unscale(grads[i], inv_scale)
        if found_inf is not None and not g.isfinite().all():
            found_inf.fill_(1)
        master = entry(masters, i)
        w = (p if master is None else master).to(torch.float32)
        yield canonical((w + value(rho, i) * g).to(p.dtype))


def write_(p: Tensor, u: Tensor, keep: Tensor | None) -> None:
    """p = u, and +0 where keep [numel, memory order] is False; a NaN is never hidden."""
    p.copy_(u)
    if keep is not None:
        w = flat(p)
        w.copy_(torch.where(keep | w.isnan(), w, torch.zeros((), dtype=w.dtype, device=w.device)))


@torch.no_grad()
def perturb_masked_(params, grads, saved, masks, perturbed, rho, *, inv_scale=None, found_inf=None, masters=()):
    save_(params, saved, perturbed)
    for i, u in enumerate(uphill(params, grads, rho, inv_scale, found_inf, masters)):
        mask = entry(masks, i)
        write_(params[i], u, None if mask is None else unpack_bits(mask, u.numel()))
