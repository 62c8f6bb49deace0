"""What users of the optimizer expect of its API: the module form, patterns per group, schedules, plain steps, reports, refused options."""

import copy
import io
import math
import warnings

import pytest
import torch
from optim_cases import assert_same_bits, clones, random_tensors, set_gradients, two_halves
from torch import nn

from cram_kernels import NM, CrAM, CrAMWarning, RhoWarmup, SparsityWarmup, TopK, prune

SHAPES = [(8, 16), (16,), (4, 8, 3, 3), (16, 16)]


def fresh() -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in random_tensors(SHAPES, 0)]


def grads(seed: int) -> list[torch.Tensor]:
    return random_tensors(SHAPES, seed)


def language_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"table": nn.Embedding(100, 16), "norm": nn.BatchNorm1d(16), "body": nn.Linear(16, 16), "head": nn.Linear(16, 100)}
    )
    model["head"].weight = model["table"].weight
    return model


def kept_by_hand(tensors: list[torch.Tensor], sparsity: float) -> list[torch.Tensor]:
    """The published rule: what is larger than the k-th largest magnitude of all stays."""
    everything = torch.cat([t.abs().flatten() for t in tensors]).sort(descending=True).values
    threshold = everything[math.ceil(everything.numel() * (1 - sparsity)) - 1]
    return [t.abs() > threshold for t in tensors]


# --- the module form ---


def test_a_model_gives_names_is_attached_and_keeps_its_tables_dense():
    model = language_model()
    optimizer = CrAM(model, torch.optim.AdamW, lr=1e-3, compression=[TopK(sparsity=0.5)], rho=0.0)
    assert {c.name: c.why_dense for c in optimizer.coverage(TopK(sparsity=0.5))} == {
        "table.weight": "embedding table (prune_embeddings=True prunes it)",
        "norm.weight": "fewer than 2 dims",
        "norm.bias": "fewer than 2 dims",
        "body.weight": None,
        "body.bias": "fewer than 2 dims",
        "head.bias": "fewer than 2 dims",
    }
    statistics = clones(model["norm"].buffers())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with optimizer.perturbed():
        assert torch.equal(model["body"].weight != 0, kept_by_hand([before["body.weight"]], 0.5)[0])
        assert torch.equal(model["table"].weight, before["table.weight"])
        assert torch.equal(model.state_dict()["body.weight"], before["body.weight"])  # attached
        model["norm"](torch.randn(8, 16) + 5)
    assert_same_bits(list(model["norm"].buffers()), statistics)
    model["norm"](torch.randn(8, 16) + 5)
    assert not torch.equal(model["norm"].running_mean, statistics[0])


def test_tables_are_pruned_where_asked_or_where_a_list_is_given():
    model = language_model()
    for optimizer in (CrAM(model, prune_embeddings=True, lr=0.1), CrAM(model.named_parameters(), lr=0.1)):
        assert next(c for c in optimizer.coverage(NM(2, 4)) if c.name == "table.weight").why_dense is None


@pytest.mark.parametrize("wrap", [torch.compile, lambda m: m], ids=["compiled", "plain"])
def test_names_are_those_of_the_model_inside(wrap):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = CrAM(wrap(model), lr=0.1, exclude=["1.*"])
    assert [(c.name, c.why_dense) for c in optimizer.coverage(NM(2, 4))][2] == ("1.weight", "excluded by '1.*'")


def test_a_model_beside_an_instance_of_a_base():
    model = language_model()
    base = torch.optim.AdamW(model["body"].parameters(), lr=1e-3)
    optimizer = CrAM(model, base)
    assert [c.name for c in optimizer.coverage(NM(2, 4))] == ["body.weight", "body.bias"]


# --- patterns per group ---


