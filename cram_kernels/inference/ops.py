"""The ops of sparse inference as torch sees them: result shapes for tracing, and no gradients.

A weight of shape [rows, ...] is one vector of bytes, `packed`, cut as the first 5 numbers of `form` say: rows, columns, columns of a block,
rows of a section, bytes of a value (weights.py, csrc/sparse/matrix.h). Those behind them are the plan, which says how many columns of the
product are handled together: (largest number of columns, tile), ...; none for the defaults. `form` is a tensor, int64, since torch takes
half a microsecond to hand over a list.

    sparse_linear(input [..., K], packed, bias [rows], form) -> [..., rows]
    sparse_conv2d(input [B, C, H, W], packed, bias [rows], form, kernel_size, stride, padding, dilation) -> [B, rows, H', W']

Both take contiguous float32 on the CPU. A column that is not stored is skipped, so 0 * Inf does not make a NaN.
"""

from typing import Any

import torch
from torch import Tensor

sparse_linear = torch.ops.cram_kernels.sparse_linear.default
sparse_conv2d = torch.ops.cram_kernels.sparse_conv2d.default


def _check_devices(op: str, input: Tensor, **others: Tensor) -> None:
    """A tensor on the meta device brings a call here, whatever has the others."""
    for name, t in others.items():
        if t.device != input.device:
            raise ValueError(f"{op}: {name} must be on the device of input, {input.device}, got {t.device}")


@torch.library.register_fake("cram_kernels::sparse_linear")
def _(input: Tensor, packed: Tensor, bias: Tensor, form: Tensor) -> Tensor:
    _check_devices("sparse_linear", input, packed=packed, bias=bias, form=form)
    return input.new_empty(*input.shape[:-1], bias.numel())


@torch.library.register_fake("cram_kernels::sparse_conv2d")
def _(
    input: Tensor,
    packed: Tensor,
    bias: Tensor,
    form: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    _check_devices("sparse_conv2d", input, packed=packed, bias=bias, form=form)
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(input.shape[2:], padding, dilation, kernel_size, stride, strict=True)
    ]
    return input.new_empty(input.shape[0], bias.numel(), *size)


def refuse_autograd(op: str) -> None:
    raise RuntimeError(
        f"{op}: no argument must require a gradient, got one that does: sparse inference has no backward. "
        "Call it under torch.inference_mode() or torch.no_grad(), or train the dense model: inference.to_dense(model)"
    )


def _register_refusal(op: str) -> None:
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        refuse_autograd(op)

    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_autograd(op)

    torch.library.register_autograd(f"cram_kernels::{op}", backward, setup_context=setup_context)


for _op in ("sparse_linear", "sparse_conv2d"):
    _register_refusal(_op)
