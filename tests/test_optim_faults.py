"""Faults that strangers found in version 0.1, each as a kind: the right value comes from plain torch, or from the same run without the
feature that must not matter."""

import collections
import contextlib
import copy
import gc
import warnings
import weakref

import pytest
import torch
from optim_cases import assert_same_bits, clones, random_tensors, set_gradients, two_halves
from torch import nn

from cram_kernels import NM, CrAM, CrAMWarning, RhoWarmup, SparsityWarmup, TopK

SHAPES = [(8, 16), (16,), (4, 8, 3, 3)]
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
}
every_base = pytest.mark.parametrize("base", BASES)


def fresh(dtype=torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(t.to(dtype)) for t in random_tensors(SHAPES, 0)]


def grads(seed: int, dtype=torch.float32) -> list[torch.Tensor]:
    return [t.to(dtype) for t in random_tensors(SHAPES, seed)]


def made(params, base: str, **options) -> CrAM:
    kind, base_options = BASES[base]
    return CrAM(params, kind, **base_options, **options)


def closure_form(optimizer, params, first, second):
    halves = iter((first, second))
    optimizer.step(lambda: set_gradients(params, next(halves)))


def block_form(optimizer, params, first, second):
    set_gradients(params, first)
    with optimizer.perturbed():
        set_gradients(params, second)
    optimizer.step()


every_form = pytest.mark.parametrize("form", [closure_form, block_form, two_halves])


# --- two meanings in one value ---


@every_base
@every_form
@pytest.mark.parametrize("normalize_grad", [False, True])
def test_a_norm_that_clips_nothing_changes_no_bit(base, form, normalize_grad):
    results = []
    for max_grad_norm in (None, 1e6):
        params = fresh()
        optimizer = made(
            params, base, rho=0.5, compression=[TopK(sparsity=0.5)], normalize_grad=normalize_grad, max_grad_norm=max_grad_norm
        )
        for seed in range(3):
            form(optimizer, params, grads(seed), grads(seed + 10))
        results.append(params)
    assert_same_bits(*results)


@every_base
@pytest.mark.parametrize("normalize_grad", [False, True])
def test_clipping_is_clip_grad_norm_by_hand_in_each_pass(base, normalize_grad):
    """The other run gets gradients that torch has clipped already. (To the last ulp or two: torch sums a norm in another order.)"""
    params, other = fresh(), fresh()
    ours = made(params, base, rho=0.5, compression=[], normalize_grad=normalize_grad, max_grad_norm=1.5)
    theirs = made(other, base, rho=0.5, compression=[], normalize_grad=normalize_grad)
    for seed in range(3):
        two_halves(ours, params, grads(seed), grads(seed + 10))
        for seeds, half in ((seed, theirs.perturb), (seed + 10, theirs.step)):
            set_gradients(other, grads(seeds))
            torch.nn.utils.clip_grad_norm_(other, 1.5)
            half()
    for p, q in zip(params, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_rho_is_rho_under_clipping():
    """w + rho * (clipped g), as plain torch gives it; with normalize_grad, rho / |clipped g| of it."""
    for normalize_grad in (False, True):
        p, g = nn.Parameter(torch.zeros(4, 4)), torch.full((4, 4), 2.0)  # |g| = 8
        optimizer = CrAM([p], lr=0.1, rho=0.5, compression=[], max_grad_norm=4.0, normalize_grad=normalize_grad)
        p.grad = g.clone()
        optimizer.perturb()
        clipped = g * 0.5
        torch.testing.assert_close(p.detach(), 0.5 * clipped / (clipped.norm() if normalize_grad else 1.0), rtol=1e-6, atol=0.0)


# --- guessing from numbers ---


@every_base
@every_form
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("second", ["zero", "random"])
def test_a_step_closes_whatever_its_numbers_are(base, form, lr, second):
    """A rate of 0 (warm-up from 0) and gradients of 0 (labels that are all ignored, a dead net): the weights are clean, the step counts."""
    if base == "rmsprop" and isinstance(lr, torch.Tensor):
        lr = 0.0  # torch's RMSprop takes a tensor only where it is capturable, on a GPU
    params = fresh()
    model = nn.Sequential(nn.BatchNorm1d(4))
    model.weights = nn.ParameterList(params)
    optimizer = CrAM(model, BASES[base][0], lr=lr, compression=[TopK(sparsity=0.9)])
    ours = [p for p in model.weights]
    before = clones(ours)
    zeros = [torch.zeros_like(p) for p in ours]
    form(optimizer, ours, grads(1), zeros if second == "zero" else grads(2))
    assert_same_bits(ours, before)
    assert optimizer.open_step is None and optimizer.param_groups[0]["cram_step"] == 1
    assert model[0].track_running_stats


# --- pairs of features ---


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["pre", "post", "both"])
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("where", ["base", "wrapper"])
def test_hooks_change_no_bit(base, kind, masters, where):
    """Hooks of either optimizer, beside master weights or not. (`plus` is off for 16 bits: hooks see gradients rounded to them.)"""
    dtype = torch.bfloat16 if masters else torch.float32
    results = []
    for hooked in (False, True):
        params, seen = fresh(dtype), []
        optimizer = made(params, base, compression=[TopK(sparsity=0.5)], plus=not masters, master_weights=masters)
        target = optimizer.base_optimizer if where == "base" else optimizer
        if hooked and kind != "post":
            target.register_step_pre_hook(lambda *_, params=params, seen=seen: seen.append(params[0].grad is not None))
        if hooked and kind != "pre":
            target.register_step_post_hook(lambda *_, seen=seen: seen.append(True))
        for seed in range(4):
            two_halves(optimizer, params, grads(seed, dtype), grads(seed + 10, dtype))
        assert len(seen) == (0 if not hooked else 8 if kind == "both" else 4) and all(seen)
        results.append(params)
    assert_same_bits(*results)
    assert not torch.equal(results[0][0], fresh(dtype)[0])