def test_each_group_has_its_own_pattern():
    """N:M in one group, TopK in another, the optimizer's own in the third; each ranked over the groups that share the pattern."""
    params = fresh()
    one, two = {"params": params[:1], "compression": [NM(2, 4)]}, {"params": params[1:3], "compression": TopK(sparsity=0.25)}
    groups = [one, two, {"params": params[3:]}]
    optimizer = CrAM(groups, compression=[TopK(sparsity=0.75)], rho=0.0, lr=0.1)
    before = clones(params)
    set_gradients(params, grads(1))
    with optimizer.perturbed():
        assert optimizer.last.patterns == (NM(2, 4), TopK(sparsity=0.25), TopK(sparsity=0.75))
        assert bool(((params[0] != 0).view(8, 4, 4).sum(-1) == 2).all())
        assert torch.equal(params[2] != 0, kept_by_hand([before[2]], 0.25)[0])
        assert torch.equal(params[3] != 0, kept_by_hand([before[3]], 0.75)[0])
        masks = [(p != 0) for p in params]
        set_gradients(params, grads(2))
    optimizer.step()
    masks[1] = torch.ones_like(masks[1])  # a vector is not pruned
    expected = [w - 0.1 * (g + torch.where(m, h, 0.0)) for w, g, h, m in zip(before, grads(1), grads(2), masks, strict=True)]
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-6, atol=1e-7)


def test_groups_with_the_same_pattern_are_ranked_together():
    params = fresh()
    pattern = TopK(sparsity=0.5)
    optimizer = CrAM([{"params": params[:1]}, {"params": params[3:], "compression": [pattern]}], compression=[pattern], rho=0.0)
    set_gradients(params, grads(1))
    with optimizer.perturbed():
        masks = kept_by_hand(random_tensors(SHAPES, 0)[0::3], 0.5)
        assert torch.equal(params[0] != 0, masks[0]) and torch.equal(params[3] != 0, masks[1])
    optimizer.restore()


