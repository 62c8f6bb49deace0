"""frozen_batchnorm and tune_batchnorm: the statistics, to the bit, and everything put back."""

import copy

import pytest
import torch
from torch import Tensor, nn

from cram_kernels.batchnorm import frozen_batchnorm, tune_batchnorm

SHAPES = {
    nn.BatchNorm1d: (16, 3),
    nn.BatchNorm2d: (8, 3, 4, 4),
    nn.BatchNorm3d: (8, 3, 2, 2, 2),
    nn.SyncBatchNorm: (8, 3, 4, 4),  # outside a process group
}
KINDS = pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.__name__)
MOMENTA = pytest.mark.parametrize("momentum", [0.1, None, 1.0], ids=lambda momentum: f"momentum={momentum}")


def batch(kind: type, seed: int, scale: float = 1.0) -> Tensor:
    return 0.5 + scale * torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(seed))


def warmed(kind: type, momentum: float | None = 0.1) -> nn.Module:
    """A batch norm that has seen two batches."""
    layer = kind(3, momentum=momentum)
    for seed in (1, 2):
        layer(batch(kind, seed))
    return layer


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.state_dict().items() if "running" in name or "tracked" in name}


def assert_same_statistics(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    found = statistics(model)
    assert found.keys() == wanted.keys() and len(found) > 0
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


@KINDS
@MOMENTA
@pytest.mark.parametrize("scale", [1.0, float("inf"), float("nan")])
def test_frozen_normalises_with_the_batch_and_touches_nothing(kind, momentum, scale):
    layer, free = warmed(kind, momentum), warmed(kind, momentum)
    before = statistics(layer)
    x = batch(kind, 3, scale)
    with frozen_batchnorm(layer):
        y = layer(x)
        assert_same_statistics(layer, before)  # state_dict() has them inside, too
    torch.testing.assert_close(y, free(x), rtol=0, atol=0, equal_nan=True)
    assert_same_statistics(layer, before)
    layer(batch(kind, 4))
    assert layer.num_batches_tracked == 3  # tracks again


@KINDS
def test_frozen_in_eval_mode_uses_the_running_statistics(kind):
    layer = warmed(kind).eval()
    x = batch(kind, 3)
    wanted = layer(x)
    with frozen_batchnorm(layer):
        assert torch.equal(layer(x), wanted)


def test_frozen_gradients_are_those_of_train_mode():
    layer, free = warmed(nn.BatchNorm2d), warmed(nn.BatchNorm2d)
    x, y = batch(nn.BatchNorm2d, 3).requires_grad_(), batch(nn.BatchNorm2d, 3).requires_grad_()
    with frozen_batchnorm(layer):
        layer(x).square().sum().backward()
    free(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad) and torch.equal(layer.weight.grad, free.weight.grad)


def test_frozen_nests_and_survives_exceptions():
    model = nn.Sequential(warmed(nn.BatchNorm2d), nn.BatchNorm2d(3, track_running_stats=False))
    before = statistics(model)
    x = batch(nn.BatchNorm2d, 3)
    with frozen_batchnorm(model):
        with pytest.raises(KeyError), frozen_batchnorm(model):
            raise KeyError
        model(x)
        assert_same_statistics(model, before)
    assert [layer.track_running_stats for layer in model] == [True, False]
    frozen = frozen_batchnorm(model)
    with frozen, frozen:
        model(x)
    assert_same_statistics(model, before)
    assert [layer.track_running_stats for layer in model] == [True, False]
    with pytest.raises(KeyError), frozen_batchnorm(model):
        raise KeyError
    model(x)
    assert model[0].num_batches_tracked == 3


def test_frozen_can_be_copied_with_the_model():
    model = warmed(nn.BatchNorm2d)
    frozen = frozen_batchnorm(model)
    with frozen:
        model_copy, frozen_copy = copy.deepcopy((model, frozen))
    frozen_copy.__exit__(None, None, None)
    assert model.track_running_stats and model_copy.track_running_stats


def test_frozen_through_compile():
    model = torch.compile(nn.Sequential(warmed(nn.BatchNorm2d), nn.ReLU()), backend="aot_eager", fullgraph=True)
    model(batch(nn.BatchNorm2d, 3))
    before = statistics(model)
    with frozen_batchnorm(model):
        model(batch(nn.BatchNorm2d, 4, float("inf")))
    assert_same_statistics(model, before)
    model(batch(nn.BatchNorm2d, 5))
    assert model.state_dict()["_orig_mod.0.num_batches_tracked"] == 4


def test_frozen_through_ddp():
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this torch is built without torch.distributed; one built with it runs this test")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    group = distributed.group.WORLD

    def train() -> None:
        model = nn.parallel.DistributedDataParallel(warmed(nn.BatchNorm2d))
        before = statistics(model)
        with frozen_batchnorm(model):
            model(batch(nn.BatchNorm2d, 3, float("inf"))).sum().backward()
        assert_same_statistics(model, before)

    try:
        train()
    finally:
        distributed.destroy_process_group()
        # The last reference: without the GIL, which gloo's threads may need to end. DDP's holds it and hangs (pytorch/pytorch#56297).
        del group


def test_frozen_refuses_a_lazy_layer_without_its_first_batch():
    model = nn.Sequential(warmed(nn.BatchNorm2d), nn.LazyBatchNorm2d())
    with pytest.raises(RuntimeError, match=r"frozen_batchnorm: layer '1' must be initialised, got a lazy one"), frozen_batchnorm(model):
        raise AssertionError("not reached")
    assert model[0].track_running_stats


@KINDS
def test_tuned_statistics_are_the_mean_over_all_batches(kind):
    layer = warmed(kind)
    batches = [batch(kind, seed, scale=seed) for seed in range(3, 10)]
    assert tune_batchnorm(layer, batches, batches=7) == 1
    axes = [axis for axis in range(batches[0].dim()) if axis != 1]
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean(axes) for x in batches]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([x.var(axes) for x in batches]).mean(0))
    assert layer.num_batches_tracked == 7


