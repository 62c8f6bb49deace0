"""Perturb with masks that are there already (`mask_period`): the bare arithmetic and its bytes."""

import sys
from collections.abc import Iterator
from functools import partial

from cram_kernels.patterns import TopK

from . import inputs, run
from .inputs import MASTERS_TRAFFIC, PERTURB_TRAFFIC, OpRun
from .measure import Contest, Setup
from .shapes import MODELS, Shape


def perturb_run(shapes: list[Shape], dtype: str, setup: Setup, masters: bool = False) -> OpRun:
    def arguments(shapes):
        a = inputs.perturb(shapes, TopK(0.9), dtype, setup.device, masters=masters)
        return {name: value for name, value in a.items() if name not in ("sets", "k")}

    return OpRun(setup, "perturb_masked_", shapes, arguments, MASTERS_TRAFFIC if masters else PERTURB_TRAFFIC, inputs.restored)


def perturb(model: str, setup: Setup) -> Contest:
    return perturb_run(setup.shapes(model), "fp32", setup).contest()


def dtypes(setup: Setup) -> Contest:
    return inputs.dtype_contest(lambda dtype, masters: perturb_run(setup.shapes("ResNet-50"), dtype, setup, masters))


def cases() -> Iterator[run.Case]:
    for model in MODELS:
        yield run.Case(f"perturb_masked_ {model}", partial(perturb, model))
    yield run.Case("perturb_masked_ ResNet-50, dtypes", dtypes)


def main(argv: list[str] | None = None) -> int:
    return run.main("bench_perturb", cases(), argv)


if __name__ == "__main__":
    sys.exit(main())
