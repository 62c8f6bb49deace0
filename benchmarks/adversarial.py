"""Top-k on data that no sample describes well: exact all the same, how often the guess fails, and the time against the good case."""

from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor

from cram_kernels.patterns import TopK

from . import inputs, run
from .inputs import PERTURB_TRAFFIC, Arguments, OpRun
from .measure import Contest, Row, Setup
from .shapes import Shape

GOOD = "normal"
WORST = 4  # times slower than the good case, per byte
STEPS = 100  # perturbs with fresh gradients, whose failed guesses are counted
SQUARES: list[Shape] = [(1024, 1024)] * 16
SMALL: list[Shape] = [(4, 4)] * 100
SHAPES: dict[str, list[Shape]] = {
    GOOD: SQUARES,
    "all equal": SQUARES,
    "two values": SQUARES,
    "half of them zero": SQUARES,  # a pruned model, trained on
    "a fifth of them equal, at the threshold": SQUARES,
    "a fifth of them equal, above the threshold": SQUARES,
    "sorted": SQUARES,
    "a million times larger numbers in one tensor": SQUARES,
    "a million times more numbers in one tensor": [*SMALL, (4096, 4096), *SMALL],
    "rows of very different scale": [(16384, 1024)],
}


def equalize(params: list[Tensor], k: int, *, above: bool) -> None:
    """One magnitude for a fifth of the weights: the k-th largest is among their largest or, `above`, among their smallest."""
    largest = torch.cat([p.flatten() for p in params]).abs().sort(descending=True).values
    first = max(0, k - 5 - (len(largest) // 5 if above else 0))
    low, high = largest[min(first + len(largest) // 5 + 10, len(largest) - 1)], largest[first]
    for p in params:
        p.copy_(torch.where((p.abs() >= low) & (p.abs() <= high), high.copysign(p), p))


def fill(kind: str, arguments: Arguments) -> None:
    """Weights of that kind instead of normal ones, and their first gradients."""
    params: list[Tensor] = arguments["params"]
    if kind == "all equal":
        for p in params:
            p.fill_(0.5)
    elif kind == "two values":
        for p in params:
            p.copy_(torch.where(p > 0, 0.25, -0.5))
    elif kind == "half of them zero":
        for p in params:
            p.mul_(p > 0)
    elif kind.startswith("a fifth"):
        equalize(params, int(arguments["k"][0]), above="above" in kind)
    elif kind == "sorted":
        ascending = torch.cat([p.flatten() for p in params]).sort().values
        for p, part in zip(params, ascending.split([p.numel() for p in params]), strict=True):
            p.copy_(part.view_as(p))
    elif kind.startswith("a million times larger"):
        params[len(params) // 2].mul_(1e6)
    elif kind.startswith("rows"):
        for p in params:
            p.mul_(torch.randn(p.shape[0], 1, device=p.device).mul_(2).exp_())
    advance(kind, arguments, 0)


@cache
def noise(numel: int, device: str) -> Tensor:
    """Normal numbers: a window that moves over them is cheaper than new ones."""
    return torch.randn(numel + STEPS, generator=torch.Generator(device).manual_seed(0), device=device)


def advance(kind: str, arguments: Arguments, step: int) -> None:
    """Gradients of a step: of the weights' scale, and such that the perturbed weights are still of that kind."""
    for p, g in zip(arguments["params"], arguments["grads"], strict=True):
        if kind in ("all equal", "two values") or kind.startswith("a fifth"):
            g.zero_()
        elif kind == "sorted":
            torch.mul(p, 0.1, out=g)
        else:
            torch.mul(noise(p.numel(), p.device.type)[step:][: p.numel()].view_as(p), p.abs(), out=g)


def op_run(kind: str, pattern: TopK, setup: Setup) -> OpRun:
    def arguments(shapes: list[Shape]) -> Arguments:
        made = inputs.perturb(shapes, pattern, "fp32", setup.device)
        fill(kind, made)
        return made

    shapes = [tuple(max(4, dim // 16) for dim in shape) for shape in SHAPES[kind]] if setup.quick else SHAPES[kind]
    return OpRun(setup, "perturb_topk_", shapes, arguments, PERTURB_TRAFFIC, inputs.restored)


def selection(op: OpRun, kind: str, steps: int) -> Row:
    """Shares of candidates and of fallbacks over many steps."""
    candidates = fallbacks = 0.0
    for step in range(steps):
        op.reset()
        advance(kind, op.arguments, step)
        op.run()
        facts = op.facts()
        candidates += facts["candidates"] / steps
        fallbacks += facts["fallback"] / steps
    return {"candidates": candidates, "fallback_rate": fallbacks}


def contest(pattern: TopK, setup: Setup) -> Contest:
    runs = {kind: op_run(kind, pattern, setup) for kind in SHAPES}
    made = inputs.side_by_side(runs, {kind: (0, WORST) for kind in SHAPES if kind != GOOD})
    for contestant in made.contestants:
        contestant.facts = partial(selection, runs[contestant.name], contestant.name, 3 if setup.quick else STEPS)
    return made


def cases() -> Iterator[run.Case]:
    for sparsity in (0.5, 0.9):
        yield run.Case(f"perturb_topk_ {TopK(sparsity)}", partial(contest, TopK(sparsity)))


if __name__ == "__main__":
    raise SystemExit(run.main("adversarial", cases()))
