"""Which parameters CrAM perturbs, prunes and updates: exclusion, group options, unused, frozen and late parameters."""

import copy
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from optim_cases import PlainCrAM, assert_same_bits, clones, random_tensors, set_gradients, two_halves
from torch import Tensor, nn

from cram_kernels import NM, CrAM, CrAMWarning, TopK

SHAPES = [(8, 16), (16,), (4, 8, 3, 3), (16, 8)]
NAMES = ["body.weight", "body.bias", "conv.weight", "head.weight"]


def fresh(shapes=SHAPES) -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in random_tensors(shapes, 0)]


def grads(seed: int, shapes=SHAPES) -> list[Tensor]:
    return random_tensors(shapes, seed)


def second_pass(optimizer: CrAM, params: list[nn.Parameter], first: list[Tensor | None]) -> list[Tensor]:
    """The perturbed weights; afterwards the weights are back."""
    set_gradients(params, first)
    with optimizer.perturbed():
        between = clones(params)
    optimizer.restore()
    return between


def kept(tensors: list[Tensor]) -> list[int]:
    return [int(t.count_nonzero()) for t in tensors]


# --- what is pruned ---


def test_everything_is_perturbed_and_two_dims_are_pruned():
    params = fresh()
    between = second_pass(CrAM(params, compression=[TopK(0.5)], rho=0.1, lr=0.1), params, grads(1))
    moved = [p.detach() + torch.tensor(0.1) * g for p, g in zip(params, grads(1), strict=True)]
    n = 8 * 16 + 4 * 8 * 9 + 16 * 8
    assert_same_bits(between[1:2], moved[1:2])
    assert sum(kept(between)) - 16 == TopK(0.5).k(n) - 1
    for b, m in zip(between, moved, strict=True):
        assert torch.equal(b, torch.where(b != 0, m, 0.0))


@pytest.mark.parametrize("exclude", [["head.*"], ["head.*", "*.bias"], ["head.weight"]], ids=str)
def test_exclude_by_name(exclude):
    params = fresh()
    optimizer = CrAM(list(zip(NAMES, params, strict=True)), compression=[TopK(0.9)], lr=0.1, exclude=exclude)
    between = kept(second_pass(optimizer, params, grads(1)))
    assert between[3] == 128 and between[1] == 16
    assert between[0] + between[2] == TopK(0.9).k(8 * 16 + 4 * 8 * 9) - 1
    assert not torch.equal(second_pass(optimizer, params, grads(1))[3], params[3])  # perturbed all the same


def test_exclude_needs_names():
    with pytest.raises(ValueError, match="exclude"):
        CrAM(fresh(), lr=0.1, exclude=["head.*"])


def test_named_parameters_of_a_module():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    params = list(model.parameters())
    optimizer = CrAM(model.named_parameters(), compression=[TopK(0.9)], lr=0.1, exclude=["1.*"])
    between = kept(second_pass(optimizer, params, [torch.randn_like(p) for p in params]))
    assert between[2] == 32 and between[0] == TopK(0.9).k(128) - 1


def test_group_options():
    """rho, prune, plus and sparse_grad of a group stand over those of the constructor."""
    params = fresh()
    groups = [
        {"params": params[:2], "rho": 0.0},
        {"params": params[2:3], "prune": False},
        {"params": params[3:], "plus": False, "sparse_grad": False},
    ]
    optimizer = CrAM(groups, compression=[TopK(0.5)], rho=0.25, lr=2**-3)
    first, second = grads(1), grads(2)
    before = clones(params)
    between = second_pass(optimizer, params, first)
    assert_same_bits(between[1:2], before[1:2])  # rho 0, not pruned
    assert torch.equal(between[0], torch.where(between[0] != 0, before[0], 0.0)) and kept(between)[0] < 128
    assert_same_bits(between[2:3], [before[2] + 0.25 * first[2]])
    assert sum(kept([between[0], between[3]])) == TopK(0.5).k(256) - 1
    two_halves(optimizer, params, first, second)
    keep = between[0] != 0
    update = [first[0] + torch.where(keep, second[0], 0.0), first[1] + second[1], first[2] + second[2], second[3]]
    assert_same_bits(params, [w - 2**-3 * g for w, g in zip(before, update, strict=True)])


def test_group_options_may_change_between_steps():
    params = fresh()
    optimizer = CrAM(params, compression=[TopK(0.0)], rho=0.25, lr=0.1)
    optimizer.param_groups[0]["rho"] = 0.5
    between = second_pass(optimizer, params, grads(1))
    assert_same_bits(between, [p.detach() + 0.5 * g for p, g in zip(params, grads(1), strict=True)])


