"""Perturb with masks that are there already (`mask_period`): the bare arithmetic and its bytes."""

from functools import partial

from cram_kernels.patterns import TopK

from . import inputs, run
from .inputs import OpRun
from .measure import Contest, Setup
from .shapes import Shape


def perturb_run(shapes: list[Shape], dtype: str, setup: Setup, masters: bool = False) -> OpRun:
    return inputs.perturb_run("perturb_masked_", shapes, TopK(0.9), dtype, setup, masters)


def perturb(model: str, setup: Setup) -> Contest:
    return perturb_run(setup.shapes(model), "fp32", setup).contest()


dtypes = inputs.by_dtype(perturb_run)
cases = partial(run.of_models, "perturb_masked_", perturb, dtypes)

if __name__ == "__main__":
    raise SystemExit(run.main("bench_perturb", cases()))
