"""CrAM over its base optimizers: the fused ones against the reference (bits) and torch.optim (few ulp), any other through its own step."""

import copy
import itertools

import pytest
import torch
from optim_cases import PlainCrAM, assert_same_bits, clones, random_tensors, set_gradients, two_halves
from torch import nn

from cram_kernels import CrAM, TopK

SHAPES = [(8, 16), (16,), (4, 8, 3, 3), (1, 1)]
SGD_OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 1e-3},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 1e-3},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    {"lr": 0.1, "momentum": 0.9, "maximize": True, "weight_decay": 1e-3},
]
ADAM_OPTIONS = [
    {"lr": 0.01},
    {"lr": 0.01, "weight_decay": 0.1},
    {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1},
    {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    {"lr": 0.01, "maximize": True},
]
FUSED = [(torch.optim.SGD, o) for o in SGD_OPTIONS] + list(itertools.product((torch.optim.Adam, torch.optim.AdamW), ADAM_OPTIONS))
OTHERS = [
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    (torch.optim.NAdam, {"lr": 0.01}),
    (torch.optim.Adagrad, {"lr": 0.05}),
    (torch.optim.RAdam, {"lr": 0.01}),
]


def names(value) -> str:
    return value.__name__ if isinstance(value, type) else "-".join(f"{k}={v}" for k, v in value.items())


def fresh() -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in random_tensors(SHAPES, 0)]


def restated(base: type, params, options: dict) -> PlainCrAM:
    """PlainCrAM with torch's options in the words of the reference op: one value a keyword, in a list."""
    words = {}
    for key, value in options.items():
        if key == "betas":
            words |= {"beta1": [value[0]], "beta2": [value[1]]}
        elif key != "lr":
            words[key] = [int(value) if isinstance(value, bool) else value]
    if base is torch.optim.AdamW:
        words.setdefault("weight_decay", [0.01])  # torch's default
    return PlainCrAM(params, base.__name__.lower(), lr=options["lr"], **words)


@pytest.mark.parametrize("base, options", FUSED, ids=names)
def test_fused_base_equals_the_reference(base, options):
    params, other = fresh(), fresh()
    optimizer = CrAM(params, base, compression=[TopK(0.6)], **options)
    judge = restated(base, other, options)
    for seed in range(6):
        first, second = random_tensors(SHAPES, 2 * seed), random_tensors(SHAPES, 2 * seed + 1)
        if seed == 3:  # a plain step among the others
            set_gradients(params, first)
            set_gradients(other, first)
            optimizer.plain_step()
        else:
            two_halves(optimizer, params, first, second)
            set_gradients(other, first)
            judge.perturb(TopK(0.6))
            set_gradients(other, second)
        judge.step()
        assert_same_bits(params, other)


@pytest.mark.parametrize("base, options", FUSED, ids=names)
def test_plain_step_is_torchs_within_a_few_ulp(base, options):
    """Ten steps with gradients that do not depend on the weights; state included, under torch's own keys."""
    params, other = fresh(), fresh()
    optimizer, theirs = CrAM(params, base, **options), base(other, **options)
    for seed in range(10):
        for p in (params, other):
            set_gradients(p, random_tensors(SHAPES, seed))
        optimizer.plain_step()
        theirs.step()
    assert_few_ulp(params, other, steps=10)
    ours, torchs = ({i: present(s) for i, s in o.state_dict()["state"].items() if present(s)} for o in (optimizer, theirs))
    assert {i: set(s) for i, s in ours.items()} == {i: set(s) for i, s in torchs.items()}
    for key in ours.get(0, ()):
        assert_few_ulp([s[key] for s in ours.values()], [s[key] for s in torchs.values()], steps=10)


def present(state: dict) -> dict:
    """Without momentum buffers of None, which some versions of torch keep."""
    return {k: v for k, v in state.items() if v is not None}


