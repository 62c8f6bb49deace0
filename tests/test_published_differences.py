"""Each place where the drop-in names differ from the published code: what that does (published.py), and what ours do instead.

docs/migrating.md lists them with the reasons.
"""

import copy

import numpy
import pytest
import torch
from optim_cases import assert_same_bits, clones, random_tensors, set_gradients
from published_cases import EXACT, gradients, optimizer, pair, step
from torch import nn


def test_levels_do_not_touch_numpys_generator():
    before = numpy.random.get_state()[1].copy()
    a, params, _, _ = pair("TopkCrAM", options={"sparsities": [0.5, 0.7, 0.9]})
    step(a, params, gradients(), gradients(seed=6))
    assert (numpy.random.get_state()[1] == before).all()


def test_no_second_gradient():
    """Published: such a parameter stays perturbed and pruned, not updated. Ours: restored, updated by the first gradient alone."""
    a, ours, b, theirs = pair("TopkCrAM", options={"sparsities": [0.5], **EXACT, "momentum": 0.0, "weight_decay": 0.0})
    before, first = clones(ours), gradients()
    second = [None, *gradients(seed=6)[1:]]
    step(a, ours, first, second)
    between = step(b, theirs, first, second)
    assert_same_bits(theirs[:1], between[:1])
    assert int(theirs[0].count_nonzero()) < theirs[0].numel()
    assert_same_bits(ours[:1], [before[0] - EXACT["lr"] * first[0]])
    assert_same_bits(ours[1:], theirs[1:])


def test_no_first_gradient():
    """Published: the weights jump back to those of the last step in which there was one. Ours: updated by the second gradient alone."""
    a, ours, b, theirs = pair("TopkCrAM", options={"sparsities": [0.5], **EXACT, "momentum": 0.0, "weight_decay": 0.0})
    steps = [(gradients(), gradients(seed=6)), ([None, *gradients(seed=7)[1:]], gradients(seed=8))]
    for sam, params in ((a, ours), (b, theirs)):
        step(sam, params, *steps[0])
    before, stale = clones(ours), gradients()[0]
    step(a, ours, *steps[1])
    step(b, theirs, *steps[1])
    second = steps[1][1][0]
    assert_same_bits(ours[:1], [before[0] - EXACT["lr"] * second])
    mask = b.state[theirs[0]]["mask"]
    assert_same_bits(theirs[:1], [before[0] - EXACT["lr"] * (second * mask + stale)])  # a mask and a gradient of another step
    c, params, d, others = pair("TopkCrAM", options={"sparsities": [0.5]})
    with pytest.raises(KeyError, match="old_p"):  # published, where the first step of all has no gradient
        step(d, others, *steps[1])
    step(c, params, *steps[1])


def test_storage_does_not_move():
    a, ours, b, theirs = pair("TopkCrAM", options={"sparsities": [0.5]})
    here, there = [p.data_ptr() for p in ours], [p.data_ptr() for p in theirs]
    step(a, ours, gradients(), gradients(seed=6))
    step(b, theirs, gradients(), gradients(seed=6))
    assert [p.data_ptr() for p in ours] == here
    assert all(p.data_ptr() != q for p, q in zip(theirs, there, strict=True))


@pytest.mark.parametrize("name", ["TopkCrAM", "TopkCrAMPeriod", "NMTopkCrAM", "SAM"])
def test_resume_keeps_the_momentum(name):
    """Published: the momentum is in the file and is not used again."""
    options = {} if name in ("SAM", "NMTopkCrAM") else {"sparsities": [0.5]}
    shapes = [(8, 16), (16,)]
    results = {}
    for where in ("cram_kernels", "published"):
        extra = {"levels": [(2, 4)] * 9} if where == "published" and name == "NMTopkCrAM" else {}
        params = [nn.Parameter(t) for t in random_tensors(shapes, seed=3)]
        sam = optimizer(where, name, params, **options, **extra)
        for seed in range(3):
            step(sam, params, gradients(shapes, seed), gradients(shapes, seed + 50))
        again = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = optimizer(where, name, again, **options, **extra)
        resumed.load_state_dict(copy.deepcopy(sam.state_dict()))
        for s, p in ((sam, params), (resumed, again)):
            step(s, p, gradients(shapes, 9), gradients(shapes, 59))
        results[where] = (params, again)
    assert_same_bits(*results["cram_kernels"])
    params, again = results["published"]
    assert (params[0] - again[0]).abs().max() > 1e-3


def test_state_is_torchs_own():
    """Published: 4 parameters' worth of saved weights, gradients, masks and momentum. Ours: what torch.optim.SGD keeps."""
    a, ours, b, theirs = pair("TopkCrAM", options={"sparsities": [0.5]})
    step(a, ours, gradients(), gradients(seed=6))
    step(b, theirs, gradients(), gradients(seed=6))
    assert all(set(state) == {"momentum_buffer"} for state in a.state_dict()["state"].values())
    assert set(b.state_dict()["state"][0]) == {"momentum_buffer", "old_p", "clean_grad", "mask"}


def test_channels_last_runs():
    params = [nn.Parameter(random_tensors([(8, 8, 3, 3)], 3)[0].to(memory_format=torch.channels_last)) for _ in range(3)]
    plain = [nn.Parameter(params[0].detach().contiguous())]
    first, second = gradients([(8, 8, 3, 3)]), gradients([(8, 8, 3, 3)], 6)
    last = [[g[0].to(memory_format=torch.channels_last)] for g in (first, second)]
    step(optimizer("cram_kernels", "TopkCrAM", params[:1], sparsities=[0.5]), params[:1], *last)
    step(optimizer("cram_kernels", "TopkCrAM", plain, sparsities=[0.5]), plain, first, second)
    assert_same_bits(params[:1], plain)
    with pytest.raises(RuntimeError, match="view"):
        step(optimizer("published", "TopkCrAM", params[1:2], sparsities=[0.5]), params[1:2], *last)
    step(optimizer("cram_kernels", "NMTopkCrAM", params[2:]), params[2:], *last)


