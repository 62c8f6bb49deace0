"""Restore alone, and restore + combined gradient for any other optimizer, against a copy and torch's foreach calls."""

import sys
from collections.abc import Iterator
from functools import partial

import torch

from . import inputs, run
from .inputs import OpRun
from .measure import Contest, Contestant, Setup
from .shapes import MODELS, Shape

TRAFFIC = {
    "restore_": {"params": 1, "saved": 1},
    "restore_combine_": {"params": 1, "saved": 1, "grads": 2, "first_grads": 1, "masks": 1},
}


def op_run(op: str, shapes: list[Shape], dtype: str, setup: Setup, masters: bool = False) -> OpRun:
    def arguments(shapes):
        a = inputs.update(shapes, dtype, setup.device, masters=masters)
        return {name: a[name] for name in ("params", "saved", "perturbed", "masters") if name in a} if op == "restore_" else a

    return OpRun(setup, op, shapes, arguments, TRAFFIC[op] | ({"masters": 1} if masters else {}), inputs.raise_flag)


def restore(model: str, setup: Setup) -> Contest:
    op = op_run("restore_", setup.shapes(model), "fp32", setup)
    params, saved = op.arguments["params"], op.arguments["saved"]
    return op.contest(Contestant("torch._foreach_copy_", lambda: torch._foreach_copy_(params, saved)), copy_bound=1)


def combine(model: str, setup: Setup) -> Contest:
    """The peer adds the gradients and does not mask them."""
    op = op_run("restore_combine_", setup.shapes(model), "fp32", setup)
    a = op.arguments

    def foreach() -> None:
        torch._foreach_copy_(a["params"], a["saved"])
        torch._foreach_add_(a["grads"], a["first_grads"])

    return op.contest(Contestant("foreach copy + add, unmasked", foreach), copy_bound=1)


def dtypes(op: str, setup: Setup) -> Contest:
    return inputs.dtype_contest(lambda dtype, masters: op_run(op, setup.shapes("ResNet-50"), dtype, setup, masters))


def cases() -> Iterator[run.Case]:
    for model in MODELS:
        yield run.Case(f"restore_ {model}", partial(restore, model))
        yield run.Case(f"restore_combine_ {model}", partial(combine, model))
    for op in TRAFFIC:
        yield run.Case(f"{op} ResNet-50, dtypes", partial(dtypes, op))


def main(argv: list[str] | None = None) -> int:
    return run.main("bench_restore", cases(), argv)


if __name__ == "__main__":
    sys.exit(main())