def test_a_pre_hook_of_the_base_may_change_the_gradient_of_the_update():
    """Gradient centralization, or clipping by value, as users hook it: the update takes what it leaves."""
    params, other = fresh(), fresh()
    ours = CrAM(params, compression=[], rho=0.0, lr=0.5)
    ours.base_optimizer.register_step_pre_hook(lambda *_: [p.grad.clamp_(-0.1, 0.1) for p in params])
    two_halves(ours, params, grads(1), grads(2))
    for p, q, g, h in zip(params, other, grads(1), grads(2), strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - 0.5 * (g + h).clamp(-0.1, 0.1), rtol=1e-6, atol=1e-7)


def test_an_overflow_runs_no_hook_of_the_base():
    """As in torch, where the scaler then does not call step()."""
    params, seen = fresh(), []
    optimizer, scaler = CrAM(params, lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    before = clones(params)
    scaler.scale(torch.ones(()))
    set_gradients(params, grads(1))
    optimizer.perturb(scaler)
    set_gradients(params, [torch.full_like(p, float("inf")) for p in params])
    scaler.step(optimizer)
    scaler.update()
    assert not seen and scaler.get_scale() == 1.0
    assert_same_bits(params, before)


@pytest.mark.parametrize(
    "patterns", [[NM(2, 4), TopK(sparsity=0.9)], [NM(2, 4)], [TopK(sparsity=0.5), NM(2, 4), TopK(sparsity=0.9)]], ids=str
)
def test_kept_masks_follow_their_pattern(patterns):
    """A run that is resumed with its patterns in another order, or with fewer or more of them, prunes each by its own mask."""
    p = nn.Parameter(torch.randn(16, 16))
    first = CrAM([p], lr=0.1, compression=[TopK(sparsity=0.9), NM(2, 4)], mask_period=8)
    for _ in range(8):
        two_halves(first, [p], [torch.randn(16, 16)], [torch.randn(16, 16)])
    q = nn.Parameter(p.detach().clone())
    second = CrAM([q], lr=0.1, compression=patterns, mask_period=8)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(12):
        set_gradients([q], [torch.randn(16, 16)])
        second.perturb()
        wanted = {NM(2, 4): 128, TopK(sparsity=0.9): 256 - 25, TopK(sparsity=0.5): 129}[second.last.pattern]
        assert int((q == 0).sum()) == wanted
        set_gradients([q], [torch.randn(16, 16)])
        second.step()


@every_form
def test_one_autocast_block_around_steps(form):
    """Autocast keeps the casts of the weights within its block: each pass must see the weights as they are then, as with a block a pass."""

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def losses_of(outer, inner):
        torch.manual_seed(1)
        model, x, losses = nn.Linear(16, 8), torch.randn(4, 16), []
        optimizer = CrAM(model.parameters(), lr=0.1, compression=[TopK(sparsity=0.9)])

        def run():
            with inner():
                loss = model(x).float().pow(2).mean()
            loss.backward()
            losses.append(loss.item())

        with outer():
            for _ in range(3):
                if form is closure_form:
                    optimizer.step(run)
                    continue
                run()
                if form is block_form:
                    with optimizer.perturbed():
                        run()
                else:
                    optimizer.perturb()
                    run()
                optimizer.step()
        return losses

    once = losses_of(autocast, contextlib.nullcontext)
    assert once == losses_of(contextlib.nullcontext, autocast) and len(set(once)) == 6


# --- an open step outlives its owner ---


def opened(model, **options) -> CrAM:
    optimizer = CrAM(model, lr=0.1, compression=[TopK(sparsity=0.9)], **options)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.perturb()
    assert optimizer.open_step is not None
    return optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8))


def test_a_new_optimizer_over_the_same_parameters_restores_them():
    """A cell is interrupted within a step and run again, while a traceback still holds the old optimizer."""
    model = network()
    before = clones(model.parameters())
    old = opened(model)
    new = CrAM(model, lr=0.1)
    assert_same_bits(list(model.parameters()), before)
    assert model[1].track_running_stats
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="given up: another optimizer took the parameters over"):
        old.step()
    assert_same_bits(list(model.parameters()), before)
    assert all(p.grad is None for p in model.parameters())
    two_halves(new, list(model.parameters()), *([torch.ones_like(p) for p in model.parameters()] for _ in range(2)))
    assert not torch.equal(model[0].weight, before[0])


@pytest.mark.parametrize("cycle", [False, True])
def test_the_end_of_the_optimizer_restores(cycle):
    model = network()
    before = clones(model.parameters())
    optimizer = opened(model)
    if cycle:
        optimizer.itself = optimizer
    del optimizer
    gc.collect()
    assert_same_bits(list(model.parameters()), before)
    assert model[1].track_running_stats


def test_a_base_over_the_same_parameters_alone_is_left_alone():
    """Two optimizers over different parameters have nothing to do with each other."""
    one, two = network(), network()
    optimizer = opened(one)
    CrAM(two, lr=0.1)
    assert optimizer.open_step is not None
    optimizer.restore()


@pytest.mark.parametrize("what", ["add", "replace", "remove", "load", "load model", "attach", "detach"])
def test_what_changes_between_the_halves_ends_the_step(what):
    """The weights are clean and step() says so: its gradients are those at the perturbed weights. The step after it is whole."""
    model = network()
    optimizer = CrAM([{"params": list(model[0].parameters())}, {"params": list(model[1].parameters())}], lr=0.1).attach(model)
    state, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    params = list(model.parameters())
    before = clones(params)
    set_gradients(params, [torch.ones_like(p) for p in params])
    optimizer.perturb()
    if what == "add":
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))]})
    elif what == "replace":
        optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(4, 4))
    elif what == "remove":
        del optimizer.param_groups[1]
    elif what == "load":
        optimizer.load_state_dict(state)
    elif what == "load model":
        model.load_state_dict(weights)
    elif what == "attach":
        optimizer.attach(model)
    else:
        optimizer.detach()
    set_gradients(params, [torch.ones_like(p) for p in params])
    with pytest.raises(RuntimeError, match=r"given up|the same in both halves"):
        optimizer.step()
    assert_same_bits(params, before)
    assert model[1].track_running_stats and optimizer.open_step is None
    now = [p for group in optimizer.param_groups for p in group["params"]]
    two_halves(optimizer, now, *([torch.ones_like(p) for p in now] for _ in range(2)))
    assert optimizer.param_groups[0]["cram_step"] == 1


