"""restore_ and restore_combine_ equal the reference to the bit."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from calls import UPDATE_VARIANTS, combine, f32, restore
from cases import LARGE, MANY, SEARCH, SMALL, Case, Drawn, drawn_cases
from compare import check

CASE = pytest.mark.parametrize("case", SMALL, ids=str)


@pytest.mark.parametrize("variant", ["plain", "masters", "unperturbed"])
@CASE
def test_restore(backend, case: Case, variant: str) -> None:
    check(backend, "restore_", restore(case, variant))


@pytest.mark.parametrize("variant", UPDATE_VARIANTS)
@CASE
def test_restore_combine(backend, case: Case, variant: str) -> None:
    check(backend, "restore_combine_", combine(case, variant))


@pytest.mark.parametrize("found_inf", [0.0, -0.0, 1.0, 2.0, 1e-45, math.nan])
def test_found_inf(backend, found_inf: float) -> None:
    """Anything but 0 leaves the gradients as they are, NaN and denormals included."""
    check(backend, "restore_combine_", combine(Case("bits", "shapes", "mixed")) | {"found_inf": f32(found_inf)})


@pytest.mark.parametrize("inv_scale", [0.0, 1e-45, 3e38, math.inf, math.nan])
def test_scales(backend, inv_scale: float) -> None:
    for values in ("bits", "range", "denormal"):
        arguments = combine(Case(values, "shapes", "mixed"))
        check(backend, "restore_combine_", arguments | {"inv_scale": f32(inv_scale), "first_inv_scale": f32(0.3)})


@pytest.mark.parametrize("masks", ["kept", "dropped"])
def test_a_mask_selects_and_never_multiplies(backend, masks: str) -> None:
    """0 * Inf would be NaN: where nothing is kept, g1 stays what it is whatever g2 is."""
    arguments = combine(Case("nonfinite", "offsets", "fp32"))
    for mask in arguments["masks"]:
        mask.fill_(0)
        if masks == "kept":
            mask[:8] = 255
    check(backend, "restore_combine_", arguments)


@pytest.mark.parametrize("case", [MANY, *LARGE[1:3]], ids=str)
def test_large(backend, case: Case) -> None:
    check(backend, "restore_", restore(case, "masters"))
    check(backend, "restore_combine_", combine(case, "amp"))


@SEARCH
@hypothesis.given(drawn_cases(), st.sampled_from(UPDATE_VARIANTS))
def test_drawn(backend, case: Drawn, variant: str) -> None:
    check(backend, "restore_combine_", combine(case, variant))


def test_nothing_to_restore(backend) -> None:
    flag = torch.tensor(1, dtype=torch.int32)
    check(backend, "restore_", {"params": [], "saved": [], "perturbed": flag})
