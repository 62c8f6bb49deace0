"""The checker: its counts equal brute force, its reasons are those of the consumers, its command's exit status is for CI."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from export_models import Transformer, make, pruned, resnet, resnet50
from torch import Tensor, nn

from cram_kernels import NM, CrAMWarning, cli, prune
from cram_kernels.export import check_nm, load
from cram_kernels.export.consumers import CUSPARSELT, CUTLASS
from cram_kernels.export.report import NMReport, Row


def one(t: Tensor, **options) -> Row:
    (row,) = check_nm({"w": t}, **options).rows
    return row


def brute_force(t: Tensor, n: int, m: int) -> tuple[int, str | None]:
    """Violating groups along axis 1, and the first by index."""
    found = []
    other = [range(size) for dim, size in enumerate(t.shape) if dim != 1]
    for place in itertools.product(*other):
        for begin in range(0, t.shape[1], m):
            index = (place[0], slice(begin, begin + m), *place[1:])
            if sum(float(x) != 0 for x in t[index].flatten()) > n:
                found.append(((place[0], begin, *place[1:]), index))
    if not found:
        return 0, None
    first = min(found, key=lambda x: x[0])[1]
    return len(found), "[" + ", ".join(f"{i.start}:{i.stop}" if isinstance(i, slice) else str(i) for i in first) + "]"


@pytest.mark.parametrize("shape", [(5, 8), (3, 12, 2), (2, 8, 3, 2), (1, 4, 1, 1), (2, 4, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("n, m", [(2, 4), (1, 2), (1, 4), (2, 3)], ids=str)
def test_counts_and_places(shape: tuple[int, ...], n: int, m: int) -> None:
    t = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(1)).float()
    layouts = [t, t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))]
    layouts += [t.repeat(1, 2, *[1] * (t.dim() - 2))[:, ::2]]  # with holes
    for own in layouts:
        row = one(own, n=n, m=m)
        assert row.zeros == int((own == 0).sum()) and row.numel == own.numel()
        if shape[1] % m:
            assert row.violations is None and "not a multiple" in str(row.why_dense)
            continue
        groups, first = brute_force(own, n, m)
        assert (row.violations, row.first) == (groups, first)


def test_the_usual_mistakes() -> None:
    """2:4 on another axis: named."""
    w = torch.randn(8, 8, 3, 4)
    rows = w.clone().transpose(0, 1).contiguous()
    prune(nn.ParameterList([rows]), NM(2, 4))
    assert one(rows.transpose(0, 1)).holds_along == "axis 0, the outputs"
    flat = w.clone().view(8, 96)
    prune(nn.ParameterList([flat]), NM(2, 4))
    row = one(flat.view(8, 8, 3, 4))
    assert row.violates and row.holds_along == "axes 1 and up flattened, across kernel positions"
    assert one(w).holds_along is None


@pytest.mark.parametrize(
    "consumer, dtype, rows, cols",
    [(CUTLASS, torch.float16, 32, 64), (CUTLASS, torch.float32, 32, 32), (CUSPARSELT, torch.bfloat16, 16, 16)],
)
def test_shapes_of_torch(consumer, dtype: torch.dtype, rows: int, cols: int) -> None:
    """As in torch 2.13."""
    assert consumer.multiples[dtype] == (rows, cols)
    for shape in ((rows // 2, 4 * cols), (4 * rows, cols // 2)):
        assert verdicts(half_zero(*shape, m=2).to(dtype))[consumer.name] == ("no", f"shape is not a multiple of {rows} x {cols}")
    assert verdicts(half_zero(rows, cols, m=2).to(dtype))[consumer.name] == ("yes", "")


def verdicts(t: Tensor) -> dict[str, tuple[str, str]]:
    return {name: (v.runs, v.why) for name, v in one(t).verdicts.items()}


def half_zero(*shape: int, m: int = 4) -> Tensor:
    t = torch.ones(shape)
    t[:, torch.arange(shape[1]) % m < m // 2] = 0
    return t


def test_who_can_run_it() -> None:
    large = half_zero(512, 512)
    assert {name: runs for name, (runs, _) in verdicts(large.half()).items()} == {"CUTLASS": "yes", "cuSPARSELt": "yes", "TensorRT": "yes"}
    assert verdicts(large)["CUTLASS"] == ("no", "float32 needs 1:2 on tensor cores: convert to float16 or bfloat16")
    assert verdicts(half_zero(64, 64, m=2))["CUTLASS"][0] == "yes"  # 1:2
    assert verdicts(large.to(torch.float8_e4m3fn))["cuSPARSELt"][0] == "yes"
    assert verdicts(large.to(torch.float8_e4m3fn))["CUTLASS"] == ("no", "float8_e4m3fn is not read")
    assert verdicts(large[:24, :64].bfloat16())["CUTLASS"] == ("no", "shape is not a multiple of 32 x 64")
    assert verdicts(large[:, :64].bfloat16())["TensorRT"][0] == "seldom"
    assert verdicts(half_zero(512, 512, 3, 3).half())["CUTLASS"] == ("no", "not a matrix: torch has no sparse convolution")
    assert verdicts(torch.ones(512, 512).half()) == dict.fromkeys(("CUTLASS", "cuSPARSELt", "TensorRT"), ("no", "not 2:4"))
    one_of_four = torch.zeros(64, 64)
    one_of_four[:, ::4] = 1
    assert verdicts(one_of_four.half())["CUTLASS"][0] == "yes"  # a legal 2:4


def test_a_model_names_stems_depthwise_and_embeddings() -> None:
    report = check_nm(pruned(resnet()))
    rows = {row.name: row for row in report.rows}
    assert report.ok and str(rows["0.weight"].why_dense).endswith("(a stem)")
    assert rows["4.weight"].why_dense == "depthwise: one input channel a group"
    assert rows["3.shortcut.weight"].holds and rows["3.shortcut.weight"].kind == "conv"
    tied = pruned(Transformer(tied=True))
    row = next(row for row in check_nm(tied, exclude=["head.*"]).rows if row.name == "embedding.weight")
    assert row.kind == "embedding" and row.aliases == ("head.weight",) and row.why_dense == "excluded"
    transposed = check_nm(nn.ConvTranspose2d(8, 8, 3)).rows[0]
    assert transposed.violations is None and "outputs" in str(transposed.why_dense)


def test_resnet50() -> None:
    """What a user of TensorRT is told: the stem is dense, sparse kernels are for the wide layers."""
    model = pruned(resnet50()).half()
    report = check_nm(model)
    assert report.ok and len(report.holding) == 17  # 16 convolutions and the classifier
    verdicts = {row.name: row.verdicts["TensorRT"].runs for row in report.rows if row.holds}
    assert {name for name, runs in verdicts.items() if runs == "yes"} == {
        "4.downsample.weight",
        "5.path.conv1.weight",
        "5.path.conv2.weight",
        "5.path.conv3.weight",
        "5.downsample.weight",
        "8.weight",
    }
    assert next(row for row in report.rows if row.name == "0.weight").why_dense == "3 input channels are not a multiple of 4 (a stem)"
    classifier = next(row for row in report.rows if row.name == "8.weight").verdicts
    assert classifier["CUTLASS"].why == "shape is not a multiple of 32 x 64" and classifier["cuSPARSELt"].runs == "no"  # 1000 rows


def test_grouped_convolutions_are_no_stems() -> None:
    row = check_nm(nn.Conv2d(16, 16, 3, groups=8)).rows[0]
    assert row.why_dense == "2 input channels are not a multiple of 4 (8 groups)"


def test_one_input_channel_of_one_group_is_a_stem() -> None:
    row = check_nm(nn.Conv2d(1, 16, 3)).rows[0]
    assert row.why_dense == "1 input channels are not a multiple of 4 (a stem)"


def test_nothing_checked_is_not_ok() -> None:
    report = check_nm({"w": torch.zeros(0, 4)})
    assert not report.ok and report.rows[0].why_dense == "empty" and report.summary() == "no tensor is 2:4"


def test_parameters_of_unknown_use_are_not_called_convolutions() -> None:
    """A vision transformer's class token, position embedding, and an LSTM."""
    model = nn.Module()
    model.token, model.position = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 8, 16))
    model.lstm = nn.LSTM(8, 4)
    rows = {row.name: row for row in check_nm(model).rows}
    assert rows["token"].why_dense == "1 input channels are not a multiple of 4"
    assert rows["position"].kind == "parameter" and rows["position"].verdicts["TensorRT"].runs == "no"
    assert (
        rows["lstm.weight_ih_l0"].kind == "recurrent" and rows["lstm.weight_ih_l0"].verdicts["cuSPARSELt"].why == "recurrent, not a Linear"
    )
    state = {row.name: row.kind for row in check_nm(model.state_dict()).rows}
    assert (state["token"], state["position"], state["lstm.weight_ih_l0"]) == ("parameter", "parameter", "matrix")
    assert check_nm({"w": torch.ones(8, 1, 3, 3)}).rows[0].why_dense == "depthwise, or a stem with one input channel"


