"""Mixed precision: a GradScaler over both passes, clipping of each pass, float32 master weights."""

import copy
import io

import pytest
import torch
from optim_cases import assert_same_bits, batches, clones, network, random_tensors, set_gradients, weights
from torch import Tensor, nn

from cram_kernels import NM, CrAM, CrAMWarning, TopK, ops

SHAPES = [(8, 16), (16,), (4, 8, 3, 3), (16, 8)]
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
}
PATTERNS = [TopK(0.5), NM(2, 4), TopK(0.9)]
BASE = pytest.mark.parametrize("base", BASES)


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are small: a second thread would only wait."""
    set_threads(1)


def optimizer_of(params, base: str, **options) -> CrAM:
    kind, base_options = BASES[base]
    return CrAM(params, kind, **{"compression": PATTERNS, **base_options, **options})


def scaler_of(scale: float = 2.0**10, **options) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, **options)
    scaler.scale(torch.zeros(()))  # the first call makes the scale
    return scaler


def fresh() -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in random_tensors(SHAPES, 0)]


def grads(seed: int, scale: float = 1.0) -> list[Tensor]:
    return [g * scale for g in random_tensors(SHAPES, seed)]


def scaled_step(optimizer: CrAM, scaler, params, first: list[Tensor], second: list[Tensor]) -> None:
    set_gradients(params, first)
    optimizer.perturb(scaler)
    set_gradients(params, second)
    scaler.step(optimizer)
    scaler.update()


def state_of(optimizer: CrAM) -> list[Tensor]:
    """All weights and all optimizer state, copied."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return clones([*params, *(t for p in params for t in optimizer.state.get(p, {}).values() if isinstance(t, Tensor))])


@BASE
@pytest.mark.parametrize("normalize", [False, True])
def test_a_scaled_run_has_the_bits_of_an_unscaled_one(base, normalize):
    """A power of two scales exactly; also where the scale changes between steps, and in plain steps."""
    ours, theirs = fresh(), fresh()
    scaled = optimizer_of(ours, base, normalize_grad=normalize)
    plain = optimizer_of(theirs, base, normalize_grad=normalize)
    scaler = scaler_of(growth_interval=2)
    for seed in range(6):
        scale = scaler.get_scale()
        scaled_step(scaled, scaler, ours, grads(seed, scale), grads(seed + 50, scale))
        set_gradients(theirs, grads(seed))
        plain.perturb()
        set_gradients(theirs, grads(seed + 50))
        plain.step()
        assert_same_bits(ours, theirs)
        assert all(p.grad is None for p in ours)
    set_gradients(ours, grads(9, scaler.get_scale()))
    set_gradients(theirs, grads(9))
    with pytest.warns(CrAMWarning, match="plain step of the base"):  # a scaler knows no other name for it
        scaler.step(scaled)
    scaler.update()
    plain.plain_step()
    assert_same_bits(ours, theirs)
    assert scaler.get_scale() == 2.0**13