# --- caches by object that nobody empties ---


def test_replaced_parameters_are_let_go():
    """As Gaussian splatting densifies: another parameter takes the place, the state and the name of an old one."""
    p, q, refs = nn.Parameter(torch.randn(100, 8)), nn.Parameter(torch.randn(100, 8)), []
    groups = [{"params": [("points", p)], "lr": 1e-3}, {"params": [("colours", q)]}]
    optimizer = CrAM(groups, torch.optim.Adam, lr=1e-3, compression=[TopK(sparsity=0.5)], exclude=["points"], mask_period=2)
    del p, groups
    for step in range(10):
        group = optimizer.param_groups[0]
        old = group["params"][0]
        for half in (optimizer.perturb, optimizer.step):
            ((group["params"][0] ** 2).sum() + (q**2).sum()).backward()
            half()
        refs.append(weakref.ref(old))
        state = optimizer.state.pop(old)
        group["params"][0] = nn.Parameter(torch.cat([old.detach(), torch.randn(step, 8)]))
        del state, old
        assert next(c for c in optimizer.coverage(TopK(sparsity=0.5)) if c.name == "points").why_dense == "excluded by 'points'"
    gc.collect()
    assert sum(r() is not None for r in refs) <= 1  # the last one, until the next step


def test_removed_groups_are_let_go():
    p, q = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
    optimizer, gone = CrAM([{"params": [p]}, {"params": [q]}], lr=0.1), weakref.ref(q)
    two_halves(optimizer, [p, q], [torch.ones(8, 8)] * 2, [torch.ones(8, 8)] * 2)
    del optimizer.param_groups[1], q
    two_halves(optimizer, [p], [torch.ones(8, 8)], [torch.ones(8, 8)])
    gc.collect()
    assert gone() is None


def test_a_model_keeps_no_optimizer_alive():
    model = network()
    refs = []
    for _ in range(5):
        optimizer = opened(model)
        optimizer.restore()
        refs += [weakref.ref(optimizer), weakref.ref(optimizer._workspace.slots[0].saved)]
        del optimizer
    gc.collect()
    assert not any(r() is not None for r in refs)
    assert not any(m._state_dict_hooks or m._load_state_dict_pre_hooks for m in model.modules())


# --- torch idioms on a wrapper ---


@pytest.mark.parametrize(
    "reset",
    [
        lambda o: o.__setstate__({"state": collections.defaultdict(dict)}),
        lambda o: setattr(o, "state", collections.defaultdict(dict)),
        lambda o: o.state.clear(),
    ],
    ids=["__setstate__", "assigned", "cleared"],
)
@every_base
def test_the_usual_ways_to_reset_the_state(reset, base):
    """The next steps are those of a new optimizer over the weights of now."""
    params = fresh()
    optimizer = made(params, base, compression=[TopK(sparsity=0.5)])
    two_halves(optimizer, params, grads(1), grads(2))
    reset(optimizer)
    assert optimizer.base_optimizer.state is optimizer.state and not optimizer.state
    other = [nn.Parameter(p.detach().clone()) for p in params]
    judge = made(other, base, compression=[TopK(sparsity=0.5)])
    judge.param_groups[0]["cram_step"] = 1
    for seed in (3, 5):
        two_halves(optimizer, params, grads(seed), grads(seed + 10))
        two_halves(judge, other, grads(seed), grads(seed + 10))
    assert_same_bits(params, other)


def test_groups_may_be_made_anew():
    params = fresh()
    optimizer = CrAM(params[:1], lr=0.1, rho=0.25)
    optimizer.param_groups = []
    optimizer.add_param_group({"params": params, "lr": 0.5})
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["lr"]) == (0.25, 0.5)
    two_halves(optimizer, params, grads(1), grads(2))