def test_pruned_weights_are_positive_zeros_and_inf_is_masked():
    """Published: weight * 0 is -0, and Inf * 0 in the second gradient is NaN. Ours selects."""
    second = gradients(seed=6)
    a, ours, b, theirs = pair("TopkCrAM", options={"sparsities": [0.5], "rho": 0.0})
    smallest = tuple(int(i) for i in (ours[0].detach().abs() == ours[0].detach().abs().min()).nonzero()[0])
    second[0][smallest] = float("inf")
    between, between_theirs = step(a, ours, gradients(), second)[0], step(b, theirs, gradients(), second)[0]
    assert torch.equal(between, between_theirs)
    assert not between[between == 0].signbit().any() and bool(between_theirs[between_theirs == 0].signbit().any())
    assert ours[0].isfinite().all() and theirs[0][smallest].isnan()


@pytest.mark.filterwarnings("ignore:CrAM. .* prunes none")
def test_nm_leaves_layers_dense_that_m_does_not_divide():
    """Published: groups straddle rows, which no engine reads as 2:4; or numel is no multiple of m, and it raises."""
    a, ours, b, theirs = pair("NMTopkCrAM", shapes=[(8, 6)], theirs={"levels": [(2, 4)] * 2})
    between = step(a, ours, gradients([(8, 6)]), gradients([(8, 6)], 6))[0]
    between_theirs = step(b, theirs, gradients([(8, 6)]), gradients([(8, 6)], 6))[0]
    assert int(between.count_nonzero()) == 48
    assert (between_theirs.view(-1, 4).count_nonzero(1) == 2).all() and between_theirs.count_nonzero(1).unique().numel() > 1


def test_nm_leaves_frozen_and_unused_weights_alone():
    """Published: a frozen weight is pruned in place, then KeyError; one that is unused in a step stays pruned for good."""
    first, second = [None, *gradients()[1:]], [None, *gradients(seed=6)[1:]]
    a, ours, b, theirs = pair("NMTopkCrAM", theirs={"levels": [(2, 4)] * 3})
    before = clones(ours[:1])
    step(a, ours, first, second)
    assert_same_bits(ours[:1], before)
    with pytest.raises(KeyError, match="old_p"):
        step(b, theirs, first, second)
    a, ours, b, theirs = pair("NMTopkCrAM", theirs={"levels": [(2, 4)] * 3})
    for sam, params in ((a, ours), (b, theirs)):
        step(sam, params, gradients(), gradients(seed=6))
    before, before_theirs = clones(ours[:1]), clones(theirs[:1])
    step(a, ours, first, second)
    step(b, theirs, first, second)
    assert_same_bits(ours[:1], before)
    assert int(theirs[0].count_nonzero()) == theirs[0].numel() // 2 < int(before_theirs[0].count_nonzero())


def test_period_takes_a_parameter_that_appears_between_two_masks():
    late = [([*gradients()[:2], None, None], [*gradients(seed=6)[:2], None, None]), (gradients(), gradients(seed=6))]
    a, ours, b, theirs = pair("TopkCrAMPeriod", options={"sparsities": [0.5], "mask_freq": 4})
    for first, second in late:
        step(a, ours, first, second)
    step(b, theirs, *late[0])
    with pytest.raises(KeyError, match=r"mask-0\.5"):
        step(b, theirs, *late[1])


def test_a_group_may_come_late():
    a, ours, _, _ = pair("TopkCrAM", options={"sparsities": [0.5]})
    late = nn.Parameter(random_tensors([(4, 4)], 9)[0])
    a.add_param_group({"params": [late]})
    before = late.detach().clone()
    between = step(a, [*ours, late], gradients() + gradients([(4, 4)]), gradients(seed=6) + gradients([(4, 4)], 6))
    assert int(between[-1].count_nonzero()) == 7 and not torch.equal(late, before)


def test_bad_sparsity_is_refused_when_it_is_given():
    for sparsity in (1.0, 1.5, -0.1):
        with pytest.raises(ValueError, match="sparsity"):
            pair("TopkCrAM", options={"sparsities": [sparsity]})


def test_whatever_the_closure_raises_the_weights_come_back():
    """Published: they stay perturbed and pruned."""

    def closure():
        raise KeyboardInterrupt

    a, ours, b, theirs = pair("TopkCrAM", options={"sparsities": [0.5]})
    before = clones(ours)
    for sam, params in ((a, ours), (b, theirs)):
        set_gradients(params, gradients())
        with pytest.raises(KeyboardInterrupt):
            sam.step(closure)
    assert_same_bits(ours, before)
    assert all(p.grad is None for p in ours)
    assert not torch.equal(theirs[0], before[0])


@pytest.mark.parametrize("name", ["SAM", "TopkCrAM", "NMTopkCrAM", "TopkCrAMPeriod"])
def test_a_missing_closure_is_a_value_error(name):
    a, ours, b, _ = pair(name)
    before = clones(ours)
    set_gradients(ours, gradients())
    with pytest.raises(ValueError, match="closure"):
        a.step()
    with pytest.raises(AssertionError):
        b.step()
    assert_same_bits(ours, before)