@BASE
@pytest.mark.parametrize("bad", ["first", "second", "both"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_overflow_in_either_pass_skips_the_update_and_lowers_the_scale(base, bad, value, steps_before):
    """The scaler looks at the second gradients alone; an overflow of the first reaches it, too. The next step is as if nothing was."""
    params, judges = fresh(), fresh()
    optimizer, judge = optimizer_of(params, base), optimizer_of(judges, base)
    scaler, undisturbed = scaler_of(), scaler_of()
    for seed in range(steps_before):
        scaled_step(optimizer, scaler, params, grads(seed, 2.0**10), grads(seed + 50, 2.0**10))
        scaled_step(judge, undisturbed, judges, grads(seed, 2.0**10), grads(seed + 50, 2.0**10))
    before = state_of(optimizer)
    first, second = grads(7, 2.0**10), grads(8, 2.0**10)
    for which, tensors in (("first", first), ("second", second)):
        if bad in (which, "both"):
            tensors[2].view(-1)[5] = value
    scaled_step(optimizer, scaler, params, first, second)
    assert_same_bits(params, before[: len(params)])
    if steps_before:
        assert_same_bits(state_of(optimizer), before)
    assert scaler.get_scale() == 2.0**9
    step = optimizer.param_groups[0]["cram_step"]
    judge.param_groups[0]["cram_step"] = step  # a skipped step counts: nobody can know on the host without waiting for the device
    scaled_step(optimizer, scaler, params, grads(7, 2.0**9), grads(8, 2.0**9))
    scaled_step(judge, undisturbed, judges, grads(7, 2.0**10), grads(8, 2.0**10))
    assert_same_bits(params, judges)


def test_an_overflow_that_no_second_gradient_shows():
    """No gradient at all in the second pass: torch's scaler alone would have nothing to look at."""
    params = fresh()
    optimizer, scaler = optimizer_of(params, "sgd"), scaler_of()
    before, first = clones(params), grads(1)
    first[0][0, 0] = float("inf")
    set_gradients(params, first)
    optimizer.perturb(scaler)
    with pytest.warns(UserWarning, match="no parameter has a second gradient"):
        scaler.step(optimizer)
    scaler.update()
    assert_same_bits(params, before)
    assert scaler.get_scale() == 2.0**9


def test_masks_of_an_overflow_are_not_kept():
    """The scaler's first overflows would else prune everything for mask_period steps."""
    params = fresh()
    optimizer, scaler = optimizer_of(params, "sgd", compression=[TopK(0.5)], mask_period=4), scaler_of()
    scaled_step(optimizer, scaler, params, [torch.full_like(p, float("nan")) for p in params], grads(1))
    for seed in range(3):
        set_gradients(params, grads(seed, scaler.get_scale()))
        optimizer.perturb(scaler)
        pruned = torch.cat([p.detach().flatten() for p in params if p.dim() > 1])
        assert 0.4 < (pruned == 0).float().mean() < 0.6
        set_gradients(params, grads(seed + 50, scaler.get_scale()))
        scaler.step(optimizer)
        scaler.update()


def test_a_step_that_raises_within_the_scaler_leaves_nothing_behind():
    params = fresh()
    optimizer, scaler = optimizer_of(params, "sgd", compression=[]), scaler_of()
    set_gradients(params, grads(1, 2.0**10))
    held = params[0].grad
    optimizer.perturb(scaler)
    held.mul_(2)
    set_gradients(params, grads(2, 2.0**10))
    with pytest.raises(RuntimeError, match="must be left alone"):
        scaler.step(optimizer)
    assert not {"grad_scale", "found_inf"} & set(optimizer.__dict__)


def test_unscale_before_any_gradient_is_refused_too():
    params = fresh()
    optimizer, scaler = optimizer_of(params, "sgd"), scaler_of()
    scaler.unscale_(optimizer)
    set_gradients(params, grads(1, 2.0**10))
    with pytest.raises(RuntimeError, match=r"unscale_\(\) must not be called before perturb\(scaler\)"):
        optimizer.perturb(scaler)


def test_unscale_in_the_second_pass_is_fine_and_in_the_first_is_refused():
    ours, theirs = fresh(), fresh()
    optimizer, judge, scaler = optimizer_of(ours, "sgd"), optimizer_of(theirs, "sgd"), scaler_of()
    set_gradients(ours, grads(1, 2.0**10))
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) must not be called before perturb\(scaler\)"):
        optimizer.perturb(scaler)
    scaler.update()
    assert_same_bits(ours, theirs)
    set_gradients(ours, grads(1, 2.0**10))
    optimizer.perturb(scaler)
    set_gradients(ours, grads(2, 2.0**10))
    scaler.unscale_(optimizer)
    assert_same_bits([p.grad for p in ours], grads(2))
    scaler.step(optimizer)
    set_gradients(theirs, grads(1))
    judge.perturb()
    set_gradients(theirs, grads(2))
    judge.step()
    assert_same_bits(ours, theirs)


def test_what_cannot_be_right_is_refused_with_the_clean_weights():
    params = fresh()
    before = clones(params)
    optimizer, scaler = optimizer_of(params, "sgd"), scaler_of()

    def closure() -> None:
        set_gradients(params, grads(1, 2.0**10))

    def refused(call, words: str) -> None:
        with pytest.raises(RuntimeError, match=words):
            call()
        assert_same_bits(params, before)
        assert not optimizer.state and all(p.grad is None for p in params)
        assert not {"grad_scale", "found_inf"} & set(optimizer.__dict__)
        scaler.update(2.0**10)

    closure()
    refused(lambda: scaler.step(optimizer, closure), r"step\(closure\) must not be called by a GradScaler")
    closure()
    optimizer.perturb()
    closure()
    refused(lambda: scaler.step(optimizer), r"perturb\(\) must be given the GradScaler")
    closure()
    optimizer.perturb(scaler)
    closure()
    refused(optimizer.step, r"scaler.step\(optimizer\) must follow perturb\(scaler\)")
    with pytest.raises(TypeError, match=r"scaler must be a torch.amp.GradScaler, got float"):
        optimizer.perturb(1024.0)
    with pytest.raises(RuntimeError, match="scaler must have scaled a loss"):
        optimizer.perturb(torch.amp.GradScaler("cpu"))


def test_a_disabled_scaler_changes_nothing():
    ours, theirs = fresh(), fresh()
    optimizer, judge = optimizer_of(ours, "sgd"), optimizer_of(theirs, "sgd")
    scaled_step(optimizer, torch.amp.GradScaler("cpu", enabled=False), ours, grads(1), grads(2))
    set_gradients(theirs, grads(1))
    judge.perturb()
    set_gradients(theirs, grads(2))
    judge.step()
    assert_same_bits(ours, theirs)


def test_training_under_fp16_autocast_survives_a_scale_that_is_far_too_large():
    model = network()
    optimizer = CrAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, compression=[TopK(0.5)])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    batch, losses = next(batches(1)), []

    def pass_over() -> None:
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(batch[0]).float(), batch[1])
        scaler.scale(loss).backward()
        losses.append(loss.item())

    for _ in range(40):
        pass_over()
        optimizer.perturb(scaler)
        pass_over()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**26
    assert all(p.isfinite().all() for p in weights(model))
    assert losses[-2] < 0.5 * losses[0]


