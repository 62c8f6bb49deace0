"""Top-k: topk_threshold, prune_topk_, perturb_topk_ equal the reference to the bit."""

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy
import pytest
import torch
from calls import PERTURB_VARIANTS, SELECTIONS, perturb, poisoned_masks, selection, without
from cases import DTYPES, HOSTILE, LARGE, MANY, SEARCH, SMALL, Case, Drawn, drawn_cases
from compare import assert_bitwise_equal, check
from torch import Tensor

from cram_kernels import ops
from cram_kernels.backend import use_backend
from cram_kernels.patterns import TopK

CASE = pytest.mark.parametrize("case", SMALL, ids=str)
SELECTION = pytest.mark.parametrize("name", SELECTIONS)


@CASE
@SELECTION
def test_prune_topk(backend, case: Case, name: str) -> None:
    weights = case.tensors("params")
    masks = without(poisoned_masks(case), 3, 1) if name in ("half", "groups") else poisoned_masks(case)
    chosen = selection(name, weights)
    thresholds, _ = check(backend, "prune_topk_", {"weights": weights, "masks": masks, **chosen})
    assert_bitwise_equal(check(backend, "topk_threshold", {"weights": weights, **chosen}), thresholds, "topk_threshold")


@CASE
@SELECTION
def test_perturb_topk(backend, case: Case, name: str) -> None:
    variant = PERTURB_VARIANTS[list(SELECTIONS).index(name) % len(PERTURB_VARIANTS)]
    arguments = perturb(case, variant)
    check(backend, "perturb_topk_", arguments | selection(name, arguments["params"]))


@pytest.mark.parametrize("variant", PERTURB_VARIANTS)
@CASE
def test_perturb_topk_variants(backend, case: Case, variant: str) -> None:
    arguments = perturb(case, variant)
    check(backend, "perturb_topk_", arguments | selection("groups", arguments["params"]))


def test_many_tensors(backend) -> None:
    arguments = perturb(MANY)
    check(backend, "perturb_topk_", arguments | selection("groups", arguments["params"]))


def test_many_sets(backend) -> None:
    arguments = perturb(Case("normal", "pieces", "mixed"))
    check(backend, "perturb_topk_", arguments | selection("per_tensor", arguments["params"]))


@pytest.mark.parametrize("case", LARGE + HOSTILE, ids=str)
def test_large(backend, case: Case) -> None:
    arguments = perturb(case, "masters" if case.dtype != "fp32" else "amp")
    check(backend, "perturb_topk_", arguments | selection("tenth", arguments["params"]))


@pytest.mark.parametrize("name", ["keep_none", "second", "keep_all", "groups"])
def test_large_selections(backend, name: str) -> None:
    arguments = perturb(Case("normal", "large", "mixed"))
    arguments |= selection(name, arguments["params"])
    check(backend, "perturb_topk_", arguments)
    check(backend, "prune_topk_", {"weights": arguments["grads"], **{key: arguments[key] for key in ("masks", "sets", "k")}})


@pytest.mark.parametrize("case", [Case("two", "uneven", dtype) for dtype in DTYPES], ids=str)
def test_a_threshold_between_heavy_ties_costs_time_and_no_bits(backend, case: Case) -> None:
    """The k-th largest is the last of half a million equal ones: every bracket holds all weights. CUDA falls back, others count them.

    So does CUDA in bfloat16, where a bin of its sample holds one key only."""
    arguments = perturb(case, "amp" if case.dtype == "fp32" else "masters")
    for g in arguments["grads"]:
        g.zero_()
    weights = arguments["masters"] if "masters" in arguments else arguments["params"]
    k = sum(int((w.abs() > 0.3).sum()) for w in weights)
    _, stats = check(backend, "perturb_topk_", arguments | {"sets": [0] * len(weights), "k": torch.tensor([k])})
    falls_back = backend.name.startswith("cuda") and case.dtype != "bf16"
    assert stats[0, 2] == falls_back, f"statistics {stats.tolist()}"


@pytest.fixture
def counts_ties(backend):
    """The CPU's backend, or Triton's."""
    if backend.name != "cpu" and not backend.name.startswith("triton"):
        pytest.skip(f"{backend.name} writes down keys that many weights share, or falls back: tests/test_cuda_topk.py")
    return backend


