"""Sparse layers as modules, and sparsify: what it replaces, what it leaves alone and says so, files, compiling, exporting."""

import copy
import gc
import io
import pickle
from typing import Any

import pytest
import torch
from test_inference_ops import pruned
from torch import Tensor, nn

from cram_kernels.export.bitmask import encode
from cram_kernels.inference import SparseConv2d, SparseLinear, sparsify, to_dense, trial
from cram_kernels.inference.trial import Trial, plan_from

IMAGES = (2, 3, 12, 12)
HEAD = (16, 16)  # of fewer outputs its sparse weight would be larger than the dense one


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, HEAD[0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.down(self.conv(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


def net(density: float = 0.3) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    for i, p in enumerate(model.parameters()):
        if p.dim() > 1:
            p.data = pruned(*p.shape, density=density, seed=i)
    return model


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Trials that every layer wins, without a clock; what they were asked."""
    asked: list[tuple[int, ...]] = []

    def won(dense: nn.Module, sparse: nn.Module, shape: tuple[int, ...], strides: Any) -> Trial:
        asked.append(shape)
        return Trial(shape, shape[0], 8, 2.0, None)

    monkeypatch.setattr("cram_kernels.inference.convert.try_layer", won)
    return asked


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.detach().contiguous().view(torch.int32), b.detach().contiguous().view(torch.int32))


def test_sparsify_and_back(always: list[tuple[int, ...]]) -> None:
    model, x = net(), torch.randn(IMAGES)
    model.conv.weight.data[0, 0, 0, 0] = -0.0
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.inference_mode():
        expected = model(x)
    report = sparsify(model, (x,))
    assert [row.name for row in report.sparse] == ["conv", "down", "point", "head"]
    assert always == [(2, 3, 12, 12), (2, 16, 12, 12), (2, 24, 6, 6), (2, 16)]
    assert [type(m) for m in model.children()] == [SparseConv2d] * 3 + [SparseLinear]
    assert not list(model.parameters())  # no dense weight is left
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
    assert "4 of 4 layers are sparse" in str(report) and "conv  Conv2d [16, 3, 3, 3]" in str(report)
    assert to_dense(model) is model
    after = model.state_dict()
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("values, most", [(torch.float32, 6.1), (torch.bfloat16, 4.0)])
@pytest.mark.parametrize("density", [0.5, 0.3, 0.1, 0.05])
@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (128, 128)])
def test_memory(shape: tuple[int, int], density: float, values: torch.dtype, most: float) -> None:
    """At most so many bytes a non-zero, and all that the layer holds."""
    layer = SparseLinear(_linear(pruned(*shape, density=density)), values)
    assert layer.weight_bytes <= most * layer.nonzeros, layer.weight_bytes / layer.nonzeros
    zeros_of_bias = 4 * shape[0]
    assert sum(t.nbytes for t in layer.buffers()) == layer.weight_bytes + zeros_of_bias + layer.form.nbytes


def test_bfloat16_values(always: list[tuple[int, ...]]) -> None:
    """The rounded weight, through a state dict and back; a Parameter that is still held is not rounded."""
    model, free, x = net(), net(), torch.randn(IMAGES)
    held, rounded = list(model.parameters()), {name: t.clone() for name, t in free.state_dict().items()}
    before = [p.detach().clone() for p in held]
    for name, t in rounded.items():
        if t.dim() > 1:
            rounded[name] = t.bfloat16().float()
    reference = net()
    reference.load_state_dict(rounded)
    for each in (model, free):
        sparsify(each, (x,), values=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), reference(x))
    state = free.state_dict()
    assert state["head.weight.values"].dtype == torch.bfloat16
    exact = net()
    sparsify(exact, (x,))
    exact.load_state_dict(state)
    again = net(0.1)
    sparsify(again, (x,), values=torch.bfloat16)
    again.load_state_dict(state)
    for each in (free, exact, again):
        assert all(same_bits(t, rounded[name]) for name, t in to_dense(each).state_dict().items())
    assert all(a is b and same_bits(a, c) for a, b, c in zip(to_dense(model).parameters(), held, before, strict=True))


def test_truncated_files_are_refused(always: list[tuple[int, ...]], tmp_path: Any) -> None:
    """Cut anywhere, safetensors refuses the file before the layer sees it, and the model is as it was."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install 'cram_kernels[export]'")
    model, x = sparse_net(always), torch.randn(IMAGES)
    file = tmp_path / "model.safetensors"
    safetensors.save_file(model.state_dict(), file)
    whole, n = file.read_bytes(), len(file.read_bytes())
    with torch.inference_mode():
        expected = model(x)
    other = sparse_net(always)
    other.load_state_dict(safetensors.load_file(file))
    for size in (0, 7, 100, n // 2, n - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(Exception, match=r"(?i)header|incomplete"):
            other.load_state_dict(safetensors.load_file(file))
    with torch.inference_mode():
        assert torch.equal(other(x), expected)


def _linear(weight: Tensor, bias: bool = False) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    linear.weight.data = weight
    return linear


def test_real_trials_decide_by_speed() -> None:
    """99.5 % zeros are faster anywhere; a threshold that nothing reaches keeps the layer dense and says why."""
    sparse, dense = (nn.Sequential(_linear(pruned(512, 512, density=0.005))).eval() for _ in range(2))
    report = sparsify(sparse, (torch.randn(64, 512),))
    assert isinstance(sparse[0], SparseLinear) and report.rows[0].speedup is not None and report.rows[0].speedup > 1.1, str(report)
    assert report.rows[0].weight_bytes == sparse[0].weight_bytes
    weight = dense[0].weight
    report = sparsify(dense, (torch.randn(64, 512),), min_speedup=10**6)
    assert dense[0].weight is weight and "less than 1e+06x" in (report.rows[0].why_dense or "")


def test_what_stays_dense_and_why(always: list[tuple[int, ...]]) -> None:
    class Own(nn.Linear):
        pass

    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    replaced = nn.Linear(8, 8)
    replaced.forward = lambda x: 2 * x  # type: ignore[method-assign]
    cases: dict[str, tuple[nn.Module, str]] = {
        "replaced": (replaced, "its forward was replaced"),
        "subclass": (Own(8, 8), "Own is a subclass"),
        "sixteen bits": (nn.Linear(8, 8).bfloat16(), "torch.bfloat16"),
        "groups": (nn.Conv2d(8, 8, 3, groups=2), "have groups=1, got 2"),
        "reflect": (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        "one sided": (nn.Conv2d(8, 8, 2, padding="same"), "padded alike"),
        "hooks": (hooked, "hooks"),
        "dense": (nn.Linear(8, 8), "density above"),
        "no input": (_linear(pruned(8, 8, density=0.2)), "no example input reached it"),
    }
    model = nn.ModuleDict({name: module for name, (module, _) in cases.items()}).eval()
    model.forward = lambda x: x  # type: ignore[method-assign]
    report = sparsify(model, (torch.randn(2, 8),))
    assert {row.name: row.name for row in report.rows}.keys() == cases.keys() and not always
    for row in report.rows:
        assert cases[row.name][1] in (row.why_dense or ""), row
        assert model[row.name] is cases[row.name][0]
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    report = sparsify(encoder, (torch.randn(2, 3, 16),))
    assert {row.name for row in report.rows} == {"self_attn.out_proj", "linear1", "linear2"} and not report.sparse


def test_without_examples(always: list[tuple[int, ...]]) -> None:
    """Linears are tried with 1 and 32 rows; of convolutions the size of the image is unknown."""
    model = net()
    report = sparsify(model)
    assert [row.name for row in report.sparse] == ["head"] and always == [(1, 16), (32, 16)]
    assert all("size of its input is unknown" in (row.why_dense or "") for row in report.rows[:3])


def test_shared_modules_are_replaced_everywhere(always: list[tuple[int, ...]]) -> None:
    layer = _linear(pruned(8, 8, density=0.1), bias=True)
    model = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer)).eval()
    report = sparsify(model, (torch.randn(3, 8),))
    assert len(report.rows) == 1 and isinstance(model[0], SparseLinear) and model[1][1] is model[0]


def test_nothing_is_lost_where_the_example_fails() -> None:
    model = net()
    before = list(model.modules())
    with pytest.raises(RuntimeError):
        sparsify(model, (torch.randn(1, 4, 8, 8),))
    assert list(model.modules()) == before and not any(m._forward_pre_hooks for m in before)


def test_input_by_name(always: list[tuple[int, ...]]) -> None:
    """A layer that is called with a keyword is seen, too."""
    model = nn.Sequential(_linear(pruned(8, 8, density=0.1))).eval()
    model.forward = lambda x: model[0](input=x)  # type: ignore[method-assign]
    assert len(sparsify(model, (torch.randn(3, 8),)).sparse) == 1 and always == [(3, 8)]


def test_another_default_dtype(always: list[tuple[int, ...]]) -> None:
    """Trials, files and the way back are float32 all the same."""
    model, before = net(), net().state_dict()
    shape = (2, 8)
    torch.set_default_dtype(torch.float64)
    try:
        sparsify(model, (torch.randn(IMAGES, dtype=torch.float32),))
        model.load_state_dict(model.state_dict())
        layer = _linear(pruned(8, 8, density=0.2).float())
        trial.try_layer(layer, SparseLinear(layer), shape, rounds=1)
        after = to_dense(model).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same_bits(before[name], t) for name, t in after.items())


def test_back_in_inference_mode_and_trained(always: list[tuple[int, ...]]) -> None:
    model = sparse_net(always)
    with torch.inference_mode():
        to_dense(model)
    model(torch.randn(IMAGES)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("wrong", ["head.weight", "head.bias"])
def test_what_does_not_fit_leaves_weight_and_bias(wrong: str, always: list[tuple[int, ...]]) -> None:
    model = sparse_net(always)
    weight, bias = model.head.weight, model.head.bias.clone()
    state = {name: t + 1 for name, t in net(0.1).state_dict().items()}
    state[wrong] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match=wrong):
        model.load_state_dict(state)
    assert same_bits(model.head.weight, weight) and same_bits(model.head.bias, bias)


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"sparsify: min_speedup must be at least 1, got 0\.5"):
        sparsify(net(), min_speedup=0.5)
    with pytest.raises(ValueError, match=r"sparsify: values must be torch.float32 or torch.bfloat16, got torch.float16"):
        sparsify(net(), values=torch.float16)
    with pytest.raises(ValueError, match=r"SparseLinear: values must be torch.float32 or torch.bfloat16, got torch.int8"):
        SparseLinear(nn.Linear(4, 4), torch.int8)
    with pytest.raises(ValueError, match="sparsify: model must be in eval mode"):
        sparsify(net().train())
    with pytest.raises(TypeError, match="sparsify: example_inputs must be a tuple"):
        sparsify(net(), torch.randn(IMAGES))
    with pytest.raises(ValueError, match="SparseConv2d: conv must have groups=1, got 3"):
        SparseConv2d(nn.Conv2d(3, 3, 1, groups=3))
    with pytest.raises(ValueError, match=r"pack: weight must be float32 of 2 or more dims, got torch\.float64"):
        SparseLinear(nn.Linear(4, 1).double())
    layer = SparseLinear(_linear(pruned(4, 6, density=0.5)))
    with pytest.raises(RuntimeError, match="SparseLinear: no argument must require a gradient"):
        layer(torch.randn(2, 6, requires_grad=True))


