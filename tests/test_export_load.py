"""load_sparse: dense on the CPU; on a GPU eligible layers become semi-structured, and the others say why not."""

import copy
from pathlib import Path

import pytest
import torch
from compare import assert_bitwise_equal
from export_models import Transformer, llama, make, pruned
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
    with pytest.raises(
        ValueError, match=r"must be the model's, got no 'weight' \(and 1 more\); '.*', which the model has not \(and \d+ more"
    ):
        load_sparse(nn.Linear(4, 4), path)


def test_what_does_not_fit_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    state = {name: torch.full_like(t, 3) for name, t in model.state_dict().items()}
    before = copy.deepcopy(model.state_dict())
    for wrong, message in (
        (state | {"2.weight": torch.zeros(4, 8)}, r"got '2\.weight' of shape \[4, 8\] where the model has \[8, 8\]$"),
        ({name: t for name, t in state.items() if name != "2.bias"}, r"got no '2\.bias'$"),
        (state | {"3.weight": torch.zeros(4, 8)}, r"got '3\.weight', which the model has not$"),
    ):
        torch.save(wrong, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=message):
            load_sparse(model, tmp_path / "w.pt")
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    del state["1.num_batches_tracked"]  # as checkpoints of old
    torch.save(state, tmp_path / "w.pt")
    load_sparse(model, tmp_path / "w.pt")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in state.items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrappers(prefix: str, tmp_path: Path) -> None:
    """DataParallel's, and a compiled model's."""
    model, _, _ = make("transformer")
    torch.save({"model": {prefix + name: t for name, t in model.state_dict().items()}, "epoch": 1}, tmp_path / "w.pt")
    other = Transformer()
    load_sparse(other, tmp_path / "w.pt")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in other.state_dict().items())
    wrapped = nn.DataParallel(Transformer())
    if prefix == "module.":
        load_sparse(wrapped, tmp_path / "w.pt")
        assert torch.equal(wrapped.module.head.weight, model.head.weight)


def test_tied_weights_that_a_file_has_once(tmp_path: Path) -> None:
    """transformers saves the embedding, and not the head that is tied to it."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'cram_kernels[frameworks]'")
    torch.manual_seed(0)
    model = llama().to(torch.bfloat16)
    prune(model, NM(2, 4), exclude=["model.embed_tokens.*"])
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in read(tmp_path / "model.safetensors")
    other = llama().to(torch.bfloat16)
    load_sparse(other, tmp_path / "model.safetensors")
    assert other.lm_head.weight is other.model.embed_tokens.weight
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(other(tokens).logits, model(tokens).logits)


def test_a_sparse_model_is_not_loaded_again(tmp_path: Path) -> None:
    model = pruned(nn.Sequential(nn.Linear(128, 64))).half()
    path = file(model, tmp_path, "safetensors", ())
    model[0].weight = nn.Parameter(load.cutlass_tensor(model[0].weight.detach()), requires_grad=False)
    with pytest.raises(ValueError, match=r"model must have dense weights, got '0\.weight', which is semi-structured"):
        load_sparse(model, path)
    before = read(path)
    export(model, path)  # as it would have been
    assert torch.equal(read(path)["0.weight"], before["0.weight"])


@pytest.mark.parametrize("fused", [True, False])
def test_weights_of_fused_kernels_stay_dense(fused: bool) -> None:
    """In inference torch hands the weights of an encoder layer to one fused kernel, which knows no semi-structured tensor. On the CPU the
    product itself is missing, too: the op that is asked for shows which way was taken."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        for model, inputs in (
            (nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 1),
            (nn.MultiheadAttention(64, 4, batch_first=True), 3),
        ):
            model = model.half().eval()
            prune(model, NM(2, 4))
            kept = load.fused_weights(model)
            found = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
            assert kept.keys() == ({f"{name}.weight" for name in found} if fused else set())
            for name in found:
                module = model.get_submodule(name)
                module.weight = nn.Parameter(load.cutlass_tensor(module.weight.detach()), requires_grad=False)
            op = "_transformer_encoder_layer_fwd|_native_multi_head_attention" if fused else "_sparse_semi_structured_addmm"
            with torch.no_grad(), pytest.raises(NotImplementedError, match=op):
                model(*[torch.randn(2, 8, 64).half()] * inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_a_file_that_is_not_what_its_manifest_says(tmp_path: Path) -> None:
    """Changed behind our back: refused before the model is touched."""
    from cram_kernels.export.container import read_metadata, save

    model, _, exclude = make("transformer")
    path = file(model, tmp_path, "safetensors", exclude)
    tensors = read(path)
    tensors["encoder.layers.1.linear1.weight"][3, 8:12] = 1
    save(path, {name: t.clone() for name, t in tensors.items()}, read_metadata(path))
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
@pytest.mark.parametrize("model", ["transformer", "llama"])
def test_transformers_on_a_gpu(model: str, tmp_path: Path) -> None:
    """What is compressed can be run, in inference too: weights of fused kernels are not."""
    device = torch.device("cuda")
    if all(load._why_missing(backend, device) is not None for backend in load.CONSUMER):
        pytest.skip(f"{load._choose('auto', device)[1]}")
    if model == "llama":
        pytest.importorskip("transformers", reason="transformers is not installed: pip install 'cram_kernels[frameworks]'")
    make_model, exclude = (llama, "model.embed_tokens.*") if model == "llama" else (Transformer, "embedding.*")
    torch.manual_seed(0)
    dense, loaded = make_model().half().cuda().eval(), make_model().half().cuda().eval()
    prune(dense, NM(2, 4), exclude=[exclude])
    report = load_sparse(loaded, file(dense, tmp_path, "safetensors", (exclude,)))
    fused = {row.name for row in report.rows if "fused" in str(row.why_dense)}
    assert len(report.sparse) == (7 if model == "llama" else 0) and len(fused) == (0 if model == "llama" else 6), str(report)
    tokens = torch.arange(16, device=device).view(2, 8)
    with torch.no_grad():
        found, expected = loaded(tokens), dense(tokens)
    found, expected = (x.logits if model == "llama" else x for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


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
def test_float8_on_a_gpu() -> None:
    """Where torch has it: compressed as others, multiplied by torch._scaled_mm."""
    device = torch.device("cuda")
    if (why := load._why_missing("cusparselt", device)) is not None or torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip(why or "float8 needs compute capability 8.9 or later")
    w = torch.randn(256, 128, device=device)
    w.view(256, -1, 4)[..., 2:] = 0
    w, x = w.to(torch.float8_e4m3fn), torch.randn(64, 128, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    sparse = load.COMPRESS["cusparselt"](w)
    products = [torch._scaled_mm(a, x.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16) for a in (sparse, w)]
    torch.testing.assert_close(*products, rtol=2e-2, atol=2e-2)


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
