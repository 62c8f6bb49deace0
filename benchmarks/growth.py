"""Growth: time per weight from 1 M to 200 M weights and from 1 to 5,000 tensors, and what a list of 5,000 tensors costs by itself."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from cram_kernels import CrAM
from cram_kernels.patterns import TopK

from . import inputs, run
from .bench_sgd import sgd_run
from .bench_topk import perturb_run
from .inputs import OpRun
from .measure import Contest, Contestant, Row, Setup, interleave, timing
from .shapes import Shape

PATTERN = TopK(0.9)
MILLIONS = (16, 1, 4, 64, 200)  # weights; the first is what the others are compared with
COUNTS = (100, 1, 10, 1000, 5000)  # tensors
FLAT = 1.2
VALIDATION_MS = 1.0
HANDED, CHECKED = "torch hands its lists over", "the same, and its checks"
MAKE: dict[str, Callable[[list[Shape], Setup], OpRun]] = {
    "perturb_topk_ 90 %": lambda shapes, setup: perturb_run(shapes, PATTERN, "fp32", setup),
    "restore_sgd_": lambda shapes, setup: sgd_run(shapes, "fp32", setup),
}


def by_weights(op: str, setup: Setup, millions: tuple[int, ...] = MILLIONS) -> Contest:
    """Tensors of 2^20 weights, of 2^10 with --quick."""
    side = 32 if setup.quick else 1024
    runs = {f"{n} M weights": MAKE[op]([(side, side)] * n, setup) for n in millions}
    return inputs.side_by_side(runs, {f"{n} M weights": (0, FLAT) for n in millions if n > millions[0]})


def by_tensors(op: str, setup: Setup) -> Contest:
    """2^24 weights in so many tensors; 2^18 with --quick, and no list of thousands."""
    weights = 2**18 if setup.quick else 2**24
    runs = {f"{n} tensors": MAKE[op]([(weights // n // 8, 8)] * n, setup) for n in COUNTS if n <= 100 or not setup.quick}
    return inputs.side_by_side(runs, {})


class Overhead:
    """What a list of many tiny tensors costs: there is next to nothing to compute."""

    def __init__(self, setup: Setup) -> None:
        count = 100 if setup.quick else COUNTS[-1]
        self.many = perturb_run([(8, 8)] * count, PATTERN, "fp32", setup)
        self.one = perturb_run([(8 * count, 8)], PATTERN, "fp32", setup)
        params = [nn.Parameter(p.clone()) for p in self.many.arguments["params"]]
        self.grads = self.many.arguments["grads"]
        self.params, self.optimizer = params, CrAM(params, compression=[PATTERN], lr=1e-3, momentum=0.9)
        fused = [nn.Parameter(p.detach().clone()) for p in params]
        self.fused_params, self.fused = fused, torch.optim.SGD(fused, lr=1e-3, momentum=0.9, fused=True)

    def check(self) -> None:
        self.many.check()
        self.one.check()

    def hand_over(self) -> None:
        """The lists of the op, to one that does nothing: what torch takes for 4 x 5,000 tensors."""
        a = self.many.arguments
        torch.ops.cram_kernels.nothing.default(a["params"], a["grads"], a["saved"], a["masks"], a["sets"])

    def check_arguments(self) -> None:
        """The lists handed over, and the checks of the op."""
        a = self.many.arguments
        lists = (a["params"], a["grads"], a["saved"], a["masks"], a["perturbed"], a["rho"], a["sets"], a["k"])
        torch.ops.cram_kernels.check_perturb_topk_.default(*lists, masters=[])

    def give(self, params: list[nn.Parameter]) -> None:
        for p, g in zip(params, self.grads, strict=True):
            p.grad = g

    def between(self) -> None:
        """The second gradients; the first half is not timed."""
        self.before()
        self.optimizer.perturb()
        self.give(self.params)

    def before(self) -> None:
        """The first gradients, at clean weights."""
        self.optimizer.restore()
        self.give(self.params)

    def rows(self, setup: Setup) -> list[Row]:
        contestants = [
            Contestant("perturb_topk_", self.many.run, self.many.reset),
            Contestant(HANDED, self.hand_over, self.hand_over),  # before it, too: both find the tensors in the same caches
            Contestant(CHECKED, self.check_arguments, self.hand_over),
            Contestant("perturb_topk_ of one tensor as large", self.one.run, self.one.reset),
            Contestant("CrAM.perturb()", self.optimizer.perturb, self.before),
            Contestant("CrAM.step()", self.optimizer.step, self.between),
            Contestant("torch.optim.SGD(fused=True).step()", self.fused.step, lambda: self.give(self.fused_params)),
        ]
        times = interleave(contestants, setup.how_often(15), setup.device)
        times["its checks alone: the difference"] = [c - h for c, h in zip(times[CHECKED], times[HANDED], strict=True)]
        rows = [timing(name, values) for name, values in times.items()]
        rows[-1] |= {"target": f"<= {VALIDATION_MS:g} ms", "met": rows[-1]["median_ms"] <= VALIDATION_MS}
        return rows

    def describe(self) -> Row:
        return {"tensors": len(self.grads), "weights": self.many.weights}


def cases() -> Iterator[run.Case]:
    for op in MAKE:
        yield run.Case(f"{op} by weights", partial(by_weights, op))
        yield run.Case(f"{op} by tensors", partial(by_tensors, op))
    yield run.Case("many tiny tensors", Overhead)


if __name__ == "__main__":
    raise SystemExit(run.main("growth", cases()))