def test_inputs_of_any_layout() -> None:
    weight, x = pruned(8, 4, 3, 3, density=0.4), torch.randn(2, 4, 9, 7)
    conv = nn.Conv2d(4, 8, 3, padding=1)
    conv.weight.data = weight
    layer = SparseConv2d(conv)
    with torch.inference_mode():
        expected = layer(x)
        torch.testing.assert_close(expected, conv(x))
        assert torch.equal(layer(x.to(memory_format=torch.channels_last)), expected)
        assert torch.equal(layer(x[0]), expected[0])
        assert torch.equal(layer(torch.cat([x, x], 3)[..., :7]), expected)
    linear = SparseLinear(_linear(pruned(5, 6, density=0.5), bias=True))
    y = torch.randn(6, 3)
    assert torch.equal(linear(y.t()), linear(y.t().contiguous()))
    assert linear(torch.randn(6)).shape == (5,)


def test_padding_by_name() -> None:
    """ "same" with an odd kernel and "valid" mean numbers."""
    for padding in ("same", "valid"):
        conv = nn.Conv2d(3, 4, 3, padding=padding, dilation=2)
        x = torch.randn(1, 3, 10, 10)
        with torch.inference_mode():
            torch.testing.assert_close(SparseConv2d(conv)(x), conv(x))


