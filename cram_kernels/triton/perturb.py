"""Save and move uphill (docs/contract.md: Perturb), and the perturbation with a mask that is already there."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import send
from .number import INF_KEY, NAN_KEY, magnitude_key, rounded, scaled, widen
from .table import GRAD, MASK, MASTER, PARAM, SAVED, Table, chunk_of, column, elements_of, load_bits, only


@triton.jit
def rho_of(tensor, rho, RHO_EACH: tl.constexpr):
    """rho float32: [] or, RHO_EACH, one a tensor."""
    return tl.load(rho + tensor) if RHO_EACH else tl.load(rho)


@triton.jit
def weight_at(row, start, i, valid, SOURCE: tl.constexpr, T: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr):
    """The unperturbed weights as float32: masters, or what SOURCE (PARAM, SAVED) holds."""
    if MASTERS:
        return tl.load(column(row, MASTER, start, tl.float32, ALIGNED) + i, mask=valid, other=0)
    else:
        return widen(tl.load(column(row, SOURCE, start, T, ALIGNED) + i, mask=valid, other=0))


@triton.jit
def save(row, start, i, valid, T: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr):
    """Copy the parameter away, beside a master only where there is a place for it. Returns the unperturbed weights as float32."""
    there = only(valid, tl.load(row + SAVED) != 0) if MASTERS else valid
    param = tl.load(column(row, PARAM, start, T, ALIGNED) + i, mask=there, other=0)
    tl.store(column(row, SAVED, start, T, ALIGNED) + i, param, mask=there)
    if MASTERS:
        return tl.load(column(row, MASTER, start, tl.float32, ALIGNED) + i, mask=valid, other=0)
    else:
        return widen(param)


@triton.jit
def gradient_at(row, start, i, valid, inv_scale, T: tl.constexpr, ALIGNED: tl.constexpr):
    return scaled(widen(tl.load(column(row, GRAD, start, T, ALIGNED) + i, mask=valid, other=0)), inv_scale)


@triton.jit
def note_bad(found_inf, valid, g):
    """Sets found_inf to 1 where a gradient, float32, is not finite."""
    bad = valid & ((g.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= INF_KEY)
    tl.store(found_inf, 1.0, mask=tl.max(tl.max(bad.to(tl.int32), 1), 0) != 0)


@triton.jit
def uphill(w, row, start, i, valid, rho, inv_scale, found_inf, T: tl.constexpr, ALIGNED: tl.constexpr):
    """w float32 -> u as stored numbers: product and sum are rounded on their own. A gradient that is not finite sets found_inf to 1."""
    g = gradient_at(row, start, i, valid, inv_scale, T, ALIGNED)
    if found_inf is not None:
        note_bad(found_inf, valid, g)
    return rounded(w + rho * g, T)


@triton.jit
def perturb_masked_kernel(
    rows, chunks, rho, inv_scale, found_inf,
    RHO_EACH: tl.constexpr, T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    i, valid = elements_of(size, BLOCK)
    w = save(row, start, i, valid, T, MASTERS, ALIGNED)
    u = uphill(w, row, start, i, valid, rho_of(tensor, rho, RHO_EACH), inv_scale, found_inf, T, ALIGNED)
    keep = load_bits(row, start, size, BLOCK) | (magnitude_key(widen(u)) == NAN_KEY)
    tl.store(column(row, PARAM, start, T, ALIGNED) + i, tl.where(keep, u, 0).to(T), mask=valid)


def raise_flag(op: str, perturbed: Tensor) -> None:
    """0 -> 1, the first of what an op sends. Where the flag can be read without a synchronisation, 1 is refused."""
    if perturbed.device.type == "cpu" and int(perturbed) != 0:
        raise RuntimeError(f"{op}: perturbed must be 0, got {int(perturbed)}: the weights are perturbed already; restore_ them first")
    perturbed.fill_(1)


def perturb_table(params: Any, grads: Any, saved: Any, masks: Any, masters: Any, numbers: Any = None) -> Table:
    lists = {PARAM: params, GRAD: grads, SAVED: saved, MASK: masks, MASTER: masters}
    return Table(params, {place.value: tensors for place, tensors in lists.items()}, numbers)


def perturb_masked_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    masks: Sequence[Tensor],
    perturbed: Tensor,
    rho: Tensor,
    *,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor] = (),
) -> None:
    table = perturb_table(params, grads, saved, masks, masters)
    launches = table.launches(perturb_masked_kernel, rho, inv_scale, found_inf, RHO_EACH=rho.dim() > 0)
    send([partial(raise_flag, "perturb_masked_", perturbed), *launches])
