"""topk_histogram: digits of the keys of u, and that they lead to the threshold of topk_threshold."""

import pytest
import torch
from calls import PERTURB_VARIANTS, f32, perturb, selection
from cases import HOSTILE, LARGE, SMALL, Case
from compare import assert_bitwise_equal, check

from cram_kernels import ops, reference

CASE = pytest.mark.parametrize("case", SMALL, ids=str)
READ = ("params", "grads", "rho", "inv_scale", "masters")


def histogram(arguments: dict, shift: int, bits: int, prefix: list[int]) -> dict:
    given = {name: arguments[name] for name in READ if name in arguments}
    return given | {"sets": arguments["sets"], "prefix": torch.tensor(prefix, dtype=torch.int64), "shift": shift, "bits": bits}


@CASE
@pytest.mark.parametrize("variant", PERTURB_VARIANTS)
def test_first_digit(backend, case: Case, variant: str) -> None:
    arguments = perturb(case, variant)
    arguments |= selection("groups", arguments["params"])
    check(backend, "topk_histogram", histogram(arguments, 20, 11, [0] * 4))


@pytest.mark.parametrize("case", LARGE + HOSTILE, ids=str)
def test_later_digits(backend, case: Case) -> None:
    """Under the prefix of a key that is there, and of one that is not."""
    arguments = perturb(case, "amp" if case.dtype == "fp32" else "masters")
    arguments |= selection("half", arguments["params"])
    first = check(backend, "topk_histogram", histogram(arguments, 20, 11, [0]))
    fullest = int(first.argmax())
    check(backend, "topk_histogram", histogram(arguments, 10, 10, [fullest]))
    assert check(backend, "topk_histogram", histogram(arguments, 0, 10, [2**21 - 1])).sum() == 0


def test_weights_without_gradients_count_as_they_are(backend) -> None:
    weights = [torch.tensor([1.0, -1.0, 0.0, float("nan")]), torch.tensor([2.0])]
    call = {"params": weights, "grads": [], "rho": f32(0.5), "sets": [0, -1], "prefix": torch.zeros(1, dtype=torch.int64)}
    bins = check(backend, "topk_histogram", call | {"shift": 15, "bits": 16})
    assert {i: int(n) for i, n in enumerate(bins[0]) if n} == {0: 1, 0x3F800000 >> 15: 2, reference.NAN_KEY >> 15: 1}


@pytest.mark.parametrize("shift, bits", [(-1, 8), (24, 8), (0, 0), (0, 17), (31, 1)])
def test_bad_digits_are_refused(shift: int, bits: int) -> None:
    call = {"params": [torch.ones(4)], "grads": [], "rho": f32(0.5), "sets": [0], "prefix": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match="topk_histogram: shift, bits must satisfy"):
        ops.topk_histogram(**call, shift=shift, bits=bits)


@CASE
def test_digits_add_up(case: Case) -> None:
    """All keys of a set are in the first digit's bins, those of a bin in the second's."""
    arguments = perturb(case)
    arguments |= selection("half", arguments["params"])
    first = ops.topk_histogram(**histogram(arguments, 20, 11, [0]))
    assert int(first.sum()) == sum(p.numel() for p in arguments["params"])
    for bin_ in first[0].nonzero().flatten().tolist()[:3]:
        second = ops.topk_histogram(**histogram(arguments, 10, 10, [bin_]))
        assert_bitwise_equal(second.sum().reshape(1), first[0, bin_].reshape(1), "second digit")