def test_weights_of_gpt2_lie_the_other_way_round() -> None:
    """transformers' Conv1D is [inputs, outputs]: 2:4 along axis 1 is of no use to an engine, and not called 2:4."""
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    model = nn.Sequential(conv1d(16, 8))
    with pytest.warns(CrAMWarning, match="prunes nothing"):
        prune(model, NM(2, 4))
    report = check_nm(model)
    assert not report.ok and report.rows[0].why_dense == "axis 1 of transformers' Conv1D is the outputs"


def test_semi_structured_weights_are_unpacked() -> None:
    model = nn.Linear(128, 64, bias=False).half()
    prune(model, NM(2, 4))
    expected = check_nm(model)
    model.weight = nn.Parameter(load.cutlass_tensor(model.weight.detach()), requires_grad=False)
    assert check_nm(model) == expected and expected.ok


STRANGE = {
    "float8_e4m3fnuz": torch.zeros(8, 8, dtype=torch.uint8).view(torch.float8_e4m3fnuz),
    "uint16": torch.zeros(8, 8, dtype=torch.uint16),
    "complex64": torch.zeros(8, 8, dtype=torch.complex64),
    "meta": torch.zeros(8, 8, device="meta"),
    "csr": torch.eye(8).to_sparse_csr(),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_cannot_be_checked_is_named(name: str) -> None:
    report = check_nm({"w": STRANGE[name], "same": STRANGE[name].clone()})
    assert len(report.rows) == 2 and report.rows[0].violations is None
    assert str(report.rows[0].why_dense) in str(report)
    assert report.rows[0].zeros == (64 if name == "complex64" else None)  # torch counts no others
    json.loads(report.to_json())


def test_report_is_data_and_a_table() -> None:
    model = pruned(resnet())
    with torch.no_grad():
        model[7].weight[3, 4:8] = 1
    report = check_nm(model)
    assert not report.ok and [row.name for row in report.violating] == ["7.weight"]
    data = json.loads(report.to_json())
    assert data["ok"] is False and len(data["tensors"]) == len(report.rows)
    assert {row["name"]: row["first"] for row in data["tensors"]}["7.weight"] == "[3, 4:8]"
    text = str(report)
    assert "1 of 96 groups, the first [3, 4:8]" in text and text.endswith("1 of 35 tensors violate 2:4"), text
    assert check_nm(model, exclude="7.*").ok
    assert not check_nm({"b": torch.zeros(4)}).ok  # nothing is 2:4
    with pytest.raises(ValueError, match="got 'head', which matches none"):
        check_nm(model, exclude=["head"])
    with pytest.raises(TypeError, match="got list"):
        check_nm([torch.zeros(2, 4)])


@pytest.mark.parametrize("kind", ["safetensors", "torch", "nested", "onnx"])
def test_command(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, _, _ = make("convolution")
    path = tmp_path / {"safetensors": "w.safetensors", "torch": "w.pt", "nested": "w.pth", "onnx": "w.onnx"}[kind]

    def save() -> None:
        state = model.state_dict()
        if kind == "safetensors":
            pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install 'cram_kernels[export]'").save_file(
                state, path
            )
        elif kind == "onnx":
            pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'cram_kernels[onnx]'")
            torch.onnx.export(model, (torch.randn(1, 8, 6, 6),), path, dynamo=True, external_data=False, verbose=False)
        else:
            torch.save({"epoch": 3, "state_dict": state} if kind == "nested" else state, path)

    save()
    assert cli.main(["check", str(path)]) == 0
    assert "2 of 4 tensors are 2:4, none violates it" in capsys.readouterr().out
    with torch.no_grad():
        model[0].weight[5, :4, 1, 2] = 1
    save()
    assert cli.main(["check", str(path), "--json"]) == 1
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tensors"]}
    assert (rows["0.weight"]["violations"], rows["0.weight"]["first"]) == (1, "[5, 0:4, 1, 2]")
    assert cli.main(["check", str(path), "--exclude", "0.*"]) == 0
    assert cli.main(["check", str(path), "--pattern", "4:8", "--exclude", "*"]) == 1  # none is 4:8 ...


def test_command_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("a.pt", b"no"), ("a.safetensors", b"no"), ("a.onnx", b"no")):
        path = tmp_path / name
        path.write_bytes(content)
        assert cli.main(["check", str(path)]) == 2
        assert name in capsys.readouterr().err
    assert cli.main(["check", str(tmp_path / "none.pt")]) == 2
    for data in (b"hi", b"", b'{"a": 1}', (tmp_path / "a.safetensors").read_bytes()):
        (tmp_path / "w.pt").write_bytes(data)
        assert cli.main(["check", str(tmp_path / "w.pt")]) == 2
        assert capsys.readouterr().err.endswith("w.pt': torch.save did not write it\n")
    (tmp_path / "w.pt").write_bytes(b"\x80\x02hi")  # a pickle, damaged
    assert cli.main(["check", str(tmp_path / "w.pt")]) == 2
    assert capsys.readouterr().err.endswith("w.pt': KeyError: 105\n")
    contents = {
        "must hold a state dict, got .* of type list": [1, 2],
        "must hold a state dict, got .* an empty dict under 'model'": {"model": {}},
        "whose entry 1 has no string for a name": {1: torch.zeros(4, 4)},
        "whose entry 'optimizer' is an object of type dict": {"optimizer": {"state": {}}, "epoch": 3},
        "whose entry 'extra' under 'model' is an object of type int": {"model": {"extra": 1}},
        "torch.nn.modules.linear.Linear was not an allowed global by default; save model.state_dict()": nn.Linear(2, 2),
    }
    for message, content in contents.items():
        torch.save(content, tmp_path / "w.pt")
        assert cli.main(["check", str(tmp_path / "w.pt")]) == 2
        assert re.search(message, error := capsys.readouterr().err) and "weights_only=False" not in error, error
    torch.save({"w": torch.zeros(4, 4)}, tmp_path / "w.pt")
    with monkeypatch.context() as patched:
        patched.setattr(NMReport, "to_json", lambda self: 1 / 0)  # whatever it is: 1 would say that w violates the pattern
        assert cli.main(["check", str(tmp_path / "w.pt"), "--json"]) == 2
        assert "ZeroDivisionError" in capsys.readouterr().err
    assert cli.main(["check", str(tmp_path)]) == 2
    assert "which is a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["check", "x", "--pattern", "4:2"])


