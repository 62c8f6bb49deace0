"""N:M: prune_nm_ and perturb_nm_ equal the reference to the bit."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from calls import PERTURB_VARIANTS, perturb, poisoned_masks, without
from cases import DTYPES, LAYOUTS, SEARCH, VALUES, Drawn, Spec, drawn_cases, mixed
from compare import check

PATTERNS = [(2, 4), (1, 2), (4, 8), (1, 4), (3, 4), (1, 3), (2, 5), (7, 16), (16, 32), (1, 1024), (1023, 1024)]
PATTERN = pytest.mark.parametrize("n, m", PATTERNS, ids=lambda x: str(x))


def specs(m: int) -> list[Spec]:
    """Layers of every kind with axis 1 a multiple of m, and some that stay dense."""
    shapes = [
        Spec((3, 2 * m)),  # Linear
        Spec((5, m), order=(1, 0)),  # transposed
        Spec((7, 3 * m), offset=1),
        Spec((2, m, 5)),  # Conv1d
        Spec((2, 2 * m, 3, 3)),
        Spec((2, 2 * m, 3, 3), order=(0, 2, 3, 1)),  # channels_last
        Spec((3, m, 1, 1), order=(0, 2, 3, 1)),
        Spec((2, m, 2, 1, 3), order=(4, 1, 0, 3, 2)),
        Spec((1, m)),
        Spec((0, m)),
        Spec((4, 0)),
        Spec((m,)),  # stays dense, as does the last
        Spec((3, m + 1)),
    ]
    return mixed(shapes)


def prunable(m: int) -> list[int]:
    return [int(len(spec.shape) > 1 and spec.shape[1] % m == 0) for spec in specs(m)]


@PATTERN
@pytest.mark.parametrize("values", VALUES)
def test_prune_nm(backend, values: str, n: int, m: int) -> None:
    case = Drawn(values, specs(m)[:5] if m == 1024 else specs(m))
    masks = poisoned_masks(case) if n % 2 else without(poisoned_masks(case), 2, 0)
    check(backend, "prune_nm_", {"weights": case.tensors("params"), "masks": masks, "prune": prunable(m)[: len(masks)], "n": n, "m": m})


@pytest.mark.parametrize("variant", PERTURB_VARIANTS)
@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (1, 3)], ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_perturb_nm(backend, values: str, n: int, m: int, variant: str) -> None:
    case = Drawn(values, specs(m))
    check(backend, "perturb_nm_", perturb(case, variant) | {"prune": prunable(m), "n": n, "m": m})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, m", [(2, 4), (4, 8), (3, 7)], ids=str)
def test_large(backend, n: int, m: int, dtype: str) -> None:
    shapes = [Spec((500, 40 * m)), Spec((64, 8 * m, 3, 3)), Spec((64, 8 * m, 3, 3), order=(0, 2, 3, 1)), Spec((9, 5))]
    case = Drawn("rows", [spec._replace(dtype=DTYPES[dtype]) for spec in shapes])
    check(backend, "perturb_nm_", perturb(case, "amp") | {"prune": [1, 1, 1, 0], "n": n, "m": m})


def test_every_place_within_a_cache_line(backend) -> None:
    case = Drawn("normal", mixed([Spec((3, 8), offset=i) for i in range(48)]))
    check(backend, "perturb_nm_", perturb(case) | {"prune": [1] * 48, "n": 2, "m": 4})


def test_a_prunable_layer_may_stay_dense(backend) -> None:
    case = Drawn("normal", mixed(specs(4)[:6]))
    check(backend, "perturb_nm_", perturb(case) | {"prune": [1, 0, 1, 0, 0, 1], "n": 2, "m": 4})
    check(backend, "prune_nm_", {"weights": case.tensors("a"), "masks": [], "prune": [0, 1, 0, 0, 1, 0], "n": 2, "m": 4})


def test_many_tensors(backend) -> None:
    count = len(LAYOUTS["many"])
    case = Drawn("normal", mixed([Spec((1 + i % 4, 4 + 4 * (i % 3))) for i in range(count)]))
    check(backend, "perturb_nm_", perturb(case) | {"prune": [int(i % 7 != 0) for i in range(count)], "n": 2, "m": 4})


@SEARCH
@hypothesis.given(st.data(), st.integers(2, 9))
def test_drawn(backend, data: st.DataObject, m: int) -> None:
    n = data.draw(st.integers(1, m - 1))
    case = data.draw(drawn_cases(min_dims=2, unit=m))
    prune = data.draw(st.lists(st.integers(0, 1), min_size=len(case.specs), max_size=len(case.specs)))
    arguments = perturb(case, data.draw(st.sampled_from(PERTURB_VARIANTS)))
    check(backend, "perturb_nm_", arguments | {"prune": prune, "n": n, "m": m})


def test_nothing_to_prune(backend) -> None:
    check(backend, "prune_nm_", {"weights": [], "masks": [], "prune": [], "n": 2, "m": 4})
    check(backend, "prune_nm_", {"weights": [torch.zeros(0, 4)], "masks": [], "prune": [1], "n": 2, "m": 4})