class Lookahead(torch.optim.Optimizer):
    """An optimizer around an optimizer, as scripts write it: k steps, then half way back to the slow weights."""

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 2) -> None:
        self.optimizer, self.k, self.count = optimizer, k, 0
        self.param_groups, self.defaults, self.state = optimizer.param_groups, optimizer.defaults, optimizer.state
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for slow, p in zip(self.slow, (p for group in self.param_groups for p in group["params"]), strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


def test_an_optimizer_around_ours():
    params, other = fresh(), fresh()
    ours, judge = Lookahead(CrAM(params, lr=0.1)), CrAM(other, lr=0.1)
    slow = clones(other)
    for seed in range(4):
        closure_form(ours, params, grads(seed), grads(seed + 10))
        closure_form(judge, other, grads(seed), grads(seed + 10))
        if seed % 2:
            with torch.no_grad():
                for s, p in zip(slow, other, strict=True):
                    s.lerp_(p, 0.5)
                    p.copy_(s)
    assert_same_bits(params, other)


def test_nothing_warns_in_an_ordinary_run():
    params = fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = CrAM(params, lr=0.1)
        for form in (closure_form, block_form, two_halves):
            form(optimizer, params, grads(1), grads(2))
        with pytest.raises(CrAMWarning, match="called twice"):
            set_gradients(params, grads(1))
            optimizer.perturb()
            optimizer.perturb()


# --- what a hostile reader of the new optimizer found ---


def test_a_parameter_of_another_shape_does_not_keep_the_others_perturbed():
    """`param.data = ...` within a step, as code that resizes does it: what can be restored is, and the optimizer goes on."""
    model = nn.Linear(8, 4)
    optimizer = CrAM(model, torch.optim.SGD, lr=0.1, compression=[TopK(sparsity=0.5)])
    bias = model.bias.detach().clone()
    set_gradients(list(model.parameters()), [torch.ones_like(p) for p in model.parameters()])
    optimizer.perturb()
    model.weight.data = torch.ones(4, 6)
    set_gradients(list(model.parameters()), [torch.ones_like(p) for p in model.parameters()])
    with pytest.raises(RuntimeError, match=r"parameter .weight. must keep its dtype, device, shape and strides between"):
        with pytest.warns(CrAMWarning, match=r"what was written to parameter .weight. after"):
            optimizer.step()
    assert torch.equal(model.bias, bias) and torch.equal(model.weight, torch.ones(4, 6))
    assert model.weight.grad is None
    two_halves(optimizer, list(model.parameters()), *([torch.ones_like(p) for p in model.parameters()] for _ in range(2)))
    assert not torch.equal(model.bias, bias)


def test_a_base_that_is_loaded_behind_our_back_loses_no_option_silently():
    """Ours are not in the checkpoint where they are patterns and schedules: the next step says so instead of taking others."""
    for options in ({"compression": [NM(2, 4)]}, {"rho": RhoWarmup(0.05, steps=10)}):
        params = fresh()
        optimizer = CrAM([{"params": params, **options}], lr=0.1)
        optimizer.base_optimizer.load_state_dict(optimizer.state_dict())
        set_gradients(params, grads(1))
        with pytest.raises(RuntimeError, match="must be called on CrAM"):
            optimizer.perturb()


def test_a_base_that_is_wrapped_again_has_one_guard_and_no_hooks_of_users():
    params = fresh()
    base = torch.optim.SGD(params, lr=0.1)
    for _ in range(4):
        optimizer = CrAM(base)
    gc.collect()
    assert len(base._optimizer_step_pre_hooks) == 1
    seen = []
    params[0].register_hook(lambda g: seen.append(g))
    other = CrAM(base)  # beside the first: its guard is no hook of a user, so no combined gradient is written
    set_gradients(params, grads(1))
    other.perturb()
    set_gradients(params, second := grads(2))
    kept = clones(second)
    other.step()
    assert_same_bits(second, kept)
    assert optimizer.open_step is None


def test_second_gradients_stay_as_they_were_with_any_base():
    params = fresh()
    optimizer = made(params, "rmsprop")
    set_gradients(params, grads(1))
    optimizer.first_step()
    set_gradients(params, grads(2))
    optimizer.second_step(zero_grad=False)
    assert_same_bits([p.grad for p in params], grads(2))


def test_a_plain_step_is_a_step_to_hooks_and_schedulers():
    params, seen = fresh(), []
    optimizer = CrAM(params, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    set_gradients(params, grads(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.plain_step()
        scheduler.step()
    assert seen == [1] and optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_plain_step_under_a_scaler():
    params, other = fresh(), fresh()
    ours, judge, scaler = CrAM(params, lr=0.1), CrAM(other, lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    set_gradients(params, [4 * g for g in grads(1)])
    set_gradients(other, grads(1))
    ours.plain_step(scaler)
    scaler.update()
    judge.plain_step()
    assert_same_bits(params, other)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rho": torch.tensor(-1.0)}, "rho must be a number >= 0"),
        ({"rho": torch.tensor(float("nan"))}, "rho must be a number >= 0"),
        ({"rho": RhoWarmup}, "rho must be a number >= 0"),
        ({"compression": TopK}, "compression must be a list of patterns"),
        ({"compression": SparsityWarmup}, "compression must be a list of patterns"),
        ({"exclude": 5}, "exclude must be names of parameters, got 5"),
        ({"exclude": b"w"}, "exclude must be names of parameters, got"),
    ],
    ids=str,
)
def test_slips_of_the_pen_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        CrAM(fresh(), lr=0.1, **options)


@pytest.mark.parametrize("returned", [-1.0, float("nan"), None, "x", True, torch.ones(2)], ids=str)
def test_what_a_schedule_of_rho_returns_is_checked(returned):
    params = fresh()
    optimizer = CrAM(params, lr=0.1, rho=lambda step: returned)
    before = clones(params)
    set_gradients(params, grads(1))
    with pytest.raises(ValueError, match=r"what rho\(step\) returns must be a number >= 0"):
        optimizer.perturb()
    assert_same_bits(params, before)


def test_options_that_are_set_between_steps_are_checked_or_taken():
    params = fresh()
    optimizer = CrAM(params, lr=0.1)
    optimizer.compression = TopK(sparsity=0.9)
    two_halves(optimizer, params, grads(1), grads(2))
    assert optimizer.last.pattern == TopK(sparsity=0.9)
    wrong = {"mask_period": 0, "normalize_grad": "false", "max_grad_norm": -1, "master_weights": 1, "compression": 0.9}
    for name, value in wrong.items():
        before = getattr(optimizer, name)
        setattr(optimizer, name, value)
        set_gradients(params, grads(1))
        with pytest.raises(ValueError, match=f"{name} must be"):
            optimizer.perturb()
        setattr(optimizer, name, before)


def test_no_groups_at_all():
    params = fresh()
    optimizer = CrAM(params, lr=0.1)
    optimizer.param_groups = []
    with pytest.warns(CrAMWarning, match="no parameter has a gradient"):
        optimizer.perturb()
    with pytest.warns(CrAMWarning, match="no parameter has a second gradient"):
        optimizer.step()


def test_a_step_that_raises_releases_the_gradients_at_perturbed_weights():
    """The next backward pass would add to them."""
    params = fresh()
    optimizer = CrAM(params, lr=0.1)
    set_gradients(params, grads(1))
    first = params[0].grad
    optimizer.perturb()
    first.add_(1)
    set_gradients(params, grads(2))
    with pytest.raises(RuntimeError, match="first gradient of parameter 0 of group 0 must be left alone"):
        optimizer.step()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("end", ["collected", "another optimizer", "perturb", "plain step"])
@pytest.mark.parametrize("write", ["torch optimizer", "load", "in place"])
def test_what_somebody_wrote_after_perturb_is_not_lost(write, end):
    """A cell is interrupted within a step, and the user goes on with something else: no restore may throw that away."""
    params = fresh()
    optimizer = CrAM(params, lr=0.1)
    set_gradients(params, grads(1))
    optimizer.perturb()
    if write == "torch optimizer":
        set_gradients(params, grads(2))
        torch.optim.SGD(params, lr=0.5).step()
    else:
        with torch.no_grad():
            for p, t in zip(params, random_tensors(SHAPES, 5), strict=True):
                p.copy_(t) if write == "load" else p.mul_(0.5)
    written = clones(params)
    set_gradients(params, grads(3))
    with pytest.warns(CrAMWarning, match="after perturb\\(\\) stays there"):
        if end == "collected":
            del optimizer
            gc.collect()
        elif end == "another optimizer":
            CrAM(params, lr=0.1)
        elif end == "plain step":
            optimizer.zero_grad()
            optimizer.plain_step()
        else:
            with pytest.warns(CrAMWarning, match="called twice"):
                optimizer.perturb()
            optimizer.restore()
    assert_same_bits(params, written)


@every_form
@pytest.mark.filterwarnings("ignore:CrAM. parameter 0 of group 0 was written to between")  # tested by itself, below
@pytest.mark.parametrize("fails", [False, True])
def test_what_the_second_pass_writes_to_the_weights_is_undone(form, fails):
    """A model that writes to its own weights, as an embedding with max_norm does: the step starts from the clean weights (Algorithm 1)."""
    params, other = fresh(), fresh()
    optimizer, judge = CrAM(params, lr=0.1), CrAM(other, lr=0.1)
    before, calls = clones(params), []

    def gradients_of(seed):
        calls.append(seed)
        if len(calls) == 2:
            with torch.no_grad():
                for p in params:
                    p.clamp_(-0.01, 0.01)
            if fails:
                raise OSError
        return grads(seed)

    class Lazy(list):
        def __init__(self, seed):
            super().__init__(grads(seed))
            self.seed = seed

        def __iter__(self):
            return iter(gradients_of(self.seed))

    if fails:
        with pytest.raises(OSError):
            form(optimizer, params, Lazy(1), Lazy(2))
        optimizer.restore()
        assert_same_bits(params, before)
        return
    form(optimizer, params, Lazy(1), Lazy(2))
    form(judge, other, grads(1), grads(2))
    assert_same_bits(params, other)


def test_an_embedding_with_a_largest_norm_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=1.0), nn.Linear(4, 2))
    optimizer = CrAM(model, lr=0.1, compression=[TopK(sparsity=0.5)])

    def closure():
        loss = model(torch.arange(10)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0] and optimizer.open_step is None
    assert not bool((model[1].weight == 0).any())


def test_optimizers_that_were_there_before_heal_each_other():
    """Two over the same parameters, one interrupted: the other one starts from clean weights, and its update stays."""
    params, other = fresh(), fresh()
    one, two, judge = CrAM(params, lr=0.1), CrAM(params, lr=0.1), CrAM(other, lr=0.1)
    set_gradients(params, grads(9))
    one.perturb()
    two_halves(two, params, grads(1), grads(2))
    two_halves(judge, other, grads(1), grads(2))
    assert_same_bits(params, other)
    del one
    gc.collect()
    assert_same_bits(params, other)


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.float().bfloat16(),
        lambda m: m.double().to(torch.float32, memory_format=torch.channels_last),
        lambda m: setattr(m[0].weight, "data", m[0].weight.data.view(9, 4, 4, 2)),
    ],
    ids=["dtypes", "memory format", "view"],
)
def test_a_converted_model_trains_on(convert):
    """Allocators give the memory out again: the same address is no sign that nothing was converted."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3)).half()
    optimizer = CrAM(model, lr=0.01, momentum=0.9)

    def step():
        params = list(model.parameters())
        two_halves(optimizer, params, [torch.ones_like(p) for p in params], [torch.ones_like(p) for p in params])

    step()
    convert(model)
    optimizer.state.clear()
    for _ in range(2):
        step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_converted_parameter_may_have_its_gradient_in_the_second_half_alone():
    model = nn.Linear(8, 4)
    optimizer = CrAM(model, lr=0.5)
    two_halves(optimizer, list(model.parameters()), [torch.ones(4, 8), torch.ones(4)], [torch.ones(4, 8), torch.ones(4)])
    model.bfloat16()
    before = clones(model.parameters())
    two_halves(
        optimizer, list(model.parameters()), [torch.ones(4, 8).bfloat16(), None], [torch.zeros(4, 8).bfloat16(), torch.ones(4).bfloat16()]
    )
    assert_same_bits([model.bias], [before[1] - 0.5])


def test_groups_that_are_made_anew_go_on_counting():
    """Schedules and the draw do not begin again."""
    params = fresh()
    optimizer = CrAM(params, lr=0.1, seed=7)
    for seed in range(3):
        two_halves(optimizer, params, grads(seed), grads(seed + 10))
    optimizer.param_groups = []
    optimizer.add_param_group({"params": params})
    assert (optimizer.param_groups[0]["cram_step"], optimizer.param_groups[0]["cram_seed"]) == (3, 7)


def test_names_that_no_longer_fit_their_parameters_are_refused():
    params = fresh()
    optimizer = CrAM(list(zip("abc", params, strict=True)), lr=0.1, exclude=["a"])
    optimizer.param_groups[0]["params"].pop(0)
    set_gradients(params, grads(1))
    for call in (optimizer.perturb, lambda: optimizer.coverage(NM(2, 4))):
        with pytest.raises(ValueError, match="param_names of a group must name each of its params, in order, got 3 names of 2 parameters"):
            call()


@pytest.mark.parametrize("pattern", [0.9, [TopK(sparsity=0.9)], TopK], ids=str)
def test_coverage_takes_one_pattern(pattern):
    with pytest.raises(ValueError, match=r"CrAM\.coverage: pattern must be"):
        CrAM(fresh(), lr=0.1).coverage(pattern)


def test_a_parameter_that_was_frozen_after_its_backward_pass_is_not_pruned():
    params = fresh()
    optimizer = CrAM(params, lr=0.1, rho=0.0)
    two_halves(optimizer, params, grads(1), grads(2))
    set_gradients(params, grads(3))
    params[0].requires_grad_(False)
    with optimizer.perturbed():
        assert not bool((params[0] == 0).any()) and bool((params[2] == 0).any())
    optimizer.restore()


def test_a_hook_may_return_another_state_dict():
    optimizer = CrAM(fresh(), lr=0.1)
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {"mine": state_dict})
    assert "compression" not in optimizer.state_dict()["mine"]["param_groups"][0]


class OwnCheckpoint(torch.optim.RMSprop):
    """A base that keeps more than torch's optimizers do, and says so in its checkpoints."""

    slow = 3

    def state_dict(self):
        return super().state_dict() | {"slow": self.slow}

    def train(self):
        return "training"