def test_tuned_lazy_layer():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    assert tune_batchnorm(model, [batch(nn.BatchNorm2d, 3)], batches=2) == 1
    assert type(model[0]) is nn.BatchNorm2d and model[0].momentum == 0.1
    torch.testing.assert_close(model[0].running_mean, batch(nn.BatchNorm2d, 3).mean((0, 2, 3)))


class Wilful(nn.Sequential):
    """Keeps its batch norms in eval mode, as models for fine-tuning do."""

    def train(self, mode: bool = True) -> "Wilful":
        super().train(mode)
        self[1].eval()
        return self


def network() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3, momentum=None))
    return Wilful(nn.Dropout(0.5), nn.BatchNorm1d(3, momentum=0.25), inner).train()


def settings(model: nn.Module) -> list[object]:
    return [(m.training, getattr(m, "momentum", None)) for m in model.modules()]


def test_tuning_runs_only_batch_norms_in_train_mode_and_puts_modes_and_momentum_back():
    model, before = network(), settings(network())
    random = torch.get_rng_state()
    x = batch(nn.BatchNorm1d, 3)
    tune_batchnorm(model, [x], batches=1)
    torch.testing.assert_close(model[1].running_mean, x.mean(0))  # no dropout
    assert settings(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert model[1].weight.grad is None


def test_tuning_puts_modes_and_momentum_back_after_an_exception():
    model, before = network(), settings(network())
    with pytest.raises(RuntimeError):
        tune_batchnorm(model, [torch.ones(4, 3), torch.ones(4, 5)])
    assert settings(model) == before


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 0), lambda x: [x], lambda x: {"input": x}], ids=["x", "tuple", "list", "dict"])
def test_forms_of_a_batch(wrap):
    layer, x = nn.BatchNorm1d(3), batch(nn.BatchNorm1d, 3)
    tune_batchnorm(layer, [wrap(x)])
    torch.testing.assert_close(layer.running_mean, x.mean(0))


def test_batches_go_to_the_device_of_the_model():
    moved = []

    class Elsewhere(Tensor):
        def to(self, device):
            moved.append(device)
            return self.as_subclass(Tensor)

    tune_batchnorm(nn.BatchNorm1d(3), [{"input": batch(nn.BatchNorm1d, 3).as_subclass(Elsewhere)}], batches=2)
    assert moved == [torch.device("cpu")] * 2


@pytest.mark.parametrize(("make", "wanted"), [(list, 5), (iter, 2)], ids=["list again", "iterator once"])
def test_a_short_loader_is_started_again(make, wanted):
    layer = nn.BatchNorm1d(3)
    tune_batchnorm(layer, make([batch(nn.BatchNorm1d, 1), batch(nn.BatchNorm1d, 2)]), batches=5)
    assert layer.num_batches_tracked == wanted


@pytest.mark.parametrize(
    ("loader", "batches", "message"),
    [
        ([], 100, "loader must give at least one batch, got an empty one"),
        ([torch.ones(4, 3)], 0, "batches must be an int of at least 1, got 0"),
        ([torch.ones(4, 3)], 2.5, "batches must be an int of at least 1, got 2.5"),
    ],
    ids=["empty", "batches=0", "batches=2.5"],
)
def test_refused_before_anything_is_reset(loader, batches, message):
    layer = warmed(nn.BatchNorm1d)
    before = statistics(layer)
    with pytest.raises(ValueError, match=f"tune_batchnorm: {message}"):
        tune_batchnorm(layer, loader, batches)
    assert_same_statistics(layer, before)


def test_nothing_to_tune_is_said():
    def unread():
        raise AssertionError("the loader was read")
        yield

    assert tune_batchnorm(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)), unread()) == 0


def test_tuning_a_compiled_model():
    model = torch.compile(nn.Sequential(nn.BatchNorm1d(3)), backend="aot_eager", fullgraph=True)
    x = batch(nn.BatchNorm1d, 3)
    model(x)
    assert tune_batchnorm(model, [x], batches=3) == 1
    torch.testing.assert_close(model.state_dict()["_orig_mod.0.running_mean"], x.mean(0))


def test_blocks_may_overlap():
    """The optimizer's own and the user's: statistics move again when both have ended."""
    layer = warmed(nn.BatchNorm1d)
    first, second = frozen_batchnorm(layer), frozen_batchnorm(layer)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not layer.track_running_stats
    second.__exit__(None, None, None)
    assert layer.track_running_stats
    second.__exit__(None, None, None)  # without a block: nothing


def test_frozen_layers_are_not_tuned():
    layer = warmed(nn.BatchNorm1d)
    before = statistics(layer)
    with frozen_batchnorm(layer), pytest.raises(RuntimeError, match="tune_batchnorm: batch norms must not be frozen"):
        tune_batchnorm(layer, [torch.ones(4, 3)])
    assert_same_statistics(layer, before)
