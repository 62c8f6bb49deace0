"""Packed 2:4: pack_24_, unpack_24_ and nm_violations equal the reference to the bit, and the reference equals torch's own packer."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from calls import meta_shape, packing
from cases import DTYPES, SEARCH, VALUES, Drawn, Spec, drawn_cases, mixed
from compare import assert_bitwise_equal, check
from test_nm import PATTERN, specs
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass, sparse_semi_structured_to_dense_cutlass

from cram_kernels import ops, reference

PACKABLE = {**DTYPES, "int8": torch.int8}
DTYPE = pytest.mark.parametrize("dtype", PACKABLE)
UNIT = {torch.float32: (32, 16), torch.bfloat16: (32, 32), torch.float16: (32, 32), torch.int8: (16, 64)}


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


def empties(w: Tensor) -> tuple[Tensor, Tensor]:
    meta_dtype = torch.int32 if w.dtype == torch.int8 else torch.int16
    return w.new_empty(w.shape[0], w.shape[1] // 2), torch.empty(meta_shape(w), dtype=meta_dtype)


def packed(w: Tensor) -> tuple[Tensor, Tensor]:
    p, m = empties(w)
    ops.pack_24_([w], [p], [m])
    return p, m


def unpacked(p: Tensor, m: Tensor) -> Tensor:
    w = p.new_full((p.shape[0], 2 * p.shape[1]), 7)
    ops.unpack_24_([w], [p], [m])
    return w


def shapes(dtype: torch.dtype) -> list[tuple[int, int]]:
    rows, cols = UNIT[dtype]
    return [(rows, cols), (2 * rows, cols), (rows, 2 * cols), (3 * rows, 5 * cols), (0, cols), (rows, 0)]


@DTYPE
def test_pack_and_unpack(backend, dtype: str) -> None:
    case = Drawn("ties", [Spec(shape, PACKABLE[dtype], offset=i) for i, shape in enumerate(shapes(PACKABLE[dtype]))])
    if dtype == "int8":
        weights = [random(spec.shape, torch.int8) for spec in case.specs]
        outputs = zip(*(empties(w) for w in weights), strict=True)
        arguments = dict(zip(("weights", "packed", "metas"), (weights, *map(list, outputs)), strict=True))
        for t in (*arguments["packed"], *arguments["metas"]):
            t.fill_(90)
        check(backend, "pack_24_", arguments)
        reference.pack_24_(**arguments)
        check(backend, "unpack_24_", arguments)
    else:
        check(backend, "pack_24_", packing(case))
        check(backend, "unpack_24_", packing(case, written=True))


@pytest.mark.parametrize("values", VALUES)
def test_any_numbers(backend, values: str) -> None:
    """More than two in a group too: some are lost, everywhere the same."""
    case = Drawn(values, [Spec(shape, dtype) for dtype in DTYPES.values() for shape in shapes(dtype)[:3]])
    arguments = packing(case)
    arguments["weights"] = case.tensors("weights")
    check(backend, "pack_24_", arguments)
    check(backend, "unpack_24_", packing(case, written=True))


@pytest.mark.parametrize("dtype", PACKABLE)
def test_metadata_that_packing_never_writes(backend, dtype: str) -> None:
    w = sparse(UNIT[PACKABLE[dtype]], PACKABLE[dtype])
    p, m = packed(w)
    m.view(torch.int8).copy_(torch.randint(-128, 128, (m.nbytes,), dtype=torch.int8).view(*m.shape[:-1], -1))
    check(backend, "unpack_24_", {"weights": [w], "packed": [p], "metas": [m]})


@DTYPE
@pytest.mark.parametrize("values", ["normal", "ties", "zeros", "denormal", "nonfinite", "bits"])
def test_bit_equal_to_torch(dtype: str, values: str) -> None:
    """torch's packer of any input, also where it loses numbers."""
    t = PACKABLE[dtype]
    for shape in shapes(t)[:4]:
        for w in (sparse(shape, t, values), random(shape, t, values)):
            ours, theirs = packed(w), sparse_semi_structured_from_dense_cutlass(w)
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
        assert_bitwise_equal(unpacked(*packed(w)), w, f"{dtype} {shape}")


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
    rows, cols = UNIT[t]
    w = torch.zeros(rows * cols * (1 + len(groups) * m // (rows * cols)), dtype=t).view(rows, -1)
    w.view(-1)[: len(groups) * m] = torch.tensor(groups, dtype=t).flatten()
    back = unpacked(*packed(w))
    minus = (w == 0) & (back == 0)
    assert_bitwise_equal(torch.where(minus, w, back), w, dtype)
    assert torch.equal(unpacked(*packed(back)).view(torch.int8), back.view(torch.int8))


@pytest.mark.parametrize("n", [0, 1])
@DTYPE
def test_emptier_than_it_may_be(dtype: str, n: int) -> None:
    """1:4 and all zero."""
    t = PACKABLE[dtype]
    w = random(UNIT[t], t)
    w = torch.where(reference.nm_keep(w, 1, 4), w, 0) if n else torch.zeros_like(w)
    assert_bitwise_equal(unpacked(*packed(w)), w, dtype)


def test_halves_of_float32_that_are_signalling_nans() -> None:
    """torch's unpacker moves them as float16, and quiets them: 1.5 % of random numbers come back wrong. Ours moves bits."""
    w = sparse((256, 256), torch.float32, "bits")
    w = torch.where(at_most(w), w, 0)
    w[0, :4] = torch.tensor([0x3F80_7D01, 0, 0, 0x7D01_FDD9]).to(torch.int32).view(torch.float32)
    assert_bitwise_equal(unpacked(*packed(w)), w, "float32")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_torch_reads_ours_and_we_read_theirs(dtype: str) -> None:
    t = PACKABLE[dtype]
    w = sparse((64, 256), t)
    p, m = packed(w)
    assert_bitwise_equal(sparse_semi_structured_to_dense_cutlass(p, m), w, "torch of ours")
    assert_bitwise_equal(unpacked(*sparse_semi_structured_from_dense_cutlass(w)), w, "ours of torch's")
    tensor = SparseSemiStructuredTensorCUTLASS(w.shape, p, m, None, None, None)
    assert_bitwise_equal(tensor.to_dense(), w, "SparseSemiStructuredTensorCUTLASS")


@PATTERN
@pytest.mark.parametrize("values", VALUES)
def test_nm_violations(backend, values: str, n: int, m: int) -> None:
    own = [spec for spec in (specs(m)[:5] if m == 1024 else specs(m)) if len(spec.shape) > 1 and spec.shape[1] % m == 0]
    weights = Drawn(values, own).tensors("weights")
    check(backend, "nm_violations", {"weights": weights, "n": n, "m": m})
    for w in weights[::2]:
        ops.prune_nm_([w], [], [1], n, m)
    check(backend, "nm_violations", {"weights": weights, "n": n, "m": m})


@SEARCH
@hypothesis.given(st.data(), st.integers(2, 9))
def test_nm_violations_drawn(backend, data: st.DataObject, m: int) -> None:
    case = data.draw(drawn_cases(min_dims=2, unit=m))
    check(backend, "nm_violations", {"weights": case.tensors("weights"), "n": data.draw(st.integers(1, m - 1)), "m": m})


def violations_of_bytes(backend, dtype: torch.dtype) -> torch.Tensor:
    """Every byte; the second half of the rows is 2:4, whose weights are returned."""
    w = torch.arange(256).to(torch.uint8).repeat(8).view(32, 64)
    w[16:, ::2] = 0
    check(backend, "nm_violations", {"weights": [w.view(dtype), w.view(dtype).t()], "n": 2, "m": 4})
    return w.view(dtype)[16:]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_bytes(backend, dtype: torch.dtype) -> None:
    found = ops.nm_violations([violations_of_bytes(backend, dtype)], 2, 4)
    assert found[0, :2].tolist() == [0, -1]


@pytest.mark.parametrize("layout", ["rows", "columns", "channels_last"])
def test_the_first_place(layout: str) -> None:
    """One group with three numbers, in a large tensor: where it is, in memory order."""
    w = torch.zeros(96, 64, 24)
    w = {"rows": w[..., 0].contiguous(), "columns": w[..., 0].t().contiguous().t(), "channels_last": w.mT.contiguous().mT}[layout]
    place = (70, 36) if w.dim() == 2 else (70, 36, 11)
    for i in (0, 1, 3):
        w[(place[0], place[1] + i, *place[2:])] = 1
    expected = sum(i * s for i, s in zip(place, w.stride(), strict=True))
    assert ops.nm_violations([w], 2, 4).tolist() == [[1, expected, 3]]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(backend, set_threads, threads: int) -> None:
    set_threads(threads)
    case = Drawn("normal", mixed([Spec((160, 320)), Spec((320, 160)), Spec((64, 64))]))
    check(backend, "pack_24_", packing(case))
    check(backend, "unpack_24_", packing(case, written=True))
    check(backend, "nm_violations", {"weights": [*case.tensors("weights"), torch.randn(64, 64, 3, 3)], "n": 2, "m": 4})


@pytest.mark.parametrize(
    "shape, dtype, part", [((16, 32), torch.float16, "rows"), ((32, 16), torch.float16, "columns"), ((16, 32), torch.int8, "columns")]
)
def test_shapes_that_do_not_fit(shape: tuple[int, int], dtype: torch.dtype, part: str) -> None:
    """torch's packer accepts the last two and then runs out of bounds."""
    w = torch.zeros(shape, dtype=dtype)
    with pytest.raises(RuntimeError, match=rf"pack_24_: weights\[0\] must have .*{part}.*got shape \[{shape[0]}, {shape[1]}\]"):
        ops.pack_24_([w], [w], [w])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64, torch.uint8])
def test_dtypes_that_have_no_packed_form(dtype: torch.dtype) -> None:
    w = torch.zeros(32, 64).to(dtype)
    with pytest.raises(RuntimeError, match=r"pack_24_: weights\[0\] must be int8, float16, bfloat16 or float32, got "):
        ops.pack_24_([w], [w], [w])
