"""The weights of an ONNX model: what a node multiplies with decides which axis is the input channels."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .weights import Kind, Weight, guess

PASS = ("Cast", "CastLike", "DequantizeLinear", "Identity", "QuantizeLinear")  # nodes between a weight and its user that keep its shape
CONVOLUTIONS = {("Conv", 1), ("ConvInteger", 1), ("QLinearConv", 3)}  # node, place of the weight
MATRICES = {  # node, place of the matrix -> is it the right factor
    ("Gemm", 0): False,
    ("Gemm", 1): True,
    ("MatMul", 0): False,
    ("MatMul", 1): True,
    ("MatMulInteger", 0): False,
    ("MatMulInteger", 1): True,
    ("QLinearMatMul", 0): False,
    ("QLinearMatMul", 3): True,
}
ELEMENTWISE = ("Add", "And", "Concat", "Div", "Equal", "Expand", "Greater", "Less", "Max", "Min", "Mul", "Or", "Pow", "Sub", "Where")
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
    """Every initialiser and constant of 1 or more dims; a matrix that is multiplied from the right is given transposed, with axis 0 named.

    What lies in files beside the model is read too.

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
    constants = [(node.output[0], a.t) for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"]
    named = [(initializer.name, initializer) for initializer in graph.initializer] + constants
    return [_weight(onnx, name, proto, users) for name, proto in named if len(proto.dims) > 0]


def _weight(onnx: Any, name: str, proto: Any, users: dict[str, list[tuple[Any, int]]]) -> Weight:
    t = _tensor(onnx, proto)
    kind, transposed, groups = _use(onnx, name, t, users)
    return Weight(name, t.t() if transposed else t, kind, 0 if transposed else 1, groups)


def _tensor(onnx: Any, proto: Any) -> Tensor:
    array = onnx.numpy_helper.to_array(proto).copy()
    name = onnx.TensorProto.DataType.Name(proto.data_type)
    if name in VIEWS:
        integer, dtype = VIEWS[name]
        return torch.from_numpy(array.view(integer)).view(dtype)
    try:
        return torch.from_numpy(array)
    except TypeError:  # of what torch cannot hold, such as int4, the name is kept
        return torch.empty(array.shape, dtype=getattr(torch, name.lower(), torch.bits8), device="meta")


def _use(onnx: Any, name: str, t: Tensor, users: dict[str, list[tuple[Any, int]]]) -> tuple[Kind, bool, int | None]:
    """What a weight is used for, whether its input channels are axis 0, and the groups of a convolution."""
    transposed = False
    for _ in range(len(users) + 1):
        node, place = users.get(name, [(None, 0)])[0]
        if node is None:
            return guess(t), False, None
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        use = (node.op_type, place)
        if use in CONVOLUTIONS:
            return "conv", False, attributes.get("group", 1)
        if use == ("ConvTranspose", 1):
            return "conv transpose", False, attributes.get("group", 1)
        if use == ("Gather", 0):
            return "embedding", False, None
        if use in MATRICES and t.dim() == 2:
            right = MATRICES[use]
            flag = attributes.get("transB" if right else "transA", 0)
            inputs_first = right != bool(flag)  # B is [inputs, outputs], A is [outputs, inputs]
            return "linear", inputs_first != transposed, None
        if node.op_type == "Transpose" and t.dim() == 2:
            transposed = not transposed
        elif node.op_type not in PASS or place != 0:
            return "other" if t.dim() < 2 or node.op_type in ELEMENTWISE else "matrix", False, None
        name = node.output[0]
    return guess(t), False, None