def test_a_base_with_checkpoints_of_its_own_is_not_saved_by_halves():
    optimizer = CrAM(fresh(), OwnCheckpoint, lr=0.1)
    with pytest.raises(RuntimeError, match="OwnCheckpoint has one of its own"):
        optimizer.state_dict()
    assert optimizer.train() == "training" and optimizer.slow == 3 and not hasattr(optimizer, "nothing")
    with pytest.raises(AttributeError, match=r"^'CrAM' object has no attribute 'nothing'$"):
        optimizer.nothing  # noqa: B018


class TensorsOnly(torch.optim.RMSprop):
    """A base from before parameters had names."""

    def __init__(self, params, **options):
        super().__init__([p for p in params if p.requires_grad], **options)


def test_a_base_that_knows_no_names_takes_a_model():
    model = network()
    optimizer = CrAM(model, TensorsOnly, lr=0.1, exclude=["0.*"])
    assert [c.name for c in optimizer.coverage(NM(2, 4))] == [name for name, _ in model.named_parameters()]


def test_warnings_of_the_block_form_point_at_the_users_line():
    optimizer = CrAM(fresh(), lr=0.1)
    with pytest.warns(CrAMWarning, match="no parameter has a gradient") as caught:
        with optimizer.perturbed():
            pass
    assert [w.filename for w in caught] == [__file__]
    optimizer.restore()


