"""load_sparse: dense on the CPU; on a GPU eligible layers become semi-structured, and the others say why not."""

import copy
from pathlib import Path

import pytest
import torch
from compare import assert_bitwise_equal
from export_models import Transformer, make, pruned
from torch import nn
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from cram_kernels import NM, prune
from cram_kernels.export import check_nm, export, load, load_sparse, read
from cram_kernels.export.consumers import CUSPARSELT, CUTLASS

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install 'cram_kernels[export]'")
FORMAT = pytest.mark.parametrize("format", ["safetensors", "bitmask", "cutlass-sm80"])
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run these tests on a machine with an NVIDIA GPU")


def file(model: nn.Module, tmp_path: Path, format: str, exclude: tuple[str, ...]) -> Path:
    export(model, tmp_path / "w.safetensors", format, exclude=exclude)
    return tmp_path / "w.safetensors"


@FORMAT
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_on_the_cpu(backend, format: str, tmp_path: Path) -> None:
    model, (tokens,), exclude = make("transformer")
    empty = Transformer()
    report = load_sparse(empty, file(model, tmp_path, format, exclude), backend)
    assert report.sparse == () and len(report.rows) == len(model.state_dict())
    assert all(row.why_dense for row in report.rows)
    assert ("on cpu" if backend == "auto" else "backend 'dense'") in str(report)
    for name, t in model.state_dict().items():
        assert_bitwise_equal(empty.state_dict()[name], t, name)
    assert torch.equal(empty.eval()(tokens), model(tokens))


def test_refused(tmp_path: Path) -> None:
    model, _, exclude = make("transformer")
    path = file(model, tmp_path, "safetensors", exclude)
    for backend in ("cutlass", "cusparselt"):
        with pytest.raises(ValueError, match=f"backend '{backend}' needs a model on an NVIDIA GPU, got one on 'cpu'"):
            load_sparse(Transformer(), path, backend)
    with pytest.raises(ValueError, match="backend must be one of auto, cusparselt, cutlass, dense, got 'triton'"):
        load_sparse(Transformer(), path, "triton")
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        load_sparse(nn.Linear(4, 4), path)


def test_a_file_that_is_not_what_its_manifest_says(tmp_path: Path) -> None:
    """Changed behind our back: refused before the model is touched."""
    from cram_kernels.export.container import read_manifest, save

    model, _, exclude = make("transformer")
    path = file(model, tmp_path, "safetensors", exclude)
    tensors, own = read(path), read_manifest(path)
    tensors["encoder.layers.1.linear1.weight"][3, 8:12] = 1
    assert own is not None
    save(path, {name: t.clone() for name, t in tensors.items()}, own)
    other = Transformer()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"'encoder\.layers\.1\.linear1\.weight' must be 2:4, as its manifest says, got violations in 1 of"
    ):
        load_sparse(other, path)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


@pytest.mark.parametrize("consumer, backend", [(CUTLASS, "cutlass"), (CUSPARSELT, "cusparselt")], ids=str)
def test_why_a_layer_stays_dense(consumer, backend: str) -> None:
    """The choice is made from shapes, dtypes and users alone, so it can be seen on any machine."""

    def reasons(model: nn.Module) -> dict[str, str | None]:
        return {row.name: load.why_dense(row, backend) for row in check_nm(model).rows}

    model, _, _ = make("transformer")
    found = reasons(model.half())
    assert found["encoder.layers.0.linear1.weight"] is None and found["encoder.layers.0.self_attn.out_proj.weight"] is None
    assert found["encoder.layers.0.self_attn.in_proj_weight"] == "not the weight of a Linear module"
    assert "groups" in str(found["embedding.weight"])  # not pruned
    assert found["head.weight"] == f"shape is not a multiple of {'32 x 64' if backend == 'cutlass' else '16 x 16'}"
    assert found["encoder.layers.0.linear1.bias"] == "fewer than 2 dims"
    assert "float32" in str(reasons(model.float())["encoder.layers.0.linear1.weight"])
    tied = Transformer(tied=True)
    prune(tied, NM(2, 4))
    assert reasons(tied.half())["embedding.weight"] == "shared with head.weight"
    resnet, _, _ = make("resnet")
    assert reasons(resnet.half())["3.conv1.weight"] == "not a matrix: torch has no sparse convolution"


