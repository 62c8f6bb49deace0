"""restore_sgd_ equals the reference to the bit."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from calls import UPDATE_VARIANTS, f32, sgd
from cases import LARGE, MANY, SEARCH, SMALL, Case, Drawn, Spec, drawn_cases, mixed
from compare import check

CASE = pytest.mark.parametrize("case", SMALL, ids=str)
NUMBERS = st.sampled_from([0.0, 1e-60, 1e-40, 1e-3, 0.1, 0.9, 1.0, 1 / 3])
FLAGS = st.integers(0, 1)


@pytest.mark.parametrize("variant", UPDATE_VARIANTS)
@CASE
def test_a_combination_a_tensor(backend, case: Case, variant: str) -> None:
    check(backend, "restore_sgd_", sgd(case, variant))


@pytest.mark.parametrize("nesterov", [0, 1])
@pytest.mark.parametrize("maximize", [0, 1])
@pytest.mark.parametrize("fresh", [0, 1])
@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
@pytest.mark.parametrize("momentum, dampening", [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1)])
def test_options_for_all(backend, nesterov: int, maximize: int, fresh: int, weight_decay: float, momentum: float, dampening: float) -> None:
    options = {"nesterov": [nesterov], "maximize": [maximize], "fresh": [fresh], "weight_decay": [weight_decay], "momentum": [momentum]}
    for values in ("normal", "bits"):
        check(backend, "restore_sgd_", sgd(Case(values, "shapes", "mixed"), "masters", dampening=[dampening], **options))


def test_without_momentum_no_buffers_are_needed(backend) -> None:
    arguments = sgd(Case("normal", "shapes", "mixed"), lr=f32(0.1))
    check(backend, "restore_sgd_", arguments | {"momentum_buffers": []})


def test_the_opposite_of_zero(backend) -> None:
    """0 - 0 would be +0."""
    check(backend, "restore_sgd_", sgd(Drawn("zeros", mixed([Spec((8,)), Spec((40,))])), maximize=[1], momentum=[0.9], nesterov=[1]))


@pytest.mark.parametrize("lr", [0.0, 1e-45, float("inf"), float("nan"), -1.0])
def test_lr(backend, lr: float) -> None:
    check(backend, "restore_sgd_", sgd(Case("range", "shapes", "mixed"), momentum=[0.9], lr=f32(lr)))


def test_the_first_gradient_may_be_the_second(backend) -> None:
    """Read-only arguments may share memory."""
    arguments = sgd(Case("normal", "shapes", "mixed"))
    check(backend, "restore_sgd_", arguments | {"first_grads": arguments["grads"]})


@pytest.mark.parametrize("case", [MANY, *LARGE[1:3]], ids=str)
def test_large(backend, case: Case) -> None:
    check(backend, "restore_sgd_", sgd(case, "masters", momentum=[0.9], weight_decay=[1e-4], nesterov=[1]))


@SEARCH
@hypothesis.given(drawn_cases(), st.sampled_from(UPDATE_VARIANTS), st.data())
def test_drawn(backend, case: Drawn, variant: str, data: st.DataObject) -> None:
    n = len(case.specs)
    kinds = {"momentum": NUMBERS, "dampening": NUMBERS, "weight_decay": NUMBERS, "nesterov": FLAGS, "maximize": FLAGS, "fresh": FLAGS}
    options = {name: data.draw(st.lists(kind, min_size=n, max_size=n) if n else kind.map(lambda x: [x])) for name, kind in kinds.items()}
    check(backend, "restore_sgd_", sgd(case, variant, lr=torch.linspace(0.3, 0.1, n), **options))
