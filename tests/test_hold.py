"""`hold_zeros`: exact zeros after every step of any optimizer, and the other weights as if nothing held them."""

import copy
import gc

import forked
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks_of_all_optimizers

from cram_kernels import CrAM, TopK, hold_zeros, prune


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6)).to(dtype)
    prune(model, TopK(sparsity=0.8))
    return model


def zeros(model):
    return {name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() > 1}


def backward(model, i):
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(5, 2, 8, generator=generator).to(next(model.parameters()).dtype)
    loss = model(x).float().pow(2).mean()
    loss.backward()
    return loss


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adam, fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1),
    "cram": lambda p: CrAM(p, torch.optim.SGD, lr=0.1, momentum=0.9),
    "cram, fused by nobody": lambda p: CrAM(torch.optim.RMSprop(p, 0.01)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay(name):
    model = network()
    free, held = copy.deepcopy(model), zeros(model)
    optimizer, other = OPTIMIZERS[name](list(model.parameters())), OPTIMIZERS[name](list(free.parameters()))
    handle = hold_zeros(model)
    assert handle.zeros == {name: int(mask.sum()) for name, mask in held.items()}
    for i in range(5):
        for net, opt in ((model, optimizer), (free, other)):
            opt.zero_grad()
            opt.step(lambda net=net, i=i: backward(net, i))
        assert all(bool((p[held[n]] == 0).all()) for n, p in model.named_parameters() if n in held)
    assert any(bool((p[held[n]] != 0).any()) for n, p in free.named_parameters() if n in held)  # it was needed
    assert all(bool((p[~held[n]] != 0).all()) for n, p in model.named_parameters() if n in held)
    handle.remove()
    handle.remove()
    optimizer.zero_grad()
    optimizer.step(lambda: backward(model, 9))
    assert any(bool((p[held[n]] != 0).any()) for n, p in model.named_parameters() if n in held)


def test_the_other_weights_are_those_of_a_masked_loop():
    """Against a loop that multiplies by the mask itself."""
    model = network()
    other, held = copy.deepcopy(model), zeros(model)
    a, b = (torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.01) for m in (model, other))
    with hold_zeros(model):
        for i in range(6):
            for net, opt in ((model, a), (other, b)):
                opt.zero_grad()
                backward(net, i)
                opt.step()
            for name, p in other.named_parameters():
                if name in held:
                    p.data = torch.where(held[name], 0.0, p.data)
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_a_scaler_and_dtypes(dtype):
    model = network(dtype)
    held, scaler = zeros(model), torch.amp.GradScaler("cpu", enabled=dtype is torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    with hold_zeros(model):
        for i in range(3):
            optimizer.zero_grad()
            x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(i)).to(dtype)
            scaler.scale(model(x).float().pow(2).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            assert all(bool((p[held[n]] == 0).all()) for n, p in model.named_parameters() if n in held)


def test_state_dict_and_loading():
    """Nothing is added to the model, and loading keeps the hold, also where it replaces parameters."""
    model = network()
    before, held = {k: v.clone() for k, v in model.state_dict().items()}, zeros(model)
    handle = hold_zeros(model)
    assert model.state_dict().keys() == before.keys()
    model.load_state_dict(before, assign=True)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    backward(model, 0)
    optimizer.step()
    assert all(bool((p[held[n]] == 0).all()) for n, p in model.named_parameters() if n in held)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(twin.parameters(), 0.1)
    backward(twin, 0)
    optimizer.step()
    assert any(bool((p[held[n]] != 0).any()) for n, p in twin.named_parameters() if n in held)  # copies are free
    handle.remove()


def test_exclude_and_what_it_refuses():
    model = network()
    handle = hold_zeros(model, exclude=["0.*"])
    assert list(handle.zeros) == ["3.weight"]
    handle.remove()
    with pytest.raises(ValueError, match="hold_zeros: exclude must match the name of a parameter, got 'head'"):
        hold_zeros(model, exclude="head")
    with pytest.raises(ValueError, match="hold_zeros: model must have zeros in parameters of 2 or more dims, got none"):
        hold_zeros(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"hold_zeros: model must be a torch\.nn\.Module, got list"):
        hold_zeros([model])
    with pytest.raises(ValueError, match="must be initialised, got a lazy one"):
        hold_zeros(nn.LazyLinear(3))
    optimizer = CrAM(model.parameters(), lr=0.1)
    backward(model, 0)
    optimizer.perturb()
    with pytest.raises(RuntimeError, match="must not be perturbed"):
        hold_zeros(model)
    optimizer.restore()


def test_a_parameter_that_changes_its_shape():
    model = network()
    with hold_zeros(model):
        model[3] = nn.Linear(48, 5)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        backward(model, 0)
        with pytest.raises(
            RuntimeError, match=r"hold_zeros: parameter '3.weight' must keep its name and its shape \(6, 48\), got shape \(5, 48\)"
        ):
            optimizer.step()


def test_another_optimizer_between_the_halves():
    """Its step leaves the perturbed weights alone; the zeros are held at the end of the step."""
    model, other = network(), nn.Linear(2, 2)
    held, optimizer, second = zeros(model), CrAM(model.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), 0.1)
    with hold_zeros(model):
        backward(model, 0)
        optimizer.perturb()
        inside = {n: p.detach().clone() for n, p in model.named_parameters()}
        other(torch.ones(1, 2)).sum().backward()
        second.step()
        assert all(torch.equal(p, inside[n]) for n, p in model.named_parameters())
        backward(model, 0)
        optimizer.step()
        assert all(bool((p[held[n]] == 0).all()) for n, p in model.named_parameters() if n in held)


def test_the_step_of_an_optimizer_of_another_model():
    """It takes its step, whatever became of the model that is held, whose weights stay as they are."""
    model, other = network(), nn.Linear(2, 2)
    with hold_zeros(model):
        model[3].weight.data.fill_(1.0)
        model[0] = nn.Conv1d(2, 7, 3)
        other(torch.ones(1, 2)).sum().backward()
        torch.optim.SGD(other.parameters(), 0.1).step()
        assert bool((model[3].weight == 1).all())


def test_a_model_that_is_gone():
    model, other = network(), nn.Linear(2, 2)
    before = len(hooks_of_all_optimizers)
    handle = hold_zeros(model)
    del model
    gc.collect()
    assert len(hooks_of_all_optimizers) == before
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    handle.remove()


def spread(rank, port, kind):
    """One of two ranks."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        model = network()
        held = zeros(model)
        wrapped = (
            DistributedDataParallel(model) if kind == "ddp" else fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
        )
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        hold_zeros(model)
        for i in range(3):
            optimizer.zero_grad()
            backward(wrapped, 2 * i + rank)
            optimizer.step()
        for name, p in model.named_parameters():
            if name in held:
                whole = p if kind == "ddp" else p.full_tensor()
                assert torch.equal(whole == 0, held[name]), name
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks(kind):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    forked.spawn(spread, (port, kind), 2)
