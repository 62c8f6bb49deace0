"""What CrAM refuses, when it is given and with nothing changed."""

import contextlib
import socket

import forked
import pytest
import torch
from optim_cases import assert_same_bits, clones, random_tensors, set_gradients
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from cram_kernels import NM, CrAM, CrAMWarning, TopK, hold_zeros, prune

SHAPES = [(8, 16), (16,), (4, 8, 3, 3), (16, 8)]


def fresh() -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in random_tensors(SHAPES, 0)]


def refused(optimizer: CrAM, params: list[Tensor], *words: str) -> None:
    before = clones(params)
    for call in (optimizer.perturb, optimizer.plain_step):
        with pytest.raises((RuntimeError, ValueError)) as error:
            call()
        assert all(word in str(error.value).lower() for word in words), str(error.value)
        assert_same_bits(params, before)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    refused(CrAM(table.parameters(), lr=0.1), [table.weight], "sparse")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64])
def test_other_dtypes_are_refused(dtype):
    p = nn.Parameter(torch.ones(4, 4, dtype=dtype))
    before = p.detach().clone()
    with pytest.raises((RuntimeError, ValueError), match=str(dtype).removeprefix("torch.")[:7] + "|" + str(dtype)[6:7].upper()):
        optimizer = CrAM([p], lr=0.1)
        p.grad = torch.ones_like(p)
        optimizer.perturb()
    assert torch.equal(p.detach(), before)


def test_one_bad_parameter_among_good_ones_changes_nothing():
    params = fresh()
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    set_gradients(params, random_tensors(SHAPES, 1))
    refused(CrAM([*params, table.weight], lr=0.1, momentum=0.9), params, "sparse")


@pytest.mark.parametrize(
    "options, word",
    [
        ({"rho": -0.1}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"compression": [0.5]}, "compression"),
        ({"mask_period": 0}, "mask_period"),
        ({"plus": "yes"}, "plus"),
        ({"prune": 0.9}, "prune"),
        ({"base_optimizer": "sgd"}, "base_optimizer"),
    ],
    ids=str,
)
def test_bad_options_are_refused_when_they_are_given(options, word):
    with pytest.raises((ValueError, TypeError), match=word):
        CrAM(fresh(), lr=0.1, **options)


def test_bad_group_options_are_refused():
    with pytest.raises(ValueError, match="rho"):
        CrAM([{"params": fresh(), "rho": -1.0}], lr=0.1)
    optimizer = CrAM(fresh()[:1], lr=0.1)
    with pytest.raises(ValueError, match="rho"):
        optimizer.add_param_group({"params": fresh()[1:], "rho": -1.0})


def test_overlapping_storage_is_refused():
    """Two parameters over one storage would be perturbed twice; the same parameter twice is torch's own error. Neighbours are fine."""
    store = torch.ones(3, 8)
    whole, first, last = (nn.Parameter(t) for t in (store, store[:1], store[2:]))
    with pytest.raises(ValueError, match="parameter 0 of group 0 must have memory of its own, got some that parameter 0 of group 1 has"):
        CrAM([{"params": [last]}, {"params": [whole]}], lr=0.1)
    optimizer = CrAM([first, last], lr=0.1)
    with pytest.raises(ValueError, match="must have memory of its own"):
        optimizer.add_param_group({"params": [whole]})
    assert len(optimizer.param_groups) == 1


def test_an_uninitialized_parameter_is_refused():
    with pytest.raises(ValueError, match="run the model once before making the optimizer"):
        CrAM(nn.LazyLinear(4).parameters(), lr=0.1)


def test_a_forgotten_backward_is_said():
    """Nothing would happen, or no second pass: the run would go on for hours without CrAM."""
    model = nn.Linear(8, 8)
    optimizer = CrAM(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="no parameter has a gradient, so nothing is perturbed"):
        optimizer.perturb()
    optimizer.restore()
    model(torch.ones(1, 8)).sum().backward()
    optimizer.perturb()
    with pytest.warns(UserWarning, match="no parameter has a second gradient"):
        optimizer.step()
    with pytest.warns(UserWarning, match="no parameter has a gradient, so nothing is perturbed"):
        with pytest.warns(CrAMWarning, match="no parameter has a second gradient"):
            optimizer.step(lambda: model(torch.ones(1, 8)).sum())
    with pytest.warns(CrAMWarning, match=r"step\(\) without perturb\(\) is a plain step"):
        optimizer.step()
    optimizer.step()  # says it once


def test_a_pattern_that_prunes_nothing_is_said():
    model = nn.Sequential(nn.Linear(30, 50), nn.Linear(50, 3))
    optimizer = CrAM(model.parameters(), lr=0.1, compression=[NM(2, 4)])
    for first in (True, False):
        model(torch.ones(1, 30)).sum().backward()
        with pytest.warns(UserWarning, match=r"2:4 prunes none of the 4 parameters") if first else contextlib.nullcontext():
            optimizer.perturb()
        optimizer.restore()


