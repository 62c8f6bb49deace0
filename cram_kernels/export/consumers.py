"""Who can run a 2:4 weight faster, and why not: rules as data, and torch's from torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from .weights import Weight

HALVES = (torch.float16, torch.bfloat16)
BYTES = (torch.int8, torch.float8_e4m3fn)
CONVERT = "convert to float16 or bfloat16"
TENSORRT_SMALL = 256  # at and below about so many channels TensorRT times sparse kernels and seldom picks them


@dataclass(frozen=True)
class Facts:
    """What was counted: does the weight hold 2:4, and 1:2, along axis 1?"""

    is_24: bool
    is_12: bool


@dataclass(frozen=True)
class Verdict:
    runs: Literal["yes", "seldom", "no"]
    why: str = ""


@dataclass(frozen=True)
class Consumer:
    """multiples: dtype -> of how many rows and columns the matrix must consist; dtypes that are not there are not read."""

    name: str
    needs: str
    multiples: dict[torch.dtype, tuple[int, int]] = field(default_factory=dict)
    judge: "Callable[[Consumer, Weight, Facts], Verdict] | None" = None

    def verdict(self, weight: Weight, facts: Facts) -> Verdict:
        return (self.judge or _matrix)(self, weight, facts)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _no(why: str) -> Verdict:
    return Verdict("no", why)


def _pattern(weight: Weight, facts: Facts) -> Verdict | None:
    if weight.tensor.dtype == torch.float32 and not facts.is_12:
        return _no(f"float32 needs 1:2 on tensor cores: {CONVERT}" if facts.is_24 else "not 2:4")
    return None if facts.is_24 else _no("not 2:4")


def _matrix(consumer: Consumer, weight: Weight, facts: Facts) -> Verdict:
    """torch's semi-structured tensors: the weight of a Linear, never padded."""
    t = weight.tensor
    if t.dim() != 2:
        return _no("not a matrix: torch has no sparse convolution")
    if weight.kind not in ("linear", "matrix"):
        return _no(f"{weight.kind}, not a Linear")
    if t.dtype not in consumer.multiples:
        return _no(f"{dtype_name(t.dtype)} is not read" + (f": {CONVERT}" if t.dtype == torch.float32 else ""))
    rows, cols = consumer.multiples[t.dtype]
    if t.shape[0] % rows or t.shape[1] % cols or t.numel() == 0:
        return _no(f"shape is not a multiple of {rows} x {cols}")
    return _pattern(weight, facts) or Verdict("yes")


def _tensorrt(consumer: Consumer, weight: Weight, facts: Facts) -> Verdict:
    t = weight.tensor
    if weight.kind not in ("linear", "matrix", "conv"):
        return _no(f"{weight.kind}, not a convolution or a matrix product")
    if t.shape[1] % 4:
        return _no(f"{t.shape[1]} input channels are not a multiple of 4")
    if t.dtype not in (torch.float32, *HALVES, *BYTES):
        return _no(f"{dtype_name(t.dtype)} is not read")
    if not facts.is_24:
        return _no("not 2:4")
    if min(t.shape[:2]) <= TENSORRT_SMALL:
        return Verdict("seldom", f"{t.shape[1]} in, {t.shape[0]} out: at or below about {TENSORRT_SMALL} it seldom picks a sparse kernel")
    return Verdict("yes", "build with float16 or bfloat16" if t.dtype == torch.float32 else "")


def _torch_says(tensor: type[SparseSemiStructuredTensor]) -> dict[torch.dtype, tuple[int, int]]:
    """The rows and columns of which torch's tensors consist, in the installed version."""
    return {dtype: (shape.sparse_min_rows, shape.sparse_min_cols) for dtype, shape in tensor._DTYPE_SHAPE_CONSTRAINTS.items()}


CUTLASS = Consumer("CUTLASS", "torch on SM 8.x", _torch_says(SparseSemiStructuredTensorCUTLASS))
CUSPARSELT = Consumer("cuSPARSELt", "torch on SM 8.0 and later", _torch_says(SparseSemiStructuredTensorCUSPARSELT))
TENSORRT = Consumer("TensorRT", "TensorRT, also through ONNX Runtime and Torch-TensorRT", judge=_tensorrt)
CONSUMERS = (CUTLASS, CUSPARSELT, TENSORRT)
