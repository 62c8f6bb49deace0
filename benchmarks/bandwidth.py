"""Each op on a GPU beside copies of as many bytes: called, and replayed from a captured graph; and what a call of 161 tiny tensors takes.

On the CPU backend, where there is nothing to capture, it runs as a check of itself.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from cram_kernels.patterns import NM, TopK

from . import bench_adam, bench_nm, bench_norm, bench_perturb, bench_restore, bench_sgd, bench_topk, run
from .inputs import DTYPES, OpRun
from .measure import Contest, Contestant, Setup
from .shapes import Shape

GOAL = 0.85  # of the copy's bandwidth
TINY: list[Shape] = [(8, 8)] * 161  # as many tensors as ResNet-50 has
MAKE: dict[str, Callable[[list[Shape], str, Setup], OpRun]] = {
    "perturb_topk_": lambda shapes, dtype, setup: bench_topk.perturb_run(shapes, TopK(0.9), dtype, setup),
    "perturb_nm_": lambda shapes, dtype, setup: bench_nm.perturb_run(shapes, NM(2, 4), dtype, setup),
    "perturb_masked_": bench_perturb.perturb_run,
    "restore_": partial(bench_restore.op_run, "restore_"),
    "restore_combine_": partial(bench_restore.op_run, "restore_combine_"),
    "restore_sgd_": bench_sgd.sgd_run,
    "restore_adam_": bench_adam.adam_run,
    "grad_norm": bench_norm.norm_run,
}


def captured(op: OpRun) -> Callable[[], None]:
    """The replay of a graph of one call."""
    if op.device == "cpu":
        return op.run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op.reset()
        op.run()  # loads or compiles the kernels, which a capture must not
    torch.cuda.synchronize()
    op.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op.run()
    return graph.replay


def contest(name: str, dtype: str, tiny: bool, setup: Setup) -> Contest:
    op = MAKE[name](TINY[:: 10 if setup.quick else 1] if tiny else setup.shapes("ResNet-50"), dtype, setup)
    made = op.contest(op.contestant("called"), copy_bound=0 if tiny else GOAL, rounds=30)
    made.contestants[0] = Contestant("from a graph", captured(op), op.reset, facts=op.facts, ours=True)
    return made


def cases() -> Iterator[run.Case]:
    for name in MAKE:
        for dtype in DTYPES:
            yield run.Case(f"{name} ResNet-50, {dtype}", partial(contest, name, dtype, False))
        yield run.Case(f"{name} {len(TINY)} tensors of 64", partial(contest, name, "fp32", True))


if __name__ == "__main__":
    raise SystemExit(run.main("bandwidth", cases()))
