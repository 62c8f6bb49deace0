"""Top-k: topk_threshold, prune_topk_, perturb_topk_ equal the reference to the bit."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from calls import PERTURB_VARIANTS, SELECTIONS, perturb, poisoned_masks, selection, without
from cases import DTYPES, HOSTILE, LARGE, MANY, SEARCH, SMALL, Case, Drawn, drawn_cases
from compare import assert_bitwise_equal, check

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
    """The k-th largest is the last of half a million equal ones: every bracket around it holds all weights, and the backend falls back."""
    arguments = perturb(case, "amp" if case.dtype == "fp32" else "masters")
    for g in arguments["grads"]:
        g.zero_()
    weights = arguments["masters"] if "masters" in arguments else arguments["params"]
    k = sum(int((w.abs() > 0.3).sum()) for w in weights)
    _, stats = check(backend, "perturb_topk_", arguments | {"sets": [0] * len(weights), "k": torch.tensor([k])})
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
