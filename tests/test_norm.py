"""grad_norm equals the reference to the bit."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from calls import f32
from cases import DTYPES, LARGE, MANY, SEARCH, SMALL, Case, Drawn, Spec, drawn_cases
from compare import check

from cram_kernels import reference


@pytest.mark.parametrize("inv_scale", [None, 1 / 3, 0.0])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_grad_norm(backend, case: Case, inv_scale: float | None) -> None:
    check(backend, "grad_norm", {"grads": case.tensors("grads"), "inv_scale": None if inv_scale is None else f32(inv_scale)})


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_length_around_a_chunk(backend, dtype: str) -> None:
    """Chunks of 1024, the last one padded; more and fewer chunks than a power of two."""
    for lengths in ([1], [1023], [1024], [1025], [2047, 3], [5 * 1024 + 1], [1024] * 33, [0, 1, 0, 2048]):
        case = Drawn("normal", [Spec((n,), DTYPES[dtype], offset=i % 3) for i, n in enumerate(lengths)])
        check(backend, "grad_norm", {"grads": case.tensors("grads")})


@pytest.mark.parametrize("case", [MANY, *LARGE[:3], LARGE[-1]], ids=str)
def test_large(backend, case: Case) -> None:
    check(backend, "grad_norm", {"grads": case.tensors("grads"), "inv_scale": f32(2**-16)})


def test_squares_beyond_float32_are_summed_in_float64(backend) -> None:
    for value in (3e38, 1e-30, 1e-45):
        check(backend, "grad_norm", {"grads": [torch.full((3000,), value)]})


# The exact sum is the square of 1 + 2^-24, halfway between two float32, and whatever comes on top decides. A dust grain alone is lost
# beside 1; ten that meet before they meet the 1 are not. In the contract's order the grains of LOST reach the 1 one by one, those of
# FOUND together.
HALFWAY = [1.0, 2.0**-12, 2.0**-12, 2.0**-24]
DUST = 2.0**-27  # its square is a quarter of the last place of 1 in float64
LOST = [512, 768, 640, 576, 544, 528, 520, 516, 514, 513]
FOUND = [1, 3, 5, 9, 17, 33, 65, 129, 257, 513]


@pytest.mark.parametrize("places, norm", [(LOST, 1.0), (FOUND, 1 + 2.0**-23)], ids=["lost", "found"])
def test_the_order_of_additions(backend, places: list[int], norm: float) -> None:
    """Within a chunk of 1024 elements, and among 1024 chunks."""
    within = torch.zeros(2048)
    within[0], within[1024:1027], within[places] = HALFWAY[0], torch.tensor(HALFWAY[1:]), DUST
    among = [torch.tensor(HALFWAY)] + [torch.tensor([DUST if i in places else 0.0]) for i in range(1, 1024)]
    for grads in ([within], among):
        assert float(reference.grad_norm(grads)) == norm
        check(backend, "grad_norm", {"grads": grads})


@SEARCH
@hypothesis.given(drawn_cases(), st.floats(width=32))
def test_drawn(backend, case: Drawn, inv_scale: float) -> None:
    check(backend, "grad_norm", {"grads": case.tensors("grads"), "inv_scale": f32(inv_scale)})
