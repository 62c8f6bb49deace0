"""CrAM as a torch optimizer: schedulers, hooks, zero_grad, deepcopy, pickle."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from optim_cases import assert_same_bits, backward, batches, clones, network, random_tensors, set_gradients, two_halves, weights
from torch import nn
from torch.optim import lr_scheduler

from cram_kernels import CrAM, TopK, TopkCrAM

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
MULTI = [TopK(0.5), TopK(0.7), TopK(0.9)]


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are small: a second thread would only wait."""
    set_threads(1)


def step(optimizer: CrAM, model: nn.Module, batch) -> None:
    backward(model, batch)
    optimizer.perturb()
    backward(model, batch)
    optimizer.step()


def test_is_an_optimizer_and_prints_itself():
    optimizer = CrAM(network().parameters(), compression=MULTI, **SGD)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "SGD" in repr(optimizer) and "TopK(sparsity=0.7" in repr(optimizer)
    assert "CrAM" in repr(optimizer) and "rho" in repr(optimizer) and "momentum" in repr(optimizer)


@pytest.mark.parametrize("use", ["calls", "closure"])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=10),
        lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.StepLR(o, 2)], milestones=[2]),
    ],
    ids=["cosine", "one-cycle", "sequential"],
)
def test_schedulers(make, use):
    """The rates are those of torch.optim.SGD under the same scheduler, they are used, and torch does not warn about the order of calls."""
    model, other = network(), network()
    optimizer, theirs = (
        CrAM(model.parameters(), compression=[TopK(0.0)], rho=0.0, plus=False, **SGD),
        torch.optim.SGD(other.parameters(), **SGD),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = make(optimizer), make(theirs)
        for batch in batches(5):
            if use == "closure":
                optimizer.step(lambda batch=batch: backward(model, batch))
            else:
                step(optimizer, model, batch)
            backward(other, batch)
            theirs.step()
            theirs.zero_grad()
            assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in theirs.param_groups]
            for s in schedulers:
                s.step()
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # a plain step apart by ulps, through five batch norms


def test_lr_of_this_step_counts():
    """A rate that changes between the halves is the one used, as with any optimizer: step() reads it."""
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = CrAM([p], compression=[TopK(0.0)], lr=1.0)
    set_gradients([p], [torch.ones(2, 2)])
    optimizer.perturb()
    optimizer.param_groups[0]["lr"] = 0.5
    set_gradients([p], [torch.ones(2, 2)])
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((2, 2), -1.0))


def test_step_hooks_run_once_a_step():
    model = network()
    optimizer = CrAM(model.parameters(), compression=MULTI, **SGD)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    batch = next(batches(1))
    step(optimizer, model, batch)
    assert calls == ["pre", "post"]
    optimizer.step(lambda: backward(model, batch))
    assert calls == ["pre", "post"] * 2


def test_a_profiler_sees_a_mark_of_each_step():
    """With torch's name for it; where no profiler runs, torch's wrapper of step() is left out."""
    params = [nn.Parameter(torch.ones(4, 4))]
    optimizer = CrAM(params, lr=0.1)
    set_gradients(params, [torch.ones(4, 4)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.plain_step()
    assert [e.count for e in profile.key_averages() if e.key == "Optimizer.step#CrAM.step"] == [1]


def test_step_hooks_of_an_instance_run_too():
    model = network()
    base = torch.optim.RMSprop(model.parameters(), lr=0.01)
    calls = []
    base.register_step_post_hook(lambda *_: calls.append("base"))
    step(CrAM(base, compression=MULTI), model, next(batches(1)))
    assert calls == ["base"]


def test_step_hooks_of_a_fused_instance_run_and_see_the_combined_gradient():
    model, other = network(), network()
    seen = []
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    base.register_step_pre_hook(lambda optimizer, *_: seen.extend(p.grad for p in model.parameters()))
    optimizer, judge = CrAM(base, compression=MULTI), CrAM(other.parameters(), compression=MULTI, lr=0.5)
    before = clones(list(model.parameters()))
    for opt, net in ((optimizer, model), (judge, other)):
        step(opt, net, next(batches(1)))
    assert_same_bits(weights(model), weights(other))
    for w, g, p in zip(before, seen, model.parameters(), strict=True):
        assert torch.equal(w - 0.5 * g, p.detach())


@pytest.mark.parametrize("halves", ["first_step", "perturb"])
def test_a_scheduler_over_the_base_or_a_published_name_hears_of_every_step(halves):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = network()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = lr_scheduler.StepLR(base, 1)
        optimizer = CrAM(base, compression=MULTI)
        step(optimizer, model, next(batches(1)))
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
        sam = TopkCrAM(model.parameters(), torch.optim.SGD, lr=0.1)
        scheduler = lr_scheduler.StepLR(sam, 1)
        backward(model, next(batches(1)))
        getattr(sam, halves)()
        backward(model, next(batches(1)))
        sam.second_step()
        scheduler.step()


def test_a_compiled_step_equals_an_eager_one():
    """torch.compile of the whole training step: the optimizer breaks the graph, as torch.optim's fused ones may, and is right."""
    model, other = network(), network()
    compiled, eager = (CrAM(m.parameters(), compression=MULTI, **SGD) for m in (model, other))

    @torch.compile(backend="eager")
    def train(batch):
        backward(model, batch)
        compiled.perturb()
        backward(model, batch)
        compiled.step()

    for batch in batches(3):
        train(batch)
        step(eager, other, batch)
    assert_same_bits(weights(model), weights(other))


def test_gradient_hooks_see_both_passes():
    model = network()
    optimizer = CrAM(model.parameters(), compression=MULTI, **SGD)
    calls = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p.shape))
    step(optimizer, model, next(batches(1)))
    assert len(calls) == 2 * len(list(model.parameters()))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    """Before, between and after; gradients that were filled with zeros work as first gradients of the next pass."""
    model, other = network(), network()
    optimizer, judge = (CrAM(m.parameters(), compression=MULTI, **SGD) for m in (model, other))
    for batch in batches(4):
        optimizer.zero_grad(set_to_none)
        backward(model, batch)
        optimizer.perturb()
        optimizer.zero_grad(set_to_none)
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none)
        step(judge, other, batch)
    assert_same_bits(weights(model), weights(other))