def test_group_options_of_the_base():
    """Every number of torch.optim.SGD may be a group's own."""
    own = [
        {"lr": 0.5},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.2, "weight_decay": 0.1, "maximize": True},
        {"lr": 0.3, "momentum": 0.5, "dampening": 0.5},
    ]
    params, others = fresh(), fresh()
    optimizer = CrAM([{"params": [p], **o} for p, o in zip(params, own, strict=True)], compression=[TopK(0.5, scope="tensor")], lr=1.0)
    judges = [PlainCrAM([p], **{k: v if k == "lr" else [v] for k, v in o.items()}) for p, o in zip(others, own, strict=True)]
    for seed in range(3):
        two_halves(optimizer, params, grads(2 * seed), grads(2 * seed + 1))
        for i, judge in enumerate(judges):
            set_gradients(others[i : i + 1], grads(2 * seed)[i : i + 1])
            judge.perturb(TopK(0.5))
            set_gradients(others[i : i + 1], grads(2 * seed + 1)[i : i + 1])
            judge.step()
    assert_same_bits(params, others)


@pytest.mark.parametrize("scope, counts", [("model", [(256 + 288 + 0)]), ("group", [256, 288]), ("tensor", [128, 288, 128])])
def test_scopes(scope, counts):
    params = fresh()
    with torch.no_grad():
        params[2].mul_(100)
    optimizer = CrAM([{"params": [params[0], params[1], params[3]]}, {"params": [params[2]]}], compression=[TopK(0.5, scope=scope)], lr=0.1)
    a, _, conv, b = kept(second_pass(optimizer, params, [g * 0 for g in grads(1)]))
    expected = [TopK(0.5).k(n) - 1 for n in counts]
    assert {"model": [a + conv + b], "group": [a + b, conv], "tensor": [a, conv, b]}[scope] == expected


def test_nm_prunes_along_the_input_channels_and_leaves_the_rest_dense():
    shapes = [(8, 16), (16,), (4, 8, 3, 3), (4, 6), (4, 8, 5), (4, 3, 3, 3)]
    params = fresh(shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the layers that stay dense are reported; how is not this test's subject
        optimizer = CrAM(params, compression=[NM(1, 4)], lr=0.1)
        between = second_pass(optimizer, params, grads(1, shapes))
    for i, t in enumerate(between):
        if i in (0, 2, 4):
            groups = t.movedim(1, -1).reshape(-1, 4)
            assert (groups.count_nonzero(1) == 1).all()
        else:
            assert int(t.count_nonzero()) == t.numel()


# --- which gradients there are ---


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("plus", [True, False])
def test_parameters_without_one_of_the_gradients(base, plus):
    """Neither: untouched. First only: g1 with plus, else no update. Second only: g2, unmasked. Never left perturbed."""
    params, other = fresh(), fresh()
    options = {"lr": 0.01} | ({"momentum": 0.9} if base is torch.optim.SGD else {})
    optimizer, theirs = (
        CrAM(params, base, compression=[TopK(0.9)], plus=plus, **options),
        CrAM(other, base, compression=[TopK(0.9)], **options),
    )
    for seed in (1, 3):
        first, second = grads(seed), grads(seed + 1)
        two_halves(optimizer, params, [None, first[1], None, first[3]], [None, None, second[2], second[3]])
        mask = expected_mask(other[3], first[3])
        combined = torch.where(mask, second[3], 0.0)
        set_gradients(other, [None, first[1] if plus else None, second[2], first[3] + combined if plus else combined])
        theirs.plain_step()
        assert_same_bits(params, other)
    assert params[0] not in optimizer.state or not optimizer.state[params[0]]


def expected_mask(p: Tensor, g: Tensor, rho: float = 0.05, sparsity: float = 0.9) -> Tensor:
    u = p.detach() + torch.tensor(rho) * g
    return u.abs() > u.abs().flatten().topk(TopK(sparsity).k(u.numel())).values[-1]


def test_no_gradients_at_all():
    params = fresh()
    optimizer = CrAM(params, lr=0.1, momentum=0.9)
    before = clones(params)
    with pytest.warns(CrAMWarning, match="no parameter has a gradient"):
        optimizer.perturb()
    with pytest.warns(CrAMWarning, match="no parameter has a second gradient"):
        optimizer.step()
    optimizer.plain_step()
    assert_same_bits(params, before)


def test_frozen_parameters():
    """In the list and without a gradient: not perturbed, not pruned, not decayed, not counted among the weights."""
    params = fresh()
    params[0].requires_grad_(False)
    optimizer = CrAM(params, compression=[TopK(0.5)], lr=0.1, weight_decay=0.1, momentum=0.9)
    before = clones(params)
    between = second_pass(optimizer, params, [None, *grads(1)[1:]])
    assert_same_bits(between[:1], before[:1])
    assert sum(kept(between[2:])) == TopK(0.5).k(288 + 128) - 1
    two_halves(optimizer, params, [None, *grads(1)[1:]], [None, *grads(2)[1:]])
    assert_same_bits(params[:1], before[:1])
    params[0].requires_grad_(True)  # and thawed later
    two_halves(optimizer, params, grads(3), grads(4))
    assert not torch.equal(params[0], before[0])


def test_a_group_that_comes_late():
    """add_param_group between steps: as if it had been there, its momentum begins with its first gradient."""
    params, other = fresh(), fresh()
    early = CrAM(params[:2], compression=[TopK(0.5, scope="tensor")], lr=0.1, momentum=0.9, rho=0.3)
    judge = CrAM(
        [{"params": other[:2]}, {"params": other[2:], "lr": 0.5}], compression=[TopK(0.5, scope="tensor")], lr=0.1, momentum=0.9, rho=0.3
    )
    two_halves(early, params[:2], grads(1)[:2], grads(2)[:2])
    two_halves(judge, other, [*grads(1)[:2], None, None], [*grads(2)[:2], None, None])
    early.add_param_group({"params": params[2:], "lr": 0.5})
    assert all(early.param_groups[1][key] == early.param_groups[0][key] for key in ("cram_seed", "cram_step"))
    assert early.param_groups[1]["rho"] == 0.3 and early.param_groups[1]["momentum"] == 0.9
    for seed in (3, 5):
        two_halves(early, params, grads(seed), grads(seed + 1))
        two_halves(judge, other, grads(seed), grads(seed + 1))
        assert_same_bits(params, other)


def test_empty_parameters():
    shapes = [(0, 8), (8, 16), (0,)]
    params = fresh(shapes)
    optimizer = CrAM(params, compression=[TopK(0.5), NM(2, 4)], lr=0.1, momentum=0.9)
    before = clones(params)
    for seed in range(4):
        two_halves(optimizer, params, grads(seed, shapes), grads(seed + 9, shapes))
    assert not torch.equal(params[1], before[1])


def test_exclude_that_matches_nothing_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="exclude must match the name of a parameter, got 'head"):
        CrAM(model.named_parameters(), lr=0.1, exclude=["0.bias", "head.*"])


