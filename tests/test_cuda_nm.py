"""N:M of the CUDA backend, executed on the CPU, equals the reference to the bit."""

import pytest
from calls import PERTURB_VARIANTS, perturb, poisoned_masks, without
from capture import check_captured, launches
from cases import DTYPES, VALUES, Drawn, Spec, mixed
from compare import check
from test_nm import PATTERN, prunable, specs

FAR = [Spec((300, 16), order=(1, 0)), Spec((4, 64, 5, 7), offset=1), Spec((2100, 8), order=(1, 0)), Spec((6, 16), offset=3)]  # large tiles


@PATTERN
def test_prune_nm(executed, n: int, m: int) -> None:
    for values in ("ties", "bits", "nonfinite"):
        case = Drawn(values, specs(m))
        masks = poisoned_masks(case) if n % 2 else without(poisoned_masks(case), 2, 0)
        check(executed, "prune_nm_", {"weights": case.tensors("params"), "masks": masks, "prune": prunable(m), "n": n, "m": m})


@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 3)], ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_perturb_nm(executed, values: str, n: int, m: int) -> None:
    for variant in PERTURB_VARIANTS:
        check(executed, "perturb_nm_", perturb(Drawn(values, specs(m)), variant) | {"prune": prunable(m), "n": n, "m": m})


@pytest.mark.parametrize("dtype", DTYPES)
def test_large(executed, dtype: str) -> None:
    shapes = [Spec((100, 160)), Spec((32, 32, 3, 3)), Spec((32, 32, 3, 3), order=(0, 2, 3, 1)), Spec((9, 5)), *FAR]
    case = Drawn("rows", [spec._replace(dtype=DTYPES[dtype]) for spec in shapes])
    check(executed, "perturb_nm_", perturb(case, "amp") | {"prune": [1, 1, 1, 0, 1, 1, 1, 1], "n": 2, "m": 4})


@pytest.mark.parametrize("variant", PERTURB_VARIANTS)
@pytest.mark.parametrize("n, m", [(2, 4), (5, 8)], ids=str)
def test_in_all_ways(executed_in_all_ways, n: int, m: int, variant: str) -> None:
    for case, prune in ((Drawn("ties", specs(m)), prunable(m)), (Drawn("normal", mixed(FAR)), [1] * 4)):
        check(executed_in_all_ways, "perturb_nm_", perturb(case, variant) | {"prune": prune, "n": n, "m": m})


def test_every_place_within_a_cache_line(executed) -> None:
    case = Drawn("normal", mixed([Spec((3, 8), offset=i) for i in range(48)]))
    check(executed, "perturb_nm_", perturb(case) | {"prune": [1] * 48, "n": 2, "m": 4})


def test_many_tensors_take_several_launches(executed) -> None:
    case = Drawn("normal", mixed([Spec((1 + i % 4, 4 + 4 * (i % 3))) for i in range(901)]))
    arguments = perturb(case) | {"prune": [int(i % 7 != 0) for i in range(901)], "n": 2, "m": 4}
    assert launches(executed, "perturb_nm_", arguments) == 3  # of 450 tensors at most
    check(executed, "perturb_nm_", arguments)


def test_nothing_to_prune(executed) -> None:
    empty = Drawn("normal", [Spec((0, 4)), Spec((3,))])
    check(executed, "prune_nm_", {"weights": empty.tensors("params"), "masks": [], "prune": [1, 0], "n": 2, "m": 4})
    check(executed, "perturb_nm_", perturb(empty) | {"prune": [1, 0], "n": 2, "m": 4})


@pytest.mark.parametrize("variant", ["amp", "masters"])
def test_captured(executed, variant: str) -> None:
    case = Drawn("normal", mixed([*specs(4), *FAR]))
    check_captured(executed, "perturb_nm_", perturb(case, variant) | {"prune": [*prunable(4), 1, 1, 1, 1], "n": 2, "m": 4})
