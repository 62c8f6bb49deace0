"""ONNX: real exports of real models, judged by ONNX Runtime and by NVIDIA's Polygraphy."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from compare import assert_bitwise_equal
from export_models import MODELS, Transformer, bert, make, pruned, tokens
from torch import Tensor, nn

from cram_kernels import NM, cli, prune
from cram_kernels.export import check_nm, export, onnx_model, weights_in
from cram_kernels.export.check import check_weights

for _package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package, reason=f"{_package} is not installed: pip install 'cram_kernels[onnx]'")
import onnx  # noqa: E402
import onnxruntime  # noqa: E402

POLYGRAPHY = "import sys; from polygraphy.tools import main; sys.exit(main())"


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, [t.numpy() for t in inputs], strict=True)))[0])


def polygraphy_sparse(path: Path) -> set[str]:
    """The tensors that Polygraphy calls 2:4; it prints PASSED whatever it finds."""
    pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install 'cram_kernels[test]'")
    command = [sys.executable, "-c", POLYGRAPHY, "inspect", "sparsity", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"POLYGRAPHY_AUTOINSTALL_DEPS": "0"})
    assert result.returncode == 0, result.stdout + result.stderr
    found = set(re.findall(r"Found sparse tensor: (\S+)", result.stdout))
    assert found or "Found non-sparse tensor" in result.stdout, result.stdout
    return found


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, tmp_path: Path) -> None:
    """The file computes what torch does, on other inputs too; every weight is 2:4 for us and for Polygraphy."""
    model, inputs, exclude = make(name)
    path = tmp_path / "m.onnx"
    report = export(model, path, "onnx", exclude=exclude, example_inputs=inputs)
    assert os.listdir(tmp_path) == ["m.onnx"]  # one file
    others = tuple(t.flip(0) if t.is_floating_point() else (t + 31) % 100 for t in inputs)
    for values in (inputs, others):
        with torch.no_grad():
            expected = model(*values)
        torch.testing.assert_close(run(path, *values), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    graph = onnx.load(path)
    assert not graph.graph.sparse_initializer
    found = {row.name: row for row in check_weights(weights_in(path), NM(2, 4)).rows}
    holding = {row.name for row in report.holding}
    used = {name: row for name, row in found.items() if row.kind in ("conv", "linear") and row.violations is not None}
    assert used and all(row.holds for row in used.values())
    assert polygraphy_sparse(path) == set(used)
    assert len(used) == len(holding), (sorted(used), sorted(holding))
    own = json.loads({p.key: p.value for p in graph.metadata_props}["cram_kernels"])
    assert own["format"] == "onnx" and {name for name, entry in own["tensors"].items() if entry["pattern"]} == holding


def test_weights_keep_their_bits(tmp_path: Path) -> None:
    """Where nothing is folded the initialisers are the weights."""
    model, inputs, _ = make("convolution")
    export(model, tmp_path / "m.onnx", "onnx", example_inputs=inputs)
    found = {w.name: w.tensor for w in weights_in(tmp_path / "m.onnx")}
    for name, t in model.state_dict().items():
        assert_bitwise_equal(found[name], t.contiguous(), name)


def test_half(tmp_path: Path) -> None:
    model, (x,), _ = make("resnet")
    assert export(model.half(), tmp_path / "m.onnx", "onnx", example_inputs=(x.half(),)).ok
    assert {row.dtype for row in check_weights(weights_in(tmp_path / "m.onnx"), NM(2, 4)).holding} == {"float16"}


def test_dynamic_shapes(tmp_path: Path) -> None:
    model, inputs, _ = make("resnet")
    options = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    export(model, tmp_path / "m.onnx", "onnx", example_inputs=inputs, onnx_options=options)
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "m.onnx", x), model(x), rtol=1e-4, atol=1e-4)


def test_the_wrong_axis_is_seen_by_both(tmp_path: Path) -> None:
    """2:4 along C*R*S flattened is not 2:4 for an engine."""
    flat = torch.randn(16, 8 * 9)
    prune(nn.ParameterList([flat]), NM(2, 4))
    model = nn.Conv2d(8, 16, 3).eval()
    with torch.no_grad():
        model.weight.copy_(flat.view(16, 8, 3, 3))
    torch.onnx.export(model, (torch.randn(1, 8, 5, 5),), tmp_path / "m.onnx", dynamo=True, external_data=False, verbose=False)
    assert polygraphy_sparse(tmp_path / "m.onnx") == set()
    (row,) = check_weights(weights_in(tmp_path / "m.onnx"), NM(2, 4)).violating
    assert row.holds_along == "axes 1 and up flattened, across kernel positions"
    assert cli.main(["check", str(tmp_path / "m.onnx")]) == 1
    with pytest.raises(ValueError, match="must be 2:4 along axis 1"):
        export(model, tmp_path / "n.onnx", "onnx", example_inputs=(torch.randn(1, 8, 5, 5),))
    before = model.weight.clone()
    assert export(model, tmp_path / "n.onnx", "onnx", example_inputs=(torch.randn(1, 8, 5, 5),), prune=True).ok
    assert polygraphy_sparse(tmp_path / "n.onnx") == {"weight"} and torch.equal(model.weight, before)


def node_model(tmp_path: Path, nodes: list, weight: Tensor, inputs: int) -> Path:
    """y = nodes(x, w) as a file."""
    value = onnx.helper.make_tensor_value_info
    w = onnx.numpy_helper.from_array(weight.numpy(), "w")
    x, y = value("x", onnx.TensorProto.FLOAT, [None, inputs]), value("y", onnx.TensorProto.FLOAT, None)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y], [w])), tmp_path / "n.onnx")
    return tmp_path / "n.onnx"


NODES = {  # name -> nodes, whether the weight is stored [inputs, outputs]
    "MatMul": ([("MatMul", ["x", "w"], {})], True),
    "Gemm": ([("Gemm", ["x", "w"], {})], True),
    "Gemm transB": ([("Gemm", ["x", "w"], {"transB": 1})], False),
    "Transpose": ([("Transpose", ["w"], {"perm": [1, 0]}), ("MatMul", ["x", "t"], {})], False),
    "Cast, Transpose": ([("Cast", ["w"], {"to": 1}), ("Transpose", ["t"], {"perm": [1, 0]}), ("Gemm", ["x", "u"], {})], False),
}


@pytest.mark.parametrize("name", NODES)
def test_the_axis_is_the_one_that_is_summed(name: str, tmp_path: Path) -> None:
    steps, transposed = NODES[name]
    weight = torch.randn(8, 12)  # [outputs, inputs]
    prune(nn.ParameterList([weight]), NM(2, 4))
    outputs = [*("t", "u")[: len(steps) - 1], "y"]
    nodes = [onnx.helper.make_node(op, inputs, [out], **attributes) for (op, inputs, attributes), out in zip(steps, outputs, strict=True)]
    path = node_model(tmp_path, nodes, weight.t().contiguous() if transposed else weight, 12)
    (row,) = check_weights(weights_in(path), NM(2, 4)).rows
    assert row.holds and row.shape == ((12, 8) if transposed else (8, 12)) and row.axis == (0 if transposed else 1) and row.kind == "linear"
    assert polygraphy_sparse(path) == {"w"}


def test_other_outputs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with ONNX Runtime is a real one: a file of other weights is not written."""
    model, inputs, _ = make("convolution")
    real = onnx_model._same_pattern

    def spoiled(path: Path, report) -> None:
        real(path, report)
        graph = onnx.load(path)
        w = onnx.numpy_helper.to_array(graph.graph.initializer[0])
        graph.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(w * 1.01, graph.graph.initializer[0].name))
        onnx.save(graph, path)

    monkeypatch.setattr(onnx_model, "_same_pattern", spoiled)
    with pytest.raises(ValueError, match=r"output 0 of ONNX Runtime must be within .* of torch's .*, got "):
        export(model, tmp_path / "m.onnx", "onnx", example_inputs=inputs)
    assert os.listdir(tmp_path) == []


