"""The weights of an ONNX model: what a node multiplies with decides which axis is the input channels.

Nodes that depend on constants only are computed first, with onnx.reference. So a weight behind a mask, a cast, a scale, a split or a
transpose is checked as the matrix product gets it. Reports name it as the file does.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .weights import Kind, Weight, guess

# node -> places of a weight, and of the zero point of that weight
PRODUCTS: dict[str, dict[int, int | None]] = {
    "Conv": {1: None},
    "ConvInteger": {1: 3},
    "ConvTranspose": {1: None},
    "Einsum": {0: None, 1: None},
    "GRU": {1: None, 2: None},
    "Gemm": {0: None, 1: None},
    "LSTM": {1: None, 2: None},
    "MatMul": {0: None, 1: None},
    "MatMulInteger": {0: 2, 1: 3},
    "QLinearConv": {3: 5},
    "QLinearMatMul": {0: 2, 3: 5},
    "RNN": {1: None, 2: None},
}
MOVES = ("Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")  # of input 0
ELEMENTWISE = (
    *"Abs Add And Cast CastLike Clip DequantizeLinear Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Neg Not Or".split(),
    *"Pow QuantizeLinear Sign Sub Where Xor".split(),
)
# of what goes into these a model takes single numbers, and multiplies along no axis
NO_PRODUCT = (
    *"BatchNormalization GroupNormalization InstanceNormalization LayerNormalization RMSNormalization PRelu Concat Pad Resize".split(),
    *"GatherElements GatherND GridSample ScatterElements ScatterND Shape Size Tile".split(),
)
RANDOM = ("Bernoulli", "Dropout", "Multinomial", "RandomNormalLike", "RandomUniformLike")
LARGEST = 2**30  # no more numbers are made from constants
VIEWS = {"bfloat16": torch.int16, "float8_e4m3fn": torch.uint8, "float8_e5m2": torch.uint8}  # which numpy does not know by itself


@dataclass(frozen=True, eq=False)
class Value:
    """What a name stands for.

    Attributes:
        array: its numbers; None where they are known only when the model runs.
        sources: the stored tensors of 2 or more dims from which it takes its numbers unchanged.
        activation: whether it comes from a product or a lookup.
        origin: the value whose numbers these are, in another order or shape; None for a stored tensor.
        moved: how they were moved; None: not at all.
    """

    name: str
    array: Any = None
    sources: frozenset[str] = frozenset()
    activation: bool = False
    origin: "Value | None" = None
    moved: Callable[[Any], Any] | None = None

    @property
    def stored(self) -> "Value":
        return self if self.origin is None else self.origin.stored

    def places(self) -> Any:
        """For each number, its place in the flattened stored tensor."""
        import numpy

        if self.origin is None:
            return numpy.arange(self.array.size).reshape(self.array.shape)
        places = self.origin.places()
        return places if self.moved is None else self.moved(places)


@dataclass(frozen=True)
class Use:
    """What one node does with a value. turn: makes [outputs, inputs, ...] of it; None: it is no weight there. why: not checked, since."""

    value: Value
    node: str
    kind: Kind = "other"
    turn: "Callable[[Tensor], Tensor] | None" = None
    order: str = ""  # equal for equal turns
    groups: int | None = None
    numbers: Any = None  # without the zero point
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
    """Every stored tensor of 1 or more dims, as the products get it; also those in local functions, in the graphs of If, Loop and Scan,
    sparse ones, and those in files beside the model.

    Raises:
        ValueError: not an ONNX model.
    """
    onnx = onnx_package()
    import onnx.inliner  # noqa: F811

    try:
        model = onnx.load(path, load_external_data=False)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
        walk = _Walk(onnx, model)
    except Exception as error:  # protobuf's, onnx's own and OSError
        raise ValueError(f"read: path must be an ONNX model, got {str(path)!r}: {error}") from error
    return walk.weights()


def to_torch(array: Any) -> Tensor:
    """Of what torch cannot hold, such as int4 and text, an empty tensor of that shape that has at most the name of its dtype."""
    try:
        if array.dtype.name in VIEWS:
            integer = VIEWS[array.dtype.name]
            return torch.from_numpy(array.view(str(integer).removeprefix("torch.")).copy()).view(getattr(torch, array.dtype.name))
        return torch.from_numpy(array.copy())
    except TypeError:
        dtype = getattr(torch, array.dtype.name, None)
        return torch.empty(array.shape, dtype=dtype if isinstance(dtype, torch.dtype) else torch.bits8, device="meta")


class _Walk:
    """Goes through the graphs of a model. What a graph inside of a node defines is named NODE/ATTRIBUTE/NAME."""

    def __init__(self, onnx: Any, model: Any) -> None:
        self.onnx = onnx
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.stored: dict[str, Value] = {}
        self.uses: dict[str, list[Use]] = {}  # name of a stored or computed tensor -> what is done with it
        self.folded: set[str] = set()
        self._graph(model.graph, {}, "")

    def weights(self) -> list[Weight]:
        computed = [name for name in self.uses if name not in self.stored]
        return [weight for name in (*self.stored, *computed) for weight in self._weights(name)]

    def _weights(self, name: str) -> list[Weight]:
        uses = self.uses.get(name, [])
        found = {(id(use.value), use.order): use for use in reversed(uses) if use.turn is not None}
        lookups = [key for key, use in found.items() if use.kind == "embedding"]
        for key in lookups if len(lookups) < len(found) else ():
            del found[key]  # a table that is multiplied, too
        why = next((use.why for use in uses if use.why), None)
        weights = [_weight(name, use, len(found) + bool(why) > 1) for use in reversed(found.values())]
        if name not in self.stored or (weights and why is None):
            return weights
        value = self.stored[name]
        t = to_torch(value.array)
        if why is not None:
            return [Weight(name, t, "other", why_dense=why, unchecked=t.dim() > 1), *weights]
        kind: Kind = "other" if uses or name in self.folded else guess(t)
        return [Weight(name, t, kind)] if t.dim() > 0 else []

    def _store(self, name: str, array: Any) -> Value:
        sources = frozenset([name] if array.ndim > 1 else [])
        self.stored[name] = Value(name, array, sources)
        return self.stored[name]

    def _dense(self, sparse: Any) -> Any:
        """The array of a sparse_initializer: indices are flat, or one row for each number."""
        import numpy

        values, indices = (self.onnx.numpy_helper.to_array(t) for t in (sparse.values, sparse.indices))
        array = numpy.zeros(tuple(sparse.dims), values.dtype)
        array[numpy.unravel_index(indices, array.shape) if indices.ndim == 1 else tuple(indices.T)] = values
        return array

    def _graph(self, graph: Any, outer: dict[str, Value], prefix: str) -> list[Value]:
        names = outer | {x.name: Value(prefix + x.name) for x in graph.input}
        for proto in graph.initializer:
            names[proto.name] = self._store(prefix + proto.name, self.onnx.numpy_helper.to_array(proto))
        for sparse in graph.sparse_initializer:
            names[sparse.values.name] = self._store(prefix + sparse.values.name, self._dense(sparse))
        for node in graph.node:
            names |= zip(node.output, self._node(node, names, prefix), strict=True)
        return [names.get(x.name, Value(prefix + x.name)) for x in graph.output]

    def _node(self, node: Any, names: dict[str, Value], prefix: str) -> list[Value]:
        inputs = [names.get(name, Value(prefix + name)) if name else None for name in node.input]
        outputs = [prefix + name for name in node.output]
        attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        inner: list[Value] = []
        for a in node.attribute:
            for i, graph in enumerate([a.g] if a.type == a.GRAPH else a.graphs):
                where = f"{prefix}{node.name or ''.join(node.output[:1])}/{a.name}{i or ''}/"
                inner += self._graph(graph, names, where)
        standard = node.domain in ("", "ai.onnx")
        if standard and node.op_type == "Constant":
            sparse = attributes.get("sparse_value")
            array = self._dense(sparse) if sparse is not None else self._evaluate(node, {})
            return [self._store(outputs[0], array if sparse is not None else array[0])]
        given = [v for v in inputs if v is not None]
        if standard and given and not inner and all(v.array is not None for v in given) and node.op_type not in RANDOM:
            folded = self._fold(node, inputs, outputs)
            if folded is not None:
                return folded
        op = node.op_type if standard else f"{node.domain}.{node.op_type}"
        self._note(op, node.op_type, inputs, attributes, outputs)
        flowing = [*given, *inner]
        activation = any(v.activation for v in flowing)
        if op not in ELEMENTWISE and op not in MOVES and not inner:
            return [Value(name, activation=True) for name in outputs]
        lookup = op == "Gather" and inputs[0] is not None and inputs[0].array is not None
        sources = frozenset() if activation or lookup else frozenset().union(*(v.sources for v in flowing))
        return [Value(name, None, sources, activation or lookup) for name in outputs]

    def _evaluate(self, node: Any, feeds: dict[str, Any]) -> list[Any]:
        import numpy
        from onnx.reference import ReferenceEvaluator

        return [numpy.asarray(array) for array in ReferenceEvaluator(node, opsets=self.opsets).run(None, feeds)]

    def _fold(self, node: Any, inputs: Sequence[Value | None], outputs: Sequence[str]) -> list[Value] | None:
        """The outputs of a node whose inputs are constants; None where they cannot be computed."""
        feeds = {name: None if v is None else v.array for name, v in zip(node.input, inputs, strict=True)}
        op, given = node.op_type, [v for v in inputs if v is not None]
        if op in ("ConstantOfShape", "Expand", "Range", "Tile") and math.prod(map(int, given[-1].array.ravel())) > LARGEST:
            return None
        try:
            arrays = self._evaluate(node, feeds)
        except Exception:  # whatever the reference has no code for: its users are then not known
            return None
        sources = frozenset().union(*(v.sources for v in given))
        self.folded |= sources
        found = []
        for i, (name, array) in enumerate(zip(outputs, arrays, strict=True)):
            origin, moved = None, None
            if op in MOVES and given[0].array.dtype != object:
                origin, moved = given[0], functools.partial(self._moved, node, feeds, i)
            elif op in ELEMENTWISE:
                same = [v for v in given if v.array.shape == array.shape and v.sources]
                origin = next((v for v in same if len(same) == 1 or not _is_mask(v.array)), next(iter(same), None))
            found.append(Value(name, array, sources if array.ndim > 1 else frozenset(), False, origin, moved))
        return found

    def _moved(self, node: Any, feeds: dict[str, Any], i: int, places: Any) -> Any:
        return self._evaluate(node, feeds | {node.input[0]: places})[i]

    def _note(self, op: str, name: str, inputs: Sequence[Value | None], attributes: dict[str, Any], outputs: Sequence[str]) -> None:
        """What a node that has to run does with the constants among its inputs."""
        products = PRODUCTS.get(op, {})
        weighed = any(inputs[i].array is not None for i in products if i < len(inputs) and inputs[i] is not None)  # type: ignore[union-attr]
        for i, v in enumerate(inputs):
            if v is None:
                continue
            if v.array is None:
                if i in products and not weighed:  # a product of two values of a run: is one of them a weight that a run changes?
                    for source in v.sources:
                        self._add(Use(self.stored[source], outputs[0], why=f"changed by what only a run gives, before {name} uses it"))
            elif i in products and v.array.ndim > 1:
                self._add(self._product(op, i, v, inputs, attributes, outputs[0]))
            elif op == "Gather" and i == 0 and v.array.ndim == 2:
                self._add(Use(v, outputs[0], "embedding", lambda t: t))
            elif v.array.ndim < 2 or (op == "Gemm" and i == 2) or op in (*ELEMENTWISE, *NO_PRODUCT):
                self._add(Use(v, outputs[0]))
            else:
                self._add(Use(v, outputs[0], why=f"used by {name}, along an axis that is not known"))

    def _add(self, use: Use) -> None:
        stored = use.value.stored
        names = [stored.name]
        if use.turn is None and stored.name not in self.stored:
            names = [*use.value.sources]  # of a computed constant: those that it is computed from
        for name in names:
            self.uses.setdefault(name, []).append(use)

    def _product(self, op: str, i: int, v: Value, inputs: Sequence[Value | None], attributes: dict[str, Any], output: str) -> Use:
        numbers, zero_place = v.array, PRODUCTS[op][i]
        zero = inputs[zero_place] if zero_place is not None and zero_place < len(inputs) else None
        left = i == 0 and "MatMul" in op
        if zero is not None:
            if zero.array is None:
                return Use(v, output, why="its zero point is not a constant")
            point = zero.array.reshape(-1, *[1] * (numbers.ndim - 1)) if zero.array.ndim == 1 and ("Conv" in op or left) else zero.array
            numbers = (numbers.astype("int16") - point.astype("int16")).clip(-127, 127).astype("int8")
        if "Conv" in op:
            kind: Kind = "conv transpose" if op == "ConvTranspose" else "conv"
            return Use(v, output, kind, lambda t: t, "conv", attributes.get("group", 1), numbers)
        if op in ("GRU", "LSTM", "RNN"):
            return Use(v, output, "recurrent", lambda t: t.flatten(0, -2), "last", numbers=numbers)
        if op == "Einsum":
            order = _einsum_order(attributes["equation"].decode(), i)
            if order is None:
                return Use(v, output, why="used by Einsum, along an axis that is not known")
            kept, summed = order
            if not summed:
                return Use(v, output)
            size = math.prod(v.array.shape[axis] for axis in summed)
            return Use(v, output, "linear", lambda t: t.permute(*kept, *summed).reshape(-1, size), f"{kept}{summed}", numbers=numbers)
        last = left if op != "Gemm" else bool(attributes.get("transB", 0)) if i == 1 else not attributes.get("transA", 0)
        if last:
            return Use(v, output, "linear", lambda t: t.flatten(0, -2), "last", numbers=numbers)
        return Use(v, output, "linear", lambda t: t.transpose(-1, -2).flatten(0, -2), "last but one", numbers=numbers)


def _weight(name: str, use: Use, several: bool) -> Weight:
    """several: the stored tensor is the weight of several products that read it differently."""
    assert use.turn is not None
    turn, value = use.turn, use.value
    own = f"{name} (in {use.node})" if several else name
    aliases = tuple(sorted({name, *value.sources} - {own}))
    index = None
    if (
        value.origin is not None
        or use.order not in ("", "conv", "last")
        or value.array.ndim != turn(torch.empty(value.array.shape, device="meta")).dim()
    ):
        index = lambda: turn(torch.from_numpy(value.places()))  # noqa: E731 (only where a group is named)
    tensor = turn(to_torch(value.array if use.numbers is None else use.numbers))
    return Weight(own, tensor, use.kind, use.groups, aliases, shape=value.stored.array.shape, index=index)


def _is_mask(array: Any) -> bool:
    return bool(((array == 0) | (array == 1)).all())


def _einsum_order(equation: str, place: int) -> tuple[list[int], list[int]] | None:
    """The axes of a factor that the result keeps, and those that are summed; None where the equation does not name them all."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    term = terms[place]
    if "." in equation or len(set(term)) < len(term) or len(terms) != 2:
        return None
    kept = set(right) if arrow else {c for c in left if left.count(c) == 1}
    axes = range(len(term))
    return [axis for axis in axes if term[axis] in kept], [axis for axis in axes if term[axis] not in kept]
