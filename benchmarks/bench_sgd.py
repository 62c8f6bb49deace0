"""Restore + combined gradient + SGD with momentum, against a copy and torch's fused SGD, which does less."""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from . import inputs, run
from .inputs import OpRun
from .measure import Contest, Contestant, Setup
from .shapes import MODELS, Shape

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
    return op.contest(fused(op), copy_bound=1)


def fused(op: OpRun) -> Contestant:
    """Plain SGD: no restore, one gradient, no mask."""
    params = [torch.nn.Parameter(p.clone()) for p in op.arguments["params"]]
    for p, g in zip(params, op.arguments["grads"], strict=True):
        p.grad = g
    optimizer = torch.optim.SGD(params, fused=True, **OPTIONS)
    return Contestant("torch.optim.SGD(fused=True) alone", optimizer.step)


def dtypes(setup: Setup) -> Contest:
    return inputs.dtype_contest(lambda dtype, masters: sgd_run(setup.shapes("ResNet-50"), dtype, setup, masters))


def cases() -> Iterator[run.Case]:
    for model in MODELS:
        yield run.Case(f"restore_sgd_ {model}", partial(sgd, model))
    yield run.Case("restore_sgd_ ResNet-50, dtypes", dtypes)


def main(argv: list[str] | None = None) -> int:
    return run.main("bench_sgd", cases(), argv)


if __name__ == "__main__":
    sys.exit(main())