@pytest.mark.parametrize("kind", ["safetensors", "onnx", "zip", "legacy"])
def test_any_damage_is_an_exit_status_of_its_own(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Python's own for an exception, 1, would say that a tensor violates the pattern. A file that is read all the same holds 2:4."""
    path = tmp_path / {"safetensors": "w.safetensors", "onnx": "w.onnx"}.get(kind, "w.pt")
    state = {"w": half_zero(8, 8), "b": half_zero(8, 8)}
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(state, path)
    elif kind == "onnx":
        onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'cram_kernels[onnx]'")
        tensors = [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in state.items()]
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors)), path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    random = torch.Generator().manual_seed(0)

    def drawn(limit: int) -> int:
        return int(torch.randint(limit, (), generator=random))

    statuses = []
    for i in range(60):
        if i % 3 == 0:
            data = whole[: drawn(len(whole))]
        elif i % 3 == 1:
            data = bytes(drawn(256) for _ in range(drawn(300)))
        else:
            data = bytearray(whole)
            data[drawn(min(len(whole), 400))] = drawn(256)
        path.write_bytes(data)
        statuses.append(cli.main(["check", str(path), "--json"]))
        out, error = capsys.readouterr()
        assert "Traceback" not in error and (statuses[-1] == 2) == (not out), (i, statuses[-1], error)
    assert statuses.count(2) >= 30, statuses