def test_patterns_of_groups_are_no_part_of_a_checkpoint():
    """They are code, as the optimizer's own are; torch.load(weights_only=True) reads the file."""
    params = fresh()
    optimizer = CrAM([{"params": params, "compression": [NM(2, 4)], "rho": RhoWarmup(0.1, steps=4)}], lr=0.1)
    two_halves(optimizer, params, grads(1), grads(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = fresh()
    other = CrAM([{"params": twin, "compression": [NM(1, 4)], "rho": RhoWarmup(0.2, steps=4)}], lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    group = other.param_groups[0]
    assert (group["compression"], group["rho"], group["lr"], group["cram_step"]) == ((NM(1, 4),), RhoWarmup(0.2, steps=4), 0.1, 1)


@pytest.mark.parametrize(
    "option", ["exclude", "mask_period", "max_grad_norm", "master_weights", "normalize_grad", "seed", "prune_embeddings", "grad_norms"]
)
def test_what_a_group_cannot_have_is_refused_by_name(option):
    params = fresh()
    with pytest.raises(ValueError, match=f"{option} must be given to the optimizer"):
        CrAM([{"params": params, option: 1}], lr=0.1)
    optimizer = CrAM(params[:1], lr=0.1)
    with pytest.raises(ValueError, match=f"{option} must be given to the optimizer"):
        optimizer.add_param_group({"params": params[1:], option: 1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"normalize_grad": "false"}, "normalize_grad must be True or False, got 'false'"),
        ({"plus": 1}, "plus must be True or False, got 1"),
        ({"sparse_grad": None}, "sparse_grad must be True or False"),
        ({"prune": "no"}, "prune must be True or False"),
        ({"master_weights": 0}, "master_weights must be True or False"),
        ({"prune_embeddings": "yes"}, "prune_embeddings must be True or False"),
        ({"grad_norms": 1}, "grad_norms must be True or False"),
        ({"rho": "0.05"}, "rho must be a number"),
        ({"rho": True}, "rho must be a number"),
        ({"rho": float("nan")}, "rho must be a number"),
        ({"rho": torch.ones(2)}, "rho must be a tensor of one element"),
        ({"max_grad_norm": "1"}, "max_grad_norm must be None or a number"),
        ({"max_grad_norm": True}, "max_grad_norm must be None or a number"),
        ({"mask_period": 2.0}, "mask_period must be an int"),
        ({"mask_period": True}, "mask_period must be an int"),
        ({"seed": "1"}, "seed must be an int"),
        ({"exclude": [1]}, "exclude must be names"),
        ({"compression": {"a": 1}}, "compression must be a list of patterns"),
    ],
    ids=str,
)
def test_options_are_checked_by_type(options, words):
    with pytest.raises(ValueError, match=words):
        CrAM([("a.weight", fresh()[0])], lr=0.1, **options)


# --- schedules ---


@pytest.mark.filterwarnings("ignore:Detected call of `scheduler.step")
def test_sparsity_warmup_is_the_cubic_of_torch_ao_pruning():
    """Its CubicSL, on the same steps; and a straight line with power 1."""
    from torch.ao.pruning import CubicSL, WeightNormSparsifier

    model = nn.Sequential(nn.Linear(8, 8))
    sparsifier = WeightNormSparsifier(sparsity_level=0.9)
    sparsifier.prepare(model, config=[{"tensor_fqn": "0.weight"}])
    theirs = CubicSL(sparsifier, init_sl=0.1, init_t=2, delta_t=1, total_t=10)
    ours = SparsityWarmup([TopK(sparsity=0.9), NM(2, 4)], steps=10, begin=2, start=0.1)
    line = SparsityWarmup([TopK(sparsity=0.9)], steps=10, begin=2, start=0.1, power=1)
    for step in range(16):
        assert ours(step)[0].sparsity == pytest.approx(sparsifier.groups[0]["sparsity_level"]), step
        assert line(step)[0].sparsity == pytest.approx(0.1 + 0.8 * min(1, max(0, (step - 2) / 10)))
        assert ours(step)[1] == NM(2, 4)
        theirs.step()
    assert ours(12) == (TopK(sparsity=0.9), NM(2, 4))  # the very pattern, so that its masks and buckets are one


def test_a_warmup_prunes_more_from_step_to_step_and_resumes():
    def run(params, optimizer, steps):
        shares = []
        for seed in steps:
            set_gradients(params, grads(seed))
            optimizer.perturb()
            shares.append(optimizer.last.pattern.sparsity)
            set_gradients(params, grads(seed + 50))
            optimizer.step()
        return shares

    def made(params):
        return CrAM(params, lr=0.1, momentum=0.9, compression=SparsityWarmup([TopK(sparsity=0.9)], steps=6), rho=RhoWarmup(0.5, steps=4))

    params, twin = fresh(), fresh()
    whole = made(params)
    shares = run(params, whole, range(8))
    assert shares == sorted(shares) and shares[0] == 0 and shares[-2:] == [0.9, 0.9]
    first = made(twin)
    run(twin, first, range(3))
    second = made(twin)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert run(twin, second, range(3, 8)) == shares[3:]
    assert_same_bits(twin, params)


def test_rho_may_be_a_schedule_or_a_tensor():
    def moved(rho, steps=0):
        p = nn.Parameter(torch.zeros(4, 4))
        optimizer = CrAM([p], lr=0.0, compression=[], rho=rho)
        for _ in range(steps):
            two_halves(optimizer, [p], [torch.ones(4, 4)], [torch.ones(4, 4)])
        p.grad = torch.full((4, 4), 2.0)
        with optimizer.perturbed():
            return p[0, 0].item()

    assert moved(0.25) == moved(torch.tensor(0.25)) == 0.5
    assert moved(RhoWarmup(1.0, steps=4), 1) == 0.5 and moved(RhoWarmup(1.0, steps=4), 9) == 2.0
    with pytest.raises(ValueError, match=r"what rho\(step\) returns must be a number >= 0, got -1"):
        moved(lambda step: -1.0)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: SparsityWarmup([0.9], steps=4), "patterns must be patterns"),
        (lambda: SparsityWarmup([TopK(sparsity=0.9)], steps=0), "steps must be an int of at least 1"),
        (lambda: SparsityWarmup([TopK(sparsity=0.9)], steps=4, start=1.0), r"start must be a number in \[0, 1\)"),
        (lambda: SparsityWarmup([TopK(sparsity=0.9)], steps=4, power=0), "power must be a number > 0"),
        (lambda: RhoWarmup(-1.0, steps=4), "rho must be a number >= 0"),
        (lambda: RhoWarmup(1.0, steps=4, begin=-1), "begin must be an int of at least 0"),
    ],
)
def test_schedules_check_their_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- plain steps, and what is warned of ---


