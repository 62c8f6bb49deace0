"""Restore + combined gradient + AdamW, against a copy and torch's fused AdamW, which does less."""

import sys
from collections.abc import Iterator
from functools import partial

import torch

from . import inputs, run
from .inputs import OpRun
from .measure import Contest, Contestant, Setup
from .shapes import MODELS, Shape

LR, WEIGHT_DECAY = 1e-5, 1e-2


def adam_run(shapes: list[Shape], dtype: str, setup: Setup, masters: bool = False) -> OpRun:
    def arguments(shapes):
        return inputs.update(shapes, dtype, setup.device, ("exp_avgs", "exp_avg_sqs"), masters=masters) | {
            "max_exp_avg_sqs": [],
            "steps": [torch.tensor(10.0, device=setup.device) for _ in shapes],
            "lr": torch.tensor(LR, device=setup.device),
            "weight_decay": [WEIGHT_DECAY],
            "decoupled": True,
        }

    traffic = inputs.update_traffic({"exp_avgs": 2, "exp_avg_sqs": 2}, masters)
    return OpRun(setup, "restore_adam_", shapes, arguments, traffic, inputs.raise_flag)


def adamw(model: str, setup: Setup) -> Contest:
    op = adam_run(setup.shapes(model), "fp32", setup)
    return op.contest(fused(op), copy_bound=1)


def fused(op: OpRun) -> Contestant:
    """Plain AdamW: no restore, one gradient, no mask."""
    params = [torch.nn.Parameter(p.clone()) for p in op.arguments["params"]]
    for p, g in zip(params, op.arguments["grads"], strict=True):
        p.grad = g
    optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    return Contestant("torch.optim.AdamW(fused=True) alone", optimizer.step)


def dtypes(setup: Setup) -> Contest:
    return inputs.dtype_contest(lambda dtype, masters: adam_run(setup.shapes("ResNet-50"), dtype, setup, masters))


def cases() -> Iterator[run.Case]:
    for model in MODELS:
        yield run.Case(f"restore_adam_ {model}", partial(adamw, model))
    yield run.Case("restore_adam_ ResNet-50, dtypes", dtypes)


def main(argv: list[str] | None = None) -> int:
    return run.main("bench_adam", cases(), argv)


if __name__ == "__main__":
    sys.exit(main())
