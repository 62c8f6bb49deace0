"""Bring the weights back; form the gradient of the update (docs/contract.md: Restore, Gradient of an update)."""

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import send
from .number import rounded, scaled, skipped, widen
from .table import FIRST_GRAD, GRAD, MASK, MASTER, PARAM, SAVED, Table, chunk_of, column, elements_of, load_bits, only, pointer


@triton.jit
def restored(row, start, i, valid, perturbed, T: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr):
    """The unperturbed weights as float32, and the parameter of stored numbers that they are."""
    if MASTERS:
        w = tl.load(column(row, MASTER, start, tl.float32, ALIGNED) + i, mask=valid, other=0)
        return w, rounded(w, T)
    else:
        param, saved = tl.load(row + PARAM), tl.load(row + SAVED)
        source = tl.where((tl.load(perturbed) != 0) & (saved != 0), saved, param)
        stored = tl.load(pointer(source, start, T, ALIGNED) + i, mask=valid, other=0)
        return widen(stored), stored


@triton.jit
def update_gradient(row, start, size, i, valid, inv_scale, first_inv_scale, T: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """g1 + (M ? g2 : +0) as float32, and whether there is a gradient at all."""
    first, second = tl.load(row + FIRST_GRAD) != 0, tl.load(row + GRAD) != 0
    g1 = scaled(widen(tl.load(column(row, FIRST_GRAD, start, T, ALIGNED) + i, mask=only(valid, first), other=0)), first_inv_scale)
    g2 = scaled(widen(tl.load(column(row, GRAD, start, T, ALIGNED) + i, mask=only(valid, second), other=0)), inv_scale)
    g2 = tl.where(load_bits(row, start, size, BLOCK), g2, 0.0)
    return tl.where(first & second, g1 + g2, tl.where(first, g1, g2)), first | second


@triton.jit
def restore_kernel(
    rows, chunks, perturbed,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    i, valid = elements_of(size, BLOCK)
    if tl.load(perturbed) != 0:
        _w, stored = restored(row, start, i, valid, perturbed, T, MASTERS, ALIGNED)
        tl.store(column(row, PARAM, start, T, ALIGNED) + i, stored, mask=valid)


@triton.jit
def restore_combine_kernel(
    rows, chunks, perturbed, inv_scale, first_inv_scale, found_inf,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    i, valid = elements_of(size, BLOCK)
    if tl.load(perturbed) != 0:
        _w, stored = restored(row, start, i, valid, perturbed, T, MASTERS, ALIGNED)
        tl.store(column(row, PARAM, start, T, ALIGNED) + i, stored, mask=valid)
    if tl.load(row + GRAD) != 0 and not skipped(found_inf):
        g, _there = update_gradient(row, start, size, i, valid, inv_scale, first_inv_scale, T, ALIGNED, BLOCK)
        tl.store(column(row, GRAD, start, T, ALIGNED) + i, rounded(g, T), mask=valid)


@triton.jit
def store_update(
    row, start, i, valid, w, stored, updated, perturbed,
    T: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The new weights w float32 where they are `updated`, else the restored parameter where it was perturbed."""
    if MASTERS:
        tl.store(column(row, MASTER, start, tl.float32, ALIGNED) + i, rounded(w, tl.float32), mask=only(valid, updated))
    param = tl.where(updated, rounded(w, T), stored)
    tl.store(column(row, PARAM, start, T, ALIGNED) + i, param, mask=only(valid, updated | (tl.load(perturbed) != 0)))


def update_table(
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor] = (),
    first_grads: Sequence[Tensor] = (),
    masks: Sequence[Tensor] = (),
    masters: Sequence[Tensor] = (),
    state: Mapping[Any, Sequence[Tensor]] | None = None,
    numbers: Mapping[Any, Sequence[int]] | None = None,
) -> Table:
    """What every update reads, and the columns of its own."""
    lists = {PARAM: params, SAVED: saved, GRAD: grads, FIRST_GRAD: first_grads, MASK: masks, MASTER: masters, **(state or {})}
    values = {place.value: own for place, own in (numbers or {}).items()}
    return Table(params, {place.value: tensors for place, tensors in lists.items()}, values)


def restore_(params: Sequence[Tensor], saved: Sequence[Tensor], perturbed: Tensor, *, masters: Sequence[Tensor] = ()) -> None:
    launches = update_table(params, saved, masters=masters).launches(restore_kernel, perturbed)
    send([*launches, perturbed.zero_])


def restore_combine_(
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    perturbed: Tensor,
    *,
    inv_scale: Tensor | None = None,
    first_inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor] = (),
) -> None:
    table = update_table(params, saved, grads, first_grads, masks, masters)
    launches = table.launches(restore_combine_kernel, perturbed, inv_scale, first_inv_scale, found_inf)
    send([*launches, perturbed.zero_])
