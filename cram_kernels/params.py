"""What a parameter must be for the ops to work on it."""

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

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
