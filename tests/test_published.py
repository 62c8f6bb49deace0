"""The drop-in names against the published algorithm (published.py), where that is right: equal weights, to the bit, over many steps."""

import inspect

import pytest
import torch
from optim_cases import assert_same_bits, batches, network, random_tensors, set_gradients, two_halves, weights
from published_cases import EXACT, SHAPES, gradients, optimizer, pair, step
from torch import Tensor, nn

import cram_kernels
from cram_kernels import NM, CrAM, TopK, reference


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are small: a second thread would only wait."""
    set_threads(1)


def train(where: str, name: str, steps: int = 25, base=torch.optim.SGD, **options) -> tuple[nn.Module, list[tuple[int, ...]]]:
    """A training loop as it is written for the published code; also how many weights of each layer were there in each second pass."""
    model = network()
    sam = optimizer(where, name, model.parameters(), base, **options)
    kept = []
    for images, labels in batches(steps):
        nn.functional.cross_entropy(model(images), labels).backward()

        def closure(images=images, labels=labels):
            kept.append(tuple(int(p.count_nonzero()) for p in model.parameters() if p.dim() > 1))
            nn.functional.cross_entropy(model(images), labels).backward()

        sam.step(closure)
        sam.zero_grad()
    return model, kept


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("flags", [{}, {"plus_version": False}, {"sparse_grad": False}, {"unif_prune": True}, {"rho": 0.0}], ids=str)
def test_topk_equals_published(sparsity, flags):
    options = {"sparsities": [sparsity], "rho": 0.1, **flags}
    ours, kept = train("cram_kernels", "TopkCrAM", steps=10, **options)
    theirs, kept_theirs = train("published", "TopkCrAM", steps=10, **options)
    assert kept == kept_theirs
    assert_same_bits(weights(ours), weights(theirs))


def level_of(kept: tuple[int, ...], sizes: tuple[int, ...], sparsities) -> float:
    """The level at which so many weights are there; ties do not occur in these runs."""
    (level,) = [s for s in sparsities if sum(kept) == TopK(s).k(sum(sizes)) - 1]
    return level


@pytest.mark.parametrize("name, options", [("TopkCrAM", {}), ("TopkCrAMPeriod", {"mask_freq": 3})])
def test_multi_equals_published_with_the_same_levels(name, options):
    """Ours draws the levels from a hash and not from numpy; given these levels the published code arrives at the same bits."""
    options = {"sparsities": [0.5, 0.7, 0.9], **options}
    sizes = tuple(p.numel() for p in network().parameters() if p.dim() > 1)
    ours, kept = train("cram_kernels", name, steps=40, **options)
    levels = (
        [level_of(k, sizes, options["sparsities"]) for k in kept] if name == "TopkCrAM" else [nearest(sum(k) / sum(sizes)) for k in kept]
    )
    assert set(levels) == {0.5, 0.7, 0.9}
    theirs, kept_theirs = train("published", name, steps=40, levels=levels, **options)
    assert kept == kept_theirs
    assert_same_bits(weights(ours), weights(theirs))


def nearest(density: float) -> float:
    """The level of a mask that is some steps old: a few of the weights under it may be exact zeros, never a tenth of them."""
    return min((0.5, 0.7, 0.9), key=lambda level: abs(1 - level - density))


@pytest.mark.parametrize("flags", [{}, {"plus_version": False}, {"sparse_grad": False}], ids=str)
def test_nm_equals_published_with_the_same_patterns(flags):
    """Every layer but the stem divides by 8: the stem has 3 input channels, where the published groups straddle, and is left out here."""

    def run(where, **options):
        model = network()
        model[0].requires_grad_(False)  # the published code fails on a frozen 4-d parameter in the list, so it is not in the list
        sam = optimizer(where, "NMTopkCrAM", [p for p in model.parameters() if p.requires_grad], **flags, **options)
        patterns = []
        for images, labels in batches(25):
            nn.functional.cross_entropy(model(images), labels).backward()

            def closure(images=images, labels=labels):
                quads = model[8].weight.detach().view(-1, 4).count_nonzero(1)
                patterns.append((2, 4) if bool((quads == 2).all()) else (4, 8))
                nn.functional.cross_entropy(model(images), labels).backward()

            sam.step(closure)
            sam.zero_grad()
        return model, patterns

    ours, patterns = run("cram_kernels")
    assert set(patterns) == {(2, 4), (4, 8)}
    theirs, patterns_theirs = run("published", levels=patterns)
    assert patterns == patterns_theirs
    assert_same_bits(weights(ours), weights(theirs))


def test_nm_leaves_other_dims_dense_as_published():
    """Conv1d and Conv3d: only weights of 2 and 4 dims are pruned (CrAM itself prunes them along the input channels)."""
    shapes = [(4, 8, 5), (4, 8, 3, 3), (2, 8, 2, 2, 2)]
    a, ours, b, theirs = pair("NMTopkCrAM", shapes, theirs={"levels": [(2, 4)]})
    between, between_theirs = (step(s, p, gradients(shapes), gradients(shapes, 6)) for s, p in ((a, ours), (b, theirs)))
    for kept in (between, between_theirs):
        assert [int(t.count_nonzero()) for t in kept] == [160, 144, 128]
    params = [nn.Parameter(random_tensors(shapes[:1], 3)[0])]
    set_gradients(params, gradients(shapes[:1]))
    with CrAM(params, compression=[NM(2, 4)], lr=0.1).perturbed():
        assert int(params[0].count_nonzero()) == 80


@pytest.mark.parametrize("base, options", [(torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}), (torch.optim.NAdam, {"lr": 0.002})])
def test_any_base_equals_published(base, options):
    """With a base that takes its own step the hyperparameters need not be powers of two."""
    ours, _ = train("cram_kernels", "TopkCrAM", steps=10, base=base, sparsities=[0.8], **options)
    theirs, _ = train("published", "TopkCrAM", steps=10, base=base, sparsities=[0.8], **options)
    assert_same_bits(weights(ours), weights(theirs))


def our_scale(rho: float, grads: list[Tensor]) -> Tensor:
    return torch.tensor(rho) / (reference.grad_norm(grads) + 1e-12)


@pytest.mark.parametrize("name, options", [("SAM", {}), ("TopkCrAM", {"grad_norm": True, "sparsities": [0.8]})])
def test_normalized_perturbation(name, options):
    """Equal to the bit with our norm (float64, fixed order, one division); torch's own differs in its last bits, and u by as little."""
    ours, _ = train("cram_kernels", name, steps=10, **options)
    theirs, _ = train("published", name, steps=10, scale=our_scale, **options)
    assert_same_bits(weights(ours), weights(theirs))
    a, params_a, b, params_b = pair(name, options=options)
    between_a, between_b = (step(s, p, gradients(), gradients(seed=6)) for s, p in ((a, params_a), (b, params_b)))
    for x, y in zip(between_a, between_b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_groups_have_thresholds_of_their_own():
    """As published: one threshold a parameter group, where CrAM(TopK(s)) has one for the model."""
    first, second = gradients(), gradients(seed=6)

    def run(where):
        params = [nn.Parameter(t * (10 if i == 0 else 1)) for i, t in enumerate(random_tensors(SHAPES, seed=3))]
        sam = optimizer(where, "TopkCrAM", [{"params": params[:2], "rho": 0.2}, {"params": params[2:]}], sparsities=[0.5])
        between = step(sam, params, first, second)
        return params, [int(b.count_nonzero()) for b in between]

    ours, kept = run("cram_kernels")
    theirs, kept_theirs = run("published")
    assert kept == kept_theirs == [63, 16, 287, 8]
    assert_same_bits(ours, theirs)


def test_published_signatures():
    """Names, order and defaults of the constructors, so that positional calls work too."""
    empty = inspect.Parameter.empty

    def signature(cls):
        parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return {p.name: list(p.default) if isinstance(p.default, tuple | list) else p.default for p in parameters}

    common = {"params": empty, "base_optimizer": empty, "rho": 0.05}
    topk = {"grad_norm": False, "plus_version": True, "unif_prune": False, "sparse_grad": True}
    assert list(signature(cram_kernels.SAM).items()) == list(common.items())
    assert list(signature(cram_kernels.TopkCrAM).items()) == list({**common, "sparsities": [0.5, 0.7, 0.9], **topk}.items())
    nm = {**common, "grad_norm": False, "sparse_grad": True, "plus_version": True}
    assert list(signature(cram_kernels.NMTopkCrAM).items()) == list(nm.items())
    period = {**common, "sparsities": [0.5], **topk, "mask_freq": 1}
    assert list(signature(cram_kernels.TopkCrAMPeriod).items()) == list(period.items())


def test_first_and_second_step_equal_published():
    """The loop that calls the halves itself."""
    a, params_a, b, params_b = pair("TopkCrAM", options={"sparsities": [0.5]})
    for seed in range(5):
        for sam, params in ((a, params_a), (b, params_b)):
            set_gradients(params, gradients(seed=seed))
            sam.first_step(zero_grad=True)
            assert all(p.grad is None for p in params)
            set_gradients(params, gradients(seed=100 + seed))
            sam.second_step(zero_grad=True)
            assert all(p.grad is None for p in params)
        assert_same_bits(params_a, params_b)


def test_nothing_is_printed(capsys):
    pair("TopkCrAMPeriod", options={"sparsities": [0.5]})
    assert capsys.readouterr().out == ""


def test_nan_and_ties_are_ranked_as_published():
    """A NaN takes the first rank and goes; all weights that tie with the k-th go."""
    start = torch.tensor([[1.0, -2.0, 2.0, float("nan")], [3.0, 4.0, 0.5, -2.0]])
    zero = [torch.zeros(2, 4)]
    ours, theirs = [nn.Parameter(start.clone())], [nn.Parameter(start.clone())]
    between = step(optimizer("cram_kernels", "TopkCrAM", ours, sparsities=[0.5]), ours, zero, zero)[0]
    between_theirs = step(optimizer("published", "TopkCrAM", theirs, sparsities=[0.5]), theirs, zero, zero)[0]
    torch.testing.assert_close(between, between_theirs, rtol=0, atol=0, equal_nan=True)
    assert between[0].isnan().tolist() == [False, False, False, True] and between[1].tolist() == [3.0, 4.0, 0.0, 0.0]


GROUP = [TopK(0.5, scope="group"), TopK(0.9, scope="group")]


@pytest.mark.parametrize(
    "name, options, cram",
    [
        ("SAM", {}, {"compression": [], "plus": False, "normalize_grad": True}),
        ("TopkCrAM", {"sparsities": [0.5, 0.9]}, {"compression": GROUP}),
        (
            "TopkCrAM",
            {"sparsities": [0.5, 0.9], "plus_version": False, "sparse_grad": False, "grad_norm": True},
            {"compression": GROUP, "plus": False, "sparse_grad": False, "normalize_grad": True},
        ),
        ("NMTopkCrAM", {}, {"compression": [NM(2, 4), NM(4, 8)]}),
        ("TopkCrAMPeriod", {"sparsities": [0.5, 0.9], "mask_freq": 3}, {"compression": GROUP, "mask_period": 3}),
    ],
)
def test_names_are_cram(name, options, cram):
    """The table of docs/migrating.md: each name is CrAM with other defaults, not a second optimizer."""
    assert issubclass(getattr(cram_kernels, name), CrAM)
    params, other = ([nn.Parameter(t) for t in random_tensors(SHAPES, 3)] for _ in range(2))
    ours, plain = optimizer("cram_kernels", name, params, **options), CrAM(other, torch.optim.SGD, **EXACT, **cram)
    for seed in range(6):
        step(ours, params, gradients(seed=seed), gradients(seed=seed + 50))
        two_halves(plain, other, gradients(seed=seed), gradients(seed=seed + 50))
        assert_same_bits(params, other)