def without_fallback(backend, weights: list[Tensor], k: int) -> None:
    """perturb_topk_ on weights that are not moved."""
    arguments: dict[str, Any] = {
        "params": weights,
        "grads": [torch.zeros_like(w) for w in weights],
        "saved": [torch.empty_like(w) for w in weights],
        "masks": [torch.empty((w.numel() + 7) // 8, dtype=torch.uint8) for w in weights],
        "perturbed": torch.zeros((), dtype=torch.int32),
        "rho": torch.zeros(len(weights)),
        "sets": [0] * len(weights),
        "k": torch.tensor([k]),
    }
    _, stats = check(backend, "perturb_topk_", arguments)
    assert stats[0, 2] == 0 and stats[0, 1] <= 0.07 * sum(w.numel() for w in weights), f"statistics {stats.tolist()}"


@pytest.mark.parametrize("place", [-20, -1, 0, 1, 2, 20])
@pytest.mark.parametrize("edge", ["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heavy_ties_need_no_fallback(counts_ties, dtype: str, edge: str, place: int) -> None:
    """A fifth of the weights has one magnitude; k is around the first or the last of them."""
    w = torch.randn(120_000, generator=torch.Generator().manual_seed(place)).to(DTYPES[dtype])
    largest = w.abs().sort(descending=True).values
    tie = largest[40_000]
    w = torch.where((w.abs() <= tie) & (w.abs() > largest[64_000]), tie.copysign(w), w)
    k = int((w.abs() > tie).sum()) + 1 if edge == "first" else int((w.abs() >= tie).sum())
    without_fallback(counts_ties, list(w.split(50_000)), k + place)


@pytest.mark.parametrize("place", [-1, 0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pruned_model_needs_no_fallback(counts_ties, dtype: str, place: int) -> None:
    """Half of the weights are zero, and half are to be."""
    w = torch.randn(120_000, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    w[torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    without_fallback(counts_ties, list(w.split(50_000)), int(w.count_nonzero()) + place)


def sampled(numel: int) -> Tensor:
    """Where topk_sample.cpp looks in one tensor: bool [numel]. Its strata and its hash, restated."""
    runs, best = 32, min(0.19 * numel ** (2 / 3), numel // 64, 2.0**17)
    while 1.5 * runs < best:
        runs *= 2
    j = numpy.arange(runs, dtype=numpy.uint64)
    x = j + numpy.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> numpy.uint64(shift))) * numpy.uint64(factor)
    x ^= x >> numpy.uint64(31)
    bounds = numpy.arange(runs + 1, dtype=numpy.int64) * numel // runs
    places = bounds[:-1] + ((x >> numpy.uint64(32)).astype(numpy.int64) * numpy.diff(bounds) >> 32)
    seen = torch.zeros(numel, dtype=torch.bool)
    for i in range(4):
        seen[numpy.minimum(places // 4 * 4 + i, numel - 1)] = True
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [100, 0.01, 0])
def test_a_sample_that_misleads_costs_time_and_no_bits_on_the_cpu(cpu, dtype: str, scale: float) -> None:
    w = torch.randn(120_000, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    w[sampled(w.numel())] *= scale
    masks = [torch.empty(15_000, dtype=torch.uint8)]
    _, stats = check(cpu, "prune_topk_", {"weights": [w], "masks": masks, "sets": [0], "k": torch.tensor([60_000])})
    assert stats[0, 2] == 1, f"no fallback, statistics {stats.tolist()}"


def test_ordinary_weights_need_no_fallback(backend) -> None:
    arguments = perturb(Case("normal", "large", "fp32"))
    _, stats = check(backend, "perturb_topk_", arguments | selection("half", arguments["params"]))
    assert stats.shape == (1, 3) and stats.dtype == torch.int64
    assert 0 < stats[0, 1] < 0.1 * sum(p.numel() for p in arguments["params"]) and stats[0, 2] == 0


@pytest.mark.parametrize("numel", [5_000, 30_000, 100_000, 300_000, 700_000])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_sets_of_every_size_need_no_fallback_on_the_cpu(numel: int, sparsity: float) -> None:
    """A sample of a small set is small, and the bracket wide: what falls into it has its place all the same."""
    weight = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    with use_backend("cpu"):
        _, stats = ops.prune_topk_([weight], [weight.new_empty(0, dtype=torch.uint8)], [0], torch.tensor([TopK(sparsity).k(numel)]))
    assert stats[0, 2] == 0


@pytest.mark.parametrize("rho", [0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["half", "keep_all", "groups"])
def test_rho(backend, name: str, rho: float) -> None:
    """An infinite or NaN rho makes NaN of weights, and of nothing else that a backend counts."""
    for values in ("normal", "zeros"):
        arguments = perturb(Case(values, "shapes", "mixed"), rho=rho)
        check(backend, "perturb_topk_", arguments | selection(name, arguments["params"]))


@pytest.mark.parametrize("sparsity", [0.5, 0.95, 0.999])
def test_sparsities(backend, sparsity: float) -> None:
    case = Case("rows", "rows", "bf16")
    weights = case.tensors("params")
    k = torch.tensor([TopK(sparsity).k(case.specs[0].numel)])
    check(backend, "prune_topk_", {"weights": weights, "masks": poisoned_masks(case), "sets": [0], "k": k})


@SEARCH
@hypothesis.given(drawn_cases(), st.data())
def test_drawn(backend, case: Drawn, data: st.DataObject) -> None:
    n, num_sets = len(case.specs), data.draw(st.integers(1, 4))
    sets = data.draw(st.lists(st.integers(-1, num_sets - 1), min_size=n, max_size=n))
    numels = [sum(spec.numel for spec, s in zip(case.specs, sets, strict=True) if s == own) for own in range(num_sets)]
    k = torch.tensor([data.draw(st.integers(-1, numel + 2)) for numel in numels])
    arguments = perturb(case, data.draw(st.sampled_from(PERTURB_VARIANTS)), data.draw(st.floats(width=32)))
    check(backend, "perturb_topk_", arguments | {"sets": sets, "k": k})
