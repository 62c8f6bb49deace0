"""The weights of an ONNX model: what a node multiplies with decides which axis is the input channels."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .weights import Kind, Weight, guess

PASS = ("Cast", "CastLike", "DequantizeLinear", "Identity", "QuantizeLinear")  # nodes between a weight and its user that keep its shape
VIEWS = {  # ONNX's name -> what numpy reads it as, and what it is
    "BFLOAT16": ("int16", torch.bfloat16),
    "FLOAT8E4M3FN": ("uint8", torch.float8_e4m3fn),
    "FLOAT8E5M2": ("uint8", torch.float8_e5m2),
}


def onnx_package() -> Any:
    """The onnx module.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("ONNX files need onnx: pip install 'cram_kernels[onnx]'") from error
    return onnx


def onnx_weights(path: Path) -> list[Weight]:
    """Every initialiser of 1 or more dims; a matrix that is multiplied from the right is given transposed, with axis 0 named.

    Raises:
        ValueError: not an ONNX model.
    """
    onnx = onnx_package()
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf's, onnx's own and OSError
        raise ValueError(f"read: path must be an ONNX model, got {str(path)!r}: {error}") from error
    users: dict[str, list[tuple[Any, int]]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            users.setdefault(name, []).append((node, place))
    return [_weight(onnx, initializer, users) for initializer in graph.initializer if len(initializer.dims) > 0]


def _weight(onnx: Any, initializer: Any, users: dict[str, list[tuple[Any, int]]]) -> Weight:
    t = _tensor(onnx, initializer)
    kind, transposed, groups = _use(onnx, initializer.name, t, users)
    return Weight(initializer.name, t.t() if transposed else t, kind, 0 if transposed else 1, groups)


def _tensor(onnx: Any, initializer: Any) -> Tensor:
    array = onnx.numpy_helper.to_array(initializer).copy()
    name = onnx.TensorProto.DataType.Name(initializer.data_type)
    if name in VIEWS:
        integer, dtype = VIEWS[name]
        return torch.from_numpy(array.view(integer)).view(dtype)
    return torch.from_numpy(array)


def _use(onnx: Any, name: str, t: Tensor, users: dict[str, list[tuple[Any, int]]]) -> tuple[Kind, bool, int | None]:
    """What a weight is used for, whether its input channels are axis 0, and the groups of a convolution."""
    transposed = False
    for _ in range(len(users) + 1):
        node, place = users.get(name, [(None, 0)])[0]
        if node is None:
            return guess(t), False, None
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Conv" and place == 1:
            return "conv", False, attributes.get("group", 1)
        if node.op_type == "ConvTranspose" and place == 1:
            return "conv transpose", False, attributes.get("group", 1)
        if node.op_type == "Gather" and place == 0:
            return "embedding", False, None
        if node.op_type in ("Gemm", "MatMul") and place < 2 and t.dim() == 2:
            flag = attributes.get("transB" if place == 1 else "transA", 0)
            inputs_first = (place == 1) != bool(flag)  # B is [inputs, outputs], A is [outputs, inputs]
            return "linear", inputs_first != transposed, None
        if node.op_type == "Transpose" and t.dim() == 2:
            transposed = not transposed
        elif node.op_type not in PASS or place != 0:
            return "other" if t.dim() != 2 else "matrix", False, None
        name = node.output[0]
    return guess(t), False, None
