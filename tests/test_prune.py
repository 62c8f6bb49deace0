"""prune and its report: which weights go, what stays dense and why, what is refused before anything is changed."""

import json

import pytest
import torch
from torch import Tensor, nn

from cram_kernels import CrAM, CrAMWarning, reference
from cram_kernels.patterns import NM, TopK
from cram_kernels.prune import prune
from cram_kernels.report import Layer, Report

PATTERNS = pytest.mark.parametrize(
    "pattern", [TopK(sparsity=0.0), TopK(sparsity=0.5), TopK(sparsity=0.9), TopK(sparsity=0.7, scope="tensor"), NM(2, 4), NM(4, 8)], ids=str
)


class Network(nn.Module):
    """A stem with one input channel, a channels_last convolution, a 3-d weight, and a head that is tied twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, 8, 3)
        self.conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(16)
        self.conv1d = nn.Conv1d(16, 8, 3)
        self.embedding = nn.Embedding(10, 16)
        nn.init.normal_(self.embedding.weight, std=0.1)  # as large as the other weights, so that a global threshold empties none
        self.head = nn.Linear(16, 10)
        self.head.weight = self.embedding.weight
        self.view = nn.Linear(16, 10, bias=False)
        self.view.weight = nn.Parameter(self.embedding.weight.detach())  # another Parameter on the same memory


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, tied ones under each name, strides kept."""
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters(remove_duplicate=False):
        assert torch.equal(p.view(torch.int32), before[name].view(torch.int32)), name


def largest(weights: list[Tensor], sparsity_k: int) -> list[Tensor]:
    """By a full sort of all magnitudes: what is larger than the k-th largest stays."""
    values = torch.cat([w.flatten() for w in weights]).abs().sort(descending=True).values
    return [torch.where(w.abs() > values[sparsity_k - 1], w, 0.0) for w in weights]


def test_topk_ranks_all_weights_of_the_model():
    model = Network()
    before = weights_of(model)
    report = prune(model, TopK(sparsity=0.9), prune_embeddings=True)
    names = ["stem.weight", "conv.weight", "conv1d.weight", "embedding.weight"]
    n = sum(before[name].numel() for name in names)
    after = weights_of(model)
    for name, wanted in zip(names, largest([before[name] for name in names], TopK(sparsity=0.9).k(n)), strict=True):
        assert torch.equal(after[name], wanted), name
    assert [layer.name for layer in report.pruned] == names
    assert sum(layer.zeros for layer in report.pruned) == n - TopK(sparsity=0.9).k(n) + 1  # the k-th itself goes


def test_topk_ranks_each_tensor():
    model = Network()
    before = weights_of(model)
    prune(model, TopK(sparsity=0.5, scope="tensor"))
    for name in ("stem.weight", "conv.weight"):
        assert torch.equal(model.get_parameter(name), largest([before[name]], TopK(sparsity=0.5).k(before[name].numel()))[0]), name


@PATTERNS
def test_report_tells_what_happened(pattern):
    model = Network()
    before = weights_of(model)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    report = prune(model, pattern, prune_embeddings=True)
    assert [layer.name for layer in report.layers] == [name for name, _ in model.named_parameters() if name != "view.weight"]
    for layer in report.layers:
        p = model.get_parameter(layer.name)
        assert (layer.shape, layer.numel, layer.zeros) == (tuple(p.shape), p.numel(), int((p == 0).sum())), layer.name
        assert (layer.pattern is None) == (layer.why_dense is not None) and layer.pattern in (None, str(pattern)), layer.name
        assert layer.why_dense == pattern.why_dense(p.shape), layer.name
        if layer.why_dense is not None:
            assert torch.equal(p, before[layer.name]), layer.name
        elif isinstance(pattern, NM):
            assert torch.equal(p != 0, reference.nm_keep(before[layer.name], pattern.n, pattern.m)), layer.name
            assert layer.zeros * pattern.m == layer.numel * (pattern.m - pattern.n), layer.name
    assert model.view.weight.data_ptr() == model.head.weight.data_ptr() == model.embedding.weight.data_ptr()
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(p.requires_grad for p in model.parameters())


def test_the_stem_stays_dense_for_nm_and_the_report_says_why():
    report = prune(Network(), NM(2, 4))
    assert report.layers[0] == Layer("stem.weight", (8, 1, 3, 3), None, 72, 0, "1 input channels are not a multiple of 4")


def test_dtypes_may_mix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).bfloat16(), nn.Linear(64, 64).half())
    weights = [layer.weight.detach().clone() for layer in model]
    prune(model, TopK(sparsity=0.75))
    wanted = largest([w.float() for w in weights], TopK(sparsity=0.75).k(3 * 64 * 64))
    for layer, w in zip(model, wanted, strict=True):
        assert torch.equal(layer.weight.float(), w)


@pytest.mark.parametrize("exclude", [["head.*"], "head.*", ("view.*", "stem.*"), ["embedding.weight"]], ids=str)
def test_excluded_by_any_of_its_names(exclude):
    model = Network()
    before = weights_of(model)
    report = prune(model, TopK(sparsity=0.9), exclude=exclude)
    assert torch.equal(model.embedding.weight, before["embedding.weight"])
    assert [layer.why_dense for layer in report.layers if layer.name == "embedding.weight"] == ["excluded"]
    assert "conv.weight" in [layer.name for layer in report.pruned]


def test_integers_and_vectors_stay_dense():
    model = Network()
    model.register_parameter("table", nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False))
    report = prune(model, NM(2, 4))
    reasons = {layer.name: layer.why_dense for layer in report.dense}
    assert reasons["table"] == "dtype torch.int8"
    assert reasons["norm.weight"] == "fewer than 2 dims"
    assert model.table.count_nonzero() == 16