def sparse_net(always: Any) -> Net:
    model = net()
    sparsify(model, (torch.randn(IMAGES),))
    return model


def test_state_dict(always: list[tuple[int, ...]]) -> None:
    """Saved compactly, in the layout of the export format "bitmask", and loaded into a model of other weights and another density."""
    model, other, x = sparse_net(always), net(0.1), torch.randn(IMAGES)
    sparsify(other, (x,))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert set(state) == {
        *(f"{name}.weight.{part}" for name in ("conv", "down", "point", "head") for part in ("values", "bitmask")),
        *("conv.bias", "point.bias", "head.bias"),
    }
    other.load_state_dict(state)
    with torch.inference_mode():
        assert torch.equal(other(x), model(x))
    for name, weight in net().state_dict().items():
        for part, stored in (encode(name, weight) or {}).items():
            assert torch.equal(stored, state[part])
    dense = net(0.5)
    dense.load_state_dict(to_dense(model).state_dict())
    other.load_state_dict(dense.state_dict())  # a dense state dict is compressed
    with torch.inference_mode():
        torch.testing.assert_close(other(x), dense(x))


HOSTILE: dict[str, Any] = {
    "values cut off": lambda s: s | {"head.weight.values": s["head.weight.values"][:-1]},
    "values of float64": lambda s: s | {"head.weight.values": s["head.weight.values"].double()},
    "a mask cut off": lambda s: s | {"head.weight.bitmask": s["head.weight.bitmask"][:-1]},
    "a mask of all ones": lambda s: s | {"head.weight.bitmask": torch.full_like(s["head.weight.bitmask"], 255)},
    "a mask of int64": lambda s: s | {"head.weight.bitmask": s["head.weight.bitmask"].long()},
    "no mask": lambda s: {name: t for name, t in s.items() if name != "head.weight.bitmask"},
    "a dense weight of another shape": lambda s: s | {"head.weight": torch.zeros(3, 3)},
    "a key too many": lambda s: s | {"head.more": torch.zeros(1)},
    "values on meta": lambda s: s | {"head.weight.values": s["head.weight.values"].to("meta")},
    "a list of values": lambda s: s | {"head.weight.values": s["head.weight.values"].tolist()},
    "no values at all": lambda s: s | {"head.weight.values": None},
    "a sparse mask": lambda s: s | {"head.weight.bitmask": s["head.weight.bitmask"].to_sparse()},
    "a dense weight on meta": lambda s: s | {"head.weight": torch.empty(HEAD, device="meta")},
    "a dense weight in compressed rows": lambda s: s | {"head.weight": torch.ones(HEAD).to_sparse_csr()},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_state_dicts_are_refused(case: str, always: list[tuple[int, ...]]) -> None:
    model, x = sparse_net(always), torch.randn(IMAGES)
    with torch.inference_mode():
        expected = model(x)
        with pytest.raises(RuntimeError, match="head"):
            model.load_state_dict(HOSTILE[case](model.state_dict()))
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("part", ["packed", "bias"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_part_on_meta_is_refused(kind: str, part: str) -> None:
    """It would bring the call to the kernel for shapes alone, whose output is memory that nobody wrote."""
    layer: Any = SparseLinear(nn.Linear(16, 16)) if kind == "linear" else SparseConv2d(nn.Conv2d(16, 16, 3))
    x = torch.randn(3, 16) if kind == "linear" else torch.randn(1, 16, 5, 5)
    setattr(layer, part, getattr(layer, part).to("meta"))
    with torch.inference_mode(), pytest.raises(ValueError, match=f"{part} must be on the device of input, cpu, got meta"):
        layer(x)
    whole = layer.to("meta")(x.to("meta"))
    assert whole.is_meta and whole.shape[1] == 16


def test_no_layer_takes_more_memory(always: list[tuple[int, ...]]) -> None:
    """Rows are stored as 16 at once: a head of two outputs would be larger than the dense one."""
    model = nn.Sequential(nn.Linear(768, 768), nn.Linear(768, 2)).eval()
    for i, layer in enumerate(model):
        layer.weight.data = pruned(*layer.weight.shape, density=0.1, seed=i)
    report = sparsify(model, (torch.randn(4, 768),))
    assert [row.why_dense is None for row in report.rows] == [True, False]
    assert "sparse it would take" in str(report.rows[1].why_dense) and always == [(4, 768)]
    assert all(row.weight_bytes <= 4 * torch.Size(row.shape).numel() for row in report.rows)


def test_a_model_that_was_compiled_before(always: list[tuple[int, ...]]) -> None:
    model, x = net(), torch.randn(IMAGES)
    compiled = torch.compile(model, backend="eager")
    with torch.inference_mode():
        expected = compiled(x)
        report = sparsify(compiled, (x,))
        assert len(report.sparse) == len(report.rows) == 4
        torch.testing.assert_close(compiled(x), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str, always: list[tuple[int, ...]]) -> None:
    torch._dynamo.reset()
    model, x = sparse_net(always), torch.randn(IMAGES)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x[:1]), model(x[:1]))


def test_export(always: list[tuple[int, ...]]) -> None:
    model, x = sparse_net(always), torch.randn(IMAGES)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
        assert torch.equal(loaded(x[:1].repeat(5, 1, 1, 1)), model(x[:1].repeat(5, 1, 1, 1)))


def test_dense_bfloat16_competes_where_the_cpu_has_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ratio is in the report, beside ours."""
    linear = _linear(pruned(32, 64, density=0.2))
    for there in (True, False):
        monkeypatch.setattr(trial, "matrix_units", lambda there=there: there)
        found = trial.try_layer(linear, SparseLinear(linear), (4, 64), rounds=2)
        assert (found.bf16_speedup is not None) == there == ("dense bfloat16 (AMX): " in str(found))


def test_plan_from_trials() -> None:
    """Each trial's tile is used up to half way, geometrically, to the next one; a dot product a row for 4 rows at most."""
    trials = [Trial((n, 9), n, tile, 2.0, None) for n, tile in ((32, 32), (1, 1), (8, 8))]
    assert plan_from(trials) == [2, 1, 16, 8, trial.LAST, 32]
    assert plan_from(trials[1:2]) == [4, 1]


def test_trials_get_the_memory_format_of_the_example() -> None:
    """Every convolution that is called, in the example's run and in the trials, gets channels_last; a Linear gets its transposed input."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(8, 16, 3), nn.Linear(16, 16)
            for i, layer in enumerate((self.conv, self.linear)):
                layer.weight.data = pruned(*layer.weight.shape, density=0.1, seed=i)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).sum() + self.linear(torch.ones(16, 6).t()).sum()

    given: dict[str, set[tuple[bool, bool]]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        by_columns = x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.t().is_contiguous()
        given.setdefault(type(module).__name__, set()).add((by_columns, x.is_contiguous()))

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        images = torch.randn(2, 8, 10, 9).to(memory_format=torch.channels_last)
        report = sparsify(Turned().eval(), (images,))
    finally:
        handle.remove()
    assert all(given[name] == {(True, False)} for name in ("Conv2d", "SparseConv2d", "Linear", "SparseLinear")), given
    assert [row.trials[0].strides for row in report.rows] == [images.stride(), (1, 6)]
    assert f"[2, 8, 10, 9] with strides {list(images.stride())}: " in str(report)


def test_an_empty_example_says_so() -> None:
    report = sparsify(net(), (torch.randn(0, *IMAGES[1:]),))
    assert all("input that reached it is empty, [0, " in (row.why_dense or "") for row in report.rows) and len(report.rows) == 4


WRITES: dict[str, Any] = {
    "an element": lambda w: w.__setitem__((0, 0), 1.0),
    "data": lambda w: w.data.zero_(),
    "an element of data": lambda w: w.data.__setitem__(0, 1.0),
    "a row of detach": lambda w: w.detach()[0].fill_(1.0),
    "in place": lambda w: w.mul_(2),
    "an operator": lambda w: w.__imul__(2),
    "init": lambda w: nn.init.ones_(w),
    "out": lambda w: torch.add(w, 1, out=w),
    "a part": lambda w: w.split(4)[1].zero_(),
    "a list": lambda w: torch._foreach_mul_([w], 2),
    "another tensor as data": lambda w: setattr(w, "data", torch.zeros(16, 16)),
}


@pytest.mark.parametrize("case", WRITES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_writes_to_the_dense_weight_are_refused(case: str, mode: Any) -> None:
    """The layer has no dense weight that they could change."""
    layer = SparseLinear(_linear(pruned(16, 16, density=0.3)))
    before = layer.weight.clone()
    with mode(), pytest.raises(RuntimeError, match=r"SparseLayer\.weight: what is written to must be a copy"):
        WRITES[case](layer.weight)
    assert torch.equal(layer.weight, before)


def test_the_dense_weight_is_read_as_any_tensor() -> None:
    weight = pruned(16, 16, density=0.3)
    layer = SparseLinear(_linear(weight))
    doubled, copied = layer.weight * 2, layer.weight.clone()
    doubled.add_(1)
    copied[0] = 5.0
    torch.zeros(16, 16).copy_(layer.weight)
    assert type(doubled) is type(copied) is Tensor and torch.equal(doubled, weight * 2 + 1)
    assert (layer.weight.dtype, layer.weight.shape, layer.weight.device.type) == (torch.float32, (16, 16), "cpu")
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.numpy()[0] = 1
    layer.load_state_dict({"weight": copied})
    assert torch.equal(layer.weight, copied)


class Tied(nn.Module):
    """A head that shares the weight of an embedding, before or after which it is registered."""

    def __init__(self, head_first: bool) -> None:
        super().__init__()
        embedding, head = nn.Embedding(40, 32), nn.Linear(32, 40)
        for name, layer in (("head", head), ("embedding", embedding))[:: 1 if head_first else -1]:
            setattr(self, name, layer)
        head.weight = embedding.weight
        head.weight.data = pruned(40, 32, density=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))


@pytest.mark.parametrize("head_first", [False, True])
def test_a_copy_keeps_the_tie_to_an_embedding(head_first: bool, always: list[tuple[int, ...]]) -> None:
    model = Tied(head_first).eval()
    optimizer = torch.optim.SGD([model.head.bias], 0.1)
    bias = model.head.bias
    sparsify(model, (torch.arange(4),))
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for each in (model, copied, copy.deepcopy(copied)):
        tied = each.embedding.weight
        to_dense(each)
        assert each.head.weight is each.embedding.weight is tied and same_bits(tied, pruned(40, 32, density=0.1))
    assert copied.head.weight is not model.head.weight and model.head.bias is bias is optimizer.param_groups[0]["params"][0]
    assert copied.head.bias is not bias
    assert same_bits(to_dense(pickled).head.weight, tied)


def test_a_copy_keeps_no_dense_weight_alive(always: list[tuple[int, ...]]) -> None:
    model = net()
    held = list(model.parameters())  # as an optimizer does
    sparsify(model, (torch.randn(IMAGES),))
    gc.collect()
    before = sum(type(o) is nn.Parameter for o in gc.get_objects())
    copied = copy.deepcopy(model)
    gc.collect()
    assert sum(type(o) is nn.Parameter for o in gc.get_objects()) == before and len(held) == 7
    assert not any(a is b for a, b in zip(to_dense(copied).parameters(), held, strict=True))


def test_a_copy_knows_that_the_old_weight_was_written_to(always: list[tuple[int, ...]]) -> None:
    model = Tied(True).eval()
    sparsify(model, (torch.arange(4),))
    with torch.no_grad():
        model.embedding.weight.add_(1)
    copied = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="the old one was written to since"):
        to_dense(copied)
    assert same_bits(copied.head.weight, pruned(40, 32, density=0.1))


def test_a_sparse_state_dict_into_layers_that_stayed_dense(always: list[tuple[int, ...]]) -> None:
    """As on a machine where other layers were faster: from any mixture of sparse and dense layers into any other."""
    saved, mixed = sparse_net(always), net(0.1)
    sparsify(mixed)  # the head alone
    for state in (saved.state_dict(), mixed.state_dict()):
        for into in (net(0.5), net(0.2)):
            sparsify(into, min_speedup=9)  # more than the trials find
            assert len(sparsify(into, min_speedup=9).sparse) == 0
            into.load_state_dict(state)
            whole = into.state_dict()
            source = net() if "conv.weight.values" in state else net(0.1)
            assert all(same_bits(whole[name], t) for name, t in source.state_dict().items())
    dense = net(0.5)
    sparsify(dense, min_speedup=9)
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    for case in ("values cut off", "a mask cut off", "no mask", "values on meta"):
        with pytest.raises(RuntimeError, match=r"head\.weight"):
            dense.load_state_dict(HOSTILE[case](saved.state_dict()))
        assert same_bits(dense.head.weight, before["head.weight"])
    again = copy.deepcopy(dense)
    again.load_state_dict(saved.state_dict())
    assert same_bits(again.conv.weight, net().conv.weight)
