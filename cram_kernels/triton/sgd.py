"""Restore + SGD (docs/contract.md: Updates; torch.optim.SGD)."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import send
from .number import negated, rounded, skipped, widen
from .restore import restored, store_update, update_gradient, update_table
from .table import NUMBER, STATE, bits, chunk_of, column, elements_of, flags, number, only

MOMENTUM = NUMBER
ONE_MINUS_DAMPENING = tl.constexpr(NUMBER.value + 1)
WEIGHT_DECAY = tl.constexpr(NUMBER.value + 2)
FLAGS = tl.constexpr(NUMBER.value + 3)  # nesterov, maximize, fresh: bits 0 to 2


@triton.jit
def restore_sgd_kernel(
    rows, chunks, perturbed, lr, inv_scale, first_inv_scale, found_inf,
    LR_EACH: tl.constexpr, T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    i, valid = elements_of(size, BLOCK)
    mu, wd = number(row, MOMENTUM).to(tl.float32), number(row, WEIGHT_DECAY).to(tl.float32)
    options = tl.load(row + FLAGS)
    rate = tl.load(lr + tensor) if LR_EACH else tl.load(lr)

    w, stored = restored(row, start, i, valid, perturbed, T, MASTERS, ALIGNED)
    g, there = update_gradient(row, start, size, i, valid, inv_scale, first_inv_scale, T, ALIGNED, BLOCK)
    updated = there & (not skipped(found_inf))
    g = tl.where((options & 2) != 0, negated(g), g)
    g = tl.where(wd != 0, g + wd * w, g)
    momentum = updated & (mu != 0)
    buffer = column(row, STATE, start, S, ALIGNED) + i
    old = widen(tl.load(buffer, mask=only(valid, momentum & ((options & 4) == 0)), other=0))
    b = tl.where((options & 4) != 0, g, mu * old + number(row, ONE_MINUS_DAMPENING).to(tl.float32) * g)
    tl.store(buffer, rounded(b, S), mask=only(valid, momentum))
    g = tl.where(mu != 0, tl.where((options & 1) != 0, g + mu * b, b), g)
    store_update(row, start, i, valid, w - rate * g, stored, updated, perturbed, T, MASTERS, ALIGNED)


def restore_sgd_(
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    perturbed: Tensor,
    momentum_buffers: Sequence[Tensor],
    fresh: Sequence[int],
    lr: Tensor,
    *,
    momentum: Sequence[float] = (0.0,),
    dampening: Sequence[float] = (0.0,),
    weight_decay: Sequence[float] = (0.0,),
    nesterov: Sequence[int] = (0,),
    maximize: Sequence[int] = (0,),
    inv_scale: Tensor | None = None,
    first_inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor] = (),
) -> None:
    n = len(params)
    numbers = {
        MOMENTUM: bits(momentum, n),
        ONE_MINUS_DAMPENING: bits([1 - x for x in dampening], n),
        WEIGHT_DECAY: bits(weight_decay, n),
        FLAGS: flags(nesterov, maximize, fresh, n=n),
    }
    table = update_table(params, saved, grads, first_grads, masks, masters, {STATE: momentum_buffers}, numbers)
    launches = table.launches(restore_sgd_kernel, perturbed, lr, inv_scale, first_inv_scale, found_inf, LR_EACH=lr.dim() > 0)
    send([*launches, perturbed.zero_])
