"""The compression of each step: which level, in which order, and how long a mask is kept."""

import itertools

import pytest
import torch
from optim_cases import assert_same_bits, random_tensors, set_gradients, two_halves
from torch import nn

from cram_kernels import CrAM, TopK

MULTI = [TopK(0.5), TopK(0.7), TopK(0.9)]


def levels(optimizer: CrAM, params, count: int) -> list[int]:
    """How many weights are there in each second pass."""
    counts = []
    for seed in range(count):
        set_gradients(params, random_tensors([p.shape for p in params], seed))
        optimizer.perturb()
        counts.append(sum(int(p.count_nonzero()) for p in params))
        set_gradients(params, random_tensors([p.shape for p in params], seed + count))
        optimizer.step()
    return counts


def test_levels_are_uniform_and_follow_the_seed():
    def run(seed, count=300):
        params = [nn.Parameter(random_tensors([(10, 100)], 0)[0])]
        return levels(CrAM(params, compression=MULTI, seed=seed, lr=1e-4), params, count)

    expected = {TopK(s).k(1000) - 1 for s in (0.5, 0.7, 0.9)}
    drawn = run(0)
    assert set(drawn) == expected
    assert all(70 <= drawn.count(level) <= 130 for level in expected)  # 100 +- 3.7 standard deviations of the binomial
    assert run(0, 50) == drawn[:50]
    assert len({tuple(run(seed, 20)) for seed in range(8)}) == 8


def test_levels_depend_on_no_generator():
    params = [nn.Parameter(random_tensors([(10, 100)], 0)[0])]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    levels(CrAM(params, compression=MULTI, lr=1e-4), params, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_level_is_a_function_of_seed_and_counter_in_the_groups():
    """Both are plain ints in param_groups; setting them back repeats the levels."""
    params = [nn.Parameter(random_tensors([(10, 100)], 0)[0])]
    optimizer = CrAM(params, compression=MULTI, seed=7, lr=1e-4)
    group = optimizer.param_groups[0]
    assert (type(group["cram_seed"]), group["cram_seed"], type(group["cram_step"])) == (int, 7, int)
    start = group["cram_step"]
    drawn = levels(optimizer, params, 12)
    assert group["cram_step"] == start + 12
    for g in optimizer.param_groups:
        g["cram_step"] = start
    assert levels(optimizer, params, 12) == drawn


def test_mask_period():
    """The mask of a level is kept for mask_period steps of that level; the weights under it are fresh every step."""
    params = [nn.Parameter(random_tensors([(10, 100)], 0)[0])]
    optimizer = CrAM(params, compression=[TopK(0.7)], mask_period=3, rho=0.5, lr=0.1)
    masks, shapes = [], [(10, 100)]
    for seed in range(7):
        first = random_tensors(shapes, seed)
        moved = params[0].detach() + 0.5 * first[0]
        set_gradients(params, first)
        with optimizer.perturbed():
            masks.append(params[0].detach() != 0)
            assert torch.equal(params[0].detach(), torch.where(masks[-1], moved, 0.0))
            set_gradients(params, random_tensors(shapes, seed + 9))
        optimizer.step()
    same = [torch.equal(a, b) for a, b in itertools.pairwise(masks)]
    assert same == [True, True, False, True, True, False]


def test_mask_period_with_a_dense_second_gradient():
    """Kept masks prune the weights; with sparse_grad=False they leave the second gradient alone."""
    params = [nn.Parameter(random_tensors([(10, 100)], 0)[0])]
    optimizer = CrAM(params, compression=[TopK(0.7)], mask_period=3, sparse_grad=False, lr=2**-3)
    for seed in range(4):
        before, (first,), (second,) = params[0].detach().clone(), *(random_tensors([(10, 100)], s) for s in (seed, seed + 9))
        two_halves(optimizer, params, [first], [second])
        assert_same_bits(params, [before - 2**-3 * (first + second)])


def test_masks_are_renewed_for_all_when_a_parameter_appears():
    """Its weights cannot be ranked by a mask that does not know them."""
    shapes = [(8, 16), (8, 8)]
    params = [nn.Parameter(t) for t in random_tensors(shapes, 0)]
    optimizer = CrAM(params, compression=[TopK(0.5)], mask_period=9, lr=0.1)
    two_halves(optimizer, params, [random_tensors(shapes, 1)[0], None], [random_tensors(shapes, 2)[0], None])
    set_gradients(params, random_tensors(shapes, 3))
    with optimizer.perturbed():
        assert sum(int(p.count_nonzero()) for p in params) == TopK(0.5).k(192) - 1


@pytest.mark.parametrize("seed", [-5, 2**63, 2**70])
def test_any_int_is_a_seed(seed):
    params = [nn.Parameter(random_tensors([(10, 100)], 0)[0])]
    optimizer = CrAM(params, compression=MULTI, seed=seed, lr=1e-4)
    assert len(set(levels(optimizer, params, 20))) > 1 and optimizer.param_groups[0]["cram_seed"] == seed
