"""Restore alone, and restore + combined gradient for any other optimizer, against a copy and torch's foreach calls."""

from collections.abc import Iterator
from functools import partial

import torch

from . import inputs, run
from .inputs import OpRun
from .measure import Contest, Contestant, Setup
from .shapes import Shape

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


def cases() -> Iterator[run.Case]:
    for op, contest in (("restore_", restore), ("restore_combine_", combine)):
        yield from run.of_models(op, contest, inputs.by_dtype(partial(op_run, op)))


if __name__ == "__main__":
    raise SystemExit(run.main("bench_restore", cases()))
