"""Checkpoints: bit-exact resume at any step, and state_dicts that go to torch.optim and come from there."""

import copy
import io
import itertools

import pytest
import torch
from optim_cases import assert_same_bits, backward, batches, clones, network, random_tensors, set_gradients, two_halves, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from cram_kernels import NM, CrAM, TopK

MIXED = [TopK(0.5), TopK(0.7, scope="tensor"), TopK(0.9), NM(2, 4)]
SHAPES = [(8, 16), (16,), (4, 8, 3, 3)]
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    "plain-sgd": (torch.optim.SGD, {"lr": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
}
FUSED = ["sgd", "plain-sgd", "adamw"]


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are small: a second thread would only wait."""
    set_threads(1)


def fresh() -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in random_tensors(SHAPES, 0)]


def grads(seed: int) -> list[torch.Tensor]:
    return random_tensors(SHAPES, seed)


def through_a_file(state: dict) -> dict:
    """What training scripts do; weights_only: nothing in it but plain numbers, strings and tensors."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def step(optimizer: CrAM, model: nn.Module, batch) -> None:
    backward(model, batch)
    optimizer.perturb()
    backward(model, batch)
    optimizer.step()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("period", [1, 3])
def test_resume_is_bit_exact_at_every_step(base, period):
    """From the checkpoint after each step the rest of the run has the bits of the whole run, levels and masks included."""
    kind, options = BASES[base]
    data = list(batches(9))

    def make(model, seed):
        return CrAM(model.parameters(), kind, compression=MIXED, rho=0.1, mask_period=period, seed=seed, **options)

    model = network()
    optimizer = make(model, 3)
    checkpoints, after = [], []
    for batch in data:
        checkpoints.append(through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
        step(optimizer, model, batch)
        after.append(clones(model.parameters()))
    for start in (0, 1, 4, 7):
        again = network(seed=99)
        resumed = make(again, 55)  # another seed: the checkpoint brings its own
        again.load_state_dict(checkpoints[start]["model"])
        resumed.load_state_dict(checkpoints[start]["optimizer"])
        for batch, expected in zip(data[start:], after[start:], strict=True):
            step(resumed, again, batch)
            assert_same_bits(weights(again), expected, f"resumed at {start}")


@pytest.mark.parametrize("base", BASES)
def test_loading_into_a_run_that_is_under_way(base):
    """Everything comes from the checkpoint, nothing is left of the run before: state, masks, level."""
    kind, options = BASES[base]

    def run(params, optimizer, seeds):
        for seed in seeds:
            two_halves(optimizer, params, grads(seed), grads(seed + 100))

    params = fresh()
    optimizer = CrAM(params, kind, compression=MIXED, mask_period=4, **options)
    run(params, optimizer, range(3))
    checkpoint, there = copy.deepcopy(optimizer.state_dict()), clones(params)
    run(params, optimizer, range(3, 8))
    expected = clones(params)
    run(params, optimizer, range(20, 25))
    optimizer.load_state_dict(checkpoint)
    with torch.no_grad():
        for p, t in zip(params, there, strict=True):
            p.copy_(t)
    run(params, optimizer, range(3, 8))
    assert_same_bits(params, expected)


@pytest.mark.parametrize("base", FUSED)
def test_checkpoint_of_torch_loads(base):
    """From torch.optim: the next plain step is torch's own (momentum, step count); the keys that it lacks keep their values."""
    kind, options = BASES[base]
    params, other = fresh(), fresh()
    theirs = kind(other, **options)
    for seed in range(3):
        set_gradients(other, grads(seed))
        theirs.step()
    with torch.no_grad():
        for p, q in zip(params, other, strict=True):
            p.copy_(q)
    ours = CrAM(params, kind, compression=[TopK(0.6)], rho=0.3, seed=4, **{**options, "lr": 0.7})
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    group = ours.param_groups[0]
    assert (group["lr"], group["rho"], group["cram_seed"], group["prune"]) == (options["lr"], 0.3, 4, True)
    for p in (params, other):
        set_gradients(p, grads(7))
    ours.plain_step()
    theirs.step()
    for a, b in zip(params, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    two_halves(ours, params, grads(8), grads(9))


@pytest.mark.parametrize("base", FUSED)
def test_checkpoint_loads_into_torch(base):
    """To torch.optim: it has all that torch needs, and torch goes on with the same momentum."""
    kind, options = BASES[base]
    params = fresh()
    ours = CrAM(params, kind, compression=MIXED, **options)
    for seed in range(3):
        two_halves(ours, params, grads(seed), grads(seed + 50))
    other = [nn.Parameter(p.detach().clone()) for p in params]
    theirs = kind(other, **{**options, "lr": 0.7})
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    assert theirs.param_groups[0]["lr"] == options["lr"]
    for p in (params, other):
        set_gradients(p, grads(7))
    ours.plain_step()
    theirs.step()
    for a, b in zip(params, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("base", FUSED)
def test_state_has_torchs_keys_dtypes_and_no_transients(base):
    kind, options = BASES[base]
    params, other = fresh(), fresh()
    ours, theirs = CrAM(params, kind, compression=MIXED, **options), kind(other, **options)
    two_halves(ours, params, grads(1), grads(2))
    set_gradients(other, grads(1))
    theirs.step()

    def described(optimizer):
        return {i: {k: (v.dtype, v.shape) for k, v in s.items() if v is not None} for i, s in optimizer.state_dict()["state"].items()}

    expected = {i: s for i, s in described(theirs).items() if s}
    assert {i: s for i, s in described(ours).items() if s} == expected
    assert set(theirs.state_dict()["param_groups"][0]) <= set(ours.state_dict()["param_groups"][0])


def test_state_dict_between_the_halves_is_refused():
    """It would be that of half a step. Refusing it changes nothing: the step ends as it would have."""
    params, other = fresh(), fresh()
    ours, judge = (CrAM(p, compression=MIXED, lr=0.1, momentum=0.9) for p in (params, other))
    two_halves(judge, other, grads(1), grads(2))
    set_gradients(params, grads(1))
    ours.perturb()
    with pytest.raises(RuntimeError, match=r"state_dict\(\) must not be called between perturb\(\) and step\(\), .* first"):
        ours.state_dict()
    set_gradients(params, grads(2))
    ours.step()
    assert_same_bits(params, other)
    assert all(isinstance(v, (int, float, str, bool, list, tuple, type(None))) for v in ours.state_dict()["param_groups"][0].values())


def test_loading_between_the_halves_heals_first():
    """A checkpoint that is loaded in the middle of a step: the weights are the clean ones, and the step is forgotten."""
    params = fresh()
    optimizer = CrAM(params, compression=[TopK(0.9)], lr=0.1, momentum=0.9)
    two_halves(optimizer, params, grads(1), grads(2))
    checkpoint, before = copy.deepcopy(optimizer.state_dict()), clones(params)
    set_gradients(params, grads(3))
    optimizer.perturb()
    optimizer.load_state_dict(checkpoint)
    assert_same_bits(params, before)
    set_gradients(params, grads(4))
    with pytest.raises(RuntimeError, match="given up: the optimizer was loaded"):  # these gradients are those at perturbed weights
        optimizer.step()
    assert_same_bits(params, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_resume_with_16_bit_weights(dtype):
    def run(params, optimizer, seeds):
        for seed in seeds:
            two_halves(optimizer, params, [g.to(dtype) for g in grads(seed)], [g.to(dtype) for g in grads(seed + 100)])

    params = [nn.Parameter(t.to(dtype)) for t in random_tensors(SHAPES, 0)]
    optimizer = CrAM(params, compression=MIXED, mask_period=2, lr=0.1, momentum=0.9)
    run(params, optimizer, range(3))
    again = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = CrAM(again, compression=MIXED, mask_period=2, lr=0.1, momentum=0.9)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, o in ((params, optimizer), (again, resumed)):
        run(p, o, range(3, 8))
    assert_same_bits(again, params)


def test_named_groups_come_back_with_their_own_options():
    """Two groups with options of their own; the checkpoint restores them, as torch does with lr."""
    params = fresh()
    groups = [{"params": params[:1], "rho": 0.5, "prune": False}, {"params": params[1:]}]
    optimizer = CrAM(groups, compression=[TopK(0.5)], rho=0.1, lr=0.1)
    checkpoint = through_a_file(optimizer.state_dict())
    other = fresh()
    again = CrAM([{"params": other[:1]}, {"params": other[1:]}], compression=[TopK(0.5)], rho=0.9, lr=0.9)
    again.load_state_dict(checkpoint)
    for key, (first, second) in {"rho": (0.5, 0.1), "prune": (False, True), "lr": (0.1, 0.1)}.items():
        assert [g[key] for g in again.param_groups] == [first, second]
    for (p, o), seed in itertools.product(((params, optimizer), (other, again)), range(2)):
        two_halves(o, p, grads(seed), grads(seed + 9))
    assert_same_bits(other, params)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_wrapped_instance_copies_and_resumes(kind):
    params = fresh()
    optimizer = CrAM(kind(params, lr=0.1, momentum=0.9), compression=MIXED)
    two_halves(optimizer, params, grads(1), grads(2))
    twins = copy.deepcopy((params, optimizer))
    other = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = CrAM(kind(other, lr=0.7, momentum=0.9), compression=MIXED)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, o in ((params, optimizer), twins, (other, resumed)):
        two_halves(o, p, grads(3), grads(4))
        assert_same_bits(p, params)


@pytest.mark.parametrize("kind, fused", [(torch.optim.Adam, False), (torch.optim.Adam, True), (torch.optim.SGD, True)])
def test_old_and_fused_checkpoints_of_torch(kind, fused):
    """Keys that older versions did not write yet, a step count that is a plain number, and the flags of torch's own fused kernels."""
    other = fresh()
    theirs = kind(other, lr=2**-3, fused=fused)
    set_gradients(other, grads(0))
    theirs.step()
    checkpoint = copy.deepcopy(theirs.state_dict())
    for group in [] if fused else checkpoint["param_groups"]:
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            group.pop(key, None)
    for state in [] if fused else checkpoint["state"].values():
        state["step"] = int(state["step"])
    params = [nn.Parameter(p.detach().clone()) for p in other]
    ours = CrAM(params, kind, lr=0.1)
    ours.load_state_dict(checkpoint)
    for p in (params, other):
        set_gradients(p, grads(1))
    ours.plain_step()
    theirs.step()
    for a, b in zip(params, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_checkpoint_with_kept_masks_loads_into_torch():
    params, other = fresh(), fresh()
    optimizer = CrAM(params, compression=MIXED, mask_period=5, lr=0.1, momentum=0.9)
    two_halves(optimizer, params, grads(1), grads(2))
    theirs = torch.optim.SGD(other, lr=0.1, momentum=0.9)
    theirs.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_bits([theirs.state[p]["momentum_buffer"] for p in other], [optimizer.state[p]["momentum_buffer"] for p in params])


@pytest.mark.parametrize("full", [False, True])
def test_a_new_optimizer_takes_what_torchs_distributed_checkpoints_hold(full):
    """Counts of masks included: in the form with whole tensors, torch looks for each item of a container in the new optimizer."""
    options = StateDictOptions(full_state_dict=full)
    (model, optimizer), (again, resumed) = (
        (m, CrAM(m, lr=0.1, momentum=0.9, compression=MIXED, mask_period=2)) for m in (network(), network(seed=9))
    )
    for batch in batches(3):
        step(optimizer, model, batch)
    saved, state = get_state_dict(model, optimizer, options=options)
    set_state_dict(again, resumed, model_state_dict=saved, optim_state_dict=state, options=options)
    assert_same_bits(weights(again), weights(model))
    (old,), (new,) = optimizer.param_groups, resumed.param_groups
    assert {k: v for k, v in new.items() if k != "params"} == {k: v for k, v in old.items() if k != "params"}
    buffers = [[o.state[p]["momentum_buffer"] for p in o.param_groups[0]["params"]] for o in (resumed, optimizer)]
    assert_same_bits(*buffers)
