"""State dicts hold more than plain tensors: what can be checked is, and what cannot is named and has an exit status of its own."""

import copy
import io
from pathlib import Path

import pytest
import torch
from compare import assert_bitwise_equal
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from cram_kernels import NM, cli, prune
from cram_kernels.export import check_nm, export, load_sparse, read
from cram_kernels.export.onnx_model import _same_output
from cram_kernels.warning import CrAMWarning

NO_SAFETENSORS = "safetensors is not installed: pip install 'cram_kernels[export]'"
EXTRA = {
    "dict": {"amax": 1.0, "history": torch.ones(8, 8)},
    "None": None,
    "bytes": b"12",
    "BytesIO": io.BytesIO(b"12"),
    "tensor": torch.ones(3),
}


class WithExtra(nn.Linear):
    def __init__(self, extra: object) -> None:
        super().__init__(64, 64)
        self.extra = extra

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


@pytest.mark.parametrize("kind", EXTRA)
def test_extra_state(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason=NO_SAFETENSORS)
    model = nn.Sequential(WithExtra(EXTRA[kind]))
    prune(model, NM(2, 4))
    for source in (model, model.state_dict()):
        report = check_nm(source)
        assert report.ok and [row.name for row in report.holding] == ["0.weight"]
        assert "0._extra_state" in {row.name for row in report.rows}
    path = tmp_path / "w.safetensors"
    if kind == "tensor":
        export(model, path)
    else:
        with pytest.warns(CrAMWarning, match=r"left out, since a safetensors file holds tensors only: 0\._extra_state"):
            export(model, path)
    other = nn.Sequential(WithExtra(EXTRA[kind]))
    load_sparse(other, path)
    assert_bitwise_equal(other[0].weight.detach(), model[0].weight.detach(), "weight")
    assert other[0].extra is EXTRA[kind] or kind == "tensor"


def test_what_is_no_tensor_may_hide_weights() -> None:
    """torch.ao's quantized Linear keeps a tuple in its state dict."""
    w = torch.zeros(8, 8)
    report = check_nm({"w": w, "epoch": 3, "_packed_params": (torch.ones(8, 8), None)})
    assert [row.name for row in report.unchecked] == ["_packed_params"] and not report.ok
    assert check_nm({"w": w, "epoch": 3, "_packed_params": (torch.ones(8, 8), None)}, exclude="_packed*").ok
    with pytest.raises(TypeError, match="entry 'step' must be a tensor, got int"):
        check_nm({"step": 3})


class Scaled(Tensor):
    """A wrapper with no storage of its own, as torchao's quantized tensors are: integers and a scale."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> "Scaled":
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers: Tensor, scale: Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(str(op))


class Readable(Scaled):
    def dequantize(self) -> Tensor:
        return self.numbers * self.scale


class Named(Tensor):
    """With storage of its own, as torchvision's tensors are."""


def quantized(t: Tensor, cls: type) -> nn.Parameter:
    scale = t.abs().max() / 127
    return nn.Parameter(cls((t / scale).round().to(torch.int8), scale), requires_grad=False)


def test_subclasses(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason=NO_SAFETENSORS)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 8))
    prune(model, NM(2, 4))
    dense = torch.randn(8, 16)
    model[0].weight = quantized(model[0].weight.detach(), Readable)
    model[1].weight = quantized(model[1].weight.detach(), Scaled)
    model[2].weight = nn.Parameter(dense.as_subclass(Named))
    rows = {row.name: row for row in check_nm(model).rows}
    assert rows["0.weight"].holds and rows["1.weight"].unchecked and rows["1.weight"].shape == (16, 8)
    assert "Scaled" in str(rows["1.weight"].why_dense)
    assert rows["2.weight"].violates and rows["2.weight"].zeros == 0
    for index, name in ((0, "Readable"), (1, "Scaled")):
        with pytest.raises(ValueError, match=rf"tensor '0\.weight' must be dense and have data, got .*{name}"):
            export(nn.Sequential(model[index]), tmp_path / "w.safetensors")
    export(nn.Sequential(model[2]), tmp_path / "w.safetensors", prune=True)
    assert torch.equal(model[2].weight.as_subclass(Tensor), dense)


