"""The norm of all gradients, against a copy and torch's own."""

from functools import partial

import torch

from . import inputs, run
from .inputs import DTYPES, OpRun
from .measure import Contest, Contestant, Setup
from .shapes import Shape


def norm_run(shapes: list[Shape], dtype: str, setup: Setup) -> OpRun:
    return OpRun(
        setup, "grad_norm", shapes, lambda shapes: {"grads": inputs.tensors(shapes, "grads", DTYPES[dtype], setup.device)}, {"grads": 1}
    )


def norm(model: str, setup: Setup) -> Contest:
    op = norm_run(setup.shapes(model), "fp32", setup)
    grads = op.arguments["grads"]
    return op.contest(Contestant("torch.nn.utils.get_total_norm", lambda: torch.nn.utils.get_total_norm(grads)))


dtypes = inputs.by_dtype(norm_run, with_masters=False)
cases = partial(run.of_models, "grad_norm", norm, dtypes)

if __name__ == "__main__":
    raise SystemExit(run.main("bench_norm", cases()))
