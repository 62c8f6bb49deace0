"""Whatever is raised between the halves, the clean weights come back to the bit, and training goes on as if the step had not been begun."""

import copy

import pytest
import torch
from optim_cases import assert_same_bits, backward, batches, clones, network, weights
from torch import nn

from cram_kernels import NM, CrAM, CrAMWarning, TopK

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
MULTI = {"compression": [TopK(0.8), TopK(0.5), NM(2, 4)], "mask_period": 2}
ERRORS = [KeyboardInterrupt, torch.OutOfMemoryError]


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are small: a second thread would only wait."""
    set_threads(1)


class Trap(nn.Module):
    """Passes its input through, and raises in its k-th call; a forward and a backward count as one call each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls_left: int | None = None
        self.error: type[BaseException] = RuntimeError

    def arm(self, k: int, error: type[BaseException]) -> None:
        self.calls_left, self.error = k, error

    def called(self) -> None:
        if self.calls_left is None:
            return
        self.calls_left -= 1
        if self.calls_left == 0:
            self.calls_left = None
            raise self.error("trap")

    def forward(self, x):
        self.called()
        return Pass.apply(x, self)


class Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, trap):
        ctx.trap = trap
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.trap.called()
        return grad, None


def trapped() -> tuple[nn.Module, Trap]:
    """A network with the same trap before its head, in its middle and after its stem: 6 calls a pass."""
    trap = Trap()
    layers = list(network())
    return nn.Sequential(layers[0], trap, *layers[1:4], trap, *layers[4:8], trap, layers[8]), trap


CALLS = 6  # of the trap in one pass: three in the forward, three in the backward


def closure_form(optimizer, model, batch, arm) -> None:
    passes = 0

    def closure():
        nonlocal passes
        passes += 1
        if passes == 2:
            arm()
        return backward(model, batch)

    optimizer.step(closure)


def context_form(optimizer, model, batch, arm) -> None:
    backward(model, batch)
    with optimizer.perturbed():
        arm()
        backward(model, batch)
    optimizer.step()


def calls_form(optimizer, model, batch, arm) -> None:
    backward(model, batch)
    optimizer.perturb()
    arm()
    backward(model, batch)
    optimizer.step()


def no_trap() -> None:
    pass


def state_of(optimizer) -> dict:
    return copy.deepcopy(optimizer.state_dict()["state"])


def assert_same_state(actual: dict, expected: dict) -> None:
    assert {i: set(s) for i, s in actual.items()} == {i: set(s) for i, s in expected.items()}
    for i, state in expected.items():
        for key, value in state.items():
            assert torch.equal(actual[i][key], value), f"state[{i}][{key!r}]"


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("k", range(1, CALLS + 1))
@pytest.mark.parametrize("form", [closure_form, context_form])
def test_interrupted_second_pass_is_undone_at_once(form, k, error, base):
    """step(closure) and the block restore before the exception leaves them, and drop the gradients; then the batch can be repeated, with
    the same level and the masks that were kept before."""
    model, trap = trapped()
    other, _ = trapped()
    optimizer, judge = (CrAM(m.parameters(), base, rho=0.2, lr=0.05, **MULTI) for m in (model, other))
    data = list(batches(4))
    for batch in data[:2]:
        form(optimizer, model, batch, no_trap)
        form(judge, other, batch, no_trap)
    before, state, pointers = clones(model.parameters()), state_of(optimizer), [p.data_ptr() for p in model.parameters()]
    with pytest.raises(error, match="trap"):
        form(optimizer, model, data[2], lambda: trap.arm(k, error))
    assert_same_bits(weights(model), before)
    assert_same_state(state_of(optimizer), state)
    assert all(p.grad is None for p in model.parameters())
    for batch in data[2:]:
        form(optimizer, model, batch, no_trap)
        form(judge, other, batch, no_trap)
    assert_same_bits(weights(model), weights(other))
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize("k", range(1, CALLS + 1))
@pytest.mark.parametrize("form", [closure_form, context_form, calls_form])
def test_interrupted_second_pass_heals_with_the_next_step(form, k):
    """In the two-call form the next call heals: the step that was broken off leaves no trace in the ones that follow."""
    model, trap = trapped()
    other, _ = trapped()
    optimizer, judge = (CrAM(m.parameters(), rho=0.2, **SGD, **MULTI) for m in (model, other))
    data = list(batches(4))
    for batch in data[:2]:
        calls_form(optimizer, model, batch, no_trap)
        calls_form(judge, other, batch, no_trap)
    with pytest.raises(KeyboardInterrupt):
        form(optimizer, model, data[2], lambda: trap.arm(k, KeyboardInterrupt))
    optimizer.restore()
    optimizer.zero_grad()  # in the two-call form the caller's part, as in any loop
    for batch in data[2:]:
        calls_form(optimizer, model, batch, no_trap)
        calls_form(judge, other, batch, no_trap)
    assert_same_bits(weights(model), weights(other))


