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

from cram_kernels import NM, CrAM, CrAMWarning, TopK

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
