"""What a new user met: names of tied weights, reports of several patterns, layers that come back, arguments of another kind. What is right
is counted by hand, or is the same run without the feature."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from optim_cases import assert_same_bits, clones, random_tensors, set_gradients, two_halves
from torch import nn

import cram_kernels
from cram_kernels import (
    NM,
    CrAM,
    CrAMWarning,
    RhoWarmup,
    SparsityWarmup,
    StepInfo,
    TopK,
    hold_zeros,
    prune,
    reconstruct,
    schedule,
    tune_batchnorm,
)
from cram_kernels.export import check_nm, export, load_sparse
from cram_kernels.inference import SparseConv2d, SparseLinear, sparsify, to_dense

SHAPES = [(8, 16), (16,), (4, 8, 3, 3)]


def fresh() -> list[nn.Parameter]:
    return [nn.Parameter(t) for t in random_tensors(SHAPES, 0)]


def tied_model() -> nn.ModuleDict:
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(16, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 16)})
    model["head"].weight = model["table"].weight
    return model


def kept_share(tensors, sparsity: float) -> list[int]:
    """How many stay of each, ranked together: what is larger than the k-th largest."""
    everything = torch.cat([t.detach().abs().flatten() for t in tensors]).sort(descending=True).values
    threshold = everything[math.ceil(len(everything) * (1 - sparsity)) - 1]
    return [int((t.detach().abs() > threshold).sum()) for t in tensors]


# --- exclude ---


@pytest.mark.parametrize("exclude", ["head.weight", "table.weight", ["head.*"], ["table.*", "h*d.weight"]], ids=str)
def test_a_tied_weight_is_excluded_by_any_of_its_names(exclude):
    model = tied_model()
    optimizer = CrAM(model, lr=0.1, compression=[TopK(sparsity=0.5, scope="tensor")], prune_embeddings=True, exclude=exclude)
    [tied] = [c for c in optimizer.coverage() if c.name == "table.weight"]
    assert tied.why_dense.startswith("excluded by ")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.perturb()
    assert model["head"].weight.all() and int((model["body"].weight == 0).sum()) == 33
    optimizer.restore()
    optimizer.add_param_group({"params": [("more.weight", nn.Parameter(torch.randn(8, 8)))]})  # the names are checked again
    assert [c.why_dense for c in optimizer.coverage() if c.name == "more.weight"] == [None]


def test_a_tied_weight_that_a_model_wraps_is_excluded_by_any_of_its_names():
    model = torch.compile(tied_model(), backend="eager")
    optimizer = CrAM(model, lr=0.1, prune_embeddings=True, exclude=["head.weight"])
    assert {c.why_dense for c in optimizer.coverage() if c.name == "table.weight"} == {"excluded by 'table.weight'"}


@pytest.mark.parametrize(
    "call",
    [
        lambda model: CrAM(model, lr=0.1, exclude="haed.weight"),
        lambda model: prune(model, TopK(sparsity=0.5), exclude=["haed.weight"]),
        lambda model: hold_zeros(model, exclude=["haed.weight"]),
        lambda model: check_nm(model, exclude=["haed.weight"]),
    ],
    ids=["CrAM", "prune", "hold_zeros", "check_nm"],
)
def test_a_misspelt_name_is_refused_with_those_that_are_near(call):
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    with torch.no_grad():
        model["body"].weight.zero_()
    found = "exclude must match the name of a .*, got 'haed.weight', which matches none of 4 names; similar: 'head.weight'"
    with pytest.raises(ValueError, match=found):
        call(model)


def test_no_name_is_excluded_by_none():
    model = nn.Sequential(nn.Linear(8, 8))
    prune(model, TopK(sparsity=0.5), exclude=None)
    with hold_zeros(model, exclude=None) as held:
        assert held.zeros == {"0.weight": 33}
    check_nm(model, exclude=None)


# --- coverage ---


def test_coverage_has_every_pattern_of_every_group():
    params = fresh() + [nn.Parameter(t) for t in random_tensors([(8, 8), (8, 6)], 3)]
    groups = [
        {"params": params[:3]},
        {"params": params[3:4], "compression": [NM(2, 4), TopK(sparsity=0.9)]},
        {"params": params[4:], "compression": []},
    ]
    optimizer = CrAM(groups, lr=0.1, compression=[TopK(sparsity=0.5), TopK(sparsity=0.9)])
    table = optimizer.coverage()
    assert list(dict.fromkeys(c.pattern for c in table)) == [TopK(sparsity=0.5), TopK(sparsity=0.9), NM(2, 4)]
    found = {(c.pattern, c.name): c.kept if c.why_dense is None else c.why_dense for c in table}
    half, tenth = kept_share([params[0], params[2]], 0.5), kept_share([params[0], params[2], params[3]], 0.9)
    assert [found[TopK(sparsity=0.5), name] for name in ("0.0", "0.2")] == half
    assert [found[TopK(sparsity=0.9), name] for name in ("0.0", "0.2", "1.0")] == tenth  # those that draw it are ranked together
    assert found[TopK(sparsity=0.5), "1.0"] == "its group draws 2:4 or 90 %"
    assert found[NM(2, 4), "1.0"] == 32 and found[NM(2, 4), "0.0"] == "its group draws 50 % or 90 %"
    assert {found[p, "2.0"] for p in (TopK(sparsity=0.5), TopK(sparsity=0.9), NM(2, 4))} == {"its group draws no pattern"}
    lines = str(table).splitlines()
    assert len(lines) == 1 + 5 + 1 and "kept at sparsity 50 %" in lines[0] and "kept at 2:4" in lines[0]
    assert "50 %: its group draws 2:4 or 90 %" in lines[4] and "dense" in lines[4] and "50.00%" in lines[4]
    assert lines[-1].split()[:6] == ["pruned", "parameters", f"{sum(p.numel() for p in params):,}", "416", "480", "64"]


def test_coverage_of_one_pattern_goes_by_the_groups_that_draw_it():
    params = fresh()
    optimizer = CrAM([{"params": params[:2]}, {"params": params[2:], "compression": [NM(2, 4)]}], lr=0.1, compression=[TopK(sparsity=0.5)])
    assert [c.why_dense is None for c in optimizer.coverage(NM(2, 4))] == [False, False, True]
    assert [c.why_dense is None for c in optimizer.coverage(TopK(sparsity=0.5))] == [True, False, False]
    assert [c.why_dense is None for c in optimizer.coverage(TopK(sparsity=0.7))] == [True, False, False]  # in place of the optimizer's


def test_coverage_without_a_pattern():
    for compression in (None, []):
        table = CrAM(fresh(), lr=0.1, compression=compression).coverage()
        assert [(c.pattern, c.why_dense) for c in table] == [(None, "its group draws no pattern")] * 3
        assert "no pattern" in str(table)


def test_coverage_names_what_each_pattern_empties():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight.mul_(100)
    optimizer = CrAM(model, lr=0.1, compression=[TopK(sparsity=0.3), TopK(sparsity=0.6)])
    with pytest.warns(CrAMWarning, match="60 % leaves no weight of 1.weight") as caught:
        table = optimizer.coverage()
    assert len(caught) == 1 and table.emptied == ("1.weight",)
    [line] = [line for line in str(table).splitlines() if line.startswith("1.weight")]
    assert "60 %: EMPTIED" in line and "0.00%" in line


def test_coverage_follows_a_warm_up():
    compression = SparsityWarmup([TopK(sparsity=0.8)], steps=2, power=1)
    params = fresh()
    optimizer = CrAM(params, lr=0.1, compression=compression)
    assert {c.pattern for c in optimizer.coverage()} == {TopK(sparsity=0.0)}
    two_halves(optimizer, params, random_tensors(SHAPES, 1), random_tensors(SHAPES, 2))
    assert {c.pattern for c in optimizer.coverage()} == {TopK(sparsity=0.4)}


def test_last_names_what_a_step_empties():
    """Two groups: one under a threshold of its own, that leaves something everywhere; the other without a weight in its small tensor."""
    big, small, own = (nn.Parameter(t) for t in random_tensors([(8, 8), (4, 4), (4, 4)], 0))
    with torch.no_grad():
        small.mul_(0.01)
    groups = [{"params": [("own", own)], "compression": [TopK(sparsity=0.5)]}, {"params": [("big", big), ("small", small)]}]
    optimizer = CrAM(groups, lr=1e-3, compression=[TopK(sparsity=0.4)], rho=0.0)
    for p in (big, small, own):
        p.grad = torch.zeros_like(p)
    optimizer.perturb()
    assert [int(p.count_nonzero()) for p in (own, big, small)] == [7, 47, 0] and optimizer.last.emptied == ("small",)
    for p in (big, small, own):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert optimizer.last.emptied == ("small",)
    assert pickle.loads(pickle.dumps(optimizer.last)).emptied == () and StepInfo().emptied == ()
    last, held = optimizer.last, [weakref.ref(p) for p in (big, small, own)]
    del optimizer, groups, big, small, own, p
    gc.collect()
    assert last.emptied == () and [p() for p in held] == [None] * 3


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("where", [{(1, 1)}, {(2, 0)}, {(1, 0), (2, 1)}], ids=str)
def test_the_strides_of_a_gradient_change_nothing_in_any_group(base, hooks, where):
    """Of the second of two groups with patterns of their own; `where`: in which step, and in which pass of it."""

    def run(transposed) -> list[torch.Tensor]:
        first, second = (nn.Parameter(t) for t in random_tensors([(8, 8), (4, 8)], 0))
        optimizer = CrAM([{"params": [first]}, {"params": [second], "compression": [NM(2, 4)]}], base, lr=0.1)
        if hooks:
            optimizer.base_optimizer.register_step_post_hook(lambda *_: None)
        for step in range(4):
            for half, call in enumerate((optimizer.perturb, optimizer.step)):
                first.grad, g = random_tensors([(8, 8), (4, 8)], 2 * step + half + 1)
                second.grad = g.t().contiguous().t() if (step, half) in transposed else g
                call()
        return clones([first, second])

    assert_same_bits(run(where), run(set()))


# --- names ---


def test_a_list_of_parameters_has_names_once_a_model_is_attached():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    optimizer = CrAM(list(model.parameters()), lr=0.1, compression=[NM(1, 4)])
    assert [c.name for c in optimizer.coverage()] == ["0.0", "0.1", "0.2", "0.3"]
    optimizer.attach(model)
    assert [c.name for c in optimizer.coverage()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.perturb()
    set_gradients(list(model.parameters()), [torch.ones_like(p) for p in model.parameters()])
    model[1].bias.data = model[1].bias.data.double()
    with pytest.raises(RuntimeError, match=r"CrAM: parameter '1\.bias' must keep its dtype"):
        optimizer.step()
    assert "param_names" not in optimizer.state_dict()["param_groups"][0]  # torch would refuse a group without
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4))]})
    model[0].weight = optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(8, 8))
    assert [c.name for c in optimizer.coverage()] == ["0.weight", "0.bias", "1.weight", "1.bias", "1.0"]
    copied = copy.deepcopy(optimizer)
    assert [c.name for c in copied.coverage()][:2] == ["0.weight", "0.bias"]


# --- there and back ---


def back_and_forth(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[0] = SparseLinear(model[0])
        model[2] = SparseLinear(model[2])
    gc.collect()
    assert to_dense(model) is model and type(model[0]) is nn.Linear


@pytest.mark.parametrize("base, options", [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
@pytest.mark.parametrize("form", ["CrAM", "torch"])
def test_an_optimizer_goes_on_after_to_dense(base, options, form):
    def run(between) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        model[2].bias.requires_grad_(False)
        optimizer = CrAM(model, base, lr=0.1, **options) if form == "CrAM" else base(model.parameters(), lr=0.1, **options)
        x = torch.randn(4, 16)

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        prune(model, TopK(sparsity=0.7))
        between(model)
        for _ in range(2):
            optimizer.step(closure)
        assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
        assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in model.parameters()]
        return clones(model.parameters())

    assert_same_bits(run(back_and_forth), run(lambda model: None))


def test_a_weight_that_nobody_holds_is_freed_while_its_layer_is_sparse():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    model[0].weight.requires_grad_(False)
    held = [weakref.ref(p) for p in model.parameters()]
    values = clones(model.parameters())
    model[0], model[2] = SparseLinear(model[0]), SparseLinear(model[2])
    gc.collect()
    assert all(p() is None for p in held)
    to_dense(model)
    assert_same_bits(list(model.parameters()), values)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]


def test_what_is_loaded_into_a_sparse_layer_is_there_when_it_is_dense_again():
    model, other = (nn.Sequential(nn.Linear(16, 16)) for _ in range(2))
    weight = model[0].weight
    model[0] = SparseLinear(model[0])
    model.load_state_dict(other.state_dict())
    to_dense(model)
    assert model[0].weight is weight and torch.equal(weight, other[0].weight)


def test_a_weight_that_was_written_to_meanwhile_stays():
    model = nn.ModuleDict({"table": nn.Embedding(16, 8), "head": nn.Linear(8, 16)})
    model["head"].weight = model["table"].weight
    before = model["head"].weight.detach().clone()
    model["head"] = SparseLinear(model["head"])
    with torch.no_grad():
        model["table"].weight.add_(1)
    with pytest.warns(CrAMWarning, match="to_dense: a weight of shape .16, 8. is a new Parameter"):
        to_dense(model)
    assert torch.equal(model["head"].weight, before) and torch.equal(model["table"].weight, before + 1)
    model["head"].weight = model["table"].weight
    model["head"] = SparseLinear(model["head"])
    assert to_dense(model)["head"].weight is model["table"].weight


def test_a_copy_of_a_sparse_model_has_parameters_of_its_own():
    model = nn.Sequential(nn.Linear(16, 16))
    weight = model[0].weight
    model[0] = SparseLinear(model[0])
    other = to_dense(copy.deepcopy(model))
    assert other[0].weight is not weight and torch.equal(other[0].weight, weight)
    assert to_dense(model)[0].weight is weight


@pytest.mark.parametrize("between", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_sparse_layers_of_one_weight_are_tied_again(between):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    values = clones(layer.weight for layer in model)
    for i, layer in enumerate(model):
        model[i] = SparseLinear(layer)
    del layer
    model = to_dense(between(model))
    assert model[0].weight is model[2].weight and model[1].weight is not model[0].weight and model[0].bias is not model[2].bias
    assert_same_bits([layer.weight for layer in model], values)


def test_tied_sparse_layers_into_which_two_weights_were_loaded_part():
    model, other = (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(2))
    model[1].weight = model[0].weight
    model[0], model[1] = SparseLinear(model[0]), SparseLinear(model[1])
    model.load_state_dict(other.state_dict())
    to_dense(model)
    assert_same_bits([layer.weight for layer in model], [layer.weight for layer in other])


def test_no_weight_of_an_open_step_becomes_dense():
    model = nn.Sequential(nn.Linear(16, 16))
    optimizer = CrAM(model, lr=0.1)
    model[0].weight.grad = torch.ones(16, 16)
    before, model[0] = model[0].weight.detach().clone(), SparseLinear(model[0])
    optimizer.perturb()
    with pytest.raises(RuntimeError, match=r"to_dense: parameter '0\.weight' must not be perturbed"):
        to_dense(model)
    optimizer.restore()
    assert torch.equal(to_dense(model)[0].weight, before)


def test_an_attached_optimizer_knows_a_layer_that_came_back():
    model = nn.Sequential(nn.Linear(16, 16))
    optimizer = CrAM(model, lr=0.1)
    before = model[0].weight.detach().clone()
    model[0] = SparseLinear(model[0])
    to_dense(model)
    model[0].weight.grad = torch.ones(16, 16)
    with optimizer.perturbed():
        assert torch.equal(model.state_dict()["0.weight"], before) and not torch.equal(model[0].weight, before)


# --- arguments of another kind ---

LINEAR = nn.Linear(4, 4)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: tune_batchnorm([torch.ones(2, 4)], LINEAR), "tune_batchnorm: model must be a torch.nn.Module, got list"),
        (lambda: tune_batchnorm(LINEAR, torch.ones(2, 4)), "tune_batchnorm: loader must give batches, as a DataLoader .* got Tensor"),
        (lambda: tune_batchnorm(LINEAR, {"input": torch.ones(2, 4)}), "tune_batchnorm: loader must give batches, .* got dict"),
        (lambda: tune_batchnorm(LINEAR, None), "tune_batchnorm: loader must give batches, .* got NoneType"),
        (lambda: tune_batchnorm(LINEAR, [torch.ones(2, 4)], True), "tune_batchnorm: batches must be an int of at least 1, got True"),
        (lambda: tune_batchnorm(LINEAR, [torch.ones(2, 4)], 0.5), "tune_batchnorm: batches must be an int of at least 1, got 0.5"),
        (lambda: cram_kernels.frozen_batchnorm(LINEAR.parameters()), "frozen_batchnorm: model must be a torch.nn.Module, got generator"),
        (lambda: reconstruct(LINEAR, copy.deepcopy(LINEAR), torch.ones(2, 4)), "reconstruct: loader must give batches, .* got Tensor"),
        (lambda: reconstruct(LINEAR, copy.deepcopy(LINEAR), [torch.ones(2, 4)], True), "reconstruct: samples must be an int"),
        (lambda: sparsify(torch.ones(2, 2)), "sparsify: model must be a torch.nn.Module, got Tensor"),
        (lambda: sparsify(LINEAR.eval(), min_speedup="2"), "sparsify: min_speedup must be at least 1, got '2'"),
        (lambda: sparsify(LINEAR.eval(), min_speedup=float("nan")), "sparsify: min_speedup must be at least 1, got nan"),
        (lambda: to_dense(None), "to_dense: model must be a torch.nn.Module, got NoneType"),
        (lambda: CrAM(3, lr=0.1), "CrAM: params must be a model, or parameters or groups as in torch, got int"),
        (lambda: CrAM(LINEAR, LINEAR, lr=0.1), "CrAM: base_optimizer must be a class such as torch.optim.SGD, or an instance"),
        (lambda: CrAM(LINEAR, TopK, lr=0.1), "CrAM: base_optimizer must be a class such as torch.optim.SGD, or an instance"),
        (lambda: CrAM(LINEAR, lr=0.1, compression=LINEAR), "CrAM: compression must be a list of patterns"),
        (lambda: CrAM(LINEAR, lr=0.1, rho=LINEAR), "CrAM: rho must be a number >= 0, a tensor of one, or a schedule"),
        (lambda: cram_kernels.TopkCrAM(LINEAR, torch.optim.SGD, lr=0.1, unif_prune="no"), "CrAM: unif_prune must be True or False"),
        (lambda: cram_kernels.TopkCrAM(LINEAR, torch.optim.SGD, lr=0.1, sparsities=["x"]), "TopK: sparsity must be a number in"),
        (lambda: CrAM(LINEAR, lr=0.1).load_state_dict(LINEAR.state_dict()), "state_dict must be what .* got OrderedDict of another kind"),
        (lambda: CrAM(LINEAR, lr=0.1).add_param_group([LINEAR.weight]), "param_group must be a dict with params, got list"),
        (lambda: export(LINEAR, "a.safetensors", pattern=TopK(sparsity=0.5)), r"export: pattern must be NM\(n, m\), got TopK"),
        (lambda: export(LINEAR, "a.safetensors", prune="no"), "export: prune must be True or False, got 'no'"),
        (lambda: load_sparse({}, "a.safetensors"), "load_sparse: model must be a torch.nn.Module, got dict"),
        (lambda: SparseLinear(LINEAR.weight), "SparseLinear: linear must be an nn.Linear, got Parameter"),
        (lambda: SparseConv2d(LINEAR), "SparseConv2d: conv must be an nn.Conv2d, got Linear"),
        (lambda: NM(True, 4), "NM: n and m must be ints"),
        (lambda: SparsityWarmup([TopK(sparsity=0.5)], steps=True), "steps must be an int of at least 1, got True"),
        (lambda: SparsityWarmup([TopK(sparsity=0.5)], steps=4, start=True), "start must be a number"),
        (lambda: SparsityWarmup([TopK(sparsity=0.5)], steps=4, power=float("inf")), "power must be a number > 0, got inf"),
        (
            lambda: SparsityWarmup([TopK(sparsity=0.9), TopK(sparsity=0.5)], steps=4, start=0.6),
            r"start must be at most the sparsity of each pattern, got 0.6 above TopK\(sparsity=0.5\)",
        ),
        (lambda: RhoWarmup(True, steps=4), "RhoWarmup: rho must be a number >= 0, got True"),
        (lambda: RhoWarmup("0.1", steps=4), "RhoWarmup: rho must be a number >= 0, got '0.1'"),
        (lambda: RhoWarmup(0.1, steps=4, start=float("nan")), "RhoWarmup: start must be a number >= 0, got nan"),
        (lambda: RhoWarmup(0.1, steps=4.0), "RhoWarmup: steps must be an int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_of_another_kind_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: cram_kernels.train_step(LINEAR, LINEAR, torch.ones(2, 4)), "train_step: optimizer must be a torch optimizer, got Linear"),
        (
            lambda: cram_kernels.train_step(torch.optim.SGD(LINEAR.parameters(), lr=0.1), torch.ones(()), torch.ones(2, 4)),
            "train_step: loss must be a function that gives the loss of a batch, got Tensor",
        ),
        (
            lambda: cram_kernels.train_step(torch.optim.SGD(LINEAR.parameters(), lr=0.1), LINEAR, torch.ones(2, 4), scaler=2.0),
            "train_step: scaler must be a torch.amp.GradScaler, got float",
        ),
        (
            lambda: cram_kernels.train_step(torch.optim.SGD(LINEAR.parameters(), lr=0.1), LINEAR, torch.ones(2, 4)),
            r"train_step: loss must return a tensor of one number, got shape \(2, 4\)",
        ),
        (lambda: CrAM(LINEAR, lr=0.1).step(LINEAR), "CrAM: closure must be a function that computes the loss"),
        (lambda: CrAM(LINEAR, lr=0.1).plain_step(CrAM(LINEAR, lr=0.1)), "scaler must be a torch.amp.GradScaler, got CrAM"),
        (lambda: cram_kernels.save("a.pt", {}), "save: path, the second argument, must be a path, got dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_of_another_type_are_refused(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_a_loader_that_is_too_short_is_started_again():
    """100 batches are 100 batches, each of equal weight: 2.5 epochs of 2 of 5."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    batches = [torch.randn(4, 3) for _ in range(2)]
    tune_batchnorm(model, batches, 5)
    means = torch.stack([b.mean(0) for b in batches])
    torch.testing.assert_close(model[0].running_mean, (3 * means[0] + 2 * means[1]) / 5)
    tune_batchnorm(model, iter(batches), 5)
    torch.testing.assert_close(model[0].running_mean, means.mean(0))


