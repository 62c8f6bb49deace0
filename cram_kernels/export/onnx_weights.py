"""The weights of an ONNX model: what a node multiplies with decides which axis is the input channels."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
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
ZERO_POINTS = {  # node, place of an integer weight -> place of its zero point
    ("DequantizeLinear", 0): 2,
    ("ConvInteger", 1): 3,
    ("MatMulInteger", 0): 2,
    ("MatMulInteger", 1): 3,
    ("QLinearConv", 3): 5,
    ("QLinearMatMul", 0): 2,
    ("QLinearMatMul", 3): 5,
}
PRODUCT, LOOKUP, UNKNOWN, NUMBERS = range(4)  # of the uses of a weight the first of these counts
ELEMENTWISE = (
    "Add",
    "And",
    "Concat",
    "Div",
    "Equal",
    "Expand",
    "Greater",
    "Less",
    "Max",
    "Min",
    "Mul",
    "Or",
    "Pow",
    "Sub",
    "Shape",
    "Size",
    "Where",
)
VIEWS = {  # ONNX's name -> what numpy reads it as, and what it is
    "BFLOAT16": ("int16", torch.bfloat16),
    "FLOAT8E4M3FN": ("uint8", torch.float8_e4m3fn),
    "FLOAT8E5M2": ("uint8", torch.float8_e5m2),
}


@dataclass(frozen=True)
class Use:
    """transposed: the input channels are axis 0 of a matrix. why: it is not checked."""

    rank: int
    kind: Kind
    transposed: bool = False
    groups: int | None = None
    why: str | None = None


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
    graphs = _Graphs(onnx, graph)
    return [_weight(onnx, name, proto, graphs) for name, proto in graphs.tensors.items() if len(proto.dims) > 0]


def _weight(onnx: Any, name: str, proto: Any, graphs: "_Graphs") -> Weight:
    t = _tensor(onnx, proto)
    use = _use(onnx, name, t, graphs)
    unchecked = use.why is not None and t.dim() > 1
    if not use.transposed:
        return Weight(name, t, use.kind, use.groups, why_dense=use.why, unchecked=unchecked)
    shape = tuple(t.shape)
    places = functools.partial(_transposed_places, shape)
    return Weight(name, t.t(), use.kind, use.groups, why_dense=use.why, unchecked=unchecked, shape=shape, index=places)


def _transposed_places(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(shape[0] * shape[1]).view(shape).t()


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


def _uses(onnx: Any, name: str, t: Tensor, graphs: "_Graphs", transposed: bool = False) -> Iterator[Use]:
    """What each user does with a weight, through nodes that keep its numbers; `_use` picks one."""
    for node, place, outputs in graphs.users.get(name, ()):
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.node.attribute}
        op, use = node.node.op_type, (node.node.op_type, place)
        standard = node.node.domain in ("", "ai.onnx")
        if not t.is_floating_point() and use in ZERO_POINTS and (why := graphs.why_no_zeros(node, ZERO_POINTS[use])):
            yield Use(PRODUCT, "other", why=why)
        elif standard and use in CONVOLUTIONS:
            yield Use(PRODUCT, "conv", groups=attributes.get("group", 1))
        elif standard and use == ("ConvTranspose", 1):
            yield Use(PRODUCT, "conv transpose", groups=attributes.get("group", 1))
        elif standard and use in MATRICES and t.dim() == 2:
            right = MATRICES[use]
            flag = attributes.get("transB" if right else "transA", 0)
            inputs_first = right != bool(flag)  # B is [inputs, outputs], A is [outputs, inputs]
            yield Use(PRODUCT, "linear", inputs_first != transposed)
        elif standard and use in MATRICES and t.dim() == 3 and MATRICES[use]:
            yield Use(PRODUCT, "matrix")  # [batch, inputs, outputs]
        elif standard and use == ("Gather", 0):
            yield Use(LOOKUP, "embedding")
        elif standard and place == 0 and (op in PASS or (op == "Transpose" and t.dim() == 2)):
            flips = op == "Transpose" and list(attributes.get("perm", (1, 0))) == [1, 0]
            yield from _uses(onnx, outputs[0], t, graphs, transposed != flips)
        elif t.dim() < 2 or (standard and op in ELEMENTWISE):
            yield Use(NUMBERS, "other")
        else:
            yield Use(UNKNOWN, "other", why=f"used by {op}, along an axis that is not known")


def _use(onnx: Any, name: str, t: Tensor, graphs: "_Graphs") -> Use:
    uses = sorted(_uses(onnx, name, t, graphs), key=lambda use: use.rank)
    if not uses:
        return Use(UNKNOWN, guess(t))
    products = [use for use in uses if use.rank == PRODUCT]
    reason = next((use for use in products if use.why), None)
    if reason is None and len({use.transposed for use in products}) > 1:
        return Use(PRODUCT, "other", why="multiplied along both axes")
    return reason or uses[0]


@dataclass(frozen=True)
class _Node:
    node: Any
    inputs: tuple[str, ...]


class _Graphs:
    """A graph and those inside its nodes (If, Loop, Scan). What a graph inside defines is named NODE/ATTRIBUTE/NAME."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self.onnx = onnx
        self.users: dict[str, list[tuple[_Node, int, tuple[str, ...]]]] = {}
        self.tensors: dict[str, Any] = {}
        self._add(graph, {}, "")

    def _add(self, graph: Any, outer: dict[str, str], prefix: str) -> None:
        own = [x.name for x in (*graph.input, *graph.initializer)] + [name for node in graph.node for name in node.output]
        names = outer | {name: prefix + name for name in own}
        self.tensors |= {names[initializer.name]: initializer for initializer in graph.initializer}
        for node in graph.node:
            found = _Node(node, tuple(names.get(name, name) for name in node.input))
            outputs = tuple(names[name] for name in node.output)
            for place, name in enumerate(found.inputs):
                self.users.setdefault(name, []).append((found, place, outputs))
            for a in node.attribute:
                if node.op_type == "Constant" and a.name == "value":
                    self.tensors[outputs[0]] = a.t
                for inner in (*([a.g] if a.type == a.GRAPH else []), *a.graphs):
                    self._add(inner, names, f"{prefix}{node.name or ''.join(node.output[:1])}/{a.name}/")

    def why_no_zeros(self, node: _Node, place: int) -> str | None:
        """Why the zeros of an integer weight stand for other numbers."""
        name = node.inputs[place] if place < len(node.inputs) else ""
        if not name:
            return None
        if name not in self.tensors:
            return "its zero point is not a constant"
        return "its zero point is not 0" if self.onnx.numpy_helper.to_array(self.tensors[name]).astype("int64").any() else None
