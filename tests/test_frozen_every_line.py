"""KeyboardInterrupt at every line of frozen_batchnorm: the block leaves the model as it was, at the latest when it is ended once more."""

import torch
from test_optim_every_line import Trace
from torch import nn

from cram_kernels import frozen_batchnorm
from cram_kernels.batchnorm import _held

torch.manual_seed(0)
X = torch.randn(6, 3, 5)


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3))
    model(X)
    return model


def run(model: nn.Module, block: frozen_batchnorm) -> None:
    with block:
        model(2 * X)


def test_interrupted_at_every_line() -> None:
    model = trained()
    block = frozen_batchnorm(model)
    with Trace() as whole:
        run(model, block)
    assert len(whole.lines) > 100
    for n in range(1, len(whole.lines) + 1):
        model = trained()
        block = frozen_batchnorm(model)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with Trace(n) as trace:
            run(model, block)
        assert trace.interrupted, whole.lines[n - 1]
        while block.blocks:  # where the exit itself was interrupted, or the entry before it had undone itself
            block.__exit__(None, None, None)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), whole.lines[n - 1]
        assert [m.track_running_stats for m in model] == [True] * 3 and not any(m in _held for m in model), whole.lines[n - 1]
        run(model, frozen_batchnorm(model))  # and further blocks hold
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), whole.lines[n - 1]