def test_a_transformer_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """By the command, from half-precision weights and for int64 tokens. The exporter stores Linear weights transposed, as val_7: they keep
    their names, so that one can exclude them; what it makes of position embeddings is no weight of a product."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'cram_kernels[frameworks]'")
    torch.manual_seed(0)
    model = bert().half()
    dense = ["*embeddings*", "classifier.*", "*.query.weight"]
    prune(model, NM(2, 4), exclude=dense)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = tmp_path / "m.onnx"
    excluded = [option for name in dense for option in ("--exclude", name)]
    options = ["export", str(tmp_path / "w.pt"), str(path), "--format", "onnx", "--model", "export_models:bert", "--input", "1,8:int64"]
    assert cli.main([*options, *excluded]) == 0, capsys.readouterr().err
    found = {row.name: row for row in check_weights(weights_in(path), NM(2, 4)).rows}
    holding = {row.name for row in check_nm(model, exclude=dense).holding}
    assert (
        len(holding) == 6 and {name for name, row in found.items() if row.holds} == holding
    )  # k, v, attention's output, two of the MLP, pooler
    assert {found[name].dtype for name in holding} == {"float16"}
    assert polygraphy_sparse(path) == holding
    assert {name for name, row in found.items() if row.violates} <= {
        "bert.embeddings.word_embeddings.weight",
        "classifier.weight",
        "bert.encoder.layer.0.attention.self.query.weight",
    }
    assert cli.main(["check", str(path), "--exclude", "*word_embeddings*", *excluded[2:]]) == 0, capsys.readouterr().out


def test_a_head_that_is_tied_keeps_its_name(tmp_path: Path) -> None:
    """The file has the embedding, and the transposed head beside it."""
    model = pruned(Transformer(tied=True))
    export(model, tmp_path / "m.onnx", "onnx", exclude=["embedding.*"], example_inputs=tokens())
    report = check_weights(weights_in(tmp_path / "m.onnx"), NM(2, 4))
    assert {row.name for row in report.violating} == {"embedding.weight", "head.weight"}
    assert {row.name for row in report.holding} == {row.name for row in check_nm(model, exclude=["embedding.*"]).holding}


def test_keyword_arguments(tmp_path: Path) -> None:
    """A mask, as transformers' models take it."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'cram_kernels[frameworks]'")
    model = bert()
    prune(model, NM(2, 4))
    tokens, mask = torch.arange(16).view(2, 8), torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    export(model, tmp_path / "m.onnx", "onnx", example_inputs=(tokens,), onnx_options={"kwargs": {"attention_mask": mask}})
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "m.onnx", tokens, mask), model(tokens, mask).logits, rtol=1e-4, atol=1e-5)


