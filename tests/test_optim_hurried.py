"""What fitted in the last step is not looked at again: whatever changes after such steps is noticed all the same.

With `plus` and `sparse_grad` off, a step is one of torch's own optimizer with the second gradients: that is what is compared with.
"""

import contextlib
from weakref import ref

import pytest
import torch
from optim_cases import clones, random_tensors, set_gradients, two_halves
from torch import nn

from cram_kernels import CrAM, TopK, ops

SHAPES = [(4, 8, 3, 3), (16,), (8, 16)]
BASES = {"sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), "adamw": (torch.optim.AdamW, {"lr": 0.01})}


def fresh() -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in random_tensors(SHAPES, 0)]


def last(t: torch.Tensor) -> torch.Tensor:
    return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t


def to_channels_last(params, optimizer):
    for p in params:
        p.data = last(p.data)


def through_bfloat16(params, optimizer):
    for p in params:
        p.data = p.data.bfloat16().float()


def state_in_other_strides(params, optimizer):
    for p in params:
        for key, value in optimizer.state[p].items():
            optimizer.state[p][key] = last(value)


def state_in_another_dtype(params, optimizer):
    """Of the twin rounded only: what a checkpoint of a 16-bit run leaves."""
    for p in params:
        for key, value in optimizer.state[p].items():
            rounded = value.bfloat16() if key != "step" else value
            optimizer.state[p][key] = rounded if isinstance(optimizer, CrAM) else rounded.float()


def state_cleared(params, optimizer):
    optimizer.state.clear()


def entries_replaced(params, optimizer):
    for p in params:
        optimizer.state[p] = {key: value.clone() * (2 if key == "momentum_buffer" else 1) for key, value in optimizer.state[p].items()}


def loaded(params, optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def one_frozen(params, optimizer):
    params[1].requires_grad_(False)


def one_converted_while_frozen(params, optimizer):
    params[0].requires_grad_(False)
    params[0].data = last(params[0].data)


CHANGES = [
    to_channels_last,
    through_bfloat16,
    state_in_other_strides,
    state_in_another_dtype,
    state_cleared,
    entries_replaced,
    loaded,
    one_frozen,
    one_converted_while_frozen,
]


def steps(base: str, form: str = "calls"):
    """An optimizer that has stopped looking, and torch's own after the same steps; a function that takes one more step of both."""
    kind, options = BASES[base]
    params, twins = fresh(), fresh()
    ours = CrAM(params, kind, compression=[TopK(sparsity=0.5)], plus=False, sparse_grad=False, **options)
    torchs = kind(twins, foreach=False, **options)
    seeds = iter(range(1, 100))

    def step(order=lambda t: t):
        first, second = random_tensors(SHAPES, next(seeds)), random_tensors(SHAPES, next(seeds))
        for p, g in zip(params, first, strict=True):
            p.grad = order(g.to(p.device)) if p.requires_grad else None
        with ours.perturbed() if form == "block" else contextlib.nullcontext(ours.perturb()):
            for p, t, g in zip(params, twins, second, strict=True):
                p.grad, t.grad = (order(g), g.clone()) if p.requires_grad else (None, None)
        ours.step()
        torchs.step()
        for p, t in zip(params, twins, strict=True):
            torch.testing.assert_close(p.detach().contiguous(), t.detach().contiguous())

    for _ in range(3):
        step()
    assert ours._workspace.fitting == ours._workspace.slots
    return params, twins, ours, torchs, step


@pytest.mark.parametrize("form", ["calls", "block"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change, base, form):
    params, twins, ours, torchs, step = steps(base, form)
    change(params, ours)
    change(twins, torchs)
    for _ in range(3):
        step()
    for p in params:
        p.requires_grad_(True)
    for t in twins:
        t.requires_grad_(True)
    step()


@pytest.mark.parametrize("base", BASES)
def test_gradients_in_other_strides(base):
    step = steps(base)[-1]
    for order in (last, last, lambda t: t, lambda t: t, last):
        step(order)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("half", ["first", "second"])
def test_a_sparse_gradient_is_refused_by_name(base, half):
    params, _, ours, _, step = steps(base)
    before, grads = clones(params), random_tensors(SHAPES, 50)
    set_gradients(params, grads)
    if half == "second":
        ours.perturb()
        set_gradients(params, grads)
    params[2].grad = grads[2].to_sparse()
    with pytest.raises(RuntimeError, match=r"gradient of parameter 2 of group 0 must be dense, got a sparse one"):
        ours.perturb() if half == "first" else ours.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    step()


@pytest.mark.parametrize("base", BASES)
def test_a_conversion_within_a_step_is_refused_by_name(base):
    params, _, ours, _, _ = steps(base)
    before, grads = clones(params), random_tensors(SHAPES, 50)
    set_gradients(params, grads)
    ours.perturb()
    to_channels_last(params, ours)
    set_gradients(params, grads)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 must keep its dtype, device, shape and strides between perturb"):
        ours.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_state_that_no_op_takes_is_an_error_without_an_update():
    params, _, ours, _, _ = steps("adamw")
    before, grads = clones(params), random_tensors(SHAPES, 50)
    del ours.state[params[1]]["exp_avg"]
    with pytest.raises(KeyError, match="exp_avg"):
        two_halves(ours, params, grads, grads)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, RuntimeError])
def test_what_fails_although_every_tensor_fits_is_not_tried_twice(monkeypatch, error):
    params, _, ours, _, step = steps("sgd")
    before, calls = clones(params), []

    def out_of_memory(*args, **options):
        calls.append(args)
        raise error("no memory")

    set_gradients(params, random_tensors(SHAPES, 50))
    with monkeypatch.context() as patched:
        patched.setattr(ops, "perturb_topk_", out_of_memory)
        with pytest.raises(error, match="no memory"):
            ours.perturb()
    assert len(calls) == 1 and ours.open_step is None
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    step()


def test_state_that_was_cleared_is_freed():
    ours = steps("sgd")[2]
    held = [ref(state["momentum_buffer"]) for state in ours.state.values()]
    ours.state.clear()
    assert all(t() is None for t in held)