def test_cutlass_tensors_are_those_of_torch() -> None:
    """What a GPU of compute capability 8.x gets, made on the CPU: torch's class unpacks it to the bit, copies it and moves it."""
    w = torch.randn(64, 128).half()
    w[:, ::4] = 0
    w[:, 1::4] = 0
    sparse = load.cutlass_tensor(w)
    assert isinstance(sparse, SparseSemiStructuredTensorCUTLASS)
    for own in (sparse, copy.deepcopy(sparse), sparse.clone()):
        assert_bitwise_equal(own.to_dense(), w, "weight")


def gpu_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return pruned(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))).to(dtype)


@GPU
@FORMAT
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "cusparselt", "cutlass"])
def test_on_a_gpu(backend, dtype: torch.dtype, format: str, tmp_path: Path) -> None:
    """Two of three layers become sparse and compute what the dense ones do."""
    device = torch.device("cuda")
    if backend != "auto" and (why := load._why_missing(backend, device)) is not None:
        with pytest.raises(ValueError, match="must be able to run here"):
            load_sparse(gpu_model(dtype).cuda(), file(gpu_model(dtype), tmp_path, format, ()), backend)
        pytest.skip(f"{backend}: {why}")
    model = gpu_model(dtype)
    path = file(model, tmp_path, format, ())
    loaded = gpu_model(dtype).cuda()
    report = load_sparse(loaded, path, backend)
    assert [row.name for row in report.sparse] == ["0.weight", "2.weight"], str(report)
    assert isinstance(loaded[0].weight, SparseSemiStructuredTensor)
    x = torch.randn(64, 256, dtype=dtype, device=device)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model.cuda()(x), rtol=2e-2, atol=2e-2)
    for i in (0, 2):
        assert torch.equal(loaded[i].weight.to_dense().cpu(), model[i].weight.cpu())


@GPU
@pytest.mark.parametrize("backend", ["cusparselt", "cutlass"])
def test_int8_on_a_gpu(backend) -> None:
    """A compressed int8 matrix multiplies exactly."""
    device = torch.device("cuda")
    if (why := load._why_missing(backend, device)) is not None:
        pytest.skip(f"{backend}: {why}")
    w = torch.randint(-3, 4, (64, 128), dtype=torch.int8, device=device)
    w[:, ::4] = 0
    w[:, 1::4] = 0
    x = torch.randint(-3, 4, (128, 64), dtype=torch.int8, device=device)
    expected = w.cpu().int() @ x.cpu().int()
    product = torch.mm(load.COMPRESS[backend](w), x.t().contiguous().t())
    if product.dtype == torch.int8:
        expected.clamp_(-128, 127)
    assert torch.equal(product.cpu().int(), expected)


@GPU
def test_saved_and_loaded_with_weights_only_on_a_gpu(tmp_path: Path) -> None:
    loaded = gpu_model(torch.float16).cuda()
    load_sparse(loaded, file(gpu_model(torch.float16), tmp_path, "safetensors", ()))
    torch.save(loaded.state_dict(), tmp_path / "sparse.pt")
    with torch.serialization.safe_globals([SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT]):
        state = torch.load(tmp_path / "sparse.pt", weights_only=True)
    again = gpu_model(torch.float16).cuda()
    again.load_state_dict(state, assign=True)
    x = torch.randn(64, 256, dtype=torch.float16, device="cuda")
    with torch.no_grad():
        assert torch.equal(again(x), loaded(x))