def test_what_onnx_runtime_cannot_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not be compared."""
    model, (x,), _ = make("convolution")
    with pytest.raises(ValueError, match=r"ONNX Runtime must be able to run the file on the CPU, .*, got '0.weight' in bfloat16: convert"):
        monkeypatch.setattr(torch.onnx, "export", None)  # refused before
        export(model.bfloat16(), tmp_path / "m.onnx", "onnx", example_inputs=(x.bfloat16(),))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run this test on a machine with an NVIDIA GPU")
def test_a_model_on_a_gpu(tmp_path: Path) -> None:
    model, (x,), _ = make("convolution")
    assert export(model.cuda(), tmp_path / "m.onnx", "onnx", example_inputs=(x.cuda(),)).ok
    assert next(model.parameters()).is_cuda and check_weights(weights_in(tmp_path / "m.onnx"), NM(2, 4)).ok


def test_one_file_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """protobuf writes no 2 GB; what torch writes beside the model is checked all the same."""
    model, inputs, _ = make("convolution")
    monkeypatch.setattr(onnx_model, "LIMIT", 100)
    with pytest.raises(ValueError, match=r"at most 100 bytes of weights for one ONNX file, got [\d,]+: .*external_data=True"):
        export(model, tmp_path / "m.onnx", "onnx", example_inputs=inputs)
    assert os.listdir(tmp_path) == []
    torch.onnx.export(model, inputs, tmp_path / "m.onnx", dynamo=True, external_data=True, verbose=False)
    assert (tmp_path / "m.onnx.data").exists() and cli.main(["check", str(tmp_path / "m.onnx")]) == 0
    (tmp_path / "m.onnx.data").unlink()
    assert cli.main(["check", str(tmp_path / "m.onnx")]) == 2


def test_constants_and_dtypes_that_torch_lacks(tmp_path: Path) -> None:
    weight = torch.randn(8, 12)
    prune(nn.ParameterList([weight]), NM(2, 4))
    constant = onnx.helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(weight.t().contiguous().numpy()))
    product, added = onnx.helper.make_node("MatMul", ["x", "c"], ["t"]), onnx.helper.make_node("Add", ["t", "w"], ["y"])
    path = node_model(tmp_path, [constant, product, added], torch.ones(4, 8), 12)
    graph = onnx.load(path)
    graph.graph.initializer.append(onnx.helper.make_tensor("int4", onnx.TensorProto.INT4, [8, 4], [1] * 32))
    graph.graph.initializer.append(onnx.helper.make_tensor("text", onnx.TensorProto.STRING, [1, 4], [b"a"] * 4))
    onnx.save(graph, path)
    report = check_weights(weights_in(path), NM(2, 4))
    rows = {row.name: row for row in report.rows}
    assert rows["c"].holds and rows["c"].axis == 0 and rows["c"].shape == (12, 8)
    assert [row.name for row in report.unchecked] == ["int4"] and not report.violating
    assert rows["w"].why_dense == "not the weight of a product"
    assert (rows["int4"].why_dense, rows["text"].why_dense) == ("dtype int4", "dtype bits8")


@pytest.mark.parametrize("op, place", [("MatMulInteger", 1), ("QLinearMatMul", 3), ("ConvInteger", 1), ("QLinearConv", 3)])
def test_quantized_products(op: str, place: int, tmp_path: Path) -> None:
    matrix = "MatMul" in op
    weight = torch.arange(1, 97).to(torch.int8).view(8, 12)
    weight[:, ::2] = 0
    names = [f"i{i}" for i in range(place + 1)]
    names[place] = "w"
    stored = weight.t().contiguous() if matrix else weight.view(8, 12, 1, 1)
    path = node_model(tmp_path, [onnx.helper.make_node(op, names, ["y"])], stored, 12)
    (row,) = check_weights(weights_in(path), NM(2, 4)).rows
    assert row.holds and row.dtype == "int8" and (row.kind, row.axis) == (("linear", 0) if matrix else ("conv", 1))


Node = tuple[str, list[str], list[str], dict]
OUT = onnx.helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, None)
EMPTY = onnx.helper.make_graph([], "body", [], [OUT])
GIVES_W = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["o"])], "branch", [], [OUT])
UNKNOWN: dict[str, tuple[list[Node], tuple[int, ...], str]] = {  # nodes (op, inputs, outputs, attributes), shape, why it is not checked
    "fused": ([("FusedMatMul", ["x", "w"], ["y"], {"domain": "com.microsoft"})], (12, 8), "used by FusedMatMul, along an axis"),
    "domain": ([("MatMul", ["x", "w"], ["y"], {"domain": "mine"})], (12, 8), "used by MatMul, along an axis"),
    "input of a loop": ([("Loop", ["x", "x", "w"], ["y"], {"body": EMPTY})], (12, 8), "used by Loop, along an axis"),
    "sums": ([("Einsum", ["x", "w"], ["y"], {"equation": "...i,io->...o"})], (12, 8), "used by Einsum, along an axis"),
    "a mask at run time": (
        [("Mul", ["w", "x"], ["t"], {}), ("MatMul", ["x", "t"], ["y"], {})],
        (12, 8),
        "changed by what only a run gives",
    ),
    "a choice at run time": (
        [("If", ["c"], ["t"], {"then_branch": GIVES_W, "else_branch": GIVES_W}), ("MatMul", ["x", "t"], ["y"], {})],
        (12, 8),
        "changed by what only a run gives",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_axis_is_not_called_sparse(name: str, tmp_path: Path) -> None:
    steps, shape, why = UNKNOWN[name]
    weight = torch.zeros(shape)  # 2:4 along any axis
    path = node_model(tmp_path, [onnx.helper.make_node(op, ins, outs, **more) for op, ins, outs, more in steps], weight, 12)
    report = check_weights(weights_in(path), NM(2, 4))
    assert not report.ok and report.rows[0].violations is None and why in str(report.rows[0].why_dense)
    assert cli.main(["check", str(path)]) == 3 and cli.main(["check", str(path), "--exclude", "w"]) == 1  # nothing is 2:4 then


def test_a_weight_of_two_products(tmp_path: Path) -> None:
    """Along both axes: each is checked."""
    weight = torch.randn(12, 12)
    prune(nn.ParameterList([weight]), NM(2, 4))
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["t"]), onnx.helper.make_node("Gemm", ["t", "w"], ["y"], transB=1)]
    path = node_model(tmp_path, nodes, weight, 12)
    rows = {row.name: row for row in check_weights(weights_in(path), NM(2, 4)).rows}
    assert rows["w (in t)"].violates and rows["w (in t)"].axis == 0 and rows["w (in y)"].holds and rows["w (in y)"].axis == 1
    assert cli.main(["check", str(path)]) == 1 and cli.main(["check", str(path), "--exclude", "w (in t)"]) == 0


@pytest.mark.parametrize("first", ["Mul", "Gather", "Shape", "FusedMatMul"])
def test_a_product_counts_before_other_users(first: str, tmp_path: Path) -> None:
    weight = torch.randn(8, 12)
    prune(nn.ParameterList([weight]), NM(2, 4))
    domain = "com.microsoft" if first == "FusedMatMul" else ""
    nodes = [
        onnx.helper.make_node(first, ["w"] if first == "Shape" else ["w", "x"], ["t"], domain=domain),
        onnx.helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    rows = check_weights(weights_in(node_model(tmp_path, nodes, weight.t().contiguous(), 12)), NM(2, 4)).rows
    assert rows[-1].holds and (rows[-1].kind, rows[-1].axis) == ("linear", 0)
    assert [row.unchecked for row in rows] == ([True, False] if domain else [False])  # what it is for FusedMatMul is not known


def test_weights_inside_of_branches(tmp_path: Path) -> None:
    """Both branches call theirs v; one multiplies with a weight of the graph around it."""
    weight = torch.randn(8, 12)
    prune(nn.ParameterList([weight]), NM(2, 4))
    right, out = weight.t().contiguous(), onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)
    branches = {}
    for branch, v in (("then_branch", right), ("else_branch", torch.ones(12, 8))):
        nodes = [onnx.helper.make_node("MatMul", ["x", "v"], ["u"]), onnx.helper.make_node("Gemm", ["x", "w", "u"], ["z"])]
        branches[branch] = onnx.helper.make_graph(nodes, branch, [], [out], [onnx.numpy_helper.from_array(v.numpy(), "v")])
    path = node_model(tmp_path, [onnx.helper.make_node("If", ["c"], ["y"], "if", **branches)], right, 12)
    report = check_weights(weights_in(path), NM(2, 4))
    assert {row.name: row.axis for row in report.holding} == {"w": 0, "if/then_branch/v": 0}
    assert [row.name for row in report.violating] == ["if/else_branch/v"]


@pytest.mark.parametrize("zero", [None, 0, 3, "input"])
def test_zero_points(zero, tmp_path: Path) -> None:
    weight = torch.zeros(12, 8, dtype=torch.int8)
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["w", "s"] + (["z"] if zero is not None else []), ["t"]),
        onnx.helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    if isinstance(zero, int):
        nodes.insert(0, onnx.helper.make_node("Constant", [], ["z"], value=onnx.helper.make_tensor("z", onnx.TensorProto.INT8, [], [zero])))
    nodes.insert(0, onnx.helper.make_node("Constant", [], ["s"], value_float=0.5))
    (row,) = check_weights(weights_in(node_model(tmp_path, nodes, weight, 12)), NM(2, 4)).rows
    assert (row.holds, row.violates, row.unchecked) == (zero in (None, 0), zero == 3, zero == "input")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    model, _, _ = make("resnet")
    torch.save(model.state_dict(), tmp_path / "w.pt")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    options = ["export", str(tmp_path / "w.pt"), str(tmp_path / "m.onnx"), "--input", "1,3,16,16"]
    assert cli.main([*options, "--model", "export_models:resnet"]) == 0
    assert cli.main(["check", str(tmp_path / "m.onnx")]) == 0
    assert cli.main(options) == 2 and cli.main([*options, "--model", "export_models:none"]) == 2
    assert "--model export_models:none must make a model, got AttributeError" in capsys.readouterr().err
    assert check_nm(model).ok
    capsys.readouterr()
    wrong = [*options[:3], "--model", "export_models:resnet"]
    assert cli.main(wrong) == 2
    assert capsys.readouterr().err == "export: --input must be given for format 'onnx', got none\n"
    for text in ("1,x", "1,-3,12,12", "1,0,12,12", "", "1,3,16,16:none", "1,999999999,999999999"):
        assert cli.main([*wrong, "--input", text]) == 2
        error = capsys.readouterr().err
        assert error == f"export: --input must be a shape, and after a colon a dtype of torch, got {text!r}\n"
    command = [*forked.python(), "-m", "cram_kernels", *wrong, "--input", "1,4,16,16"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("export: model must run on inputs of shape [1, 4, 16, 16], got RuntimeError: ")
    assert done.stderr.count("\n") == 1 and "\x1b" not in done.stderr and "but got" in done.stderr, done.stderr


class Branch(nn.Module):
    """It runs, but the numbers decide what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if float(x.sum()) > 0 else x


def test_what_torch_cannot_export_is_one_sentence(tmp_path: Path) -> None:
    model = Branch()
    prune(model, NM(2, 4))
    with pytest.raises(ValueError, match=r"^export: model must be one that torch\.onnx\.export takes, got [^\n\x1b]*$"):
        export(model, tmp_path / "m.onnx", "onnx", example_inputs=(torch.ones(1, 8),))
    assert os.listdir(tmp_path) == []
