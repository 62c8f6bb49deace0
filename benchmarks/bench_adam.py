"""Restore + combined gradient + AdamW, against a copy and torch's fused AdamW, which does less."""

from functools import partial

import torch

from . import inputs, run
from .inputs import OpRun
from .measure import Contest, Setup
from .shapes import Shape

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
    return op.contest(inputs.fused(op, torch.optim.AdamW, lr=LR, weight_decay=WEIGHT_DECAY), copy_bound=1)


dtypes = inputs.by_dtype(adam_run)
cases = partial(run.of_models, "restore_adam_", adamw, dtypes)

if __name__ == "__main__":
    raise SystemExit(run.main("bench_adam", cases()))
