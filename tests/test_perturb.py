"""perturb_masked_ equals the reference to the bit; what all perturbations share: rho, the flag, changing storage."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from calls import PERTURB_VARIANTS, mask_bytes, perturb, selection, without
from cases import LARGE, MANY, SEARCH, SMALL, Case, Drawn, drawn_cases
from compare import assert_bitwise_equal, bits, check, clone

from cram_kernels import reference

CASE = pytest.mark.parametrize("case", SMALL, ids=str)


def masked(case: Case | Drawn, variant: str, rho: float = 0.05) -> dict:
    """The arguments of perturb_masked_: masks are read."""
    masks = {"no_masks": [], "few_masks": without(mask_bytes(case, "masks"), 2, 0)}
    return perturb(case, variant, rho) | {"masks": masks.get(variant, mask_bytes(case, "masks"))}


@pytest.mark.parametrize("variant", PERTURB_VARIANTS)
@CASE
def test_perturb_masked(backend, case: Case, variant: str) -> None:
    check(backend, "perturb_masked_", masked(case, variant))


@pytest.mark.parametrize("variant", ["plain", "masters"])
@pytest.mark.parametrize("rho", [0.0, -0.0, -2.0, 1e-45, 3e38, math.inf, math.nan])
def test_rho(backend, rho: float, variant: str) -> None:
    for values in ("bits", "denormal", "range"):
        check(backend, "perturb_masked_", masked(Case(values, "shapes", "mixed"), variant, rho))


@pytest.mark.parametrize("case", [MANY, *LARGE[1:4]], ids=str)
def test_large(backend, case: Case) -> None:
    check(backend, "perturb_masked_", masked(case, "amp"))


def test_found_inf_is_set_and_never_cleared(backend) -> None:
    for values, before, inv_scale, after in [("normal", 0, 1, 0), ("normal", 1, 1, 1), ("nonfinite", 0, 0.5, 1), ("normal", 0, 3e38, 1)]:
        case = Case(values, "scales", "fp32")
        arguments = masked(case, "plain") | {"found_inf": torch.tensor([float(before)]), "inv_scale": torch.tensor(float(inv_scale))}
        own = clone(arguments)
        backend("perturb_masked_", own)
        assert float(own["found_inf"]) == after
        check(backend, "perturb_masked_", arguments)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 31, 33, 4097])
@pytest.mark.parametrize("place", ["first", "last"])
def test_one_bad_gradient_is_found_wherever_it_is(backend, size: int, place: str) -> None:
    g = torch.ones(size)
    g[0 if place == "first" else -1] = -math.inf
    arguments = {
        "params": [torch.ones(size)], "grads": [g], "saved": [torch.empty(size)], "masks": [], "found_inf": torch.zeros(()),
        "perturbed": torch.tensor(0, dtype=torch.int32), "rho": torch.tensor(0.5),
    }  # fmt: skip
    check(backend, "perturb_masked_", arguments)


def test_a_second_perturbation_is_refused(backend) -> None:
    if backend.device == "cuda" or backend.name == "cuda executed":
        pytest.skip("on a GPU the flag is not read, that would synchronise: the optimizer restores first; the CPU runs this")
    arguments = masked(Case("normal", "shapes", "mixed"), "plain")
    backend("perturb_masked_", arguments)
    before = clone(arguments)
    with pytest.raises(RuntimeError, match="perturbed must be 0, got 1"):
        backend("perturb_masked_", arguments)
    for name in ("params", "saved"):
        for i, (a, b) in enumerate(zip(arguments[name], before[name], strict=True)):
            assert_bitwise_equal(a, b, f"{name}[{i}]")


def test_there_and_back(backend) -> None:
    """The weights of before, every NaN payload included, after any perturbation; and a second restore changes nothing."""
    case = Case("bits", "shapes", "mixed")
    pattern = {"perturb_masked_": {}, "perturb_topk_": selection("half", case.tensors("params"))}
    pattern["perturb_nm_"] = {"prune": [0] * len(case.specs), "n": 2, "m": 4}
    for op, more in pattern.items():
        arguments = masked(case, "plain") | more
        before = [bits(p).clone() for p in arguments["params"]]
        backend(op, arguments)
        again = {key: arguments[key] for key in ("params", "saved", "perturbed")}
        for _ in range(2):
            backend("restore_", again)
            assert int(arguments["perturbed"]) == 0
            for own, p in zip(before, arguments["params"], strict=True):
                assert torch.equal(own, bits(p)), op
            arguments["saved"][1].fill_(5)  # shows if the second restore writes


def test_calls_that_follow_see_new_storage_sets_and_shapes(backend) -> None:
    """The same list objects again, with other tensors, storage or options: nothing is remembered wrongly."""
    case = Case("normal", "shapes", "mixed")
    arguments = perturb(case) | selection("half", case.tensors("params"))
    others = perturb(Case("ties", "shapes", "mixed"))
    for step in range(6):
        arguments["perturbed"].fill_(0)
        if step == 1:
            for p, other in zip(arguments["params"], others["params"], strict=True):
                p.data = other  # storage rebound under the same tensor object
        elif step == 2:
            arguments |= selection("groups", arguments["params"])
        elif step == 3:
            arguments["k"][0] = 3
        elif step == 4:
            for name in ("params", "grads", "saved"):
                arguments[name].reverse()
            arguments["masks"].reverse()
        elif step == 5:
            arguments["masks"] = []
        expected = clone(arguments)
        reference.perturb_topk_(**expected)
        backend("perturb_topk_", arguments)
        for name in ("params", "saved", "masks"):
            for i, (a, e) in enumerate(zip(arguments[name], expected[name], strict=True)):
                assert_bitwise_equal(a, e, f"step {step}: {name}[{i}]")


@pytest.mark.parametrize("op", ["perturb_masked_", "perturb_topk_"])
def test_slices_of_one_buffer(backend, op: str) -> None:
    """Parameters of one flat buffer do not overlap: one call takes them, and writes nothing between them."""
    for gap in (0, 1):
        generator = torch.Generator().manual_seed(gap)
        lists = {name: torch.randn(4 * 1000, generator=generator) for name in ("params", "grads", "saved")}
        expected = {name: t.clone() for name, t in lists.items()}
        for owner in (lists, expected):
            cut = {name: [t[i * 1000 : (i + 1) * 1000 - gap] for i in range(4)] for name, t in owner.items()}
            arguments = cut | {"masks": [], "perturbed": torch.tensor(0, dtype=torch.int32), "rho": torch.tensor(0.3)}
            if op == "perturb_topk_":
                arguments |= selection("half", arguments["params"])
            backend(op, arguments) if owner is lists else getattr(reference, op)(**arguments)
        for name, t in lists.items():
            assert_bitwise_equal(t, expected[name], name)


@SEARCH
@hypothesis.given(drawn_cases(), st.sampled_from(PERTURB_VARIANTS), st.floats(width=32))
def test_drawn(backend, case: Drawn, variant: str, rho: float) -> None:
    check(backend, "perturb_masked_", masked(case, variant, rho))
