"""perturb_masked_ of the CUDA backend, executed on the CPU, equals the reference to the bit; so does a replay of a captured graph."""

import pytest
from calls import PERTURB_VARIANTS
from capture import check_captured, launches
from cases import SMALL, Case, Drawn, Spec, mixed
from compare import check
from test_perturb import masked

CASE = pytest.mark.parametrize("case", SMALL, ids=str)


@CASE
@pytest.mark.parametrize("variant", PERTURB_VARIANTS)
def test_perturb_masked(executed, case: Case, variant: str) -> None:
    check(executed, "perturb_masked_", masked(case, variant))


@pytest.mark.parametrize("variant", PERTURB_VARIANTS)
def test_perturb_masked_in_all_ways(executed_in_all_ways, variant: str) -> None:
    for case in (Case("bits", "offsets", "mixed"), Case("normal", "scales", "bf16"), Case("ties", "orders", "mixed")):
        check(executed_in_all_ways, "perturb_masked_", masked(case, variant))


def test_many_tensors_take_several_launches(executed) -> None:
    arguments = masked(Drawn("normal", mixed([Spec((1 + 7 * i % 23,)) for i in range(901)])), "plain")
    assert launches(executed, "perturb_masked_", arguments) == 3  # of 450 tensors at most
    check(executed, "perturb_masked_", arguments)


@pytest.mark.parametrize("rho", [0.0, float("inf"), float("nan")])
def test_rho(executed, rho: float) -> None:
    check(executed, "perturb_masked_", masked(Case("normal", "shapes", "mixed"), "amp", rho))


@pytest.mark.parametrize("variant", ["amp", "masters"])
def test_captured(executed, variant: str) -> None:
    check_captured(executed, "perturb_masked_", masked(Case("normal", "scales", "bf16"), variant))


def test_a_fault_of_a_kernel_is_seen(executed) -> None:
    """The executor refuses what the call does not own: here a tensor that it was not told of."""
    arguments = masked(Case("normal", "one", "fp32"), "plain")
    try:
        with pytest.raises(RuntimeError, match="perturb_masked_: CUDA says cudaErrorIllegalAddress"):
            executed.enqueue("perturb_masked_", arguments)
    finally:
        executed.reset()
