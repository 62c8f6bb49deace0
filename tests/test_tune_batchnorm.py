"""tune_batchnorm where something is out of the ordinary: a loader that fails, batches of one sample, norms and batches of other kinds."""

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from cram_kernels import CrAM, CrAMWarning, tune_batchnorm
from cram_kernels.batch import moved


def inputs(seed: int, *shape: int) -> Tensor:
    return 0.5 + seed * torch.randn(*(shape or (8, 3)), generator=torch.Generator().manual_seed(seed))


class Counting(nn.Module):
    """A module whose forward pass changes a buffer in any mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x


def warmed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Counting(), nn.BatchNorm1d(3), nn.Linear(3, 5), nn.BatchNorm1d(5, momentum=None))
    for seed in (1, 2):
        model(inputs(seed))
    return model


def state(model: nn.Module) -> dict[str, Any]:
    found = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [(m.training, getattr(m, "momentum", None), len(m._forward_pre_hooks)) for m in model.modules()]
    return found | {"modes": modes}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value, name


def failing(error: BaseException) -> Callable[[], Iterator[Tensor]]:
    def loader() -> Iterator[Tensor]:
        yield inputs(3)
        yield inputs(4)
        raise error

    return loader


@pytest.mark.parametrize(
    ("loader", "raised"),
    [
        (failing(OSError("the network is away")), OSError),
        (failing(KeyboardInterrupt()), KeyboardInterrupt),
        (lambda: iter([inputs(3), inputs(4, 8, 7)]), RuntimeError),  # does not fit the first norm
        (lambda: iter([inputs(3), "text"]), (TypeError, AttributeError)),
        (lambda: iter([inputs(3) * float("nan")]), RuntimeError),
        (lambda: iter([inputs(3, 1, 3), inputs(4, 1, 3)]), ValueError),
    ],
    ids=["loader", "interrupt", "model", "no tensor", "nan", "only single samples"],
)
def test_nothing_is_lost_where_tuning_fails(loader: Callable[[], Iterator[Any]], raised: type[BaseException]) -> None:
    model = warmed()
    before = state(model)
    with pytest.raises(raised):
        tune_batchnorm(model, loader())
    assert_same(state(model), before)


def test_statistics_that_are_not_finite_are_refused_by_name() -> None:
    model = warmed()
    with pytest.raises(RuntimeError, match="tune_batchnorm: statistics must be finite, got Inf or NaN in '1'"):
        tune_batchnorm(model, [inputs(3), inputs(4) * float("inf")])


@pytest.mark.parametrize("single", [0, 1, 2])
def test_a_batch_of_one_sample_is_skipped_as_a_whole(single: int) -> None:
    """Also by the norms that it had already passed: two-dimensional ones, to which a sample is many values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5))
    batches = [inputs(seed, 1 if seed == 3 + single else 6, 3, 4, 4) for seed in (3, 4, 5)]
    kept = [x for x in batches if len(x) > 1]
    with pytest.warns(CrAMWarning, match=r"tune_batchnorm: 2 of 6 batches were skipped: they have one value per channel") as said:
        assert tune_batchnorm(model, batches, batches=6) == 2
    assert said[0].filename == __file__
    torch.testing.assert_close(model[0].running_mean, torch.stack([x.mean((0, 2, 3)) for x in kept]).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([x.var((0, 2, 3)) for x in kept]).mean(0))
    normed = [(x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt() for x in kept]
    hidden = [model[2](y.flatten(1)) for y in normed]
    torch.testing.assert_close(model[3].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    assert model[0].num_batches_tracked == model[3].num_batches_tracked == 4


class NeedsMomentum(nn.BatchNorm1d):
    """As many subclasses: momentum is a number."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum * 1.0, self.eps)


def test_subclasses_that_need_a_momentum() -> None:
    layer = NeedsMomentum(3)
    batches = [inputs(seed) for seed in range(3, 8)]
    assert tune_batchnorm(layer, batches, batches=5) == 1
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([x.var(0) for x in batches]).mean(0))
    assert layer.momentum == 0.1


def test_a_norm_that_is_used_twice_in_a_pass() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(2 * x)

    model, batches = Siamese(), [inputs(seed) for seed in range(3, 8)]
    tune_batchnorm(model, batches, batches=5)
    torch.testing.assert_close(model.norm.running_mean, torch.stack([x.mean(0) * 1.5 for x in batches]).mean(0))
    assert model.norm.num_batches_tracked == 10


def test_instance_norms_are_tuned_too() -> None:
    layer = nn.InstanceNorm1d(3, track_running_stats=True)
    layer(inputs(1, 4, 3, 5) + 100)
    batches = [inputs(seed, 4, 3, 5) for seed in range(3, 8)]
    assert tune_batchnorm(layer, batches, batches=5) == 1
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean((0, 2)) for x in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([x.var(2).mean(0) for x in batches]).mean(0))


def test_norms_that_are_not_torchs_are_named_and_left_alone() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.ones(3))
            self.register_buffer("running_var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x - self.running_mean

    model = nn.Sequential(Frozen(), nn.BatchNorm1d(3))
    with pytest.warns(CrAMWarning, match=r"the statistics of '0' \(Frozen\) stay as they are, for these are not torch's"):
        assert tune_batchnorm(model, [inputs(3)]) == 1
    assert (model[0].running_mean == 1).all()
    with pytest.warns(CrAMWarning, match=r"the statistics of '' \(Frozen\) stay"):
        assert tune_batchnorm(model[0], [inputs(3)]) == 0


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_a_scripted_norm_is_named_and_left_alone() -> None:
    model = nn.Sequential(torch.jit.script(nn.BatchNorm1d(3)), nn.BatchNorm1d(3))
    with pytest.warns(CrAMWarning, match=r"the statistics of '0' \(RecursiveScriptModule\) stay as they are"):
        assert tune_batchnorm(model, [inputs(3)], batches=1) == 1
    assert (model[0].running_mean == 0).all()
    torch.testing.assert_close(model[1].running_mean, (inputs(3) / (1 + 1e-5) ** 0.5).mean(0))


def test_a_norm_that_no_batch_reaches_keeps_its_statistics() -> None:
    class Auxiliary(nn.Module):
        """A head that only training uses, as Inception's."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + (self.head(x) if self.training else 0)

    model = Auxiliary()
    model(inputs(1))
    before = model.head.running_mean.clone()
    with pytest.warns(CrAMWarning, match="tune_batchnorm: no batch reached 'head', which keep their statistics"):
        assert tune_batchnorm(model, [inputs(3)], batches=1) == 1
    assert torch.equal(model.head.running_mean, before) and model.head.num_batches_tracked == 1
    torch.testing.assert_close(model.body.running_mean, inputs(3).mean(0))


def test_a_perturbed_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = CrAM(model.parameters(), lr=0.1)  # which does not know the model, and freezes nothing
    model(inputs(1)).square().sum().backward()
    optimizer.perturb()
    before = state(model)
    with pytest.raises(RuntimeError, match="tune_batchnorm: weights must not be perturbed, got some within a step"):
        tune_batchnorm(model, [inputs(3)])
    assert_same(state(model), before)
    optimizer.restore()
    assert tune_batchnorm(model, [inputs(3)]) == 1


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Sample:
    x: Any
    name: str = "name"
    later: Any = field(init=False)


@dataclass(frozen=True)
class FrozenSample:
    x: Any


x = torch.ones(2, 3)
BATCHES: dict[str, Any] = {
    "tensor": x,
    "named tuple": Pair(x, [x, "text"]),
    "structseq": torch.ones(3, 2).max(0),
    "tuple": (x, (x, 1)),
    "list": [x, [x]],
    "ordered": collections.OrderedDict(a=x, b={"c": (x,)}),
    "default": collections.defaultdict(list, a=[x]),
    "user dict": collections.UserDict(a=x, b=Pair(x, 1)),
    "proxy": MappingProxyType({"a": x}),
    "user list": collections.UserList([x, x]),
    "deque": collections.deque([x, x], maxlen=5),
    "packed": pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]),
    "dataclass": Sample([x]),
    "frozen dataclass": FrozenSample({"a": x}),
    "nothing": {"text": "text", "none": None, "number": 3, "type": Sample, "bytes": b"x"},
}


def tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, PackedSequence):
        return [batch.data]
    if hasattr(batch, "__dataclass_fields__") and not isinstance(batch, type):
        return tensors(list(vars(batch).values()))
    if isinstance(batch, dict | collections.UserDict | MappingProxyType):
        return tensors(list(batch.values()))
    if isinstance(batch, list | tuple | collections.UserList | collections.deque):
        return [t for part in batch for t in tensors(part)]
    return []


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_keep_their_types_when_they_are_moved(kind: str) -> None:
    batch = BATCHES[kind]
    found = moved(batch, torch.device("meta"))
    assert type(found) is type(batch) or (kind == "proxy" and type(found) is dict)
    assert all(t.is_meta for t in tensors(found)) and not any(t.is_meta for t in tensors(batch))  # the loader's own is left alone
    assert [t.shape for t in tensors(found)] == [t.shape for t in tensors(batch)] and (tensors(found) or kind == "nothing")
    if kind == "default":
        assert found["absent"] == []
    if kind == "deque":
        assert found.maxlen == 5
    if kind == "named tuple":
        assert found.y[1] == "text"
    if kind == "nothing":
        assert found == batch


def test_a_batch_of_transformers_is_moved_and_kept() -> None:
    encoding = pytest.importorskip("transformers", reason="transformers is not installed").BatchEncoding({"x": x, "names": ["a", "b"]})
    found = moved(encoding, torch.device("meta"))
    assert type(found) is type(encoding) and found["x"].is_meta and found["names"] == ["a", "b"] and not encoding["x"].is_meta


def test_batches_that_are_not_x_or_a_tuple_of_it_reach_the_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, batch: Any) -> Tensor:
            return self.norm(batch.data if isinstance(batch, PackedSequence) else batch.x)

    packed = pack_sequence([inputs(3, 3, 2), inputs(4, 1, 2)])
    for batch, wanted in ((packed, packed.data), (Sample(inputs(5, 4, 2)), inputs(5, 4, 2))):
        model = Model()
        tune_batchnorm(model, [batch], batches=2)
        torch.testing.assert_close(model.norm.running_mean, wanted.mean(0))


def test_a_model_whose_first_parameter_is_elsewhere() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.register_parameter("absent", nn.Parameter(torch.empty(3, device="meta"), requires_grad=False))
    assert next(iter(model.parameters())).is_meta
    tune_batchnorm(model, [inputs(3)])
    torch.testing.assert_close(model[0].running_mean, inputs(3).mean(0))
