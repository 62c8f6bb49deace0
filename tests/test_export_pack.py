"""Packed 2:4: bit-equal to torch's own packer, on which what is not zero decides."""

import itertools

import pytest
import torch
from cases import DTYPES, VALUES
from compare import assert_bitwise_equal
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass, sparse_semi_structured_to_dense_cutlass

from cram_kernels import reference
from cram_kernels.export.check import nonzero
from cram_kernels.export.cutlass import MULTIPLES, pack, unpack

PACKABLE = {**DTYPES, "int8": torch.int8}
DTYPE = pytest.mark.parametrize("dtype", PACKABLE)


def random(shape: tuple[int, int], dtype: torch.dtype, values: str = "normal") -> Tensor:
    generator = torch.Generator().manual_seed(shape[1])
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    return VALUES[values](shape[0] * shape[1], dtype, generator).view(shape)


def sparse(shape: tuple[int, int], dtype: torch.dtype, values: str = "normal") -> Tensor:
    """2:4 (float32: 1:2), every other number +0."""
    w = random(shape, dtype, values)
    n, m = (1, 2) if dtype == torch.float32 else (2, 4)
    return torch.where(reference.nm_keep(w, n, m), w, 0)


def shapes(dtype: torch.dtype) -> list[tuple[int, int]]:
    rows, cols = MULTIPLES[dtype]
    return [(rows, cols), (2 * rows, cols), (rows, 2 * cols), (3 * rows, 5 * cols), (0, cols), (rows, 0)]


@DTYPE
@pytest.mark.parametrize("values", ["normal", "ties", "zeros", "denormal", "nonfinite", "bits"])
def test_bit_equal_to_torch(dtype: str, values: str) -> None:
    """torch's packer of any input, also where it loses numbers."""
    t = PACKABLE[dtype]
    for shape in shapes(t)[:4]:
        for w in (sparse(shape, t, values), random(shape, t, values)):
            ours, theirs = pack(w), sparse_semi_structured_from_dense_cutlass(w)
            if w.element_size() == 2:  # torch's way through gather and stack changes the payload of 16-bit NaNs; ours moves bits
                ours, theirs = ((reference.canonical(p), m) for p, m in (ours, theirs))
            assert_bitwise_equal(ours[0], theirs[0], f"packed {shape}")
            assert_bitwise_equal(ours[1], theirs[1], f"meta {shape}")


@DTYPE
@pytest.mark.parametrize("values", ["normal", "ties", "denormal", "nonfinite", "bits"])
def test_round_trip(dtype: str, values: str) -> None:
    t = PACKABLE[dtype]
    for shape in shapes(t):
        w = sparse(shape, t, values)
        w = torch.where(w == 0, torch.zeros((), dtype=t), w)  # a -0 in a full group has no place
        if values in ("nonfinite", "bits") and t.is_floating_point:
            w = w.where(at_most(w), torch.zeros((), dtype=t))  # a NaN is kept beside two numbers
        assert_bitwise_equal(unpack(*pack(w)), w, f"{dtype} {shape}")


def at_most(w: Tensor) -> Tensor:
    """The first numbers of each group, as many as 2:4 (float32: 1:2) allows."""
    n, m = (1, 2) if w.dtype == torch.float32 else (2, 4)
    groups = (w != 0).unflatten(1, (-1, m))
    return (groups & (groups.cumsum(-1) <= n)).flatten(1)


@DTYPE
def test_every_group(dtype: str) -> None:
    """All groups of up to two numbers, NaN and -0 among them: what is lost is a -0 in a group with other numbers, and nothing else."""
    t = PACKABLE[dtype]
    values = [0, 3, -5, 127] if t == torch.int8 else [0.0, -0.0, 1.5, float("nan")]
    n, m = (1, 2) if t == torch.float32 else (2, 4)
    groups = [g for g in itertools.product(values, repeat=m) if sum(x != 0 for x in g) <= n]
    rows, cols = MULTIPLES[t]
    w = torch.zeros(rows * cols * (1 + len(groups) * m // (rows * cols)), dtype=t).view(rows, -1)
    w.view(-1)[: len(groups) * m] = torch.tensor(groups, dtype=t).flatten()
    back = unpack(*pack(w))
    minus = (w == 0) & (back == 0)
    assert_bitwise_equal(torch.where(minus, w, back), w, dtype)
    assert torch.equal(unpack(*pack(back)).view(torch.int8), back.view(torch.int8))


@pytest.mark.parametrize("n", [0, 1])
@DTYPE
def test_emptier_than_it_may_be(dtype: str, n: int) -> None:
    """1:4 and all zero."""
    t = PACKABLE[dtype]
    w = random(MULTIPLES[t], t)
    w = torch.where(reference.nm_keep(w, 1, 4), w, 0) if n else torch.zeros_like(w)
    assert_bitwise_equal(unpack(*pack(w)), w, dtype)


def test_halves_of_float32_that_are_signalling_nans() -> None:
    """torch's unpacker moves them as float16, and quiets them: 1.5 % of random numbers come back wrong. Ours moves bits."""
    w = sparse((256, 256), torch.float32, "bits")
    w = torch.where(at_most(w), w, 0)
    w[0, :4] = torch.tensor([0x3F80_7D01, 0, 0, 0x7D01_FDD9]).to(torch.int32).view(torch.float32)
    assert_bitwise_equal(unpack(*pack(w)), w, "float32")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_torch_reads_ours_and_we_read_theirs(dtype: str) -> None:
    t = PACKABLE[dtype]
    w = sparse((64, 256), t)
    p, m = pack(w)
    assert_bitwise_equal(sparse_semi_structured_to_dense_cutlass(p, m), w, "torch of ours")
    assert_bitwise_equal(unpack(*sparse_semi_structured_from_dense_cutlass(w)), w, "ours of torch's")
    tensor = SparseSemiStructuredTensorCUTLASS(w.shape, p, m, None, None, None)
    assert_bitwise_equal(tensor.to_dense(), w, "SparseSemiStructuredTensorCUTLASS")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32])
def test_what_is_not_zero(dtype: torch.dtype) -> None:
    """Every byte, or every number of 16 bits; of float32 the same bits as its upper and as its lower half. Denormals count, however torch
    is set."""
    bits = torch.arange(256).to(torch.uint8) if dtype.itemsize == 1 else torch.arange(2**16)
    w = bits.to({1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]).view(dtype)
    w = torch.cat([w, (bits << 16).to(torch.int32).view(dtype)]) if dtype == torch.float32 else w
    expected = w.double() != 0
    torch.set_flush_denormal(True)
    try:
        found = nonzero(w)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, expected) and torch.equal(nonzero(w.view(16, -1).t()), expected.view(16, -1).t())


@pytest.mark.parametrize("shape, dtype", [((16, 32), "float16"), ((32, 16), "float16"), ((16, 32), "int8"), ((64,), "int8")])
def test_shapes_that_do_not_fit(shape: tuple[int, ...], dtype: str) -> None:
    """torch's packer accepts two of these and then runs out of bounds."""
    t = getattr(torch, dtype)
    rows, cols = MULTIPLES[t]
    with pytest.raises(ValueError, match=f"pack: w must be a matrix of a multiple of {rows} rows and {cols} columns"):
        pack(torch.zeros(shape, dtype=t))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.uint8])
def test_dtypes_that_have_no_packed_form(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="pack: w must be int8, float16, bfloat16 or float32, got "):
        pack(torch.zeros(32, 64).to(dtype))
