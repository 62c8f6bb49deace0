"""Exported files: every format gives back every bit, a broken or unpruned tensor is refused, a killed export leaves the old file."""

import copy
import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import forked
import pytest
import torch
from cases import VALUES
from compare import assert_bitwise_equal
from export_models import MODELS, Transformer, make, pruned
from torch import Tensor, nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from cram_kernels import NM, cli, prune, reference
from cram_kernels.export import check_nm, export, read, read_cutlass, weights_in
from cram_kernels.export.container import read_manifest
from cram_kernels.reference.key import pack_bits

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install 'cram_kernels[export]'")
FORMATS = ["safetensors", "bitmask", "cutlass-sm80"]
FORMAT = pytest.mark.parametrize("format", FORMATS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sparse(shape: tuple[int, ...], dtype: torch.dtype, values: str = "normal", m: int = 4) -> Tensor:
    w = VALUES[values](torch.Size(shape).numel(), dtype, torch.Generator().manual_seed(len(shape))).view(shape)
    return torch.where(reference.nm_keep(w, m // 2, m), w, 0)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert_bitwise_equal(found[name], t.contiguous(), name)


@FORMAT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, dtype: torch.dtype, format: str, tmp_path: Path) -> None:
    model, _, exclude = make(name)
    model = model.to(dtype)
    path = tmp_path / "w.safetensors"
    report = export(model, path, format, exclude=exclude)
    assert report.ok
    assert_same(read(path), model.state_dict())
    own = read_manifest(path)
    assert own is not None and (own["format"], own["pattern"], own["axis"]) == (format, {"n": 2, "m": 4}, 1)
    assert {name for name, entry in own["tensors"].items() if entry["pattern"] == "2:4"} == {row.name for row in report.holding}


@FORMAT
@pytest.mark.parametrize("values", ["normal", "denormal", "nonfinite", "bits", "zeros", "ties"])
def test_any_bits(values: str, format: str, tmp_path: Path) -> None:
    """NaN, -0, denormals, all-zero groups: as they were. Only packing has no place for a -0 beside two numbers."""
    state = {str(dtype): sparse((64, 128), dtype, values) for dtype in DTYPES} | {"1:2": sparse((64, 64), torch.float32, values, m=2)}
    for w in state.values():
        w[:2] = 0
        places = (w != 0).unflatten(1, (-1, 4))
        over = (places & (places.cumsum(-1) > 2)).flatten(1)  # a NaN that is kept beside two numbers
        w[over] = 0
        if format == "cutlass-sm80":
            w[w == 0] = 0
    export(state, tmp_path / "w.safetensors", format)
    assert_same(read(tmp_path / "w.safetensors"), state)


def test_minus_zero_beside_two_numbers_is_packed_as_zero(tmp_path: Path) -> None:
    w = torch.tensor([-0.0, 1, 2, 0]).half().repeat(32, 16)
    export({"w": w}, tmp_path / "w.safetensors", "cutlass-sm80")
    (found,) = read(tmp_path / "w.safetensors").values()
    assert torch.equal(found, w) and not torch.equal(found.view(torch.int16), w.view(torch.int16))


@FORMAT
def test_other_dtypes_scalars_and_empty_tensors(format: str, tmp_path: Path) -> None:
    w = torch.randint(1, 100, (32, 128)).to(torch.int8)
    w[:, ::2] = 0
    fp8 = w.float().to(torch.float8_e4m3fn)
    state = {"int8": w, "fp8": fp8, "scalar": torch.tensor(3), "bool": torch.eye(8).bool(), "empty": torch.empty(0, 4)}
    state |= {"float64": torch.eye(4).double()}
    export(state, tmp_path / "w.safetensors", format)
    found = read(tmp_path / "w.safetensors")
    assert found.keys() == state.keys()
    for name, t in state.items():
        assert found[name].dtype == t.dtype and torch.equal(found[name].float(), t.float()), name


def test_what_is_packed(tmp_path: Path) -> None:
    """Bit-equal to torch's own packer; torch's class reads it; everything else is dense, and the manifest says why."""
    model, _, exclude = make("transformer")
    model = model.half()
    path = tmp_path / "w.safetensors"
    export(model, path, "cutlass-sm80", exclude=exclude)
    tensors = safetensors.load_file(path)
    stored = {name for name in model.state_dict() if f"{name}.packed" in tensors}
    assert stored == {f"encoder.layers.{i}.{part}" for i in (0, 1) for part in PACKED}
    loaded = read_cutlass(path)
    for name, w in model.state_dict().items():
        if name in stored:
            packed, meta = sparse_semi_structured_from_dense_cutlass(w)
            assert_bitwise_equal(tensors[f"{name}.packed"], packed, name)
            assert_bitwise_equal(tensors[f"{name}.meta"], meta, name)
            assert isinstance(loaded[name], SparseSemiStructuredTensorCUTLASS)
            assert_bitwise_equal(loaded[name].to_dense(), w, name)
        else:
            assert_bitwise_equal(loaded[name], w, name)


PACKED = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")


def test_packed_tensors_are_saved_and_loaded_with_weights_only(tmp_path: Path) -> None:
    export({"w": sparse((64, 128), torch.float16)}, tmp_path / "w.safetensors", "cutlass-sm80")
    loaded = read_cutlass(tmp_path / "w.safetensors")
    torch.save(loaded, tmp_path / "w.pt")
    with torch.serialization.safe_globals([SparseSemiStructuredTensorCUTLASS]):
        again = torch.load(tmp_path / "w.pt", weights_only=True)
    assert_bitwise_equal(again["w"].to_dense(), loaded["w"].to_dense(), "w")


def test_bitmask_is_smaller_and_its_bits_are_numpys_and_compressed_tensors(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed: pip install 'cram_kernels[test]'")
    w = sparse((256, 512), torch.float16)
    export({"w": w}, tmp_path / "dense.safetensors")
    export({"w": w}, tmp_path / "bits.safetensors", "bitmask")
    tensors = safetensors.load_file(tmp_path / "bits.safetensors")
    assert tensors["w.values"].nbytes + tensors["w.bitmask"].nbytes == w.nbytes * 9 // 16
    assert (tmp_path / "bits.safetensors").stat().st_size < 0.58 * (tmp_path / "dense.safetensors").stat().st_size
    expected = numpy.packbits((w != 0).numpy(), axis=-1, bitorder="little")
    assert torch.equal(tensors["w.bitmask"], torch.from_numpy(expected).flatten())


def test_bits_are_those_of_compressed_tensors() -> None:
    reason = "compressed-tensors is not installed: pip install 'cram_kernels[test]'"
    helpers = pytest.importorskip("compressed_tensors.utils.helpers", reason=reason)
    kept = torch.rand(48, 64) < 0.5
    assert torch.equal(helpers.pack_bitmasks(kept).flatten(), pack_bits(kept.flatten()))
    assert torch.equal(helpers.unpack_bitmasks(pack_bits(kept.flatten()).view(48, 8), [48, 64]), kept)


@FORMAT
def test_tied_and_overlapping_tensors(format: str, tmp_path: Path) -> None:
    model = pruned(Transformer(tied=True)).half()
    assert model.head.weight is model.embedding.weight
    export(model, tmp_path / "w.safetensors", format, exclude=["embedding.*"])
    assert_same(read(tmp_path / "w.safetensors"), model.state_dict())
    assert "head.weight" not in safetensors.load_file(tmp_path / "w.safetensors")
    base = sparse((64, 128), torch.float16)
    views = {"whole": base, "half": base[:32], "again": base}
    export(views, tmp_path / "v.safetensors", format)
    assert_same(read(tmp_path / "v.safetensors"), views)


@FORMAT
def test_a_violation_is_refused_with_count_and_place(format: str, tmp_path: Path) -> None:
    model, _, exclude = make("resnet")
    path = tmp_path / "w.safetensors"
    export(model, path, format, exclude=exclude)
    before = path.read_bytes()
    with torch.no_grad():
        model[3].conv1.weight[7, 4:8, 1, 2] = 1
        model[3].conv1.weight[9, 0:4, 0, 0] = 1
        model[7].weight[0, :4] = 1
    with pytest.raises(
        ValueError, match=r"export: tensor '3\.conv1\.weight' must be 2:4 along axis 1, got violations in 2 of 1,152"
    ) as error:
        export(model, path, format, exclude=exclude)
    assert "groups, the first [7, 4:8, 1, 2], and 1 more tensors violate it; prune it (prune=True)" in str(error.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["w.safetensors"]
    own = {name: t.clone() for name, t in model.state_dict().items()}
    assert export(model, path, format, exclude=exclude, prune=True).ok
    assert_same(model.state_dict(), own)  # the model is not changed
    found = read(path)
    for name, t in own.items():
        expected = torch.where(reference.nm_keep(t, 2, 4), t, 0) if t.dim() > 1 and t.shape[1] % 4 == 0 else t
        assert_bitwise_equal(found[name], expected.clone(memory_format=torch.contiguous_format), name)
    with pytest.raises(ValueError, match="must not be NaN to be pruned"):
        export({"w": torch.full((4, 4), float("nan"))}, path, format, prune=True)


class Masked(nn.Module):
    """A causal mask and a projection, both persistent buffers, beside a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mask", torch.ones(8, 8).tril())
        self.register_buffer("basis", torch.arange(1.0, 65).view(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.mask) @ self.basis


@pytest.mark.parametrize("format", [*FORMATS, "onnx"])
def test_buffers_of_a_module_are_neither_pruned_nor_refused(format: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ():
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'cram_kernels[onnx]'")
    model = Masked().eval()
    expected = copy.deepcopy(model)
    prune(expected, NM(2, 4))
    path = tmp_path / ("w.onnx" if format == "onnx" else "w.safetensors")
    inputs = {"example_inputs": (torch.randn(8, 8),)} if format == "onnx" else {}
    report = export(model, path, format, prune=True, **inputs)
    assert {row.name for row in report.holding} == {"linear.weight"}
    assert {row.name: row.why_dense for row in report.rows}["mask"] == "not the weight of a product"
    if format == "onnx":
        found = {w.name: w.tensor for w in weights_in(path)}
        assert any(torch.equal(t, expected.linear.weight) for t in found.values())
        assert_bitwise_equal(found["mask"], model.mask, "mask")
        assert any(torch.equal(t, model.basis) or torch.equal(t.t(), model.basis) for t in found.values())
    else:
        assert_same(read(path), expected.state_dict())
    assert check_nm(expected).ok and export(expected, path, format, **inputs).ok
    assert [row.name for row in check_nm(expected.state_dict()).violating] == ["mask", "basis"]  # it does not say what they are


def test_wrong_arguments(tmp_path: Path) -> None:
    state = {"w": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match=r"format must be one of .*, got 'cusparselt'"):
        export(state, tmp_path / "w", "cusparselt")
    with pytest.raises(ValueError, match="must be in a folder that is there"):
        export(state, tmp_path / "no" / "w.safetensors")
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module for format 'onnx', got dict"):
        export(state, tmp_path / "w.onnx", "onnx", example_inputs=())
    with pytest.raises(ValueError, match="example_inputs must be a tuple"):
        export(nn.Linear(4, 4), tmp_path / "w.onnx", "onnx", example_inputs=torch.zeros(4))
    with pytest.raises(ValueError, match="example_inputs and onnx_options must be absent"):
        export(state, tmp_path / "w.safetensors", example_inputs=())
    with pytest.raises(TypeError, match="entry 'step' must be a tensor, got int"):
        export({"step": 3}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"got 'w\.packed' twice"):
        export({"w": sparse((32, 64), torch.float16), "w.packed": torch.zeros(1)}, tmp_path / "w.safetensors", "cutlass-sm80")
    for format, name in (("safetensors", "w.pt"), ("bitmask", "w"), ("onnx", "w.safetensors")):
        with pytest.raises(ValueError, match=rf"path must end in \.[a-z]+ for format '{format}', got '.*{name}'"):
            export(state, tmp_path / name, format)
    with pytest.raises(ValueError, match="must be dense and have data, got a meta tensor"):
        export(nn.Linear(4, 4, device="meta"), tmp_path / "w.safetensors")
    assert os.listdir(tmp_path) == []


KILLED = """
import os, sys, time, torch
from cram_kernels.export import export, write
def slow(*args):
    print(os.getpid(), flush=True)
    time.sleep(60)
write._verify = slow
export({"w": torch.zeros(64, 64)}, sys.argv[1], sys.argv[2])
"""


@FORMAT
@pytest.mark.parametrize("old", [True, False])
def test_a_killed_export_leaves_the_old_file_or_none(old: bool, format: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    if old:
        export({"old": torch.ones(4)}, path, format, pattern=NM(1, 2))
    before = path.read_bytes() if old else None
    process = subprocess.Popen([*forked.python(), "-c", KILLED, str(path), format], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    os.kill(int(process.stdout.readline()), signal.SIGKILL)
    process.wait()
    assert (path.read_bytes() if path.exists() else None) == before
    partial = [name for name in os.listdir(tmp_path) if name != path.name]
    assert len(partial) == 1 and partial[0].endswith(".partial")
    export({"new": torch.ones(4, 2)[:, :1] * torch.tensor([1, 0])}, path, format, pattern=NM(1, 2))
    assert set(read(path)) == {"new"}


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cram_kernels.export import write

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "_verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export({"w": torch.zeros(4, 4)}, tmp_path / "w.safetensors")
    assert os.listdir(tmp_path) == []


FULL = """
import resource, signal, sys
import torch
from cram_kernels import cli
from cram_kernels.export import export
torch.save({"w": torch.zeros(512, 512)}, sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing more then fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(cli.main(["export", sys.argv[2], sys.argv[1], "--format", sys.argv[3]]))
"""


@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX; Linux or macOS runs this test")
@pytest.mark.parametrize("format", ["safetensors", "cutlass-sm80"])
def test_a_full_disk_leaves_the_old_file(format: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    export({"old": torch.ones(4)}, path, pattern=NM(1, 2))
    before = path.read_bytes()
    result = subprocess.run(
        [*forked.python(), "-c", FULL, str(path), str(tmp_path / "w.pt"), format], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("export: "), result.stderr
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["w.pt", "w.safetensors"]


def test_two_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    states = [{"w": torch.full((256, 256), float(i)) * torch.tensor([0, 1]).repeat(128)} for i in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda state: export(state, tmp_path / "w.safetensors"), states * 4):
            pass
    found = read(tmp_path / "w.safetensors")["w"]
    assert any(torch.equal(found, state["w"]) for state in states) and os.listdir(tmp_path) == ["w.safetensors"]


def test_links_are_followed_and_only_files_replaced(tmp_path: Path) -> None:
    state = {"w": torch.zeros(4, 4)}
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "real.safetensors").write_bytes(b"old")
    (tmp_path / "store" / "real.safetensors").chmod(0o640)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "store" / "real.safetensors")
    export(state, tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink() and os.listdir(tmp_path / "store") == ["real.safetensors"]
    assert_same(read(tmp_path / "store" / "real.safetensors"), state)
    assert (tmp_path / "store" / "real.safetensors").stat().st_mode & 0o777 == 0o640
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, kind in (("folder", "folder"), ("pipe", "device")):
        with pytest.raises(ValueError, match=f"path must be a file, or not there yet, got .*{name}.safetensors', which is a {kind}"):
            export(state, tmp_path / f"{name}.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["folder.safetensors", "link.safetensors", "pipe.safetensors", "store"]


def damaged(path: Path, change) -> Path:
    """The file with its tensors or its manifest changed."""
    tensors, own = safetensors.load_file(path), read_manifest(path)
    change(tensors, own)
    safetensors.save_file(tensors, path, metadata={"cram_kernels": json.dumps(own)})
    return path


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    state = {"w": sparse((64, 128), torch.float16)}

    def fresh(format: str) -> Path:
        export(state, tmp_path / "w.safetensors", format)
        return tmp_path / "w.safetensors"

    with pytest.raises(ValueError, match=r"must have the tensor 'w\.meta'"):
        read(damaged(fresh("cutlass-sm80"), lambda tensors, own: tensors.pop("w.meta")))
    with pytest.raises(ValueError, match=r"w\.meta must be what packing its weight gives"):
        read(damaged(fresh("cutlass-sm80"), lambda tensors, own: tensors["w.meta"].view(-1)[5].bitwise_xor_(0x7)))
    with pytest.raises(ValueError, match=r"'w\.values' must have the dtype and shape .*, float16 \[\d+\], got float16 \[\d+\]"):
        read(damaged(fresh("bitmask"), lambda tensors, own: tensors["w.bitmask"][3].bitwise_xor_(1)))
    with pytest.raises(ValueError, match="format_version must be 1, got 2"):
        read(damaged(fresh("safetensors"), lambda tensors, own: own.update(format_version=2)))
    for change in (
        lambda tensors, own: own.pop("tensors"),
        lambda tensors, own: own["tensors"]["w"].pop("stored"),
        lambda tensors, own: own["tensors"]["w"].update(stored="zip"),
        lambda tensors, own: own.update(tensors=[1]),
        lambda tensors, own: own.update(aliases={"v": "none"}),
    ):
        with pytest.raises(ValueError, match=r"manifest must .*damaged"):
            read(damaged(fresh("safetensors"), change))
    with pytest.raises(ValueError, match=r"must name every tensor, got 'more' beside it: the file is damaged"):
        read(damaged(fresh("bitmask"), lambda tensors, own: tensors.update(more=torch.ones(4, 4))))
    for format in FORMATS:
        for reader in (read, read_cutlass) if format == "cutlass-sm80" else (read,):
            for shape in ([-64, 128], [2**62, 128], [0, 2**70], [64], [], [64, 128, 2], [64, 129], ["64", 128], [64.0, 128], 8192, None):
                with pytest.raises(ValueError, match=r"damaged|'w.*' must be"):
                    reader(damaged(fresh(format), lambda tensors, own, shape=shape: own["tensors"]["w"].update(shape=shape)))
            for key, value in (("dtype", "float"), ("dtype", "complex128"), ("dtype", "nn"), ("dtype", 3), ("stored", [1])):
                with pytest.raises(ValueError, match=r"damaged|'w.*' must be"):
                    reader(damaged(fresh(format), lambda tensors, own, new={key: value}: own["tensors"]["w"].update(new)))
            with pytest.raises(ValueError, match="damaged"):
                reader(damaged(fresh(format), lambda tensors, own: own.update(pattern={"n": 4, "m": 2})))
    for path, message in ((fresh("bitmask"), "must be a 'cutlass-sm80' file, got"), (tmp_path / "w.pt", "must be a safetensors file")):
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=f"read_cutlass: path {message}"):
            read_cutlass(path)
    with pytest.raises(FileNotFoundError, match=r"read_cutlass: path must be a file, got .*none.* not there"):
        read_cutlass(tmp_path / "none")
    path = fresh("safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="must be a safetensors file"):
        read(path)


def test_files_of_others(tmp_path: Path) -> None:
    state = {"w": sparse((8, 8), torch.float32), "b": torch.ones(8)}
    safetensors.save_file(state, tmp_path / "plain.safetensors")
    assert_same(read(tmp_path / "plain.safetensors"), state)
    for name, content in (("top.pt", state), ("nested.pt", {"model": state, "epoch": 1})):
        torch.save(content, tmp_path / name)
        assert_same(read(tmp_path / name), state)
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="must be a torch checkpoint that weights_only loads"):
        read(tmp_path / "pickle.pt")
    with pytest.raises(FileNotFoundError, match="is not there"):
        read(tmp_path / "none.pt")


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_model_in_parts(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As Hugging Face's libraries save it: an index, and files beside it."""
    state = {name: sparse((8, 8), torch.bfloat16) for name in "abc"}
    suffix, save = (".safetensors", safetensors.save_file) if kind == "safetensors" else (".bin", torch.save)
    places = {"a": f"part-1{suffix}", "b": f"part-2{suffix}", "c": f"part-1{suffix}"}
    for file in set(places.values()):
        save({name: t for name, t in state.items() if places[name] == file}, tmp_path / file)
    index = tmp_path / f"model{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    assert_same(read(index), state)
    assert cli.main(["check", str(index)]) == 0 and cli.main(["export", str(index), str(tmp_path / "one.safetensors")]) == 0
    assert_same(read(tmp_path / "one.safetensors"), state)
    for wrong, message in (
        ("[]", "an index with a weight_map"),
        (json.dumps({"weight_map": places | {"d": places["a"]}}), "must have the tensor 'd'"),
        (json.dumps({"weight_map": places | {"a": 3}}), "must name the file of 'a', with tensors, got 3"),
        (json.dumps({"weight_map": places | {"a": index.name}}), "must name the file of 'a', with tensors, got 'model"),
        (json.dumps({"weight_map": places | {"a": f"../{tmp_path.name}/{places['a']}"}}), "must name files in its folder, got '../"),
        (json.dumps({"weight_map": places | {"a": str(tmp_path / places["a"])}}), "must name files in its folder, got '/"),
    ):
        index.write_text(wrong)
        assert cli.main(["check", str(index)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / places["b"]).unlink()
    with pytest.raises((ValueError, FileNotFoundError)):
        read(index)


def test_command_in_place(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "w.safetensors"
    safetensors.save_file({"w": torch.randn(64, 128).half()}, path)
    before = path.stat().st_size
    assert cli.main(["export", str(path), str(path), "--format", "bitmask", "--prune"]) == 0
    assert capsys.readouterr().out.endswith(f"{path}: {path.stat().st_size:,} bytes, bitmask; {path}: {before:,}\n")
    assert path.stat().st_size < 0.7 * before and check_nm(read(path)).ok


@FORMAT
def test_command(format: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dense = {"w": torch.randn(64, 128).half(), "b": torch.ones(64).half()}
    torch.save(dense, tmp_path / "w.pt")
    source, out = str(tmp_path / "w.pt"), tmp_path / "w.safetensors"
    assert cli.main(["export", source, str(out), "--format", format]) == 1
    assert "refused, nothing written: w has violations in" in capsys.readouterr().err and not out.exists()
    assert cli.main(["export", source, str(out), "--format", format, "--prune"]) == 0
    assert "pruned: 4,096 weights of 1 tensors set to zero; 1 of 2 tensors are 2:4" in capsys.readouterr().out
    assert cli.main(["export", source, str(tmp_path / "2.safetensors"), "--format", format, "--prune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pruned"] == {"w": 4096}
    assert check_nm(read(out)).ok and cli.main(["check", str(out)]) == 0
    assert cli.main(["export", source, str(out), "--exclude", "w", "--format", format]) == 0
    assert_same(read(out), dense)
    assert cli.main(["export", str(tmp_path / "none.pt"), str(out)]) == 2
    assert cli.main(["export", source, str(tmp_path / "no" / "w.safetensors"), "--prune"]) == 2


def test_a_refused_command_tells_all_as_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"a": torch.ones(8, 8), "b": torch.ones(8, 8), "c": torch.zeros(8, 8)}, tmp_path / "w.pt")
    assert cli.main(["check", str(tmp_path / "w.pt"), "--json"]) == 1
    checked = capsys.readouterr().out
    assert cli.main(["export", str(tmp_path / "w.pt"), str(tmp_path / "w.safetensors"), "--json"]) == 1
    out, error = capsys.readouterr()
    assert out == checked and [row["name"] for row in json.loads(out)["tensors"] if row["violations"]] == ["a", "b"]
    assert error.endswith("a has violations in 16 of 16 groups, the first [0, 0:4], and 1 more tensors violate 2:4\n")


@pytest.mark.parametrize("option", [["--input", "1,3"], ["--model", "a:b"]])
def test_options_of_another_format_are_refused(option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"w": torch.zeros(8, 8)}, tmp_path / "w.pt")
    assert cli.main(["export", str(tmp_path / "w.pt"), str(tmp_path / "w.safetensors"), *option]) == 2
    assert "--model and --input must be absent for format 'safetensors'" in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    export({"w": torch.zeros(4, 4)}, tmp_path / "w.safetensors")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert time.time() - (tmp_path / "w.safetensors").stat().st_mtime < 600