@pytest.mark.parametrize("given", ["head.*", ["head.*"], ("head.weight",)], ids=str)
def test_exclude_may_be_set_between_steps(given):
    """The twin was made with it: from there on both keep the same weights dense, also in a copy."""

    def made(**options) -> tuple[list[nn.Parameter], CrAM]:
        params = fresh()
        return params, CrAM(list(zip(NAMES, params, strict=True)), compression=[TopK(0.9)], lr=0.1, **options)

    (params, ours), (twins, theirs) = made(), made(exclude=given)
    assert kept(second_pass(ours, params, grads(1)))[3] < 128
    ours.exclude = given
    between = second_pass(ours, params, grads(1))
    assert kept(between)[3] == 128
    assert_same_bits(between, second_pass(theirs, twins, grads(1)))
    assert ours.exclude == theirs.exclude == copy.deepcopy(ours).exclude and "exclude=('head." in repr(ours)
    with pytest.raises(ValueError, match="exclude must match the name of a parameter, got 'hands'"):
        ours.exclude = "hands"
    assert ours.exclude == theirs.exclude


# --- options that a script changes ---


def grow(group: dict) -> None:
    group["betas"][0] = 0.5  # within the list


CHANGES = {
    "lr": lambda group: group.update(lr=0.3),
    "rho": lambda group: group.update(rho=0.4),
    "a tensor": lambda group: group["rho"].fill_(0.4),
    "a list": grow,
    "an array": lambda group: (group["rho"].fill(0.4), group["lr"].fill(0.3)),
    "plus": lambda group: group.update(plus=False),
    "weight_decay": lambda group: group.update(weight_decay=0.5),
    "compression": lambda group: group.update(compression=[TopK(0.9)]),
    "maximize": lambda group: group.update(maximize=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_in_a_group_holds_from_the_next_step_on(change):
    """As in a copy of the optimizer, which has kept nothing of the steps before; and not as without the change."""

    def trained(copied: bool, changed: bool) -> list[nn.Parameter]:
        params = fresh()
        optimizer = CrAM(params, torch.optim.AdamW, lr=0.1, weight_decay=0.0, compression=[TopK(0.5)])
        group = optimizer.param_groups[0]
        if change == "a list":
            group["betas"] = [0.9, 0.999]
        if change == "a tensor":
            group["rho"] = torch.tensor(0.05)
        if change == "an array":
            group["rho"], group["lr"] = np.array(0.05), np.array(0.1)
        kept = []
        for seed in (1, 3):
            two_halves(optimizer, params, grads(seed), grads(seed + 1))
            kept.append(optimizer._workspace.settings)
        assert (kept[0] is kept[1]) == (change not in ("a tensor", "a list", "an array")), (
            "options are kept where they can be, for this to test it"
        )
        if copied:
            params, optimizer = copy.deepcopy((params, optimizer))
        if changed:
            CHANGES[change](optimizer.param_groups[0])
        two_halves(optimizer, params, grads(5), grads(6))
        return params

    assert_same_bits(trained(False, True), trained(True, True))
    assert not torch.equal(trained(False, True)[0], trained(False, False)[0])


def step_both(seed, wrapper, ours, plain, theirs) -> None:
    """A step of a CrAM that is to do what its base does, and of that optimizer: the weights are the same, but for roundings."""
    set_gradients(theirs, grads(seed))
    plain.step()
    two_halves(wrapper, ours, grads(seed), grads(seed))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "key, value", [("weight_decay", 5.0), ("momentum", 0.0), ("maximize", True), ("nesterov", True), ("dampening", 0.5)]
)
@pytest.mark.parametrize("from_hook", [False, True])
def test_what_sgd_is_told_while_it_trains_is_what_torch_does(key, value, from_hook):
    """Against torch.optim.SGD, with two groups of own values; a pre-hook of the base writes for its own step, as in torch."""
    ours, theirs = fresh(), fresh()
    groups = [[{"params": p[:1], "weight_decay": 0.1}, {"params": p[1:]}] for p in (ours, theirs)]
    optimizers = [torch.optim.SGD(own, lr=0.01, momentum=0.9, foreach=False) for own in groups]
    wrapper, steps = CrAM(optimizers[0], plus=False, rho=0.0, compression=[]), Counter()

    def tell(base, *_):
        steps[base] += 1
        if steps[base] == 4:
            base.param_groups[1][key] = value

    for base in optimizers if from_hook else ():
        base.register_step_pre_hook(tell)
    for seed in range(6):
        for base in optimizers if not from_hook else ():
            tell(base)
        step_both(seed, wrapper, ours, optimizers[1], theirs)


def test_a_hook_that_writes_for_its_step_alone_is_heard_in_each_step():
    ours, theirs = fresh(), fresh()
    optimizers = [torch.optim.SGD(p, lr=0.01, weight_decay=0.1) for p in (ours, theirs)]
    wrapper, before = CrAM(optimizers[0], plus=False, rho=0.0, compression=[]), optimizers[0].param_groups[0]["weight_decay"]
    for base in optimizers:
        told = iter((0.1, 1.0, 3.0, 0.0))
        base.register_step_pre_hook(lambda base, *_, told=told: base.param_groups[0].update(weight_decay=next(told)))
        base.register_step_post_hook(lambda base, *_: base.param_groups[0].update(weight_decay=before))
    for seed in range(4):
        step_both(seed, wrapper, ours, optimizers[1], theirs)


def test_hooks_are_called_once_a_step_also_where_a_class_overrides_it_or_its_closure_makes_them():
    class Own(CrAM):
        def step(self, closure=None):
            return super().step(closure)

    for kind in (CrAM, Own):
        params, calls = fresh(), Counter()
        optimizer = kind(params, torch.optim.SGD, lr=0.1)
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.update(["before"]))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.update(["after"]))
        two_halves(optimizer, params, grads(1), grads(2))
        assert calls == {"before": 1, "after": 1}, kind
    params, calls = fresh(), Counter()
    optimizer = CrAM(params, torch.optim.SGD, lr=0.1)

    def closure():
        if not optimizer._optimizer_step_post_hooks:
            optimizer.register_step_post_hook(lambda *_: calls.update(["after"]))
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert calls == {"after": 1}


@pytest.mark.parametrize("key, value", [("plus", 1), ("rho", -1.0), ("differentiable", True), ("mask_period", 2), ("compression", "none")])
def test_what_is_wrong_in_a_group_is_seen_after_any_number_of_steps(key, value):
    """1 equals True, and is none."""
    params = fresh()
    optimizer = CrAM(params, lr=0.1)
    for seed in (1, 3):
        two_halves(optimizer, params, grads(seed), grads(seed + 1))
    optimizer.param_groups[0][key] = value
    set_gradients(params, grads(5))
    with pytest.raises(ValueError, match=key):
        optimizer.perturb()


def test_names_that_no_longer_fit_their_parameters_are_seen():
    params = fresh()
    optimizer = CrAM(list(zip(NAMES, params, strict=True)), lr=0.1)
    two_halves(optimizer, params, grads(1), grads(2))
    optimizer.param_groups[0]["param_names"].pop()
    set_gradients(params, grads(3))
    with pytest.raises(ValueError, match="must name each of its params"):
        optimizer.perturb()