def test_torchs_own_quantized_tensors() -> None:
    """A zero is whatever its zero point says."""
    w = torch.randn(8, 16)
    prune(nn.ParameterList([w]), NM(2, 4))
    sparse, dense = (torch.quantize_per_tensor(t, 0.05, 3, torch.qint8) for t in (w, torch.ones(8, 16)))
    rows = {row.name: row for row in check_nm({"sparse": sparse, "dense": dense}).rows}
    assert rows["sparse"].holds and rows["dense"].violates


@pytest.mark.parametrize("library", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(library: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)).bfloat16()
    prune(nn.ModuleList([model[0]]), NM(2, 4))
    quantization.quantize_(model, getattr(quantization, library)())
    rows = {row.name: row for row in check_nm(model).rows}
    assert rows["0.weight"].holds and rows["1.weight"].violates


@pytest.mark.parametrize("source", ["module", "state dict", "file"])
@pytest.mark.parametrize("layer", [nn.Linear(16, 8), nn.Conv2d(8, 8, 3)], ids=["linear", "conv"])
def test_masks_of_torch_prune(layer: nn.Module, source: str, tmp_path: Path) -> None:
    """weight_orig is dense; what the layer computes with is weight_orig * weight_mask."""
    pytest.importorskip("safetensors", reason=NO_SAFETENSORS)
    torch.manual_seed(0)
    mask = torch.randn((8, 16) if isinstance(layer, nn.Linear) else (8, 8, 3, 3))
    prune(nn.ParameterList([mask]), NM(2, 4))
    model = nn.Sequential(copy.deepcopy(layer))
    torch_prune.custom_from_mask(model[0], "weight", (mask != 0).float())
    expected = (model[0].weight_orig * model[0].weight_mask).detach()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    given = {"module": model, "state dict": model.state_dict(), "file": read(tmp_path / "w.pt")}[source]
    report = check_nm(given)
    assert report.ok and [row.name for row in report.holding] == ["0.weight"]
    assert cli.main(["check", str(tmp_path / "w.pt")]) == 0
    export(given, tmp_path / "w.safetensors")
    assert_bitwise_equal(read(tmp_path / "w.safetensors")["0.weight"], expected, "weight")
    plain = nn.Sequential(copy.deepcopy(layer))
    for file in ("w.pt", "w.safetensors"):
        load_sparse(plain, tmp_path / file)
        assert_bitwise_equal(plain[0].weight.detach(), expected, file)
    with pytest.raises(ValueError, match=r"model must be without masks and parametrizations, got '0\.weight'"):
        load_sparse(model, tmp_path / "w.safetensors")
    torch_prune.remove(model[0], "weight")
    assert {row.name: row for row in check_nm(model).rows} == {row.name: row for row in check_nm(plain).rows}


def test_parametrized_layers() -> None:
    """What the layer computes with is checked; where only its parts are known, that is said."""
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(16, 8)), parametrizations.weight_norm(nn.Linear(8, 16)))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = check_nm(model)
    assert {row.name for row in report.violating} == {"0.weight", "1.weight"}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())  # power iteration would change some
    state = check_nm(model.state_dict())
    assert [row.name for row in state.unchecked] == ["0.parametrizations.weight.original"]


SPARSE = torch.tensor([1.0, 2, 0, 0]).repeat(4, 2)
NESTED = {
    "net": {"net": {"w": SPARSE}, "epoch": 1},
    "module": {"module": {"w": SPARSE}},
    "params": {"params": {"w": SPARSE}},
    "teacher": {"teacher": {"w": SPARSE}, "optimizer": {"state": {0: {"m": torch.ones(4, 4)}}}},
    "ema": {"ema": {"w": SPARSE}, "rng": torch.ones(3)},
    "model.state_dict": {"model": {"state_dict": {"w": SPARSE}, "config": {"width": 3}}},
    "of no usual name": {"my_net": {"w": SPARSE}, "epoch": 3},
}


@pytest.mark.parametrize("kind", NESTED)
def test_checkpoints_keep_their_state_dict_anywhere(kind: str, tmp_path: Path) -> None:
    torch.save(NESTED[kind], tmp_path / "w.pt")
    assert torch.equal(read(tmp_path / "w.pt")["w"], SPARSE)
    assert cli.main(["check", str(tmp_path / "w.pt")]) == 0


