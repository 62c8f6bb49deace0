"""topk_histogram of the CUDA backend, executed on the CPU, equals the reference to the bit."""

import pytest
import torch
from calls import PERTURB_VARIANTS, perturb, selection
from cases import HOSTILE, SMALL, Case
from compare import check
from test_histogram import histogram


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_first_digit(executed, case: Case) -> None:
    for variant in PERTURB_VARIANTS:
        arguments = perturb(case, variant)
        check(executed, "topk_histogram", histogram(arguments | selection("groups", arguments["params"]), 20, 11, [0] * 4))


@pytest.mark.parametrize("case", HOSTILE[:4], ids=str)
def test_later_digits(executed, case: Case) -> None:
    arguments = perturb(case, "amp" if case.dtype == "fp32" else "masters")
    arguments |= selection("half", arguments["params"])
    first = check(executed, "topk_histogram", histogram(arguments, 20, 11, [0]))
    check(executed, "topk_histogram", histogram(arguments, 10, 10, [int(first.argmax())]))


def test_in_all_ways(executed_in_all_ways) -> None:
    """A digit that is counted within blocks, and one that has too many values for that."""
    arguments = perturb(Case("bits", "offsets", "mixed"), "amp")
    arguments |= selection("groups", arguments["params"])
    check(executed_in_all_ways, "topk_histogram", histogram(arguments, 20, 11, [0] * 4))
    bins = check(executed_in_all_ways, "topk_histogram", histogram(arguments, 15, 16, [0] * 4))
    assert int(bins.sum()) == sum(p.numel() for p, s in zip(arguments["params"], arguments["sets"], strict=True) if s >= 0)
    assert bins.dtype == torch.int64
