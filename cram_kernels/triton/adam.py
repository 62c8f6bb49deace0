"""Restore + Adam / AdamW (docs/contract.md: Updates; torch.optim.Adam, torch.optim.AdamW)."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, send
from .number import negated, rounded, skipped, widen
from .restore import restored, store_update, update_gradient, update_table
from .table import FIRST_GRAD, GRAD, NUMBER, STATE, STEP, WIDTH, bits, chunk_of, column, elements_of, flags, number, only

BETA1 = NUMBER
BETA2 = tl.constexpr(NUMBER.value + 1)
EPS = tl.constexpr(NUMBER.value + 2)
WEIGHT_DECAY = tl.constexpr(NUMBER.value + 3)
FLAGS = tl.constexpr(NUMBER.value + 4)  # amsgrad, maximize: bits 0 and 1
EXP_AVG = STATE
EXP_AVG_SQ = tl.constexpr(STATE.value + 1)
MAX_EXP_AVG_SQ = tl.constexpr(STATE.value + 2)
TENSORS = 128  # a program of `step_kernel`


@triton.jit
def power(base, exponent):
    """base ** exponent, float64 and int64, by square-and-multiply: the same bits everywhere."""
    result = base * 0 + 1
    while tl.max(exponent, 0) > 0:
        result = tl.where((exponent > 0) & ((exponent & 1) != 0), result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def step_kernel(rows, lr, found_inf, out, tensors, LR_EACH: tl.constexpr, TENSORS: tl.constexpr):
    """Count the steps of the tensors that are updated; out float32 [tensors, 2]: lr / c1, sqrt(c2)."""
    tensor = tl.program_id(0).to(tl.int64) * TENSORS + tl.arange(0, TENSORS)
    row, there = rows + tensor * WIDTH, tensor < tensors
    second, first = tl.load(row + GRAD, mask=there, other=0), tl.load(row + FIRST_GRAD, mask=there, other=0)
    there = there & ((first | second) != 0)
    if found_inf is not None:
        there = only(there, tl.load(found_inf) == 0)
    p = tl.load(row + STEP, mask=there, other=0).to(tl.pointer_type(tl.float32))
    steps = tl.load(p, mask=there, other=0) + 1
    tl.store(p, steps, mask=there)
    beta1 = tl.load(row + BETA1, mask=there, other=0).to(tl.float64, bitcast=True)
    beta2 = tl.load(row + BETA2, mask=there, other=0).to(tl.float64, bitcast=True)
    rate = tl.load(lr + tensor, mask=there, other=0) if LR_EACH else tl.load(lr)
    c1 = (1 - power(beta1, steps.to(tl.int64))).to(tl.float32)
    c2 = (1 - power(beta2, steps.to(tl.int64))).to(tl.float32)
    tl.store(out + tensor * 2, tl.div_rn(rate + tl.zeros_like(c1), c1), mask=there)
    tl.store(out + tensor * 2 + 1, tl.sqrt_rn(c2), mask=there)


@triton.jit
def restore_adam_kernel(
    rows, chunks, perturbed, lr, steps, inv_scale, first_inv_scale, found_inf,
    DECOUPLED: tl.constexpr, LR_EACH: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, MASTERS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    i, valid = elements_of(size, BLOCK)
    beta1, beta2 = number(row, BETA1), number(row, BETA2)
    eps, wd = number(row, EPS).to(tl.float32), number(row, WEIGHT_DECAY).to(tl.float32)
    options = tl.load(row + FLAGS)
    amsgrad = (options & 1) != 0

    w, stored = restored(row, start, i, valid, perturbed, T, MASTERS, ALIGNED)
    g, there = update_gradient(row, start, size, i, valid, inv_scale, first_inv_scale, T, ALIGNED, BLOCK)
    updated = there & (not skipped(found_inf))
    write = only(valid, updated)
    g = tl.where((options & 2) != 0, negated(g), g)
    if DECOUPLED:
        rate = tl.load(lr + tensor) if LR_EACH else tl.load(lr)
        w = tl.where(wd != 0, w - (rate * wd) * w, w)
    else:
        g = tl.where(wd != 0, g + wd * w, g)
    first, second = column(row, EXP_AVG, start, S, ALIGNED) + i, column(row, EXP_AVG_SQ, start, S, ALIGNED) + i
    m = beta1.to(tl.float32) * widen(tl.load(first, mask=write, other=0)) + (1 - beta1).to(tl.float32) * g
    v = beta2.to(tl.float32) * widen(tl.load(second, mask=write, other=0)) + (1 - beta2).to(tl.float32) * (g * g)
    tl.store(first, rounded(m, S), mask=write)
    tl.store(second, rounded(v, S), mask=write)
    largest = column(row, MAX_EXP_AVG_SQ, start, S, ALIGNED) + i
    x = widen(tl.load(largest, mask=only(write, amsgrad), other=0))
    v = tl.where(amsgrad & ((x != x) | (x > v)), x, v)  # NaN if either is
    tl.store(largest, rounded(v, S), mask=only(write, amsgrad))
    rate, root_c2 = tl.load(steps + tensor * 2), tl.load(steps + tensor * 2 + 1)
    w = w - rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root_c2 + tl.zeros_like(v)) + eps)
    # Once more: what is compared with `size` need not live until here, where ptxas would spill its predicates.
    tensor, row, start, size = chunk_of(rows, chunks, BLOCK, ALIGNED)
    i, valid = elements_of(size, BLOCK)
    store_update(row, start, i, valid, w, stored, updated, perturbed, T, MASTERS, ALIGNED)


def restore_adam_(
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    masks: Sequence[Tensor],
    perturbed: Tensor,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    *,
    beta1: Sequence[float] = (0.9,),
    beta2: Sequence[float] = (0.999,),
    eps: Sequence[float] = (1e-8,),
    weight_decay: Sequence[float] = (0.0,),
    decoupled: bool = False,
    amsgrad: Sequence[int] = (0,),
    maximize: Sequence[int] = (0,),
    inv_scale: Tensor | None = None,
    first_inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Sequence[Tensor] = (),
) -> None:
    n = len(params)
    numbers = {
        BETA1: bits(beta1, n),
        BETA2: bits(beta2, n),
        EPS: bits(eps, n),
        WEIGHT_DECAY: bits(weight_decay, n),
        FLAGS: flags(amsgrad, maximize, n=n),
    }
    state = {EXP_AVG: exp_avgs, EXP_AVG_SQ: exp_avg_sqs, MAX_EXP_AVG_SQ: max_exp_avg_sqs, STEP: steps}
    table = update_table(params, saved, grads, first_grads, masks, masters, state, numbers)
    rates = torch.empty(n, 2, dtype=torch.float32, device=perturbed.device)
    each = lr.dim() > 0
    launches = table.launches(
        restore_adam_kernel, perturbed, lr, rates, inv_scale, first_inv_scale, found_inf, DECOUPLED=decoupled, LR_EACH=each
    )
    if n > 0:
        options = {"LR_EACH": each, "TENSORS": TENSORS, "num_warps": 4, "enable_fp_fusion": False}
        launches.insert(0, launch(step_kernel, -(-n // TENSORS), table.rows, lr, found_inf, rates, n, **options))
    send([*launches, perturbed.zero_])