@pytest.mark.parametrize("pattern", [TopK(0.5), NM(2, 4), TopK(0.0)], ids=str)
def test_perturb_heals_before_it_perturbs(pattern):
    """perturb() after a perturb() that was not followed by a step: from the clean weights, with the gradients that are there now."""
    model, other = network(), network()
    optimizer, judge = (CrAM(m.parameters(), compression=[pattern], rho=0.2, **SGD) for m in (model, other))
    first, second = batches(2)
    backward(model, first)
    optimizer.perturb()
    optimizer.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = q.grad = torch.full_like(p, 0.25)
    with pytest.warns(CrAMWarning, match="perturb.. was called twice"):
        optimizer.perturb()
    judge.perturb()
    assert_same_bits(weights(model), weights(other))
    backward(model, second)
    backward(other, second)
    optimizer.step()
    judge.step()
    assert_same_bits(weights(model), weights(other))


def test_restore_is_idempotent_and_drops_the_step():
    model = network()
    optimizer = CrAM(model.parameters(), compression=[TopK(0.5)], **SGD)
    before = clones(model.parameters())
    optimizer.restore()
    backward(model, next(batches(1)))
    optimizer.perturb()
    assert not torch.equal(model[0].weight, before[0])
    for _ in range(2):
        optimizer.restore()
        assert_same_bits(weights(model), before)


@pytest.mark.parametrize("form", [closure_form, context_form, calls_form])
def test_exception_in_the_first_pass_changes_nothing(form):
    model, trap = trapped()
    optimizer = CrAM(model.parameters(), compression=[TopK(0.5)], **SGD)
    before = clones(model.parameters())
    trap.arm(4, RuntimeError)
    with pytest.raises(RuntimeError, match="trap"):
        form(optimizer, model, next(batches(1)), no_trap)
    assert_same_bits(weights(model), before)
    assert not state_of(optimizer)


@pytest.mark.parametrize("form", [closure_form, context_form])
def test_attached_model_is_whole_after_an_interruption(form):
    """Batch norm counts and normalizes as before, and state_dict() gives the weights themselves."""
    model, trap = trapped()
    optimizer = CrAM(model.parameters(), compression=[TopK(0.5)], **SGD)
    optimizer.attach(model)
    data = list(batches(2))
    form(optimizer, model, data[0], no_trap)
    with pytest.raises(KeyboardInterrupt):
        form(optimizer, model, data[1], lambda: trap.arm(3, KeyboardInterrupt))
    statistics = {k: v.clone() for k, v in model.named_buffers()}
    model(data[0][0])
    assert all(not torch.equal(v, statistics[k]) for k, v in model.named_buffers())
    assert all(model.state_dict()[k].data_ptr() == p.data_ptr() for k, p in model.named_parameters())


def test_error_in_the_body_is_not_replaced_by_another():
    """The exception that the user sees is the one that was raised, also if it leaves the block by a return or a break."""
    model = network()
    optimizer = CrAM(model.parameters(), compression=[TopK(0.5)], **SGD)
    before = clones(model.parameters())
    batch = next(batches(1))
    for _ in range(2):
        backward(model, batch)
        with optimizer.perturbed():
            break
    assert_same_bits(weights(model), before)


def test_nested_blocks_are_refused_or_heal():
    """A second perturbed() inside the first never loses the clean weights."""
    model = network()
    optimizer = CrAM(model.parameters(), compression=[TopK(0.5)], **SGD)
    before = clones(model.parameters())
    batch = next(batches(1))
    backward(model, batch)
    try:
        with optimizer.perturbed():
            backward(model, batch)
            with pytest.warns(CrAMWarning, match="called twice"), optimizer.perturbed():
                pass
    except RuntimeError:
        pass
    assert_same_bits(weights(model), before)


def test_interrupted_step_hook_restores():
    """An exception out of a pre-step hook, in the closure form, finds the weights clean."""
    model = network()
    optimizer = CrAM(model.parameters(), compression=[TopK(0.5)], **SGD)
    before = clones(model.parameters())

    def hook(*_):
        raise KeyboardInterrupt

    optimizer.register_step_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: backward(model, next(batches(1))))
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_bad_second_gradient_is_refused_with_clean_weights(base):
    """A sparse gradient that appears in the second pass only: step() raises, and the weights are the clean ones."""
    table = nn.Embedding(12, 4)
    optimizer = CrAM(table.parameters(), base, compression=[TopK(0.5)], lr=0.1)
    before = clones(table.parameters())
    table(torch.arange(12)).square().sum().backward()
    optimizer.perturb()
    table.sparse = True
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises((RuntimeError, ValueError), match="sparse"):
        optimizer.step()
    optimizer.restore()
    assert_same_bits(weights(table), before)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_out_of_memory_while_the_state_is_made(key, monkeypatch):
    """The first step of Adam allocates its state: where that fails, the step can be repeated (with less in memory)."""
    model, other = network(), network()
    optimizer, judge = (CrAM(m.parameters(), torch.optim.Adam, compression=[TopK(0.5)], lr=0.01) for m in (model, other))
    before = clones(model.parameters())
    batch = next(batches(1))
    zeros_like, calls = torch.zeros_like, [0]

    def failing(*args, **kwargs):
        calls[0] += 1
        if calls[0] == (5 if key == "exp_avg" else 6):
            raise torch.OutOfMemoryError("no memory")
        return zeros_like(*args, **kwargs)

    backward(model, batch)
    with optimizer.perturbed():
        backward(model, batch)
    monkeypatch.setattr(torch, "zeros_like", failing)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    monkeypatch.undo()
    assert_same_bits(weights(model), before)
    optimizer.zero_grad()
    for m, o in ((model, optimizer), (other, judge)):
        context_form(o, m, batch, no_trap)
    assert_same_bits(weights(model), weights(other))