def assert_few_ulp(actual: list[torch.Tensor], expected: list[torch.Tensor], steps: int) -> None:
    """Within 2 ulp a step of the largest number in the list: cancellation leaves the error of larger numbers behind."""
    actual, expected = clones(actual), clones(expected)
    limit = 2 * steps * torch.finfo(torch.float32).eps * max(float(e.abs().max()) for e in expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and float((a - e).abs().max()) <= limit


@pytest.mark.parametrize("base, options", OTHERS, ids=names)
@pytest.mark.parametrize("kind", ["class", "instance"])
def test_any_other_base_takes_its_own_step(base, options, kind):
    """The combined gradient, then the very step of the base: equal to it in every bit."""
    params, other = fresh(), fresh()
    optimizer = (
        CrAM(params, base, compression=[TopK(0.6)], **options)
        if kind == "class"
        else CrAM(base(params, **options), compression=[TopK(0.6)])
    )
    theirs = base(other, **options)
    for seed in range(5):
        first, second = random_tensors(SHAPES, 2 * seed), random_tensors(SHAPES, 2 * seed + 1)
        two_halves(optimizer, params, first, second)
        judge = PlainCrAM(other, lr=0.0)
        set_gradients(other, first)
        judge.perturb(TopK(0.6))
        masked = [g if m.numel() == 0 else torch.where(unpacked(m, g), g, 0.0) for m, g in zip(judge.masks, second, strict=True)]
        judge.undo()
        set_gradients(other, [a + b for a, b in zip(first, masked, strict=True)])
        theirs.step()
        assert_same_bits(params, other)
        set_gradients(params, first)  # and the plain step between
        set_gradients(other, first)
        optimizer.plain_step()
        theirs.step()
        assert_same_bits(params, other)


def unpacked(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The bits of a mask as bool, in the shape of a contiguous weight."""
    bits = (mask[:, None] >> torch.arange(8)) & 1
    return bits.flatten()[: like.numel()].bool().view(like.shape)


@pytest.mark.parametrize("base, options", [(torch.optim.SGD, {"lr": 2**-4, "momentum": 0.5}), (torch.optim.AdamW, {"lr": 0.01})], ids=names)
def test_instance_of_a_fused_base(base, options):
    """CrAM(torch.optim.SGD(params, ...)) steps like CrAM(params, torch.optim.SGD, ...): bits where FMA changes nothing, else ulps."""
    params, other = fresh(), fresh()
    ours, same = CrAM(base(params, **options), compression=[TopK(0.6)]), CrAM(other, base, compression=[TopK(0.6)], **options)
    for seed in range(5):
        first, second = random_tensors(SHAPES, 2 * seed), random_tensors(SHAPES, 2 * seed + 1)
        two_halves(ours, params, first, second)
        two_halves(same, other, first, second)
        if base is torch.optim.SGD:
            assert_same_bits(params, other)
        assert_few_ulp(params, other, steps=seed + 1)


def test_instance_keeps_its_groups_and_state():
    params = fresh()
    base = torch.optim.SGD([{"params": params[:2], "lr": 0.5}, {"params": params[2:]}], lr=0.25, momentum=0.5)
    set_gradients(params, random_tensors(SHAPES, 1))
    base.step()
    other = [nn.Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.SGD([{"params": other[:2], "lr": 0.5}, {"params": other[2:]}], lr=0.25, momentum=0.5)
    theirs.load_state_dict(copy.deepcopy(base.state_dict()))  # torch would share the buffers
    optimizer = CrAM(base)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.25]
    for p in (params, other):
        set_gradients(p, random_tensors(SHAPES, 2))
    optimizer.plain_step()
    theirs.step()
    assert_same_bits(params, other)


def test_lr_as_a_tensor():
    """As in torch: a learning rate may be a tensor, and a scheduler or a user fills it in place."""
    params, other = fresh(), fresh()
    rate = torch.tensor(0.1)
    tensor_lr, number_lr = CrAM(params, lr=rate, momentum=0.9), CrAM(other, lr=0.1, momentum=0.9)
    for lr in (0.1, 0.025):
        rate.fill_(lr)
        number_lr.param_groups[0]["lr"] = lr
        two_halves(tensor_lr, params, random_tensors(SHAPES, 1), random_tensors(SHAPES, 2))
        two_halves(number_lr, other, random_tensors(SHAPES, 1), random_tensors(SHAPES, 2))
        assert_same_bits(params, other)


@pytest.mark.parametrize(
    "options", [{"lr": -0.1}, {"lr": 0.1, "momentum": -1.0}, {"lr": 0.1, "nesterov": True}, {"lr": 0.1, "weight_decay": -1.0}], ids=names
)
def test_base_options_are_checked_as_in_torch(options):
    with pytest.raises(ValueError):
        torch.optim.SGD(fresh(), **options)
    with pytest.raises(ValueError):
        CrAM(fresh(), **options)


@pytest.mark.parametrize("options", [{"differentiable": True}, {"no_such_option": 1}], ids=names)
def test_an_option_is_done_or_refused_and_never_ignored(options):
    params = fresh()
    before = clones(params)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        optimizer = CrAM(params, lr=0.1, **options)
        two_halves(optimizer, params, random_tensors(SHAPES, 1), random_tensors(SHAPES, 2))
    assert_same_bits(params, before)


def test_options_may_change_between_steps():
    """As in torch: momentum that is switched on later begins with the next gradient. Powers of two: the bits of torch.optim.SGD."""
    params, other = fresh(), fresh()
    ours, theirs = CrAM(params, lr=2**-3), torch.optim.SGD(other, lr=2**-3)
    for seed in range(4):
        if seed == 2:
            for optimizer in (ours, theirs):
                optimizer.param_groups[0].update(momentum=0.5, weight_decay=0.25, nesterov=True)
        for p in (params, other):
            set_gradients(p, random_tensors(SHAPES, seed))
        ours.plain_step()
        theirs.step()
        assert_same_bits(params, other)


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}], ids=names)
def test_torchs_flags_for_how_to_run_change_nothing(flags):
    params, other = fresh(), fresh()
    for p, o in ((params, CrAM(params, lr=0.1, momentum=0.9, **flags)), (other, CrAM(other, lr=0.1, momentum=0.9))):
        two_halves(o, p, random_tensors(SHAPES, 1), random_tensors(SHAPES, 2))
    assert_same_bits(params, other)


def test_a_base_that_needs_the_closure_is_refused():
    with pytest.raises(ValueError, match="LBFGS"):
        CrAM(fresh(), torch.optim.LBFGS, lr=0.1)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_group_added_to_an_instance_belongs_to_both(base):
    params = fresh()
    inner = base(params[:1], lr=0.1)
    optimizer = CrAM(inner, rho=0.3)
    optimizer.add_param_group({"params": params[1:], "lr": 0.5})
    assert len(inner.param_groups) == 2 and optimizer.param_groups[1]["rho"] == 0.3
    before = clones(params)
    two_halves(optimizer, params, random_tensors(SHAPES, 1), random_tensors(SHAPES, 2))
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