def test_a_function_that_happens_to_be_called_like_one_of_torchs_closes_its_step():
    import torch.distributed.checkpoint.state_dict  # noqa: F401

    params = fresh()
    optimizer = CrAM(params, lr=0.1)

    def _init_optim_state():
        two_halves(optimizer, params, grads(1), grads(2))

    _init_optim_state()
    assert optimizer.open_step is None and optimizer.param_groups[0]["cram_step"] == 1


def test_a_step_without_gradients_forgets_no_count_of_masks():
    """Found by the state machine: the masks of mask_period were computed anew after it."""
    params = fresh()
    optimizer = CrAM(params, lr=0.1, compression=[NM(2, 4)], mask_period=3)
    two_halves(optimizer, params, grads(1), grads(2))
    counted = optimizer.param_groups[0]["cram_mask_uses"]
    with pytest.warns(CrAMWarning, match="no parameter has a"):
        optimizer.perturb()
        optimizer.step()
    assert optimizer.param_groups[0]["cram_mask_uses"] == counted == '{"2:4": 1}'


@every_base
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_parameter_with_the_first_gradient_alone_is_clipped_and_unscaled(base, hooked, scaled):
    """Found by the state machine. With SGD and a second gradient of 0 in its place the update must be the same; the other bases only need
    the right gradient in p.grad, which a hook of the base sees."""
    params, seen = fresh(), []
    optimizer = made(params, base, compression=[], rho=0.0, max_grad_norm=1.0)
    if hooked:
        optimizer.base_optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in params))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    factor = 8.0 if scaled else 1.0
    if scaler is not None:
        scaler.scale(torch.ones(()))
    before, first = clones(params), grads(1)
    set_gradients(params, [factor * g for g in first])
    optimizer.perturb(scaler)
    params[0].grad = torch.zeros_like(params[0])  # the others take no part in the second pass
    optimizer.step() if scaler is None else scaler.step(optimizer)
    norm = torch.cat([g.flatten() for g in first]).double().norm().float()
    clipped = [g * (1.0 / (norm + 1e-6)) for g in first]
    assert len(seen) == (len(params) if hooked else 0)
    for g, c in zip(seen, clipped, strict=False):
        torch.testing.assert_close(g, c, rtol=1e-5, atol=1e-7)
    if base == "sgd":
        for p, b, c in zip(params, before, clipped, strict=True):
            torch.testing.assert_close(p.detach(), b - 0.1 * c, rtol=1e-5, atol=1e-7)


# --- what a reviewer of the second design found ---


@every_base
def test_hooks_of_all_optimizers_run_once_a_step(base):
    """A base that takes its own step, too, is one optimizer with ours."""
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    params, calls = fresh(), []
    optimizer = made(params, base)
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: calls.append(("before", o))),
        register_optimizer_step_post_hook(lambda o, *_: calls.append(("after", o))),
    ]
    try:
        two_halves(optimizer, params, grads(1), grads(2))
    finally:
        for handle in handles:
            handle.remove()
    assert calls == [("before", optimizer), ("after", optimizer)]