def test_gradient_accumulation():
    """N micro-batches a pass, and the same N in the second: gradients add up in both."""
    model, other = network().eval(), network().eval()
    optimizer, judge = (CrAM(m.parameters(), compression=[TopK(0.5)], **SGD) for m in (model, other))
    micro = list(batches(3))
    first = [sum(g) for g in zip(*(torch.autograd.grad(loss(other, b), list(other.parameters())) for b in micro), strict=True)]
    for b in micro:
        backward(model, b)
    optimizer.perturb()
    for b in micro:
        backward(model, b)
    optimizer.step()
    set_gradients(list(other.parameters()), first)
    with judge.perturbed():
        second = [sum(g) for g in zip(*(torch.autograd.grad(loss(other, b), list(other.parameters())) for b in micro), strict=True)]
        set_gradients(list(other.parameters()), second)
    judge.step()
    assert_same_bits(weights(model), weights(other))


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies_go_on_alike(base, copied):
    """A copy of model and optimizer together goes on with the same bits and shares nothing with the original."""
    model = network()
    optimizer = CrAM(model.parameters(), base, compression=MULTI, mask_period=2, lr=0.01)
    data = list(batches(9))
    for batch in data[:4]:
        step(optimizer, model, batch)
    twin, twin_optimizer = copied((model, optimizer))
    assert twin_optimizer.param_groups[0]["params"][0] is next(twin.parameters())
    for batch in data[4:]:
        step(optimizer, model, batch)
    after = clones(model.parameters())
    for batch in data[4:]:
        step(twin_optimizer, twin, batch)
    assert_same_bits(weights(twin), after)
    assert_same_bits(weights(model), after)


def test_two_halves_of_a_step_with_set_to_none_gradients():
    """The first gradients may be dropped by the user between the halves: the optimizer holds what it needs."""
    shapes = [(4, 8)]
    a, b = ([nn.Parameter(t) for t in random_tensors(shapes, 0)] for _ in range(2))
    first, second = random_tensors(shapes, 1), random_tensors(shapes, 2)
    ours, judge = (CrAM(p, compression=[TopK(0.5)], **SGD) for p in (a, b))
    two_halves(judge, b, first, second)
    set_gradients(a, first)
    ours.perturb()
    for p in a:
        p.grad = None
    set_gradients(a, second)
    ours.step()
    assert_same_bits(a, b)


def test_copying_within_a_step_is_refused():
    """A copy could not end the step; nor is it silently one of perturbed weights."""
    model = network()
    optimizer = CrAM(model.parameters(), compression=MULTI, **SGD)
    backward(model, next(batches(1)))
    with optimizer.perturbed():
        for copied in (copy.deepcopy, pickled):
            with pytest.raises(RuntimeError, match="step"):
                copied((model, optimizer))


def test_state_dict_hooks_run():
    optimizer = CrAM(network().parameters(), **SGD)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "saved", "load", "loaded"]


def test_scheduler_of_the_wrapped_instance_sets_the_rate():
    """Made before the instance was wrapped: the groups are the same objects."""
    params = [nn.Parameter(torch.zeros(2, 2))]
    base = torch.optim.RMSprop(params, lr=0.5)
    scheduler = lr_scheduler.StepLR(base, 1, 0.5)
    optimizer = CrAM(base, compression=[TopK(0.0)])
    two_halves(optimizer, params, [torch.ones(2, 2)], [torch.ones(2, 2)])
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