def test_the_base_alone_is_refused_while_cram_is_around_it():
    """A step of it between the halves would be undone by the next restore; what is loaded into it would not be CrAM's."""
    model = nn.Linear(8, 8)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = CrAM(base)
    before = clones(list(model.parameters()))
    model(torch.ones(1, 8)).sum().backward()
    optimizer.perturb()
    model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(RuntimeError, match=r"step\(\) of the base optimizer must not be called after perturb\(\)"):
        base.step()
    assert_same_bits(list(model.parameters()), before)
    optimizer.plain_step()
    base.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict())
    for call in (optimizer.perturb, optimizer.plain_step, optimizer.state_dict):
        with pytest.raises(RuntimeError, match=r"load_state_dict\(\) and add_param_group\(\) must be called on CrAM"):
            call()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = CrAM(base)
    base.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))]})
    with pytest.raises(RuntimeError, match="must be called on CrAM"):
        optimizer.perturb()


def test_only_a_model_with_our_parameters_is_attached():
    optimizer = CrAM(nn.Linear(8, 8).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"attach: model must be an nn.Module, got generator"):
        optimizer.attach(nn.Linear(8, 8).parameters())
    with pytest.raises(ValueError, match="must have parameters of this optimizer"):
        optimizer.attach(nn.Linear(8, 8))


def test_a_grad_scaler_is_refused_and_the_weights_are_back() -> None:
    model = nn.Linear(8, 8)
    before = [p.detach().clone() for p in model.parameters()]
    opt, scaler = CrAM(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 8)).sum()).backward()
    opt.perturb()
    scaler.scale(model(torch.ones(2, 8)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"perturb\(\) must be given the GradScaler"):
        scaler.step(opt)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    opt.zero_grad()
    model(torch.ones(2, 8)).sum().backward()
    opt.plain_step()  # without a scaler it goes on
    assert not torch.equal(model.weight, before[0])


@pytest.mark.parametrize("compression", [0.9, "2:4", [0.9]])
def test_a_compression_must_be_patterns(compression: object) -> None:
    with pytest.raises(ValueError, match="CrAM: compression must be"):
        CrAM(nn.Linear(4, 4).parameters(), lr=0.1, compression=compression)


def test_patterns_say_what_they_want() -> None:
    for wrong in (90, "0.9", None, float("nan")):
        with pytest.raises(ValueError, match="TopK: sparsity must be a number in"):
            TopK(wrong)
    with pytest.raises(ValueError, match="NM: n and m must be ints"):
        NM(2.0, 4.0)


def test_a_refused_perturb_says_why_and_leaves_the_optimizer_usable() -> None:
    shared = torch.randn(4, 4)
    a, b = nn.Parameter(shared), nn.Parameter(torch.randn(4, 4))
    opt = CrAM([a, b], lr=0.1)
    b.data = a.data  # behind the constructor's back
    a.grad, b.grad = torch.ones(4, 4), torch.ones(4, 4)
    with pytest.raises(RuntimeError, match=r"perturb_topk_: params.* must not share memory"):
        opt.perturb()
    b.grad = None
    opt.perturb()
    opt.restore()
    assert torch.equal(a, b)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_first_gradient_that_is_overwritten_is_refused(base: type) -> None:
    """Somebody's own buffer for both passes: the first gradient is gone, and the sum would be twice the second."""
    p = nn.Parameter(torch.ones(4, 4))
    own = torch.ones(4, 4)
    optimizer = CrAM([p], base, lr=1.0, compression=None)
    p.grad = own
    optimizer.perturb()
    p.grad = own.fill_(10.0)
    with pytest.raises(RuntimeError, match="first gradient of parameter 0 of group 0 must be left alone after perturb"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(4, 4))


def with_fsdp1(rank, port):
    """Made of its parameters, or of the model before it is wrapped."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    words = r"parameters must be whole or sharded by FSDP2 \(fully_shard\), got some of FSDP1's"
    for original in (False, True):
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        prune(model, TopK(0.5))
        early, attached = CrAM(model, lr=0.1), CrAM(model.parameters(), lr=0.1).attach(model)
        wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        for given in (wrapped, list(wrapped.parameters()), model):
            with pytest.raises(ValueError, match=f"CrAM: {words}"):
                CrAM(given, lr=0.1)
        with pytest.raises(ValueError, match=f"hold_zeros: {words}"):
            hold_zeros(wrapped)
        wrapped(torch.ones(2, 8)).sum().backward()
        for optimizer in (early, attached):
            with pytest.raises(ValueError, match=f"CrAM: {words}"):
                optimizer.perturb()
    torch.distributed.destroy_process_group()


def test_fsdp1_is_refused_by_name():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    forked.spawn(with_fsdp1, (port,), 2)
