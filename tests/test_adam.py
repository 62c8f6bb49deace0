"""restore_adam_ equals the reference to the bit."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from calls import UPDATE_VARIANTS, adam, f32
from cases import LARGE, MANY, SEARCH, SMALL, Case, Drawn, Spec, drawn_cases, mixed
from compare import check

CASE = pytest.mark.parametrize("case", SMALL, ids=str)
FLAGS = st.integers(0, 1)
DECAYS = st.sampled_from([0.0, 1e-60, 1e-40, 1e-2, 1.0])
BETAS = st.sampled_from([0.0, 1e-3, 0.5, 0.9, 0.999, 1 - 2**-30])


@pytest.mark.parametrize("variant", UPDATE_VARIANTS)
@CASE
def test_a_combination_a_tensor(backend, case: Case, variant: str) -> None:
    decoupled = (SMALL.index(case) + UPDATE_VARIANTS.index(variant)) % 2 == 0
    check(backend, "restore_adam_", adam(case, variant) | {"decoupled": decoupled})


@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
@pytest.mark.parametrize("amsgrad", [0, 1])
@pytest.mark.parametrize("maximize", [0, 1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_options_for_all(backend, decoupled: bool, amsgrad: int, maximize: int, weight_decay: float) -> None:
    options = {"amsgrad": [amsgrad], "maximize": [maximize], "weight_decay": [weight_decay], "decoupled": decoupled}
    for values in ("normal", "bits"):
        check(backend, "restore_adam_", adam(Case(values, "shapes", "mixed"), "masters", **options))


def test_without_amsgrad_no_maximum_is_needed(backend) -> None:
    check(backend, "restore_adam_", adam(Case("normal", "shapes", "mixed"), lr=f32(0.1)) | {"max_exp_avg_sqs": []})


def test_the_opposite_of_zero(backend) -> None:
    """0 - 0 would be +0."""
    check(backend, "restore_adam_", adam(Drawn("zeros", mixed([Spec((8,)), Spec((40,))])), maximize=[1], lr=f32(0.1)))


@pytest.mark.parametrize("step", [0, 1, 2, 3, 10, 100, 12345, 2**22, 2**24 - 1, 2**24, 2**30])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99999999])
def test_bias_correction(backend, step: int, beta: float) -> None:
    """beta^step in float64 by square-and-multiply, at every size of step; beyond 2^24 a float32 count stands still."""
    arguments = adam(Case("normal", "scales", "fp32"), beta1=[beta], beta2=[beta])
    check(backend, "restore_adam_", arguments | {"steps": [f32(float(step)) for _ in arguments["steps"]]})


def test_a_parameter_without_gradient_is_not_counted(backend) -> None:
    arguments = adam(Case("normal", "scales", "mixed"), "partial")
    check(backend, "restore_adam_", arguments | {"grads": [], "first_grads": []})


@pytest.mark.parametrize("case", [MANY, *LARGE[1:3]], ids=str)
def test_large(backend, case: Case) -> None:
    check(backend, "restore_adam_", adam(case, "masters", weight_decay=[0.01], decoupled=True, amsgrad=[1]))


@SEARCH
@hypothesis.given(drawn_cases(), st.sampled_from(UPDATE_VARIANTS), st.data())
def test_drawn(backend, case: Drawn, variant: str, data: st.DataObject) -> None:
    n = len(case.specs)
    kinds = {"beta1": BETAS, "beta2": BETAS, "eps": DECAYS, "weight_decay": DECAYS, "amsgrad": FLAGS, "maximize": FLAGS}
    options = {name: data.draw(st.lists(kind, min_size=n, max_size=n) if n else kind.map(lambda x: [x])) for name, kind in kinds.items()}
    decoupled = data.draw(st.booleans())
    check(backend, "restore_adam_", adam(case, variant, lr=torch.linspace(0.3, 0.1, n), decoupled=decoupled, **options))