def nan(model: Network) -> None:
    model.conv.weight.data[3, 2, 1, 1] = float("nan")


def double(model: Network) -> None:
    model.conv.double()


def strided(model: Network) -> None:
    model.conv.weight = nn.Parameter(torch.randn(16, 8, 3, 6)[..., ::2])


def overlapping(model: Network) -> None:
    model.conv.weight = nn.Parameter(torch.randn(1, 8, 3, 3).expand(16, 8, 3, 3))


def sparse(model: Network) -> None:
    model.extra = nn.Parameter(torch.eye(4).to_sparse())


def lazy(model: Network) -> None:
    model.conv = nn.LazyConv2d(4, 3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan, r"parameters must not be NaN, got NaN in 'conv.weight'"),
        (double, r"parameter 'conv.weight' must have dtype float32, bfloat16 or float16, got torch.float64"),
        (strided, r"parameter 'conv.weight' must be dense .*, got strides \(144, 18, 6, 2\) for shape \(16, 8, 3, 3\)"),
        (overlapping, r"parameter 'conv.weight' must be dense .*, got strides \(0, 9, 3, 1\)"),
        (sparse, r"parameter 'extra' must be dense .*, got layout torch.sparse_coo"),
        (lazy, r"parameter 'conv.weight' must be initialised, got a lazy one: run a forward pass first"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_refused_before_anything_is_changed(spoil, message):
    model = Network()
    spoil(model)
    before = model.stem.weight.detach().clone(), model.embedding.weight.detach().clone()
    with pytest.raises(ValueError, match="prune: " + message):
        prune(model, TopK(sparsity=0.5))
    assert torch.equal(model.stem.weight, before[0]) and torch.equal(model.embedding.weight, before[1])
    report = prune(
        model, TopK(sparsity=0.5), exclude=["conv.*", "extra"] if spoil is sparse else ["conv.*"]
    )  # excluded, it is in nobody's way
    assert [layer.name for layer in report.dense if layer.why_dense == "excluded" and "weight" in layer.name] == ["conv.weight"]


@pytest.mark.parametrize(
    ("pattern", "exclude", "message"),
    [
        (TopK(sparsity=0.5, scope="group"), (), r"pattern must have scope 'model' or 'tensor', got 'group'"),
        (TopK(sparsity=0.5), ["haed.*"], r"exclude must match the name of a parameter, got 'haed\.\*'"),
    ],
    ids=["group", "exclude"],
)
def test_refused_arguments(pattern, exclude, message):
    model = Network()
    before = weights_of(model)
    with pytest.raises(ValueError, match=f"prune: {message}"):
        prune(model, pattern, exclude)
    assert_unchanged(model, before)


def test_a_model_without_weights():
    assert prune(nn.Sequential(nn.ReLU()), TopK(sparsity=0.5)) == Report(())
    with pytest.warns(CrAMWarning, match="prunes nothing"):
        assert prune(nn.BatchNorm1d(3), NM(2, 4)).pruned == ()


def test_report_as_data():
    data = json.loads(prune(Network(), NM(2, 4), prune_embeddings=True).to_json())
    assert data["layers"][0] == {
        "name": "stem.weight",
        "shape": [8, 1, 3, 3],
        "pattern": None,
        "numel": 72,
        "zeros": 0,
        "why_dense": "1 input channels are not a multiple of 4",
    }
    assert data["pruned"] == {"layers": 3, "numel": 1696, "zeros": 848, "sparsity": 0.5}
    assert data["all"]["numel"] == 72 + 8 + 1152 + 16 + 32 + 384 + 8 + 160 + 10


def test_report_as_a_table():
    report = Report(
        (
            Layer("stem.weight", (8, 1, 3, 3), None, 72, 0, "excluded"),
            Layer("stem.bias", (8,), None, 8, 8, "fewer than 2 dims"),
            Layer("head.weight", (10, 160), "50 %", 1600, 800, None),
        )
    )
    assert str(report).splitlines() == [
        "layer           shape          pattern  weights  zeros  sparsity  why dense",
        "stem.weight     8 x 1 x 3 x 3  dense         72      0     0.00%  excluded",
        "head.weight     10 x 160       50 %       1,600    800    50.00%",
        "(1 more)                       dense          8      8   100.00%  fewer than 2 dims",
        "pruned layers                             1,600    800    50.00%",
        "all parameters                            1,680    808    48.10%",
    ]


def test_a_perturbed_model_is_refused():
    """What is pruned within a step would come back with the restore."""
    model = nn.Linear(8, 8)
    optimizer = CrAM(model.parameters(), lr=0.1)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.perturb()
    with pytest.raises(ValueError, match="parameter 'weight' must not be perturbed, got one within a step"):
        prune(model, TopK(sparsity=0.5))
    optimizer.restore()
    prune(model, TopK(sparsity=0.5))


def test_parameters_that_share_part_of_their_memory_are_refused_by_name():
    model = nn.Module()
    store = torch.randn(3, 8)
    model.a, model.b = nn.Parameter(store), nn.Parameter(store[1:])
    with pytest.raises(ValueError, match="parameter 'b' must have memory of its own, got some that 'a' has too"):
        prune(model, TopK(sparsity=0.5))


@pytest.mark.parametrize("model, pattern", [(nn.BatchNorm1d(4), TopK(sparsity=0.9)), (nn.Linear(7, 4), NM(2, 4))], ids=str)
def test_a_pattern_that_prunes_nothing_is_said(model, pattern):
    with pytest.warns(CrAMWarning, match=f"prune: {pattern} prunes nothing: the report says why each of 2 parameters stays dense") as said:
        assert prune(model, pattern).pruned == ()
    assert said[0].filename == __file__
