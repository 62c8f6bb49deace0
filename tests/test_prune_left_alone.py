"""What prune leaves alone or refuses by name: parameters of odd kinds, parts of parametrized weights, tables, outputs on axis 1."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune
from torch.testing._internal.two_tensor import TwoTensor

from cram_kernels import NM, CrAM, CrAMWarning, Pattern, TopK, prune

HALF = TopK(sparsity=0.5)


def halved(*weights: Tensor) -> list[Tensor]:
    """By a full sort: of n weights the n / 2 + 1 smallest go (the k-th largest, k = n / 2, goes too)."""
    values = torch.cat([w.detach().flatten() for w in weights]).abs().sort(descending=True).values
    return [torch.where(w.abs() > values[len(values) // 2 - 1], w, 0.0).detach() for w in weights]


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates them
        return torch.quantize_per_tensor(torch.ones(8, 8), 0.1, 0, torch.qint8)


def nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)])


def csr() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in beta, says torch
        return torch.eye(8).to_sparse_csr()


def freed() -> Tensor:
    """What FSDP1 leaves of a parameter between two forward passes."""
    t = torch.ones(8, 8)
    t.untyped_storage().resize_(0)
    return t


class NoFunctions(Tensor):
    """All that it can do is to become a parameter."""

    @classmethod
    def __torch_function__(cls, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func.__name__ in ("detach", "requires_grad_"):
            return super().__torch_function__(func, types, args, kwargs)
        raise TypeError(f"no {func}")


class NoOperations(Tensor):
    """The same, of a tensor without memory."""

    @staticmethod
    def __new__(cls) -> "NoOperations":
        return Tensor._make_wrapper_subclass(cls, (8, 8), dispatch_sizes_strides_policy="sizes")

    @classmethod
    def __torch_dispatch__(cls, func: Callable, *_: object) -> object:
        if func is torch.ops.aten.detach.default:
            return cls()
        raise TypeError(f"no {func}")


# kind -> a tensor of 2 dims, why it stays dense where it is frozen, how many zeros are reported
ODD: dict[str, tuple[Callable[[], Tensor], str, int | None]] = {
    "meta": (lambda: torch.empty(8, 8, device="meta"), "cannot be pruned: a meta tensor", None),
    "float8": (lambda: torch.ones(8, 8).to(torch.float8_e4m3fn), "cannot be pruned: torch.float8_e4m3fn", None),
    "float64": (lambda: torch.eye(8, dtype=torch.float64), "cannot be pruned: torch.float64", 56),
    "uint16": (lambda: torch.ones(8, 8, dtype=torch.uint16), "dtype torch.uint16", None),
    "complex": (lambda: torch.eye(8, dtype=torch.complex64), "dtype torch.complex64", 56),
    "coo": (lambda: torch.eye(8).to_sparse(), "cannot be pruned: layout torch.sparse_coo", None),
    "csr": (csr, "cannot be pruned: layout torch.sparse_csr", None),
    "quantized": (quantized, "dtype torch.qint8", None),
    "subclass": (lambda: TwoTensor(torch.ones(8, 8), torch.ones(8, 8)), "cannot be pruned: type TwoTensor", None),
    "no operations": (NoOperations, "cannot be pruned: type NoOperations", None),
    "nested": (nested, "cannot be pruned: a nested tensor", None),
    "strided": (lambda: torch.eye(8)[:, ::2], "cannot be pruned: strides (8, 2) for shape (8, 4); make it contiguous", 28),
    "negative": (lambda: torch._neg_view(torch.ones(8, 8)), "cannot be pruned: a view with the negative bit; call resolve_neg()", 0),
    "freed": (freed, "cannot be pruned: memory that was freed: gather the model first", None),
    "lazy": (lambda: nn.UninitializedParameter(requires_grad=False), "cannot be pruned: a lazy one: run a forward pass first", None),
    "empty": (lambda: torch.empty(0, 8), "empty", 0),
}


def with_odd(kind: str, **options: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    odd = ODD[kind][0]()
    model.odd = odd if isinstance(odd, nn.Parameter) else nn.Parameter(odd, **options)
    return model


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("exclude", [["odd"], []], ids=["excluded", "frozen"])
def test_odd_parameters_are_left_alone_and_reported(kind: str, exclude: list[str]) -> None:
    model = with_odd(kind, requires_grad=False)
    odd, version = model.odd, 0 if kind == "lazy" else model.odd._version
    wanted = halved(model[0].weight)[0]
    report = prune(model, HALF, exclude)
    assert torch.equal(model[0].weight, wanted)
    assert model.odd is odd and (kind == "lazy" or odd._version == version)
    layer = next(layer for layer in report.layers if layer.name == "odd")
    assert (layer.why_dense, layer.zeros) == ("excluded" if exclude else ODD[kind][1], ODD[kind][2])
    line = next(line for line in str(report).splitlines() if line.startswith("odd"))
    assert ("unknown" in line) == (layer.zeros is None)
    assert ("zeros of 1 unknown" in str(report).splitlines()[-1]) == (layer.zeros is None)
    assert report.to_dict()["all"]["zeros"] == 65 + int((model[0].bias == 0).sum()) + (layer.zeros or 0)


@pytest.mark.parametrize("kind", [kind for kind in ODD if not ODD[kind][1].startswith(("dtype", "empty")) and kind != "lazy"])
def test_odd_parameters_that_train_are_refused_by_name(kind: str) -> None:
    """Whoever trains a weight expects it to be pruned: silence would be a surprise."""
    model = with_odd(kind, requires_grad=True)
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"prune: parameter 'odd' must .*, or exclude it"):
        prune(model, HALF)
    assert torch.equal(model[0].weight, before)


def test_vectors_of_odd_kinds_do_not_fit_and_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    model.scale = nn.Parameter(torch.ones(8).to(torch.float8_e4m3fn))
    model.later = nn.Parameter(torch.empty(8, device="meta"))
    report = prune(model, HALF)
    assert [(layer.name, layer.why_dense, layer.zeros) for layer in report.dense if layer.zeros is None] == [
        ("scale", "fewer than 2 dims", None),
        ("later", "fewer than 2 dims", None),
    ]


def test_frozen_weights_are_pruned_as_others() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16)).requires_grad_(False)
    wanted = halved(model[0].weight, model[1].weight)
    prune(model, HALF)
    assert torch.equal(model[0].weight, wanted[0]) and torch.equal(model[1].weight, wanted[1])


def test_a_plain_subclass_is_a_weight() -> None:
    for kind in (type("Named", (nn.Parameter,), {}), NoFunctions):
        model = nn.Linear(16, 8)
        weight, wanted = model.weight.detach(), halved(model.weight)[0]
        model._parameters["weight"] = nn.Parameter(weight.as_subclass(kind)) if kind is NoFunctions else kind(weight)
        assert prune(model, HALF).pruned[0].zeros == 65
        assert torch.equal(weight, wanted)


@pytest.mark.parametrize("exclude", ["a", "b"])
def test_a_weight_that_shares_memory_with_one_that_stays_dense_is_refused(exclude: str) -> None:
    model, store = nn.Module(), torch.randn(3, 8)
    model.a, model.b, model.c = nn.Parameter(store), nn.Parameter(store[1:2]), nn.Parameter(torch.randn(8, 8))
    with pytest.raises(ValueError, match="parameter 'b' must have memory of its own, got some that 'a' has too"):
        prune(model, HALF, exclude=[exclude])
    assert store.count_nonzero() == 24
    assert [layer.name for layer in prune(model, HALF, exclude=["a", "b"]).pruned] == ["c"]


def test_warnings_as_errors_leave_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(model[0].weight, 1e-3)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CrAMWarning, match=r"leaves no weight in '0\.weight'"):
            prune(model, HALF)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def symmetric(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


# kind -> how it is put on, the name of a part, how the message says that it is taken off
PARAMETRIZED: dict[str, tuple[Callable[[nn.Module], nn.Module], str, Callable[[nn.Module], object]]] = {
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original0", parametrize.remove_parametrizations),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original", parametrize.remove_parametrizations),
    "orthogonal": (parametrizations.orthogonal, "parametrizations.weight.original", parametrize.remove_parametrizations),
    "own": (symmetric, "parametrizations.weight.original", parametrize.remove_parametrizations),
    "old weight_norm": (nn.utils.weight_norm, "weight_g", nn.utils.remove_weight_norm),
    "old spectral_norm": (nn.utils.spectral_norm, "weight_orig", nn.utils.remove_spectral_norm),
    "torch.nn.utils.prune": (lambda layer: torch_prune.l1_unstructured(layer, "weight", 0.3), "weight_orig", torch_prune.remove),
    "pruned twice": (
        lambda layer: torch_prune.random_structured(torch_prune.l1_unstructured(layer, "weight", 0.3), "weight", 2, dim=0),
        "weight_orig",
        torch_prune.remove,
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", PARAMETRIZED)
@pytest.mark.parametrize("pattern", [HALF, NM(2, 4)], ids=repr)
def test_parts_of_a_parametrized_weight_are_refused_until_they_are_one(kind: str, pattern: Pattern) -> None:
    put_on, part, take_off = PARAMETRIZED[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), put_on(nn.Linear(16, 16)))
    x = torch.randn(4, 16)
    before, wanted = copy.deepcopy(model.state_dict()), model.eval()(x)
    part = (
        part
        if pattern == HALF or part not in ("weight_g", "parametrizations.weight.original0")
        else {"weight_g": "weight_v"}.get(part, part[:-1] + "1")
    )
    with pytest.raises(
        ValueError, match=rf"prune: parameter '1\.{part}' must be a weight itself, got a part of '1\.weight' under"
    ) as error:
        prune(model, pattern)
    assert f"{take_off.__module__.removesuffix('.weight_norm').removesuffix('.spectral_norm')}.{take_off.__name__}(layer, 'weight')" in str(
        error.value
    )
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    report = prune(model, pattern, exclude=["1.*"])
    assert [layer.name for layer in report.pruned] == ["0.weight"]
    model.load_state_dict(before)
    take_off(model[1], "weight")  # as the message says
    torch.testing.assert_close(model(x), wanted)
    assert {layer.name for layer in prune(model, pattern).pruned} == {"0.weight", "1.weight"}
    assert model(x).isfinite().all() and (model[1].weight == 0).any()


def test_a_parametrized_vector_is_no_weight() -> None:
    model = nn.Linear(16, 8)
    parametrize.register_parametrization(model, "bias", nn.Identity())
    assert [layer.name for layer in prune(model, HALF).pruned] == ["weight"]


class Table(nn.Embedding):
    pass


@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag, Table])
@pytest.mark.parametrize("tie", ["", "parameter", "memory"])
def test_embedding_tables_stay_dense_unless_told_otherwise(table: type[nn.Embedding], tie: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": nn.Linear(16, 16), "table": table(256, 16), "head": nn.Linear(16, 256 if tie else 8, bias=False)})
    if tie:
        model["head"].weight = model["table"].weight if tie == "parameter" else nn.Parameter(model["table"].weight.detach())
    other, before = copy.deepcopy(model), model["table"].weight.detach().clone()
    trained = [model["body"].weight] + ([] if tie else [model["head"].weight])
    wanted = halved(*trained)
    report = prune(model, HALF)
    assert all(torch.equal(p, w) for p, w in zip(trained, wanted, strict=True)) and torch.equal(model["table"].weight, before)
    reasons = [layer.why_dense for layer in report.layers if layer.name == "table.weight"]
    assert reasons == ["embedding table (prune_embeddings=True prunes it)"]
    if tie == "memory":
        return  # deepcopy makes two tables of it
    weights = [other["body"].weight, other["table"].weight] + ([] if tie else [other["head"].weight])
    wanted = halved(*weights)
    with pytest.warns(CrAMWarning, match=r"leaves no weight in .*'body\.weight'"):  # the reason for the default
        assert "table.weight" in [layer.name for layer in prune(other, HALF, prune_embeddings=True).pruned]
    assert all(torch.equal(p, w) for p, w in zip(weights, wanted, strict=True))


def test_a_parametrized_table_is_a_table() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Embedding(8, 16)), nn.Linear(16, 8))
    assert [layer.name for layer in prune(model, HALF).pruned] == ["1.weight"]


@pytest.mark.parametrize("kind", ["conv_transpose", "conv1d"])
def test_nm_leaves_weights_dense_whose_axis_1_is_the_outputs(kind: str) -> None:
    if kind == "conv1d":
        conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
        model, reason = nn.Sequential(conv1d(16, 8), nn.Linear(16, 8)), "axis 1 of transformers' Conv1D is the outputs"
    else:
        model, reason = nn.Sequential(nn.ConvTranspose2d(8, 16, 3), nn.Linear(16, 8)), "axis 1 of a transposed convolution is the outputs"
    before = model[0].weight.detach().clone()
    report = prune(model, NM(2, 4))
    assert torch.equal(model[0].weight, before)
    assert [(layer.name, layer.why_dense) for layer in report.layers if layer.name == "0.weight"] == [("0.weight", reason)]
    wanted = halved(model[0].weight)[0]
    prune(model, HALF, exclude=["1.*"])  # where the axis does not matter
    assert torch.equal(model[0].weight, wanted)


def test_prune_embeddings_is_a_bool() -> None:
    with pytest.raises(ValueError, match="prune: prune_embeddings must be True or False, got 'false'"):
        prune(nn.Linear(4, 4), HALF, prune_embeddings="false")  # type: ignore[arg-type]


def test_an_optimizer_of_the_model_leaves_the_same_weights_dense() -> None:
    """Otherwise training would prepare other weights for pruning than prune prunes, and rows of a weight-normed layer would be 0 / 0."""
    torch.manual_seed(0)
    layers = (nn.Linear(8, 64), parametrizations.weight_norm(nn.Linear(64, 64)), nn.Unflatten(1, (16, 2, 2)), nn.ConvTranspose2d(16, 8, 3))
    nn.init.normal_(layers[3].weight, std=0.15)  # as large as the others, so that no pattern empties it
    model = nn.Sequential(*layers)
    for pattern, pruned in ((TopK(sparsity=0.9), ["0.weight", "3.weight"]), (NM(2, 4), ["0.weight"])):
        optimizer = CrAM(model, torch.optim.SGD, lr=0.1, compression=pattern)
        report = prune(copy.deepcopy(model), pattern, exclude=["1.*"])
        assert (
            [row.name for row in optimizer.coverage(pattern) if row.why_dense is None] == [layer.name for layer in report.pruned] == pruned
        )
        _, other = copy.deepcopy((model, optimizer))
        assert [row.why_dense for row in other.coverage(pattern)] == [row.why_dense for row in optimizer.coverage(pattern)]
        optimizer.step(lambda: model(torch.randn(4, 8)).square().sum().backward())
        assert all(p.isfinite().all() for p in model.parameters())
