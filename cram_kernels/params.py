"""What a parameter must be for the ops to work on it."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

OPEN_STEPS: WeakSet[Any] = WeakSet()  # of the optimizers whose weights are perturbed now; each answers holds(param)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_unfit(param: Tensor) -> str | None:
    """None where the ops can work on the parameter, else what is wrong, as "must ..., got ..."."""
    if is_lazy(param):
        return "must have its shape: run the model once before making the optimizer, got an uninitialized one of a lazy module"
    if param.layout is not torch.strided:
        return f"must be dense (no holes, no overlap), got layout {param.layout}"
    if param.is_meta:
        return "must have data, got a meta tensor"
    if param.dtype not in DTYPES:
        return f"must have dtype float32, bfloat16 or float16, got {param.dtype}"
    if torch.empty_like(param, device="meta").stride() != param.stride():  # empty_like keeps the strides of a dense tensor, and of no other
        return f"must be dense (no holes, no overlap), got strides {param.stride()} for shape {tuple(param.shape)}; make it contiguous"
    return None


def overlapping(named: Iterable[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The names of two tensors that share memory, the one that begins later first; None where all have memory of their own."""
    extents = sorted(
        (str(t.device), t.data_ptr(), t.data_ptr() + t.nbytes, name)
        for name, t in named
        if t.numel() > 0 and t.data_ptr() != 0  # 0: freed for a while, or not torch's
    )
    for (device, _, end, one), (next_device, begin, _, other) in pairwise(extents):
        if device == next_device and begin < end:
            return other, one
    return None


def embedding_tables(model: nn.Module) -> dict[int, str]:
    """The parameters that are embedding tables: id -> why they stay dense. A table that is tied to another layer (a language model's head)
    is a table there, too. Under a global threshold such tables, drawn with a standard deviation of 1, empty all other layers."""
    reason = "embedding table (prune_embeddings=True prunes it)"
    return {id(m.weight): reason for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
