"""The norm of all gradients, against a copy and torch's own."""

import sys
from collections.abc import Iterator
from functools import partial

import torch

from . import inputs, run
from .inputs import DTYPES, OpRun
from .measure import Contest, Contestant, Setup
from .shapes import MODELS, Shape


def norm_run(shapes: list[Shape], dtype: str, setup: Setup) -> OpRun:
    return OpRun(
        setup, "grad_norm", shapes, lambda shapes: {"grads": inputs.tensors(shapes, "grads", DTYPES[dtype], setup.device)}, {"grads": 1}
    )


def norm(model: str, setup: Setup) -> Contest:
    op = norm_run(setup.shapes(model), "fp32", setup)
    grads = op.arguments["grads"]
    return op.contest(Contestant("torch.nn.utils.get_total_norm", lambda: torch.nn.utils.get_total_norm(grads)))


def dtypes(setup: Setup) -> Contest:
    return inputs.dtype_contest(lambda dtype, masters: norm_run(setup.shapes("ResNet-50"), dtype, setup), with_masters=False)


def cases() -> Iterator[run.Case]:
    for model in MODELS:
        yield run.Case(f"grad_norm {model}", partial(norm, model))
    yield run.Case("grad_norm ResNet-50, dtypes", dtypes)


def main(argv: list[str] | None = None) -> int:
    return run.main("bench_norm", cases(), argv)


if __name__ == "__main__":
    sys.exit(main())