@every_base
def test_a_step_that_is_watched_is_the_same_step(base):
    """Hooks of the base see its step once and change no bit; a scheduler made over the base does not count it wrongly."""
    params, twins = fresh(), fresh()
    plain, watched = made(params, base), made(twins, base)
    calls = []
    watched.base_optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    watched.base_optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(watched.base_optimizer, 1)
    for seed in range(3):
        two_halves(plain, params, grads(seed), grads(seed + 10))
        two_halves(watched, twins, grads(seed), grads(seed + 10))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler.step()
        plain.param_groups[0]["lr"] = watched.param_groups[0]["lr"]
        assert_same_bits(params, twins)
    assert calls == 3 * ["before", "after"]


def test_a_subclass_of_a_fused_optimizer_says_that_it_takes_its_own_step():
    class Noisy(torch.optim.AdamW):
        pass

    with pytest.warns(CrAMWarning, match="Noisy takes its own step, which is slower: it is a subclass"):
        CrAM(fresh(), Noisy, lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CrAM(fresh(), torch.optim.AdamW, lr=0.1)
        CrAM(fresh(), torch.optim.RMSprop, lr=0.1)


@pytest.mark.parametrize("value", [["*"], 0.9])
@pytest.mark.parametrize("option", ["exclude", "mask_period", "max_grad_norm", "master_weights", "prune_embeddings", "seed"])
def test_an_option_of_the_whole_optimizer_is_refused_in_a_group_at_any_time(option, value):
    params = fresh()
    optimizer = CrAM(params, lr=0.1)
    set_gradients(params, grads(1))
    optimizer.param_groups[0][option] = value
    before = clones(params)
    for call in (optimizer.perturb, optimizer.plain_step, lambda: optimizer.coverage(TopK(sparsity=0.5)), optimizer.state_dict):
        with pytest.raises(ValueError, match=f"{option} must be given to the optimizer"):
            call()
    assert_same_bits(params, before)


def test_a_base_may_have_an_option_of_the_same_name():
    class Seeded(torch.optim.Optimizer):
        def __init__(self, params, seed=0):
            super().__init__(params, {"seed": seed})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["seed"] * p.grad)

    params = fresh()
    base = Seeded(params, seed=1)
    optimizer = CrAM(base, compression=[], rho=0.0, plus=False)
    before = clones(params)
    two_halves(optimizer, params, grads(1), grads(2))
    assert_same_bits(params, [b - g for b, g in zip(before, grads(2), strict=True)])


def test_groups_count_the_same_steps():
    params = fresh()
    optimizer = CrAM([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    optimizer.param_groups[1]["cram_step"] = 5
    set_gradients(params, grads(1))
    with pytest.raises(ValueError, match="cram_step, which the optimizer counts, must be the same in all groups, got 0 and 5"):
        optimizer.perturb()


def test_a_group_that_the_base_was_given_joins_the_count_when_it_is_wrapped_again():
    params = fresh()
    first = CrAM(params[:1], lr=0.1)
    two_halves(first, params[:1], grads(1)[:1], grads(2)[:1])
    first.base_optimizer.add_param_group({"params": params[1:]})
    second = CrAM(first.base_optimizer)
    assert [group["cram_step"] for group in second.param_groups] == [1, 1]
    two_halves(second, params, grads(1), grads(2))


def test_coverage_right_after_a_conversion_counts_the_weights_that_are_there():
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, 8, bias=False))
    optimizer = CrAM(model, lr=0.1)
    set_gradients(model.parameters(), [torch.ones_like(p) for p in model.parameters()])
    optimizer.perturb()
    optimizer.restore()
    model.bfloat16()
    kept = [row.kept for row in optimizer.coverage(TopK(sparsity=0.5))]
    flat = torch.cat([p.detach().float().abs().flatten() for p in model.parameters()])
    threshold = flat.sort(descending=True).values[flat.numel() // 2 - 1]
    assert kept == [int((p.detach().float().abs() > threshold).sum()) for p in model.parameters()]


def test_names_that_decide_what_stays_dense_name_one_parameter_each():
    def network():
        return nn.ModuleDict({"x": nn.Embedding(8, 8)})

    optimizer = CrAM(network(), lr=0.1)
    other = nn.ModuleDict({"x": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=r"names of parameters must differ, got 'x.weight' twice"):
        optimizer.add_param_group({"params": list(other.named_parameters())})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("other." + name, p) for name, p in other.named_parameters()]})
    dense = {row.name: row.why_dense for row in optimizer.coverage(TopK(sparsity=0.5))}
    assert dense["x.weight"] is not None and dense["other.x.weight"] is None


def test_a_named_parameter_is_named_in_warnings():
    model = nn.Linear(4, 4)
    optimizer = CrAM(model, lr=0.1)
    set_gradients(model.parameters(), [torch.ones_like(p) for p in model.parameters()])
    optimizer.perturb()
    with torch.no_grad():
        model.weight.zero_()
    with pytest.warns(CrAMWarning, match=r"what was written to parameter 'weight' after perturb\(\) stays there"):
        del optimizer
        gc.collect()
    assert not model.weight.any()


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_step_that_was_given_up_before_the_first_update_can_be_copied_and_saved(base):
    """Found by the state machine: Adam's state had a master weight and nothing else, which torch's Adam cannot load."""
    params = fresh(torch.bfloat16)
    optimizer = made(params, base, master_weights=True)
    set_gradients(params, grads(1, torch.bfloat16))
    optimizer.perturb()
    optimizer.restore()
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(optimizer.state_dict())
    twins = [p for group in twin.param_groups for p in group["params"]]
    for both in ((optimizer, params), (twin, twins)):
        two_halves(*both, grads(1, torch.bfloat16), grads(2, torch.bfloat16))
    assert_same_bits(params, twins)
    assert all(state["master"].dtype == torch.float32 for state in optimizer.state.values())


# --- what a new user of the second design found ---