@BASE
def test_clipping_is_that_of_each_pass(base):
    """To the bit what the user would do by hand with the same norm, and close to torch's clip_grad_norm_."""
    runs = [fresh() for _ in range(3)]
    optimizers = [optimizer_of(params, base, max_grad_norm=1.0 if i == 0 else None) for i, params in enumerate(runs)]
    for seed in range(4):
        for half in ("perturb", "step"):
            for params in runs:
                set_gradients(params, grads(seed if half == "perturb" else seed + 50, 1.0 if seed else 1e-3))  # the first is short enough
            for p in runs[1]:
                factor = (1.0 / (ops.grad_norm(grads_now(runs[2])) + 1e-6)).clamp(max=1.0)
                p.grad *= factor
            nn.utils.clip_grad_norm_(runs[2], 1.0)
            for optimizer in optimizers:
                getattr(optimizer, half)()
    assert_same_bits(runs[0], runs[1])
    for ours, torchs in zip(runs[0], runs[2], strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


def grads_now(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params]


def test_clipping_comes_after_unscaling_and_before_normalizing():
    ours, theirs = fresh(), fresh()
    scaled = optimizer_of(ours, "sgd", max_grad_norm=0.5, normalize_grad=True)
    plain = optimizer_of(theirs, "sgd", max_grad_norm=0.5, normalize_grad=True)
    scaler = scaler_of()
    for seed in range(3):
        scaled_step(scaled, scaler, ours, grads(seed, 2.0**10), grads(seed + 50, 2.0**10))
        set_gradients(theirs, grads(seed))
        plain.perturb()
        set_gradients(theirs, grads(seed + 50))
        plain.step()
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), "1"])
def test_bad_norms_are_refused(wrong):
    with pytest.raises(ValueError, match="max_grad_norm must be None or a number > 0"):
        CrAM(fresh(), lr=0.1, max_grad_norm=wrong)


# --- master weights ---

KINDS = pytest.mark.parametrize("base", ["sgd", "adamw"])


