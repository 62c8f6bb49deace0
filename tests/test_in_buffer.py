"""Lists that lie in one buffer, as the optimizer hands its own memory over: native ops take the buffer and a table of what is in it, with
the bits that the reference gives with the list."""

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
    ops.restore_sgd_(**arguments)
    reference.restore_sgd_(**expected_arguments)
    compare_all("restore_sgd_", arguments, expected_arguments)


def changed(table: Tensor, place: int, number: int) -> Tensor:
    return table.index_fill(0, torch.tensor([place]), number)


SECOND = 3 + 2 * 2  # where in the table the second tensor begins: the first has two dims


@pytest.mark.parametrize(
    "wrong, found",
    [
        (lambda buffer, table: [buffer, table[:-1]], r"saved\[3\] must be in the table of its buffer, got 4 numbers there"),
        (lambda buffer, table: [buffer, changed(table, 1, 4)], r"saved\[0\] must be in the table of its buffer, got \d+ numbers there"),
        (lambda buffer, table: [buffer[::2], table], r"saved must be a contiguous buffer and .* CPU, got \[2\], \[1\] as strides"),
        (
            lambda buffer, table: [buffer, changed(table, 0, 72)],
            r"saved\[0\] must lie in its buffer of \d+ bytes, at a multiple of 16, got",
        ),
        (lambda buffer, table: [buffer, changed(table, 0, 1 << 40)], r"saved\[0\] must lie in its buffer of .* got \d+ bytes at 1\d+"),
        (lambda buffer, table: [buffer[:80], table], r"saved\[0\] must lie in its buffer of 80 bytes"),
        (lambda buffer, table: [buffer, changed(table, SECOND, 64)], r"saved\[\d\] must not share memory with saved\[\d\]"),
        (lambda buffer, table: [buffer, changed(table, 1, 3)], r"saved\[0\] must be \w+, got uint8"),
        (lambda buffer, table: [buffer, changed(table, 3, 3)], r"saved\[0\] must have the shape \[6, 8\] of its parameter, got \[3, 8\]"),
        (lambda buffer, table: [buffer, changed(table, 6, 2)], r"saved\[0\] must have the strides \[8, 1\] of its parameter, got \[8, 2\]"),
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
