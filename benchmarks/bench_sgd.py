"""Restore + combined gradient + SGD with momentum, against a copy and torch's fused SGD, which does less."""

from functools import partial
from typing import Any

import torch

from . import inputs, run
from .inputs import OpRun
from .measure import Contest, Setup
from .shapes import Shape

OPTIONS: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}


def sgd_run(shapes: list[Shape], dtype: str, setup: Setup, masters: bool = False) -> OpRun:
    def arguments(shapes):
        return inputs.update(shapes, dtype, setup.device, ("momentum_buffers",), masters=masters) | {
            "fresh": [0],
            "lr": torch.tensor(OPTIONS["lr"], device=setup.device),
            "momentum": [OPTIONS["momentum"]],
            "weight_decay": [OPTIONS["weight_decay"]],
        }

    traffic = inputs.update_traffic({"momentum_buffers": 2}, masters)
    return OpRun(setup, "restore_sgd_", shapes, arguments, traffic, inputs.raise_flag)


def sgd(model: str, setup: Setup) -> Contest:
    op = sgd_run(setup.shapes(model), "fp32", setup)
    return op.contest(inputs.fused(op, torch.optim.SGD, **OPTIONS), copy_bound=1)


dtypes = inputs.by_dtype(sgd_run)
cases = partial(run.of_models, "restore_sgd_", sgd, dtypes)

if __name__ == "__main__":
    raise SystemExit(run.main("bench_sgd", cases()))