def half(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    """16-bit parameters and one of float32."""
    return [nn.Parameter(t.to(dtype) if i != 1 else t) for i, t in enumerate(random_tensors(SHAPES, 0))]


def half_step(optimizer: CrAM, params: list[nn.Parameter], seed: int) -> None:
    for call, s in ((optimizer.perturb, seed), (optimizer.step, seed + 50)):
        set_gradients(params, [g.to(p.dtype) for g, p in zip(grads(s, 1e-3), params, strict=True)])
        call()


def masters_of(optimizer: CrAM, params: list[nn.Parameter]) -> list[Tensor]:
    return [optimizer.state[p]["master"] if p.dtype != torch.float32 else p.detach() for p in params]


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_master_weight_is_stepped_in_float32(base, dtype):
    """rho = 0 and no pruning: the run of a float32 network that is given the same gradients; the parameters are its rounded weights."""
    params = half(dtype)
    copies = [nn.Parameter(p.detach().float().clone()) for p in params]
    options = {"compression": [], "rho": 0.0, "plus": True}
    ours, theirs = optimizer_of(params, base, master_weights=True, **options), optimizer_of(copies, base, **options)
    for seed in range(5):
        for half_of, s in (("perturb", seed), ("step", seed + 50)):
            gs = [g.to(p.dtype) for g, p in zip(grads(s, 1e-3), params, strict=True)]
            set_gradients(params, gs)
            set_gradients(copies, [g.float() for g in gs])
            getattr(ours, half_of)()
            getattr(theirs, half_of)()
    assert_same_bits(masters_of(ours, params), copies)
    assert_same_bits(params, [c.detach().to(p.dtype) for c, p in zip(copies, params, strict=True)])
    assert all(t.dtype == torch.float32 for p in params for k, t in ours.state[p].items())


@KINDS
def test_masters_need_no_saved_weights_and_come_back_rounded(base):
    params = half()
    optimizer = optimizer_of(params, base, master_weights=True)
    half_step(optimizer, params, 1)
    before = clones(params)
    set_gradients(params, [g.to(p.dtype) for g, p in zip(grads(3), params, strict=True)])
    optimizer.perturb()
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert [s.saved is s.nothing for s in optimizer._workspace.slots] == [True, False, True, True]
    optimizer.restore()
    assert_same_bits(params, before)


@KINDS
def test_a_resumed_run_with_masters_is_bit_exact(base):
    """Through torch.save; torch's own load_state_dict would round masters and momentum to 16 bits."""
    params = half()
    optimizer = optimizer_of(params, base, master_weights=True)
    for seed in range(3):
        half_step(optimizer, params, seed)
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    runs = []
    for weights_first in (True, False):
        again, loaded = half(), copy.deepcopy(loaded)  # torch's load_state_dict takes tensors over as they are
        resumed = optimizer_of(again, base, master_weights=True)
        half_step(resumed, again, 77)  # it has a past of its own
        if not weights_first:
            resumed.load_state_dict(loaded["optimizer"])
        with torch.no_grad():
            for p, w in zip(again, loaded["weights"], strict=True):
                p.copy_(w)
        if weights_first:
            resumed.load_state_dict(loaded["optimizer"])
        runs.append((resumed, again))
    twin = copy.deepcopy((optimizer, params))
    runs.append(twin)
    for seed in range(3, 6):
        half_step(optimizer, params, seed)
        for resumed, again in runs:
            half_step(resumed, again, seed)
    for resumed, _ in runs:
        assert_same_bits(state_of(resumed), state_of(optimizer))


def test_a_parameter_that_somebody_else_writes_is_taken_over():
    params = half()
    optimizer = optimizer_of(params, "sgd", master_weights=True)
    half_step(optimizer, params, 1)
    masters = clones(masters_of(optimizer, params))
    with torch.no_grad():
        params[0][2, 3] = 5.0
    set_gradients(params, [torch.zeros_like(p) for p in params])
    optimizer.param_groups[0].update(lr=0.0)
    optimizer.plain_step()
    masters[0][2, 3] = 5.0
    assert_same_bits(masters_of(optimizer, params), masters)


def test_masters_after_a_reload_are_those_of_the_state():
    params = half()
    optimizer = optimizer_of(params, "sgd", master_weights=True)
    half_step(optimizer, params, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    half_step(optimizer, params, 2)
    assert_same_bits([m.to(p.dtype) for m, p in zip(masters_of(optimizer, params), params, strict=True)], params)


def test_an_overflow_leaves_the_masters_alone():
    params = half(torch.float16)
    optimizer, scaler = optimizer_of(params, "sgd", master_weights=True), scaler_of()
    half_step(optimizer, params, 1)
    before = state_of(optimizer)
    gs = [[g.to(p.dtype) for g, p in zip(grads(s), params, strict=True)] for s in (3, 4)]
    gs[0][3][1, 1] = float("inf")
    scaled_step(optimizer, scaler, params, *gs)
    assert_same_bits(state_of(optimizer), before)
    assert scaler.get_scale() == 2.0**9


def test_masters_need_a_fused_base():
    with pytest.raises(ValueError, match="master_weights must be False for a base that takes its own step"):
        CrAM(half(), torch.optim.RMSprop, lr=0.1, master_weights=True)
