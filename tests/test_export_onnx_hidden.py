"""Weights that a node computes before they are multiplied, or that lie where nobody looks first: seen, and named as they are stored."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cram_kernels import NM, cli, prune
from cram_kernels.export import weights_in
from cram_kernels.export.check import check_weights

for _package in ("onnx", "onnxruntime"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: pip install 'cram_kernels[onnx]'")
import numpy  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402

OUT, IN = 8, 12
H, T = onnx.helper, onnx.TensorProto
Model = tuple[list, dict[str, numpy.ndarray]]


def node(op: str, inputs: str, outputs: str, **attributes):
    return H.make_node(op, inputs.split(), outputs.split(), **attributes)


def mask(w: numpy.ndarray) -> Model:
    """w is dense in the file where the mask is 0."""
    kept = (w != 0).astype(w.dtype)
    return [node("Mul", "m w", "t"), node("MatMul", "x t", "y")], {"m": kept.T, "w": numpy.where(w == 0, 3, w).astype(w.dtype).T}


def split(w: numpy.ndarray) -> Model:
    """As the fused weight of an attention."""
    ones = numpy.zeros_like(w)
    nodes = [
        node("Split", "w", "k t", axis=1, num_outputs=2),
        node("MatMul", "x k", "z"),
        node("MatMul", "x t", "u"),
        node("Add", "z u", "y"),
    ]
    return nodes, {"w": numpy.concatenate([ones.T, w.T], 1)}


def sparse_initializer(w: numpy.ndarray) -> Model:
    return [node("MatMul", "x sparse", "y")], {"sparse": w.T}


def subgraph(w: numpy.ndarray) -> Model:
    inner = H.make_graph([node("MatMul", "x w", "z")], "g", [], [H.make_tensor_value_info("z", T.FLOAT, None)])
    return [node("If", "c", "y", then_branch=inner, else_branch=inner)], {"w": w.T, "c": numpy.array(True)}


def loop(w: numpy.ndarray) -> Model:
    info = H.make_tensor_value_info
    ins = [info("i", T.INT64, []), info("go", T.BOOL, []), info("before", T.FLOAT, None)]
    outs = [info("go_on", T.BOOL, []), info("z", T.FLOAT, None)]
    body = H.make_graph([node("Identity", "go", "go_on"), node("MatMul", "x w", "z")], "g", ins, outs)
    return [node("Loop", "n c zero", "y", body=body)], {
        "w": w.T,
        "n": numpy.array(1),
        "c": numpy.array(True),
        "zero": numpy.zeros(1, "float32"),
    }


def function(w: numpy.ndarray) -> Model:
    """It is called through another one."""
    return [H.make_node("Outer", ["x", "w"], ["y"], domain="local")], {"w": w.T}


def dequantized(w: numpy.ndarray) -> Model:
    """The zeros are where the number is the zero point, of each output."""
    points = numpy.arange(OUT, dtype="int8")
    stored = (numpy.sign(w) * 5).astype("int8") + points[:, None]
    nodes = [node("DequantizeLinear", "w s p", "t", axis=0), node("Gemm", "x t", "y", transB=1)]
    return nodes, {"w": stored, "s": numpy.ones(OUT, "float32"), "p": points}


def concatenated(w: numpy.ndarray) -> Model:
    return [node("Concat", "a b", "t", axis=0), node("Gemm", "x t", "y", transB=1)], {"a": w[:4], "b": w[4:]}


SHAPE = {"shape": numpy.array([OUT, IN])}
MODELS: dict[str, tuple[Callable[[numpy.ndarray], Model], str, int | None, str]] = {
    # how -> the file, and the name, the axis and the place of the group at [5, 4:8] of the weight [outputs, inputs]
    "mask": (mask, "w", 0, "[4:8, 5]"),
    "split": (split, "w (in u)", 0, "[4:8, 13]"),
    "transpose": (lambda w: ([node("Transpose", "w", "t"), node("MatMul", "x t", "y")], {"w": w}), "w", 1, "[5, 4:8]"),
    "cast": (lambda w: ([node("Cast", "w", "t", to=1), node("MatMul", "x t", "y")], {"w": w.T.astype("float16")}), "w", 0, "[4:8, 5]"),
    "identity": (lambda w: ([node("Identity", "w", "t"), node("MatMul", "x t", "y")], {"w": w.T}), "w", 0, "[4:8, 5]"),
    "reshape": (
        lambda w: ([node("Reshape", "w shape", "t"), node("Gemm", "x t", "y", transB=1)], {"w": w.reshape(OUT, 3, 4), **SHAPE}),
        "w",
        None,  # the 12 inputs lie along two axes
        "[5, 1, 0:4]",
    ),
    "reshape of a vector": (
        lambda w: ([node("Reshape", "w shape", "t"), node("Gemm", "x t", "y", transB=1)], {"w": w.ravel(), **SHAPE}),
        "w",
        0,
        "[64:68]",
    ),
    "slice": (
        lambda w: (
            [node("Slice", "w b e a", "t"), node("MatMul", "x t", "y")],
            {"w": numpy.pad(w.T, ((2, 0), (0, 0))), "b": numpy.array([2]), "e": numpy.array([99]), "a": numpy.array([0])},
        ),
        "w",
        0,
        "[6:10, 5]",
    ),
    "einsum": (lambda w: ([node("Einsum", "x w", "y", equation="bi,oi->bo")], {"w": w}), "w", 1, "[5, 4:8]"),
    "einsum of heads": (
        lambda w: (
            [node("Einsum", "x w", "t", equation="bi,ihd->bhd"), node("Reshape", "t r", "y")],
            {"w": w.T.reshape(IN, 2, 4), "r": numpy.array([0, OUT])},
        ),
        "w",
        0,
        "[4:8, 1, 1]",
    ),
    "einsum from the left": (lambda w: ([node("Einsum", "w x", "y", equation="io,bi->bo")], {"w": w.T}), "w", 0, "[4:8, 5]"),
    "matmul from the left": (
        lambda w: ([node("Transpose", "x", "u"), node("MatMul", "w u", "v"), node("Transpose", "v", "y")], {"w": w}),
        "w",
        1,
        "[5, 4:8]",
    ),
    "batched matmul": (
        lambda w: ([node("MatMul", "x w", "t"), node("Squeeze", "t a", "y")], {"w": w.T[None], "a": numpy.array([0])}),
        "w",
        1,
        "[0, 4:8, 5]",
    ),
    "dequantized": (dequantized, "w", 1, "[5, 4:8]"),
    "concatenated": (concatenated, "t", 1, "[5, 4:8]"),
    "sparse initializer": (sparse_initializer, "sparse", 0, "[4:8, 5]"),
    "if": (subgraph, "w", 0, "[4:8, 5]"),
    "loop": (loop, "w", 0, "[4:8, 5]"),
    "local function": (function, "w", 0, "[4:8, 5]"),
}


def save(path: Path, nodes: list, tensors: dict[str, numpy.ndarray]) -> None:
    info = H.make_tensor_value_info
    plain = [onnx.numpy_helper.from_array(numpy.array(t, order="C"), name) for name, t in tensors.items() if name != "sparse"]
    sparse = []
    if (dense := tensors.get("sparse")) is not None:
        values = onnx.numpy_helper.from_array(dense[dense != 0], "sparse")
        sparse = [H.make_sparse_tensor(values, onnx.numpy_helper.from_array(numpy.flatnonzero(dense)), dense.shape)]
    graph = H.make_graph(nodes, "g", [info("x", T.FLOAT, [None, IN])], [info("y", T.FLOAT, None)], plain, sparse_initializer=sparse)
    opsets = [H.make_opsetid("", 20), H.make_opsetid("local", 1)]
    inner = H.make_function("local", "Inner", ["a", "b"], ["c"], [node("MatMul", "a b", "c")], opsets[:1])
    outer = H.make_function("local", "Outer", ["a", "b"], ["c"], [H.make_node("Inner", ["a", "b"], ["c"], domain="local")], opsets)
    functions = [inner, outer] if nodes[0].domain else []
    onnx.save(H.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions), path)


@pytest.mark.parametrize("how", MODELS)
def test_every_weight_is_seen(how: str, tmp_path: Path) -> None:
    """ONNX Runtime, given the unit matrix, says that the file multiplies by w; we say whether w is 2:4, and where it is not."""
    make, name, axis, place = MODELS[how]
    weight: Tensor = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    prune(nn.ParameterList([weight]), NM(2, 4))
    weight = weight.sign() * 5 if how == "dequantized" else weight.half().float()
    path = tmp_path / "m.onnx"
    for dense in (False, True):
        if dense:
            weight[5, 4:8] = 5
        save(path, *make(weight.numpy()))
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"x": numpy.eye(IN, dtype="float32")})[0]).t()
        torch.testing.assert_close(found, weight, rtol=1e-6, atol=1e-6)
        report = check_weights(weights_in(path), NM(2, 4))
        row = {row.name: row for row in report.rows}[name]
        assert row.holds == (not dense) and row.axis == axis and not report.unchecked
        assert cli.main(["check", str(path)]) == int(dense)
        if dense:
            assert [own.name for own in report.violating] == [name] and row.first == place and row.violations == 1
            # nothing is left that is 2:4, but the other part of the split weight
            assert cli.main(["check", str(path), "--exclude", name.partition(" ")[0]]) == int(how != "split")


def test_recurrent_weights(tmp_path: Path) -> None:
    """ONNX keeps an LSTM's weights as [directions, 4 * hidden, inputs]."""
    w = torch.randn(1, 32, IN)
    w.view(32, 3, 4)[:, :, 2:] = 0
    r = torch.ones(1, 32, 8)
    save(tmp_path / "m.onnx", [node("LSTM", "x w r", "y", hidden_size=8)], {"w": w.numpy(), "r": r.numpy()})
    rows = {row.name: row for row in check_weights(weights_in(tmp_path / "m.onnx"), NM(2, 4)).rows}
    assert rows["w"].holds and rows["w"].axis == 2 and rows["r"].violates and rows["r"].first == "[0, 0, 0:4]"