def test_key(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of several state dicts one is chosen, and it is said which; --key chooses another."""
    dense = torch.ones(4, 8)
    torch.save({"model": {"w": SPARSE}, "nets": {"a.b": {"w": dense}}}, tmp_path / "w.pt")
    with pytest.warns(CrAMWarning, match=r"read the state dict under 'model'; there is also 'nets\.a\.b'"):
        assert torch.equal(read(tmp_path / "w.pt")["w"], SPARSE)
    assert torch.equal(read(tmp_path / "w.pt", key="nets.a.b")["w"], dense)
    assert cli.main(["check", str(tmp_path / "w.pt"), "--key", "nets.a.b"]) == 1
    assert cli.main(["check", str(tmp_path / "w.pt"), "--key", "model"]) == 0
    capsys.readouterr()
    assert cli.main(["check", str(tmp_path / "w.pt"), "--key", "none"]) == 2
    assert "which holds nothing under 'none'; key (--key) must be one of 'model', 'nets.a.b'" in capsys.readouterr().err
    torch.save({"one": {"w": SPARSE}, "two": {"w": dense}}, tmp_path / "w.pt")
    assert cli.main(["check", str(tmp_path / "w.pt")]) == 2
    assert "key (--key) must be one of 'one', 'two'" in capsys.readouterr().err
    torch.save({"w": SPARSE, "extra": {"lr": 0.1}}, tmp_path / "w.pt")
    for key, holds in {
        "model": "which holds nothing under 'model'",
        "w": "which holds an object of type Tensor under 'w'",
        "extra": "whose entry 'lr' under 'extra' is an object of type float",
    }.items():
        assert cli.main(["check", str(tmp_path / "w.pt"), "--key", key]) == 2
        assert f"{holds}; its weights are at the top: leave key (--key) out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="key must be absent for anything but a torch checkpoint"):
        read(tmp_path / "w.safetensors", key="model")


def test_exit_status_of_what_could_not_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": SPARSE, "qweight": torch.ones(8, 8, dtype=torch.int32), "position": torch.zeros(1, 8, dtype=torch.int64)}, path)
    assert cli.main(["check", str(path)]) == 3
    assert "1 of 3 tensors could not be checked, the first 'qweight': dtype int32" in capsys.readouterr().out
    assert cli.main(["check", str(path), "--exclude", "qweight"]) == 0
    torch.save({"w": torch.ones(4, 8), "qweight": torch.ones(8, 8, dtype=torch.int32)}, path)
    assert cli.main(["check", str(path)]) == 1


HUGE = [float("-inf"), float("inf"), float("nan"), torch.finfo(torch.float32).min, -1e9, -1e4]


@pytest.mark.parametrize("fill", HUGE, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_outputs_beside_masked_places(fill: float, share: float) -> None:
    """Equal masks are equal; beside them a difference of the ordinary numbers is seen, and rounding is accepted."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 40, generator=random)
    masked = torch.rand(40, 40, generator=random) < share
    want = x.masked_fill(masked, fill)
    _same_output(0, want, want.clone())
    _same_output(0, want, want * (1 - 1e-5))
    _same_output(0, want, torch.where(masked, want, want + 1e-5))
    place = int((~masked).flatten().long().argmax())
    for wrong in (100.0, 0.01, float("inf"), float("nan"), fill):
        got = want.clone()
        got.view(-1)[place] = got.view(-1)[place] + wrong if wrong in (100.0, 0.01) else wrong
        with pytest.raises(ValueError, match="output 0 of ONNX Runtime must be within"):
            _same_output(0, want, got)
    with pytest.raises(ValueError, match="must be within"):  # no longer masked
        _same_output(0, want, torch.where(masked, torch.zeros(()), want))


def test_outputs_of_other_shapes_and_integers() -> None:
    with pytest.raises(ValueError, match=r"must have the shape \[4\], got \[4, 4\]"):
        _same_output(0, torch.ones(4), torch.ones(4, 4))
    _same_output(0, torch.arange(4), torch.arange(4))
    with pytest.raises(ValueError, match=r"must be within 0 of torch's 0, got 1 \(the first of 4 that differ\)"):
        _same_output(0, torch.arange(4), torch.arange(4) + 1)
    _same_output(0, torch.zeros(4), torch.zeros(4))
    _same_output(0, torch.empty(0), torch.empty(0))
