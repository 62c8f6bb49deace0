"""Lists that lie in one buffer, as the optimizer hands its own memory over: native ops take the buffer, and give the bits that the reference
gives with the list."""

from typing import Any

import pytest
import torch
from compare import clone, compare_all, contract_part
from test_schema import SAMPLES, native, positional
from torch import Tensor

from cram_kernels import ops, reference
from cram_kernels._registration import InBuffer
from cram_kernels.backend import use_backend

LISTS = ("saved", "masks")


def in_buffer(tensors: list[Tensor]) -> InBuffer:
    """Copies that begin at multiples of 64 bytes."""
    views, begin = [], 64
    buffer = torch.zeros(64 + sum(t.nbytes + 64 for t in tensors), dtype=torch.uint8)
    for t in tensors:
        views.append(buffer[begin : begin + t.nbytes].view(t.dtype).as_strided(t.shape, t.stride()).copy_(t))
        begin += -(-t.nbytes // 64) * 64
    return InBuffer(views)


@pytest.mark.parametrize("op", [op for op, sample in SAMPLES.items() if any(sample().get(name) for name in LISTS)])
def test_same_bits_as_the_list(op: str) -> None:
    arguments, expected_arguments = SAMPLES[op](), SAMPLES[op]()
    for name in LISTS:
        if arguments.get(name):
            arguments[name] = in_buffer(arguments[name])
    with use_backend("cpu"):
        actual = getattr(ops, op)(**arguments)
    expected = getattr(reference, op)(**expected_arguments)
    compare_all(op, arguments, expected_arguments)
    compare_all(op, contract_part(actual), contract_part(expected))


def test_a_tensor_of_no_elements_is_absent() -> None:
    arguments, expected_arguments = SAMPLES["restore_sgd_"](), SAMPLES["restore_sgd_"]()
    for a in (arguments, expected_arguments):
        a["masks"][1] = a["masks"][1][:0]
    arguments["masks"] = in_buffer(arguments["masks"])
    assert arguments["masks"].handed_over[1][1] == -1
    ops.restore_sgd_(**arguments)
    reference.restore_sgd_(**expected_arguments)
    compare_all("restore_sgd_", arguments, expected_arguments)


def shifted(begins: Tensor, by: int) -> Tensor:
    return begins.index_add(0, torch.tensor([0]), torch.tensor([by]))


@pytest.mark.parametrize(
    "wrong, found",
    [
        (
            lambda buffer, begins: [buffer, begins[:-1]],
            r"saved must be a contiguous buffer and on the CPU a number a parameter \(4\), got \[3\]",
        ),
        (
            lambda buffer, begins: [buffer[::2], begins],
            r"saved must be a contiguous buffer and on the CPU a number a parameter \(4\), got \[4\]",
        ),
        (lambda buffer, begins: [buffer, shifted(begins, 8)], r"saved\[0\] must lie in its buffer of \d+ bytes, at a multiple of 16"),
        (
            lambda buffer, begins: [buffer, shifted(begins, 1 << 40)],
            r"saved\[0\] must lie in its buffer of \d+ bytes, .* got \d+ bytes at 1\d+",
        ),
        (lambda buffer, begins: [buffer[:80], begins], r"saved\[\d\] must lie in its buffer of 80 bytes"),
        (lambda buffer, begins: [buffer, begins[:1].expand(4).contiguous()], r"saved\[\d\] must not share memory with saved\[\d\]"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: Any, found: str) -> None:
    arguments = SAMPLES["perturb_masked_"]()
    arguments["saved"], arguments["masters"] = wrong(*in_buffer([torch.zeros_like(p) for p in arguments["params"]]).handed_over), []
    before = clone(arguments)
    args, kwargs = positional("perturb_masked_", arguments)
    with pytest.raises(RuntimeError, match=f"perturb_masked_: {found}"):
        native("perturb_masked_")(*args, **kwargs)
    for name in ("params", "saved", "perturbed"):
        compare_all(name, arguments[name], before[name])


def test_other_backends_are_never_given_a_buffer() -> None:
    arguments = SAMPLES["perturb_masked_"]()
    arguments["saved"] = in_buffer([torch.zeros_like(p) for p in arguments["params"]]).handed_over
    args, kwargs = positional("perturb_masked_", arguments)
    with pytest.raises(RuntimeError, match=r"saved must be empty or have one tensor a parameter \(4\), got 2"):
        native("check_perturb_masked_")(*args, **kwargs)
