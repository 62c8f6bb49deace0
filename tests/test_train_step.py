"""split_batch and train_step: the loop written out, with the published optimizer (published.py) where bits must agree."""

from collections import namedtuple
from dataclasses import dataclass

import published
import pytest
import torch
from optim_cases import assert_same_bits, batches, network, weights
from published_cases import EXACT
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from cram_kernels import CrAM, TopK, frozen_batchnorm, split_batch, train_step

Pair = namedtuple("Pair", "x y")


@dataclass
class Rows:
    x: Tensor
    weight: Tensor


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are small: a second thread would only wait."""
    set_threads(1)


def cross_entropy(model):
    return lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("second_pass", ["all", "half", "split"])
def test_equals_the_published_optimizer_on_slices(second_pass):
    """Batches of 8: the second pass sees samples 4 to 8 unless "all"; the first sees 0 to 4 where they are "split"."""
    first, second = {"all": (slice(8), slice(8)), "half": (slice(8), slice(4, 8)), "split": (slice(4), slice(4, 8))}[second_pass]
    ours, theirs = network(), network()
    optimizer = CrAM(ours, compression=[TopK(0.7)], rho=0.1, **EXACT)
    judge = published.TopkCrAM(theirs.parameters(), torch.optim.SGD, rho=0.1, sparsities=[0.7], **EXACT)
    for x, y in batches(8):
        loss = train_step(optimizer, cross_entropy(ours), (x, y), second_pass)
        clean = cross_entropy(theirs)((x[first], y[first]))
        clean.backward()
        judge.first_step(zero_grad=True)
        for norm in (theirs[1], theirs[4]):
            norm.momentum = 0.0  # as the published loop does
        cross_entropy(theirs)((x[second], y[second])).backward()
        for norm in (theirs[1], theirs[4]):
            norm.momentum = 0.1
        judge.second_step(zero_grad=True)
        assert torch.equal(loss, clean.detach()) and not loss.requires_grad
    assert_same_bits(weights(ours), weights(theirs))
    for index in (1, 4):
        assert torch.equal(ours[index].running_mean, theirs[index].running_mean)
        assert torch.equal(ours[index].running_var, theirs[index].running_var)


@pytest.mark.parametrize("second_pass", ["all", "half", "split"])
def test_any_other_optimizer_takes_one_pass_on_the_whole_batch(second_pass):
    ours, theirs = network(), network()
    optimizer, judge = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, theirs))
    for batch in batches(3):
        train_step(optimizer, cross_entropy(ours), batch, second_pass)
        judge.zero_grad()
        cross_entropy(theirs)(batch).backward()
        judge.step()
    assert_same_bits(weights(ours), weights(theirs))
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("scale, overflows", [(2.0**10, False), (2.0**127, True)])
def test_scaler(scale, overflows):
    """A scale that is a power of two changes no bit; one that overflows skips the step and is lowered."""
    ours, theirs = network(), network()
    optimizer, judge = (CrAM(m, compression=[TopK(0.5)], lr=0.1) for m in (ours, theirs))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for batch in batches(1):
        train_step(optimizer, lambda b: 8 * cross_entropy(ours)(b), batch, "split", scaler)
        if not overflows:
            train_step(judge, lambda b: 8 * cross_entropy(theirs)(b), batch, "split")
    assert_same_bits(weights(ours), weights(theirs))
    assert scaler.get_scale() == (scale / 2 if overflows else scale)


def test_whatever_is_raised_leaves_the_clean_weights():
    for fails_at in (1, 2):
        model = network()
        optimizer = CrAM(model, lr=0.1)
        calls = []

        def loss(batch, model=model, calls=calls, fails_at=fails_at):
            calls.append(1)
            if len(calls) == fails_at:
                raise KeyError("on purpose")
            return cross_entropy(model)(batch)

        with pytest.raises(KeyError, match="on purpose"):
            train_step(optimizer, loss, next(batches(1)))
        assert_same_bits(weights(model), weights(network()))
        assert all(p.grad is None for p in model.parameters())
        train_step(optimizer, cross_entropy(model), next(batches(1)))


def test_old_gradients_do_not_count():
    ours, theirs = network(), network()
    for p in ours.parameters():
        p.grad = torch.ones_like(p)
    for model in (ours, theirs):
        train_step(CrAM(model, lr=0.1), cross_entropy(model), next(batches(1)))
    assert_same_bits(weights(ours), weights(theirs))


def test_batches_are_cut_and_keep_their_types():
    x, y, scale = torch.arange(10).reshape(5, 2), torch.arange(5), torch.tensor(2.0)
    first, second = split_batch(
        {"x": x, "nested": [y, (x, "name")], "scale": scale, "number": 3, "names": [{"id": c} for c in "abcde"]}, "split"
    )
    assert torch.equal(first["x"], x[:3]) and torch.equal(second["x"], x[3:])
    assert torch.equal(first["nested"][0], y[:3]) and torch.equal(second["nested"][1][0], x[3:])
    assert [name["id"] for half in (first, second) for name in half["names"]] == list("abcde") and len(second["names"]) == 2
    for half in (first, second):
        assert type(half["nested"]) is list and half["nested"][1][1] == "name" and half["number"] == 3
        assert half["scale"] is scale
    whole, half = split_batch(Pair(x, y), "half")
    assert torch.equal(whole.x, x) and type(half) is Pair and torch.equal(half.y, y[3:])
    first, second = split_batch(Rows(x, scale), "split")
    assert torch.equal(first.x, x[:3]) and torch.equal(second.x, x[3:]) and second.weight is scale
    assert all(part is x for part in split_batch(x))


def test_a_pair_of_two_samples_is_a_pair():
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    first, second = split_batch((x, y), "split")
    assert len(first) == len(second) == 2 and second[0].shape == (1, 3) and second[1].tolist() == [1]


def test_one_sample_serves_both_passes():
    first, second = split_batch((torch.ones(1, 2), torch.ones(1)), "split")
    assert len(first[0]) == len(second[0]) == 1


def test_a_batch_of_transformers_is_cut():
    encoding = pytest.importorskip("transformers").BatchEncoding({"input_ids": torch.arange(6).reshape(3, 2), "labels": torch.arange(3)})
    first, second = split_batch(encoding, "split")
    assert type(first) is type(encoding) and first["input_ids"].tolist() == [[0, 1], [2, 3]] and second["labels"].tolist() == [2]
    assert encoding["labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "batch, found",
    [
        ("text", "got str"),
        ((torch.tensor(1.0),), "got tuple"),
        (torch.empty(0, 3), r"got Tensor with \[0\]"),
        (pack_sequence([torch.ones(2), torch.ones(1)]), "got a PackedSequence"),
        (
            {"w": torch.ones(10), "x": torch.ones(4, 3)},
            r"got 10 in batch\['w'\] and 4 in batch\['x'\]: give second_pass",
        ),  # weights of classes
        ({"x": torch.ones(4, 3), "w": torch.ones(10)}, r"got 4 in batch\['x'\] and 10 in batch\['w'\]"),
        ({"edges": torch.ones(2, 9), "x": torch.ones(5, 3)}, "got 2 in .* and 5 in"),
        (([torch.ones(3, 8, 8)] * 4, [{"boxes": torch.ones(2, 4)}] * 4), r"got 3 in batch\[0\]\[0\] and 2 in batch\[1\]\[0\]\['boxes'\]"),
        (([torch.ones(3, 8, 8)] * 4, list("abcd")), r"list of tensors that may be samples, got batch\[0\]\[0\]"),
        (([torch.ones(1, 8, 8)] * 4, list("abcd")), "list of tensors"),
        (([torch.ones(4, 8, 8)] * 4, torch.ones(4)), "list of tensors"),  # four channels, four images
        ([(torch.ones(3, 8, 8), torch.tensor(1))] * 4, "list of tensors"),
        ([{"image": torch.ones(3, 8, 8), "label": torch.tensor(1)}] * 4, "list of tensors"),
    ],
)
def test_what_cannot_be_cut_is_refused(batch, found):
    with pytest.raises(ValueError, match=f"split_batch: batch must .*{found}"):
        split_batch(batch, "split")


def test_lists_beside_a_tensor_of_the_samples():
    """Two views of each of 5 images; a label a sample without dims; one sample."""
    x, labels = torch.arange(5), [torch.tensor(i) for i in range(5)]
    first, second = split_batch(([x, x + 5], x, labels), "split")
    assert [part.tolist() for part in second[0]] == [[3, 4], [8, 9]] and second[2] == labels[3:] and first[2] == labels[:3]
    assert split_batch(([x[:1]], x[:1]), "split") == (([x[:1]], x[:1]),) * 2


def test_a_function_cuts_what_nobody_else_can():
    batch = ([torch.ones(3, 8, i) for i in range(4)], list("abcd"))
    first, second = split_batch(batch, lambda b: ((b[0][:1], b[1][:1]), (b[0][1:], b[1][1:])))
    assert first == (batch[0][:1], ["a"]) and second == (batch[0][1:], ["b", "c", "d"])
    with pytest.raises(ValueError, match="split_batch: second_pass must return a tuple, the batches of both passes, got list"):
        split_batch(batch, list)
    ours, theirs = network(), network()
    for part, model in ((lambda b: (tuple(t[:4] for t in b), tuple(t[4:] for t in b)), ours), ("split", theirs)):
        train_step(CrAM(model, lr=0.1), cross_entropy(model), next(batches(1)), part)
    assert_same_bits(weights(ours), weights(theirs))


def test_another_word_is_refused_before_anything_is_changed():
    model = network()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="train_step: second_pass must be 'all', 'half', 'split' or a function, got 'third'"):
        train_step(CrAM(model, lr=0.1), cross_entropy(model), next(batches(1)), "third")
    with pytest.raises(ValueError, match="split_batch: second_pass must be"):
        split_batch(torch.ones(2), "")
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert_same_bits(weights(model), weights(network()))


def test_frozen_by_hand_is_what_the_optimizer_does():
    """The second pass on a part leaves the statistics of the first pass on the other part."""
    ours, theirs = network(), network()
    train_step(CrAM(ours, lr=0.1), cross_entropy(ours), (batch := next(batches(1))), "split")
    theirs(batch[0][:4])
    with frozen_batchnorm(theirs):
        theirs(batch[0][4:])
    assert_same_bits(list(ours.buffers()), list(theirs.buffers()), "batch norm")
