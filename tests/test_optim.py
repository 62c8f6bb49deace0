"""CrAM, the step itself: its bits over many steps against PlainCrAM, its three ways of use, what it leaves behind."""

import pytest
import torch
from optim_cases import (
    PlainCrAM,
    assert_same_bits,
    backward,
    batches,
    clones,
    network,
    random_tensors,
    seen_pattern,
    set_gradients,
    two_halves,
    weights,
)
from torch import Tensor, nn

from cram_kernels import NM, CrAM, TopK

MULTI = [TopK(0.5), TopK(0.7), TopK(0.9)]
MIXED = [TopK(0.8), TopK(0.5, scope="tensor"), NM(2, 4), NM(4, 8), NM(1, 2)]
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are small: a second thread would only wait."""
    set_threads(1)


def with_closure(optimizer: CrAM, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.step(lambda: backward(model, batch))


def with_context(optimizer: CrAM, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    backward(model, batch)
    with optimizer.perturbed():
        backward(model, batch)
    optimizer.step()


def with_calls(optimizer: CrAM, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    backward(model, batch)
    optimizer.perturb()
    backward(model, batch)
    optimizer.step()


def with_published_calls(optimizer: CrAM, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    backward(model, batch)
    optimizer.first_step(zero_grad=True)
    backward(model, batch)
    optimizer.second_step(zero_grad=True)


def with_zeroing_closure(optimizer: CrAM, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """The closure of torch's documentation: it clears the gradients itself, in both passes."""

    def closure():
        optimizer.zero_grad()
        return backward(model, batch)

    optimizer.step(closure)


WAYS = [with_closure, with_context, with_calls, with_published_calls, with_zeroing_closure]


@pytest.mark.parametrize(
    "patterns, base, ours, plain",
    [
        (MULTI, torch.optim.SGD, SGD, {"momentum": [0.9], "weight_decay": [5e-4]}),
        (MIXED, torch.optim.SGD, SGD | {"nesterov": True, "rho": 0.2}, {"momentum": [0.9], "weight_decay": [5e-4], "nesterov": [1]}),
        (MULTI, torch.optim.SGD, {"lr": 0.1, "plus": False}, {}),
        (MIXED, torch.optim.SGD, {"lr": 0.1, "sparse_grad": False}, {}),
        (MIXED, torch.optim.AdamW, {"lr": 0.003, "weight_decay": 0.05}, {"base": "adamw", "weight_decay": [0.05]}),
        ([TopK(0.0)], torch.optim.Adam, {"lr": 0.003, "amsgrad": True}, {"base": "adam", "amsgrad": [1]}),
        (MULTI, torch.optim.SGD, {"lr": 0.1, "normalize_grad": True, "rho": 0.5}, {}),
    ],
    ids=["multi-sgd", "mixed-nesterov", "no-plus", "dense-second-gradient", "mixed-adamw", "sam-amsgrad", "normalized"],
)
def test_fifty_steps_equal_the_restatement(patterns, base, ours, plain):
    """A conv net with batch norm, through perturb() and step(): perturbed weights, losses and weights, all to the bit."""
    model, other = network(), network()
    optimizer = CrAM(model.parameters(), base, compression=patterns, **ours)
    judge = PlainCrAM(
        other.parameters(), lr=ours["lr"], **{k: ours[k] for k in ("rho", "plus", "sparse_grad", "normalize_grad") if k in ours}, **plain
    )
    seen = set()
    for batch in batches(50):
        assert_same_bits([backward(model, batch)], [backward(other, batch)], "first loss")
        optimizer.perturb()
        seen.add(seen_pattern(judge, patterns, weights(model)))
        assert_same_bits([backward(model, batch)], [backward(other, batch)], "second loss")
        optimizer.step()
        judge.step()
        assert_same_bits(weights(model), weights(other))
    assert seen == set(patterns)  # every pattern has its turn


@pytest.mark.parametrize("base, options", [(torch.optim.SGD, SGD), (torch.optim.AdamW, {"lr": 0.01}), (torch.optim.RMSprop, {"lr": 0.01})])
def test_all_ways_of_use_give_the_same_bits(base, options):
    results = []
    for way in WAYS:
        model = network()
        optimizer = CrAM(model.parameters(), base, compression=MIXED, rho=0.1, **options)
        for batch in batches(8):
            way(optimizer, model, batch)
            assert all(p.grad is None for p in model.parameters()), "gradients are released after a step"
        results.append(weights(model))
    for way, result in zip(WAYS, results, strict=True):
        assert_same_bits(result, results[0], way.__name__)


