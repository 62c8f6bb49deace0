"""What the second pass may leave behind in a model, and does not: statistics of norms other than torch's batch norm, other buffers."""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from cram_kernels import CrAM, frozen_batchnorm


class Written(nn.Module):
    """A batch norm by hand, which replaces its buffers: `how` it writes them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "functional":
            return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)
        if self.training:
            mean, var = x.mean((0, 2)), x.var((0, 2))
            if self.how == "replaced":
                self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()
                self.running_var = 0.9 * self.running_var + 0.1 * var.detach()
            elif self.how == "data":
                self.running_mean.data.lerp_(mean.detach(), 0.1), self.running_var.data.lerp_(var.detach(), 0.1)
            else:
                with torch.no_grad():
                    self.running_mean += 0.1 * (mean - self.running_mean)
                    self.running_var += 0.1 * (var - self.running_var)
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean[:, None]) / (var[:, None] + 1e-5).sqrt()


class Stubborn(nn.BatchNorm1d):
    """Moves its statistics whatever track_running_stats says, as apex' and Detectron's do."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)


class Codebook(nn.Module):
    """Vectors that follow the inputs by an exponential moving average, through `.data`; and a queue with a place to write."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("embed", torch.randn(4, 5))
        self.register_buffer("queue", torch.zeros(64, 5, dtype=torch.bfloat16))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.reshape(-1, 5), self.embed).argmin(1)
        if self.training:
            rows, at = x.detach().reshape(-1, 5), int(self.place)
            self.embed.data.lerp_(rows[: len(self.embed)], 0.5)
            self.queue[at : at + 3] = rows[:3].bfloat16()
            self.place[0] = (at + 3) % 60
        return x + self.embed[nearest].reshape(x.shape)


def old_spectral_norm() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(5, 5))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "instance norm": lambda: nn.InstanceNorm1d(3, track_running_stats=True),
    "functional": lambda: Written("functional"),
    "replaced": lambda: Written("replaced"),
    "data": lambda: Written("data"),
    "in place": lambda: Written("in place"),
    "subclass": lambda: Stubborn(3),
    "scripted": lambda: torch.jit.script(nn.BatchNorm1d(3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(5, 5)),
    "old spectral norm": old_spectral_norm,
    "codebook": Codebook,
}
kinds = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning", "ignore:.*deprecated:FutureWarning")


def inputs(seed: int) -> Tensor:
    return torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def made(kind: str) -> nn.Module:
    """Within a model, and it has seen a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), KINDS[kind](), nn.BatchNorm1d(3))
    model(inputs(1))
    return model


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.named_buffers()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 3
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@kinds
@pytest.mark.parametrize("scale", [1.0, float("inf")])
def test_a_pass_within_the_block_leaves_no_trace(kind: str, scale: float) -> None:
    model, free = made(kind), made(kind)
    before, objects = buffers_of(model), dict(model.named_buffers())
    with frozen_batchnorm(model):
        y = model(inputs(2) * scale)
    torch.testing.assert_close(y, free(inputs(2) * scale), rtol=0, atol=0, equal_nan=True)  # the pass itself is as ever
    assert_same(buffers_of(model), before)
    assert any(not torch.equal(t, before[name]) for name, t in buffers_of(free).items() if not name.startswith("2."))
    assert kind == "scripted" or all(t is objects[name] for name, t in model.named_buffers())
    again = made(kind)
    assert torch.equal(model(inputs(3)), again(inputs(3)))  # moves on from there
    assert_same(buffers_of(model), buffers_of(again))


@kinds
def test_blocks_that_overlap_put_back_when_the_last_one_ends(kind: str) -> None:
    model = made(kind)
    before = buffers_of(model)
    first, second = frozen_batchnorm(model), frozen_batchnorm(model)
    first.__enter__()
    model(inputs(2))
    second.__enter__()
    model(inputs(3))
    first.__exit__(None, None, None)
    model(inputs(4))
    second.__exit__(None, None, None)
    assert_same(buffers_of(model), before)
    with frozen_batchnorm(model), pytest.raises(KeyError), frozen_batchnorm(model):
        model(inputs(5))
        raise KeyError
    assert_same(buffers_of(model), before)