def test_step_without_perturb_warns_once_at_the_callers_line():
    params = fresh()
    optimizer = CrAM(params, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            set_gradients(params, grads(1))
            optimizer.step()
    assert [(w.category, w.filename) for w in caught] == [(CrAMWarning, __file__)]
    assert "plain_step()" in str(caught[0].message)


def test_plain_step_is_that_of_torch_and_says_nothing():
    params, other = fresh(), fresh()
    ours, theirs = CrAM(params, torch.optim.AdamW, lr=0.1), torch.optim.AdamW(other, lr=0.1)
    for seed in range(3):
        set_gradients(params, grads(seed))
        set_gradients(other, grads(seed))
        ours.plain_step()
        theirs.step()
    for p, q in zip(params, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert ours.param_groups[0]["cram_step"] == 0 and all(p.grad is None for p in params)


def test_plain_step_within_an_open_step_starts_from_the_clean_weights():
    params, other = fresh(), fresh()
    optimizer, judge = CrAM(params, lr=0.1), CrAM(other, lr=0.1)
    set_gradients(params, grads(1))
    optimizer.perturb()
    set_gradients(params, grads(2))
    set_gradients(other, grads(2))
    optimizer.plain_step()
    judge.plain_step()
    assert_same_bits(params, other)


def test_second_step_keeps_or_releases_the_gradients_as_asked():
    for zero_grad in (False, True):
        params = fresh()
        optimizer = CrAM(params, lr=0.1)
        set_gradients(params, grads(1))
        optimizer.first_step()
        set_gradients(params, grads(2))
        optimizer.second_step(zero_grad=zero_grad)
        assert all((p.grad is None) is zero_grad for p in params)


# --- reports ---


@pytest.mark.parametrize("options", [{"grad_norms": True}, {"max_grad_norm": 1e6}, {"normalize_grad": True}], ids=str)
def test_gradient_norms_of_both_passes(options):
    params = fresh()
    optimizer = CrAM(params, lr=0.1, **options)
    two_halves(optimizer, params, grads(1), grads(2))
    for norm, seed in ((optimizer.last.first_grad_norm, 1), (optimizer.last.second_grad_norm, 2)):
        expected = torch.cat([g.flatten() for g in grads(seed)]).double().norm()
        assert norm.dtype == torch.float32 and norm.shape == () and float(norm) == pytest.approx(float(expected), rel=1e-6)
    assert optimizer.last.to_dict()["second_grad_norm"] == float(optimizer.last.second_grad_norm)


def test_no_norm_is_computed_that_nobody_asked_for():
    params = fresh()
    optimizer = CrAM(params, lr=0.1)
    two_halves(optimizer, params, grads(1), grads(2))
    assert optimizer.last.first_grad_norm is optimizer.last.second_grad_norm is None


@pytest.mark.parametrize("pattern", [TopK(sparsity=0.6), TopK(sparsity=0.6, scope="tensor"), NM(2, 4)], ids=str)
def test_coverage_counts_what_prune_would_keep(pattern):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 6))
    model[1].requires_grad_(False)
    table = CrAM(model, lr=0.1).coverage(pattern)
    prune(model, pattern, exclude=["1.*"])
    zeros = {name: int((p == 0).sum()) for name, p in model.named_parameters()}
    for c in table:
        if c.name.startswith("1."):
            assert c.why_dense == "frozen (requires_grad=False)"
        elif c.why_dense is None:
            assert c.numel - c.kept == zeros[c.name]
    assert "0.weight" in str(table) and "kept" in str(table).splitlines()[0]


def test_a_layer_that_a_pattern_empties_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight.mul_(100)
    optimizer = CrAM(model, lr=0.1)
    with pytest.warns(CrAMWarning, match="60 % leaves no weight of 1.weight"):
        table = optimizer.coverage(TopK(sparsity=0.6))
    assert table.emptied == ("1.weight",) and "EMPTIED" in str(table)


def test_reports_between_the_halves_do_not_count_perturbed_weights():
    params = fresh()
    optimizer = CrAM(params, lr=0.1)
    set_gradients(params, grads(1))
    with optimizer.perturbed():
        assert all(c.kept is None for c in optimizer.coverage(TopK(sparsity=0.5)))
    optimizer.restore()