def loaded_within_a_step(attached: bool):
    model = nn.Linear(8, 4)
    optimizer = CrAM(model.parameters(), lr=0.1, compression=[TopK(sparsity=0.5)])
    if attached:
        optimizer.attach(model)
    set_gradients(model.parameters(), [torch.ones_like(p) for p in model.parameters()])
    optimizer.perturb()
    model.load_state_dict({name: torch.zeros_like(p) for name, p in model.state_dict().items()})
    set_gradients(model.parameters(), [torch.ones_like(p) for p in model.parameters()])
    return model, optimizer


def test_a_checkpoint_that_is_loaded_within_a_step_is_not_undone_silently():
    model, optimizer = loaded_within_a_step(attached=False)
    with pytest.warns(CrAMWarning, match=r"parameter 0 of group 0 was written to between perturb\(\) and step\(\)"):
        optimizer.step()
    model, optimizer = loaded_within_a_step(attached=True)
    with pytest.raises(RuntimeError, match="the model was loaded between"):
        optimizer.step()
    assert not any(p.any() for p in model.parameters())


def test_the_warning_of_written_weights_comes_once_and_not_for_a_model_that_is_known():
    """An embedding with max_norm writes to its table in every pass."""
    for attached in (False, True):
        model = nn.Embedding(8, 4, max_norm=0.1)
        optimizer = CrAM(model.parameters(), lr=0.1, compression=[], rho=5.0)
        if attached:
            optimizer.attach(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer.step(lambda model=model: model(torch.arange(8)).square().sum().backward())
        assert len([w for w in caught if "was written to between" in str(w.message)]) == (not attached)


def test_tools_refuse_weights_of_an_open_step(tmp_path):
    from cram_kernels.export import export
    from cram_kernels.inference import sparsify

    model = nn.Linear(16, 8)
    optimizer = CrAM(model.parameters(), lr=0.1, compression=[TopK(sparsity=0.9)])
    set_gradients(model.parameters(), [torch.ones_like(p) for p in model.parameters()])
    optimizer.perturb()
    for tool in (lambda: sparsify(model.eval()), lambda: export(model, tmp_path / "m.safetensors", prune=True)):
        with pytest.raises(RuntimeError, match="parameter 'weight' must not be perturbed"):
            tool()
    assert not list(tmp_path.iterdir())
    optimizer.restore()
    export(model, tmp_path / "m.safetensors", prune=True)


def test_prune_says_that_layers_are_sparse_already():
    from cram_kernels import prune
    from cram_kernels.inference import SparseLinear

    model = nn.Sequential(SparseLinear(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="layers must be dense, got '0' on sparse weights"):
        prune(model, TopK(sparsity=0.5))


def test_a_model_that_is_converted_and_gets_no_second_gradient_is_named():
    model = nn.Linear(8, 4)
    optimizer = CrAM(model, lr=0.1, compression=[TopK(sparsity=0.5)])
    set_gradients(model.parameters(), [torch.ones_like(p) for p in model.parameters()])
    before = clones(model.parameters())
    optimizer.perturb()
    model.half()
    with pytest.raises(RuntimeError, match="parameter 'weight' must keep its dtype"):
        optimizer.step()
    assert_same_bits(list(model.parameters()), [b.half() for b in before])


def test_a_group_that_is_refused_ends_no_step():
    params, twins = fresh(), fresh()
    results = []
    for disturbed, own in ((False, params), (True, twins)):
        optimizer = CrAM(own, lr=0.1)
        set_gradients(own, grads(1))
        optimizer.perturb()
        if disturbed:
            for group in ({"params": own[:1]}, {"params": [nn.Parameter(torch.ones(4, dtype=torch.float64))]}):
                with pytest.raises(ValueError):
                    optimizer.add_param_group(group)
        set_gradients(own, grads(2))
        optimizer.step()
        results.append(own)
    assert_same_bits(*results)


def test_the_block_form_takes_a_scaler():
    params, twins = fresh(), fresh()
    plain, scaled = CrAM(params, lr=0.1), CrAM(twins, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    set_gradients(twins, [8 * g for g in grads(1)])
    with scaled.perturbed(scaler):
        set_gradients(twins, [8 * g for g in grads(2)])
    scaler.step(scaled)
    scaler.update()
    two_halves(plain, params, grads(1), grads(2))
    assert_same_bits(params, twins)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: o.step(torch.ones(())), "closure must be a function that computes the loss and calls backward, got Tensor"),
        (lambda o: o.plain_step(lambda: None), "scaler must be a torch.amp.GradScaler, got function"),
    ],
)
def test_what_is_no_function_and_no_scaler_is_named(call, message):
    with pytest.raises(TypeError, match=message):
        call(CrAM(fresh(), lr=0.1))


def test_exclude_may_be_none():
    from cram_kernels import prune

    assert CrAM(fresh(), lr=0.1, exclude=None).exclude == ()
    prune(nn.Linear(8, 8), TopK(sparsity=0.5), exclude=None)


def test_weights_that_are_nan_are_not_called_emptied():
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    [weight, _] = CrAM(model, lr=0.1).coverage(TopK(sparsity=0.5))
    assert weight.kept is None and not weight.emptied


def test_a_parameter_that_is_refused_is_named():
    with pytest.raises(ValueError, match="parameter 'weight' must have dtype"):
        CrAM(nn.Linear(4, 4).double(), lr=0.1)


def test_a_loss_that_is_no_tensor_is_named():
    from cram_kernels import train_step

    params = fresh()
    before = clones(params)
    with pytest.raises(TypeError, match="loss must return a tensor, without calling backward on it, got NoneType"):
        train_step(CrAM(params, lr=0.1), lambda batch: None, torch.ones(2))
    assert_same_bits(params, before)


def test_fewer_names_than_parameters_are_said_by_the_step_and_stop_no_copy():
    params = fresh()
    optimizer = CrAM([(f"p{i}", p) for i, p in enumerate(params[:2])], lr=0.1)
    optimizer.param_groups[0]["params"].append(params[2])
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        with pytest.raises(ValueError, match="param_names of a group must name each of its params, in order, got 2 names of 3 parameters"):
            each.perturb()
