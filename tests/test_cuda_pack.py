"""pack_24_, unpack_24_ and nm_violations of the CUDA backend, executed on the CPU, equal the reference to the bit: test_pack.py's cases."""

import pytest
import test_pack
import torch
from calls import packing
from capture import check_captured, launches
from cases import DTYPES, VALUES, Drawn, Spec, mixed
from compare import check
from test_nm import PATTERN, specs
from test_pack import DTYPE, PACKABLE, UNIT

WIDE = Drawn("normal", mixed([Spec((64, 160), offset=1), Spec((32, 320)), Spec((96, 32), offset=2), Spec((0, 32)), Spec((32, 0))]))
GROUPS = Drawn(
    "ties", mixed([Spec((160, 320)), Spec((33, 64, 3, 3)), Spec((64, 132), order=(1, 0)), Spec((9, 2052), offset=1), Spec((2, 4, 700, 3))])
)


@DTYPE
def test_pack_and_unpack(executed, dtype: str) -> None:
    test_pack.test_pack_and_unpack(executed, dtype)


@pytest.mark.parametrize("values", VALUES)
def test_any_numbers(executed, values: str) -> None:
    test_pack.test_any_numbers(executed, values)


@DTYPE
def test_metadata_that_packing_never_writes(executed, dtype: str) -> None:
    test_pack.test_metadata_that_packing_never_writes(executed, dtype)


def test_in_all_ways(executed_in_all_ways) -> None:
    check(executed_in_all_ways, "pack_24_", packing(WIDE))
    check(executed_in_all_ways, "unpack_24_", packing(WIDE, written=True))
    check(executed_in_all_ways, "nm_violations", {"weights": GROUPS.tensors("weights"), "n": 2, "m": 4})
    test_pack.test_pack_and_unpack(executed_in_all_ways, "int8")


@PATTERN
def test_nm_violations(executed, n: int, m: int) -> None:
    own = [spec for spec in (specs(m)[:5] if m == 1024 else specs(m)) if len(spec.shape) > 1 and spec.shape[1] % m == 0]
    for values in ("ties", "bits", "zeros"):
        check(executed, "nm_violations", {"weights": Drawn(values, own).tensors("weights"), "n": n, "m": m})


@pytest.mark.parametrize("dtype", DTYPES)
def test_violations_of_large_tensors(executed, dtype: str) -> None:
    """Several tasks a tensor; columns that a task ends in the middle of; all groups violate, and few."""
    weights = GROUPS._replace(specs=[spec._replace(dtype=DTYPES[dtype]) for spec in GROUPS.specs]).tensors("weights")
    check(executed, "nm_violations", {"weights": weights, "n": 1, "m": 4})
    for w in weights:
        w[w.shape[0] // 2 :] = 0
    check(executed, "nm_violations", {"weights": weights, "n": 3, "m": 4})


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_bytes(executed, dtype: torch.dtype) -> None:
    test_pack.violations_of_bytes(executed, dtype)


def test_many_tensors_take_several_launches(executed) -> None:
    shape = UNIT[torch.float16]
    arguments = packing(Drawn("normal", [Spec(shape, torch.float16)] * 451))
    assert launches(executed, "pack_24_", arguments) == launches(executed, "unpack_24_", arguments) == 2  # of 450 tensors at most
    check(executed, "pack_24_", arguments)
    weights = {"weights": arguments["weights"], "n": 2, "m": 4}
    assert launches(executed, "nm_violations", weights) == 3  # one clears the result
    check(executed, "nm_violations", weights)


def test_nothing_to_do(executed) -> None:
    empty = Drawn("normal", [Spec((0, 32), t) for t in DTYPES.values()])
    check(executed, "pack_24_", packing(empty))
    check(executed, "nm_violations", {"weights": empty.tensors("weights"), "n": 2, "m": 4})


def test_captured(executed) -> None:
    check_captured(executed, "pack_24_", packing(WIDE))
    check_captured(executed, "unpack_24_", packing(WIDE, written=True))
    check_captured(executed, "nm_violations", {"weights": GROUPS.tensors("weights"), "n": 2, "m": 4})
    assert set(PACKABLE) == {*DTYPES, "int8"}
