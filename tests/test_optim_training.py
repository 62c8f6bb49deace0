"""What training scripts add to model and optimizer: weight averages, torch.compile, activation checkpointing, accumulation, clipping."""

import copy

import pytest
import torch
from optim_cases import assert_same_bits, backward, batches, clones, network, weights
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from cram_kernels import NM, CrAM, TopK, tune_batchnorm

OPTIONS = {"compression": [TopK(0.5), NM(2, 4), TopK(0.9)], "lr": 0.1, "momentum": 0.9}
STEPS = 5


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are small: a second thread would only wait."""
    set_threads(1)


def started(**options) -> tuple[nn.Sequential, CrAM]:
    net = network()
    return net, CrAM(net.parameters(), **{**OPTIONS, **options}).attach(net)


def two_passes(optimizer: CrAM, model: nn.Module, batch) -> None:
    backward(model, batch)
    optimizer.perturb()
    backward(model, batch)
    optimizer.step()


def plain(**options) -> nn.Module:
    """The judge: the loop written out."""
    net, optimizer = started(**options)
    for batch in batches(STEPS):
        two_passes(optimizer, net, batch)
    return net


# Weight averages


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averages_belong_after_the_step(kind):
    """The average of the weights that steps end with, and a batch norm of its own."""
    net, optimizer = started()
    options = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if kind == "ema" else {}
    average, seen = AveragedModel(net, **options), []
    for batch in batches(STEPS):
        two_passes(optimizer, net, batch)
        average.update_parameters(net)
        seen.append(clones(net.parameters()))
    assert_same_bits(weights(net), weights(plain()))  # averaging changed nothing
    by_hand = seen[0]
    for count, now in enumerate(seen[1:], 2):
        share = 0.5 if kind == "ema" else 1 / count
        by_hand = [mean + share * (w - mean) for mean, w in zip(by_hand, now, strict=True)]
    for actual, expected in zip(average.module.parameters(), by_hand, strict=True):
        torch.testing.assert_close(actual.detach(), expected)
    again = copy.deepcopy(average)
    inputs = [x for x, _ in batches(STEPS)]
    update_bn(inputs, average)
    tune_batchnorm(again, inputs, STEPS)
    for a, b in zip(average.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_averages_within_a_step_take_the_perturbed_weights():
    """Of parameters(), attached or not: nobody tells the optimizer. A state_dict() of an attached model is clean."""
    net, optimizer = started()
    before = clones(net.parameters())
    average = AveragedModel(net)
    backward(net, next(batches(1)))
    with optimizer.perturbed():
        average.update_parameters(net)
        assert_same_bits([net.state_dict()[name] for name, _ in net.named_parameters()], before)
    assert any((p == 0).float().mean() > 0.4 for p in average.module.parameters())
    assert_same_bits(weights(net), before)


def test_swa_learning_rate():
    net, optimizer = started()
    schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2, anneal_strategy="linear")
    rates = []
    for batch in batches(4):
        two_passes(optimizer, net, batch)
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.075, 0.05, 0.05, 0.05])


# torch.compile of the model


def test_a_compiled_model_takes_the_same_steps_and_is_not_compiled_again():
    """aot_eager: the machinery of torch.compile, joint graph included, with the arithmetic of eager torch. Weights change in place."""
    net, optimizer = started()
    compiled = torch.compile(net, backend="aot_eager")
    data = list(batches(STEPS))
    two_passes(optimizer, compiled, data[0])  # one graph for the first pass, and one with still batch norms for the second
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in data[1:]:
            two_passes(optimizer, compiled, batch)
    assert_same_bits(weights(net), weights(plain()))
    assert_same_bits(list(net.buffers()), list(plain().buffers()), "batch norm")


def test_attaching_a_compiled_model_is_attaching_the_model():
    net = network()
    compiled = torch.compile(net, backend="aot_eager")
    optimizer = CrAM(compiled.parameters(), **OPTIONS).attach(compiled)
    backward(compiled, next(batches(1)))
    before = clones(net.parameters())
    statistics = clones(net.buffers())
    with optimizer.perturbed():
        backward(compiled, next(batches(1)))
        for state in (net.state_dict(), compiled.state_dict()):
            assert_same_bits([state[key] for key in state if key.endswith(("weight", "bias"))], before)
    assert_same_bits(list(net.buffers()), statistics, "batch norm")


# Activation checkpointing


class Checkpointed(nn.Module):
    """In three segments whose activations are computed again in the backward pass."""

    def __init__(self, net: nn.Sequential, use_reentrant: bool) -> None:
        super().__init__()
        self.net, self.use_reentrant = net, use_reentrant

    def forward(self, x):
        if self.use_reentrant:
            x = x.requires_grad_()
        return checkpoint_sequential(self.net, 3, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_weight(use_reentrant):
    net, optimizer = started()
    model = Checkpointed(net, use_reentrant)
    for batch in batches(STEPS):
        two_passes(optimizer, model, batch)
    assert_same_bits(weights(net), weights(plain()))


def test_a_stale_backward_raises_but_not_through_a_checkpoint():
    """A forward pass before perturb() whose backward pass comes after it. What was saved for it knows that the weights were written; a
    checkpoint saves its inputs alone, and computes the rest again with the perturbed weights: torch's limit, named in docs/torch.md.
    """
    net, optimizer = started()
    optimizer.detach()
    x, y = next(batches(1))
    outputs = net(x), checkpoint(net, x, use_reentrant=False)
    stale, unseen = (nn.functional.cross_entropy(output, y) for output in outputs)
    backward(net, (x, y))
    clean = clones(p.grad for p in net.parameters())
    optimizer.perturb()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()
    optimizer.zero_grad()
    unseen.backward()
    assert not any(torch.equal(p.grad, g) for p, g in zip(list(net.parameters())[:-1], clean, strict=False))


# Accumulation and clipping


def accumulated(model: nn.Module, batch, count: int = 4) -> torch.Tensor:
    """Gradients of the mean loss over `count` micro-batches."""
    losses = [nn.functional.cross_entropy(model(x), y) / count for x, y in zip(batch[0].chunk(count), batch[1].chunk(count), strict=True)]
    for loss in losses:
        loss.backward()
    return sum(losses)


def test_accumulation_in_every_form():
    results = []
    for form in ("calls", "closure", "context"):
        net, optimizer = started()
        for batch in batches(STEPS):
            if form == "closure":
                optimizer.step(lambda net=net, batch=batch: accumulated(net, batch))
                continue
            accumulated(net, batch)
            if form == "context":
                with optimizer.perturbed():
                    accumulated(net, batch)
            else:
                optimizer.perturb()
                accumulated(net, batch)
            optimizer.step()
        results.append(weights(net))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_accumulated_micro_batches_are_the_batch():
    """Without batch norm: the gradients of four quarters are those of the whole, but for rounding."""
    results = []
    for count in (1, 4):
        net, optimizer = started(compression=[], rho=0.05)
        net.eval()  # batch norms see no batch
        for batch in batches(2):
            optimizer.step(lambda net=net, batch=batch, count=count: accumulated(net, batch, count))
        results.append(weights(net))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_clipping_by_hand_in_every_form(clip):
    """Of the first gradients before perturb(), of the second before step(); in a closure both come by themselves."""

    def clipped(net, batch):
        loss = backward(net, batch)
        clip(net.parameters(), 0.05)
        return loss

    results = []
    for form in ("calls", "closure"):
        net, optimizer = started()
        for batch in batches(STEPS):
            if form == "closure":
                optimizer.step(lambda net=net, batch=batch: clipped(net, batch))
            else:
                clipped(net, batch)
                optimizer.perturb()
                clipped(net, batch)
                optimizer.step()
        results.append(weights(net))
    assert_same_bits(*results)
    assert any(not torch.equal(a, b) for a, b in zip(results[0], weights(plain()), strict=True))
