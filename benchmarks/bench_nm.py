"""N:M: perturb + prune on Linear and convolution weights, contiguous and channels_last, against a copy and eager torch."""

from collections.abc import Iterator
from functools import partial

from cram_kernels.patterns import NM

from . import inputs, run
from .eager import against_eager
from .measure import Contest, Setup
from .shapes import MODELS

PATTERNS = (NM(2, 4), NM(4, 8))
COPY_BOUND = 1 / 1.1


perturb_run = partial(inputs.perturb_run, "perturb_nm_")


def perturb(model: str, pattern: NM, setup: Setup) -> Contest:
    op = perturb_run(setup.shapes(model), pattern, "fp32", setup)
    return against_eager(op, pattern, COPY_BOUND) if setup.device == "cpu" else op.contest(copy_bound=COPY_BOUND)


def channels_last(pattern: NM, setup: Setup) -> Contest:
    return perturb_run(setup.shapes("ResNet-50"), pattern, "fp32", setup, channels_last=True).contest(copy_bound=COPY_BOUND)


dtypes = inputs.by_dtype(lambda shapes, *rest, **more: perturb_run(shapes, NM(2, 4), *rest, **more))


def prune(model: str, setup: Setup) -> Contest:
    return inputs.prune_run("prune_nm_", model, NM(2, 4), setup).contest()


def cases() -> Iterator[run.Case]:
    for pattern in PATTERNS:
        for model in MODELS:
            yield run.Case(f"perturb_nm_ {model} {pattern}", partial(perturb, model, pattern))
        yield run.Case(f"perturb_nm_ ResNet-50 channels_last {pattern}", partial(channels_last, pattern))
    yield run.Case("perturb_nm_ ResNet-50 2:4, dtypes", dtypes)
    for model in MODELS:
        yield run.Case(f"prune_nm_ {model} 2:4", partial(prune, model))


if __name__ == "__main__":
    raise SystemExit(run.main("bench_nm", cases()))