@kinds
def test_gradients_within_the_block_are_those_of_a_free_pass(kind: str) -> None:
    model, free = made(kind), made(kind)
    with frozen_batchnorm(model):
        model(inputs(2)).square().sum().backward()
    free(inputs(2)).square().sum().backward()
    for p, q in zip(model.parameters(), free.parameters(), strict=True):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)


def test_a_backward_pass_past_the_end_of_the_block() -> None:
    """Through a functional batch norm and past a constant it is right; where it needs a buffer that was put back, torch refuses."""
    model, free = (made("functional").append(Masked()) for _ in range(2))
    with frozen_batchnorm(model):
        loss = model(inputs(2)).square().sum()
    loss.backward()
    free(inputs(2)).square().sum().backward()
    assert torch.equal(model[0].weight.grad, free[0].weight.grad)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x * self.count

    model = nn.Sequential(nn.Linear(5, 5), Scaled())
    with frozen_batchnorm(model):
        loss = model(inputs(2)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.arange(5) > 2)
        self.register_buffer("scale", torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x * self.scale, 0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("scripted", "old spectral norm")])  # which torch cannot copy
def test_a_copy_made_within_the_block_is_put_back_on_its_own(kind: str) -> None:
    model = made(kind)
    before, block = buffers_of(model), frozen_batchnorm(model)
    with block:
        other, other_block = copy.deepcopy((model, block))
        other(inputs(2))
    assert_same(buffers_of(model), before)
    other_block.__exit__(None, None, None)
    assert_same(buffers_of(other), before)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["instance norm", "functional", "in place", "subclass", "spectral norm"])
def test_through_compile(kind: str, backend: str, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(torch.compiler.reset)  # so many versions of Sequential.forward are the most that torch compiles
    model = torch.compile(made(kind), backend=backend)
    model(inputs(1)).sum().backward()
    before = buffers_of(model)
    with frozen_batchnorm(model):
        model(inputs(2)).sum().backward()
    assert_same(buffers_of(model), before)


def test_what_a_forward_pass_may_replace_stays() -> None:
    """A cache that grew is not shrunk, and a model that was moved within the block stays there, with its values put back."""

    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(2))
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.cache = torch.arange(len(x))
            self.seen += 1
            return x

    model = Cache()
    with frozen_batchnorm(model):
        model(torch.ones(9))
        model.double()
    assert len(model.cache) == 9
    assert model.seen.dtype == torch.float64 and model.seen == 0


def test_a_buffer_in_the_memory_of_a_weight_is_left_to_the_optimizer() -> None:
    model = nn.Linear(5, 5)
    model.register_buffer("alias", model.weight.detach())
    model.register_buffer("counter", torch.zeros(()))
    with frozen_batchnorm(model), torch.no_grad():
        model.weight.fill_(2.0)
        model.counter += 1
    assert (model.weight == 2).all() and (model.alias == 2).all() and model.counter == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scripted"])  # to which torch cannot attach hooks
def test_an_optimizer_that_knows_the_model_counts_each_batch_once(kind: str) -> None:
    """Statistics after its steps are those of forward passes at the same clean weights."""
    model = made(kind)
    optimizer = CrAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.5, compression=[]).attach(model)
    judge = made(kind)
    for seed in range(3):
        x = inputs(seed)
        optimizer.step(lambda x=x: model(x).square().sum().backward())
        judge(x)
    assert_same(buffers_of(model), buffers_of(judge))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "scripted"])
def test_state_dict_between_the_halves_has_the_buffers_of_the_first_pass(kind: str) -> None:
    model = made(kind)
    optimizer = CrAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, compression=[]).attach(model)
    model(inputs(2)).square().sum().backward()
    wanted = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer.perturb()
    model(inputs(3)).square().sum().backward()
    assert_same(dict(model.state_dict()), wanted)
    optimizer.restore()
    assert_same(dict(model.state_dict()), wanted)


def test_inference_tensors_and_other_odd_buffers_are_left_alone() -> None:
    model = nn.Linear(5, 5)
    with torch.inference_mode():
        model.register_buffer("angles", torch.arange(3.0))
    model.register_buffer("later", torch.empty(3, device="meta"))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with frozen_batchnorm(model):
            model(inputs(2)).sum().backward()
    assert model.angles.tolist() == [0, 1, 2]
