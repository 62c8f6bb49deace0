"""What prune says of its result: emptied layers, more zeros than were asked for, and counts that hold."""

import json
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from cram_kernels import NM, CrAMWarning, Report, TopK, prune
from cram_kernels.patterns import Pattern
from cram_kernels.report import Layer


def of(*weights: Tensor) -> nn.Module:
    return nn.ParameterList([nn.Parameter(w) for w in weights])


def remarks(model: nn.Module, pattern: Pattern) -> tuple[Report, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = prune(model, pattern)
    assert all(w.category is CrAMWarning and w.filename == __file__ for w in caught)
    said = [str(w.message).removeprefix("prune: ") for w in caught]
    assert said == list(report.remarks) == report.to_dict()["remarks"]
    assert str(report).splitlines()[len(str(report).splitlines()) - len(said) :] == said
    return report, said


def test_an_emptied_layer_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    for i, scale in enumerate((1.0, 1e-3, 1e-4)):
        nn.init.normal_(model[i].weight, std=scale)
    report, said = remarks(model, TopK(sparsity=0.7))
    assert said == [
        "70 % leaves no weight in '1.weight', '2.weight'; scope='tensor' ranks each layer on its own, exclude= keeps a layer dense"
    ]
    assert [layer.name for layer in report.emptied] == json.loads(report.to_json())["emptied"] == ["1.weight", "2.weight"]
    assert [line.split("  ")[0] for line in str(report).splitlines() if "70 % (emptied)" in line] == ["1.weight", "2.weight"]


def test_many_emptied_layers_are_one_warning() -> None:
    model = of(torch.full((4, 4), 2.0), *[torch.rand(4, 4) for _ in range(9)], torch.randn(16, 16) * 100)
    _, said = remarks(model, TopK(sparsity=0.8))
    assert len(said) == 1 and said[0].startswith("80 % leaves no weight in '0', '1', '2', '3', '4' and 5 more")


@pytest.mark.parametrize(
    ("weights", "pattern", "said"),
    [
        ([torch.ones(8, 8)], TopK(sparsity=0.5), "100% of the 64 weights (64 tie with the k-th largest and go with it)"),
        (
            [torch.ones(8, 8), torch.randn(8, 8)],
            TopK(sparsity=0.5, scope="tensor"),
            "100% of the 64 weights of '0' (64 tie with the k-th largest and go with it)",
        ),
        (
            [torch.tensor([[1.0, 2.0]]), torch.randn(8, 8)],
            TopK(sparsity=0.5, scope="tensor"),
            "100% of the 2 weights of '0' (the k-th largest goes too, which counts in so few)",
        ),
        (
            [torch.tensor([[1.0, 2.0, 3.0, 4.0]])],
            TopK(sparsity=0.5),
            "75% of the 4 weights (the k-th largest goes too, which counts in so few)",
        ),
    ],
    ids=["ties", "ties in a tensor", "two weights", "four weights"],
)
def test_far_more_zeros_than_asked_for_are_said_with_their_cause(weights: Sequence[Tensor], pattern: TopK, said: str) -> None:
    torch.manual_seed(0)
    report, found = remarks(of(*weights), pattern)
    assert found[-1] == f"{pattern} prunes more than was asked for: {said}"
    assert report.layers[0].zeros == report.layers[0].numel * int(said.split("%")[0]) // 100


@pytest.mark.parametrize("pattern", [TopK(sparsity=0.5), TopK(sparsity=0.5, scope="tensor"), TopK(sparsity=0.0), NM(2, 4)], ids=str)
def test_what_was_zero_before_is_no_remark(pattern: Pattern) -> None:
    torch.manual_seed(0)
    model = of(torch.randn(64, 64), torch.randn(64, 64))
    prune(model, TopK(sparsity=0.9))
    before = [p.detach().clone() for p in model]
    report, said = remarks(model, pattern)
    assert said == []
    if isinstance(pattern, TopK):
        assert all(torch.equal(p, w) for p, w in zip(model, before, strict=True))
    assert [layer.zeros for layer in report.layers] == [int((p == 0).sum()) for p in model]


def test_a_layer_that_was_zero_before_is_no_remark() -> None:
    """As LoRA begins, and zero-initialised residual branches."""
    torch.manual_seed(0)
    report, said = remarks(of(torch.randn(8, 8), torch.zeros(8, 8)), TopK(sparsity=0.6))
    assert said == [] and [layer.name for layer in report.emptied] == ["1"]


def test_bfloat16_ties_of_a_large_layer_are_no_remark() -> None:
    torch.manual_seed(0)
    assert remarks(of(torch.randn(256, 256, dtype=torch.bfloat16)), TopK(sparsity=0.5))[1] == []


PATTERNS = [TopK(sparsity=s, scope=scope) for s in (0.0, 0.3, 0.5, 0.97) for scope in ("model", "tensor")] + [NM(2, 4), NM(1, 2), NM(7, 8)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.filterwarnings("ignore:prune. :cram_kernels.CrAMWarning")
def test_zeros_are_counted_before_and_hold_after(pattern: Pattern, seed: int) -> None:
    """Denormals, signed zeros, ties, infinities and three dtypes, also with strides of their own."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 6e-8, 1.0, -1.0, 1.0000001, 3.0, 65504.0, float("inf"), -float("inf")])
    pick = [values[torch.randint(len(values), shape, generator=generator)] for shape in ((5, 8), (16, 8, 3), (8, 24), (3, 5))]
    noise = torch.randn(8, 40, generator=generator)
    model = of(pick[0], pick[1].bfloat16(), pick[2].half(), pick[3], noise.t().contiguous().t(), noise.half().clone())
    report = prune(model, pattern)
    assert [layer.zeros for layer in report.layers] == [int((p == 0).sum()) for p in model]


def test_unknown_zeros_in_the_table() -> None:
    report = Report(
        (
            Layer("a.weight", (4, 8), "50 %", 32, 32, None),
            Layer("b.weight", None, None, 0, None, "cannot be pruned: a lazy one: run a forward pass first"),
            Layer("b.scale", (8,), None, 8, None, "fewer than 2 dims"),
            Layer("b.bias", (8,), None, 8, 2, "fewer than 2 dims"),
        ),
        ("50 % leaves no weight in 'a.weight'",),
    )
    assert str(report).splitlines() == [
        "layer           shape    pattern         weights    zeros  sparsity  why dense",
        "a.weight        4 x 8    50 % (emptied)       32       32   100.00%",
        "b.weight        unknown  dense                 0  unknown   unknown  cannot be pruned: a lazy one: run a forward pass first",
        "b.scale         8        dense                 8  unknown   unknown  fewer than 2 dims",
        "(1 more)                 dense                 8        2    25.00%  fewer than 2 dims",
        "pruned layers                                 32       32   100.00%",
        "all parameters                                48       34    85.00%  zeros of 2 unknown",
        "50 % leaves no weight in 'a.weight'",
    ]
    assert report.to_dict()["all"] == {"layers": 4, "numel": 48, "zeros": 34, "sparsity": 34 / 40}
    assert [layer.name for layer in report.emptied] == ["a.weight"]
