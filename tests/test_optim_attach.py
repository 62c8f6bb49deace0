"""attach(model): batch norm in the second pass, and model.state_dict() between the halves."""

import copy
import io
import pickle

import pytest
import torch
from optim_cases import assert_same_bits, backward, batches, network, weights
from torch import nn

from cram_kernels import CrAM, TopK

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


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_attach_freezes_batch_norm_in_the_second_pass():
    model, once = network(), network()
    optimizer = CrAM(model.parameters(), compression=MULTI, **SGD)
    optimizer.attach(model)
    batch = next(batches(1))
    backward(once, batch)
    for way in ("calls", "closure", "context"):
        statistics = {k: v.clone() for k, v in model.named_buffers()}
        backward(model, batch)
        clean = {k: v.clone() for k, v in model.named_buffers()}
        assert any(not torch.equal(clean[k], statistics[k]) for k in clean)
        if way == "calls":
            optimizer.perturb()
            backward(model, batch)
            optimizer.step()
        elif way == "context":
            with optimizer.perturbed():
                backward(model, batch)
            optimizer.step()
        else:
            model.load_state_dict({**model.state_dict(), **statistics})
            optimizer.zero_grad()
            optimizer.step(lambda: backward(model, batch))
        assert all(torch.equal(v, clean[k]) for k, v in model.named_buffers()), way
    statistics = {k: v.clone() for k, v in model.named_buffers()}
    model(batch[0])  # and they move again afterwards
    assert any(not torch.equal(v, statistics[k]) for k, v in model.named_buffers())


def test_batch_norm_normalizes_by_the_batch_in_the_second_pass():
    """Frozen are the statistics only: attach changes no gradient, hence no weight."""
    results = []
    for attached in (True, False):
        model = network()
        optimizer = CrAM(model.parameters(), compression=MULTI, **SGD)
        if attached:
            optimizer.attach(model)
        for batch in batches(5):
            step(optimizer, model, batch)
        results.append(weights(model))
        assert all(m.training and m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert_same_bits(*results)


def test_attached_state_dict_is_unperturbed_between_the_halves():
    model = network()
    optimizer = CrAM(model.parameters(), compression=MULTI, rho=1.0, **SGD)
    optimizer.attach(model)
    data = list(batches(2))
    step(optimizer, model, data[0])
    backward(model, data[1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer.perturb()
    between = saved(model.state_dict())
    assert_same_bits([between[k] for k in before], list(before.values()), "state_dict")
    assert not torch.equal(model[3].weight, before["3.weight"])  # while the model itself is at the perturbed point
    backward(model, data[1])
    optimizer.step()
    after = model.state_dict()
    assert_same_bits([after["3.weight"]], [model[3].weight])
    assert after["3.weight"].data_ptr() == model[3].weight.data_ptr()  # outside of a step: torch's own references


def test_attached_submodule_state_dict_and_copies():
    """The state_dict of a part of the model, with a prefix or not, is unperturbed as well."""
    model = nn.Sequential(network(), nn.Linear(8, 8))
    optimizer = CrAM(model.parameters(), compression=MULTI, **SGD)
    optimizer.attach(model)
    batch = next(batches(1))
    backward(model, batch)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer.perturb()
    part = model[0].state_dict(prefix="0.")
    assert_same_bits(list(part.values()), [before[k] for k in part], "state_dict of a part")
    backward(model, batch)
    optimizer.step()


def test_a_copy_of_an_attached_model_is_its_own():
    """As weight averaging copies it: between the halves of the original it has its own weights, and its batch norm counts."""
    model = network()
    optimizer = CrAM(model.parameters(), compression=MULTI, **SGD)
    optimizer.attach(model)
    average = copy.deepcopy(model)
    for p in average.parameters():
        p.data.fill_(7.0)
    batch = next(batches(1))
    backward(model, batch)
    optimizer.perturb()
    state = average.state_dict()
    assert all((state[k] == 7).all() for k, _ in average.named_parameters())
    statistics = {k: v.clone() for k, v in average.named_buffers()}
    average(batch[0])
    assert all(not torch.equal(v, statistics[k]) for k, v in average.named_buffers())


def test_an_attached_model_may_be_pickled():
    model = network()
    optimizer = CrAM(model.parameters(), compression=MULTI, **SGD)
    optimizer.attach(model)
    batch = next(batches(1))
    step(optimizer, model, batch)
    assert_same_bits(weights(saved(model)), weights(model))
    twin, twin_optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    backward(twin, batch)
    twin_optimizer.perturb()
    assert_same_bits([twin.state_dict()["3.weight"]], [model[3].weight])  # attached as the original is


def test_attaching_twice_is_attaching_once():
    model = network()
    optimizer = CrAM(model.parameters(), compression=MULTI, **SGD)
    optimizer.attach(model)
    optimizer.attach(model)
    before = model[3].weight.detach().clone()
    batch = next(batches(1))
    backward(model, batch)
    optimizer.perturb()
    assert_same_bits([model.state_dict(keep_vars=True)["3.weight"]], [before])
    backward(model, batch)
    optimizer.step()
    statistics = {k: v.clone() for k, v in model.named_buffers()}
    model(batch[0])
    assert all(not torch.equal(v, statistics[k]) for k, v in model.named_buffers())


def test_what_is_loaded_within_a_step_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    opt = CrAM(model.parameters(), lr=0.1).attach(model)
    other = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    model(torch.randn(4, 8)).square().sum().backward()
    opt.perturb()
    model.load_state_dict(other)
    opt.restore()
    for key, value in model.state_dict().items():
        assert torch.equal(value, other[key]), key
