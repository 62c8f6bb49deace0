"""Perturb with masks that are there already (`mask_period`): the bare arithmetic and its bytes."""

from functools import partial

from cram_kernels.patterns import TopK

from . import inputs, run
from .inputs import MASTERS_TRAFFIC, PERTURB_TRAFFIC, OpRun
from .measure import Contest, Setup
from .shapes import Shape


def perturb_run(shapes: list[Shape], dtype: str, setup: Setup, masters: bool = False) -> OpRun:
    def arguments(shapes):
        a = inputs.perturb(shapes, TopK(0.9), dtype, setup.device, masters=masters)
        return {name: value for name, value in a.items() if name not in ("sets", "k")}

    return OpRun(setup, "perturb_masked_", shapes, arguments, MASTERS_TRAFFIC if masters else PERTURB_TRAFFIC, inputs.restored)


def perturb(model: str, setup: Setup) -> Contest:
    return perturb_run(setup.shapes(model), "fp32", setup).contest()


dtypes = inputs.by_dtype(perturb_run)
cases = partial(run.of_models, "perturb_masked_", perturb, dtypes)

if __name__ == "__main__":
    raise SystemExit(run.main("bench_perturb", cases()))