def test_step_without_perturb_is_the_base_step():
    shapes = [(8, 12), (12,), (4, 8, 3, 3)]
    params, other = ([nn.Parameter(t) for t in random_tensors(shapes, 0)] for _ in range(2))
    optimizer = CrAM(params, compression=MULTI, **SGD)
    judge = PlainCrAM(other, lr=0.1, momentum=[0.9], weight_decay=[5e-4])
    for seed in range(4):
        grads = random_tensors(shapes, 10 + seed)
        for p in (params, other):
            set_gradients(p, grads)
        optimizer.plain_step()
        judge.step()
        assert_same_bits(params, other)
        assert all(p.grad is None for p in params)
    assert optimizer.param_groups[0]["cram_step"] == 0  # plain steps draw no level


def test_closure_is_run_clean_then_perturbed_and_the_clean_loss_is_returned():
    model = network()
    optimizer = CrAM(model.parameters(), compression=[TopK(0.9)], rho=1.0, **SGD)
    batch = next(batches(1))
    clean, seen, losses = weights(model), [], []
    before = clones(clean)

    def closure():
        assert torch.is_grad_enabled()
        seen.append(clones(clean))
        losses.append(backward(model, batch))
        return losses[-1]

    with torch.no_grad():
        returned = optimizer.step(closure)
    assert len(seen) == 2 and returned is losses[0] and losses[0] != losses[1]
    assert_same_bits(seen[0], before)
    assert all(not torch.equal(a, b) for a, b in zip(seen[1], before, strict=True))


def test_step_without_closure_returns_none():
    params = [nn.Parameter(torch.ones(4, 4))]
    optimizer = CrAM(params, lr=0.1)
    params[0].grad = torch.ones(4, 4)
    optimizer.perturb()
    params[0].grad = torch.ones(4, 4)
    assert optimizer.step() is None


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("way", WAYS)
def test_storage_never_moves(base, way):
    model = network()
    optimizer = CrAM(model.parameters(), base, compression=MIXED, lr=0.01)
    pointers = [p.data_ptr() for p in model.parameters()]
    for batch in batches(3):
        way(optimizer, model, batch)
        assert [p.data_ptr() for p in model.parameters()] == pointers


def test_the_context_restores_at_its_end_and_step_follows():
    """After the block the weights are the clean ones again, to the bit; the update comes with step()."""
    model = network()
    optimizer = CrAM(model.parameters(), compression=[TopK(0.9)], **SGD)
    batch = next(batches(1))
    before = clones(model.parameters())
    backward(model, batch)
    with optimizer.perturbed():
        assert int(model[3].weight.count_nonzero()) < model[3].weight.numel()
        backward(model, batch)
    assert_same_bits(weights(model), before)
    optimizer.step()
    assert not torch.equal(model[3].weight, before[3])


def test_stale_backward_raises():
    """Autograd notices that the weights of its graph were changed by perturb(), by step(), and by the restoring of the block."""
    batch = next(batches(1))
    stale = "modified by an inplace operation"
    model = network()
    optimizer = CrAM(model.parameters(), compression=[TopK(0.5)], **SGD)

    def loss():
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    first = loss()
    first.backward(retain_graph=True)
    optimizer.perturb()
    with pytest.raises(RuntimeError, match=stale):
        first.backward()
    optimizer.zero_grad()
    second = loss()
    second.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match=stale):
        second.backward()
    optimizer.zero_grad()
    loss().backward()
    with optimizer.perturbed():
        third = loss()
        third.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=stale):
        third.backward()


def test_inf_and_nan_gradients_stay_visible():
    """No check of ours hides them: the weight that an Inf or NaN reaches is not finite after the step, its neighbours are."""
    p = nn.Parameter(random_tensors([(4, 8)], 0)[0])
    optimizer = CrAM([p], compression=[TopK(0.0)], lr=0.1)
    bad = torch.zeros(4, 8)
    bad[0, 0], bad[1, 1] = float("inf"), float("nan")
    two_halves(optimizer, [p], [bad], [torch.zeros(4, 8)])
    assert (~p.isfinite()).nonzero().tolist() == [[0, 0], [1, 1]]