# --- counts ---


def test_a_pattern_of_weights_on_two_devices_counts_once():
    groups = [{"cram_step": 3, "cram_mask_uses": '{"2:4": 1}'}]
    schedule.count(groups, [NM(2, 4), NM(2, 4)], {"2:4"})
    assert groups == [{"cram_step": 4, "cram_mask_uses": '{"2:4": 2}'}]


def test_the_share_of_kept_weights_is_of_those_that_were_ranked():
    """Two patterns: the masks of one are taken from an earlier step, and say nothing of the share of the other."""
    params = fresh()
    groups = [{"params": params[:2]}, {"params": params[2:], "compression": [TopK(sparsity=0.25)]}]
    optimizer = CrAM(groups, lr=0.1, compression=[TopK(sparsity=0.75)], mask_period=2)
    two_halves(optimizer, params[:2], random_tensors(SHAPES, 1)[:2], random_tensors(SHAPES, 2)[:2])
    set_gradients(params, random_tensors(SHAPES, 3))
    optimizer.perturb()  # the second use of the first pattern, the first one of the other
    nonzero = int(params[2].count_nonzero()) / params[2].numel()
    assert float(optimizer.last.kept_share) == pytest.approx(nonzero) and optimizer.last.numels == (params[2].numel(),)
    optimizer.restore()
