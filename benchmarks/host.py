"""What the host does for a step: calls of Python functions, and time, over tensors so small that there is nothing to compute.

On a GPU this is what must be done before the kernels can run; on a CPU it is paid in full. Beside it torch's fused optimizers.
"""

import cProfile
import math
import pstats
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cram_kernels import CrAM, TopK

from . import gate, run
from .measure import Contestant, Row, Setup, interleave, ratio, target, timing

PATTERN = TopK(sparsity=0.5)
BASES = {"SGD": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}), "AdamW": (torch.optim.AdamW, {"lr": 1e-3})}
COUNTS = (4, 161)  # tensors; ResNet-50 has 161
MOST_CALLS = 2200  # of perturb() and step() over 161 parameters with SGD
MOST_TIME = 2.0  # times that of torch's fused step
REPEATS = 20  # of a step, in each timing


def calls_of(part: Callable[[], object]) -> int:
    """Python and C functions called, as cProfile counts them."""
    profile = cProfile.Profile()
    profile.runcall(part)
    return pstats.Stats(profile).total_calls  # type: ignore[attr-defined]


@dataclass
class Host:
    """One base over so many tensors of 8 x 8."""

    base: str
    count: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        kind, options = BASES[self.base]
        generator = torch.Generator().manual_seed(0)
        tensors = [[torch.randn(8, 8, generator=generator).to(self.device) for _ in range(self.count)] for _ in range(3)]
        self.params = [nn.Parameter(t.clone()) for t in tensors[0]]
        self.plain_params = [nn.Parameter(t.clone()) for t in tensors[0]]
        self.first, self.second = tensors[1:]
        self.ours = CrAM(self.params, kind, compression=[PATTERN], **options)
        self.fused = kind(self.plain_params, fused=True, **options)

    def give(self, params: list[nn.Parameter], grads: list[Tensor]) -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    def step(self) -> None:
        self.give(self.params, self.first)
        self.ours.perturb()
        self.give(self.params, self.second)
        self.ours.step()

    def fused_step(self) -> None:
        self.give(self.plain_params, self.first)
        self.fused.step()

    def check(self) -> None:
        """A step prunes as it should, ends with clean weights that have moved, and makes no more calls than it may."""
        before = [p.detach().clone() for p in self.params]
        self.step()
        info = self.ours.last
        gate.require(
            info is not None and int(info.stats[0, 0]) == PATTERN.k(64 * self.count) - 1, "the step kept another number of weights"
        )
        gate.require(all(bool(p.isfinite().all()) for p in self.params), "the weights are not finite after a step")
        gate.require(not any(torch.equal(p, b) for p, b in zip(self.params, before, strict=True)), "the weights have not moved")

    def calls(self) -> dict[str, int]:
        """Of each half of a step, and of torch's fused one."""
        self.give(self.params, self.first)
        found = {"perturb()": calls_of(self.ours.perturb)}
        self.give(self.params, self.second)
        found["step()"] = calls_of(self.ours.step)
        self.give(self.plain_params, self.first)
        return found | {"fused": calls_of(self.fused.step)}

    def rows(self, setup: Setup) -> list[Row]:
        def repeated(part: Callable[[], None]) -> None:
            for _ in range(REPEATS):
                part()

        parts = {f"CrAM around {self.base}": self.step, f"torch.optim.{self.base}(fused=True).step()": self.fused_step}
        contestants = [Contestant(name, partial(repeated, part), ours=part == self.step) for name, part in parts.items()]
        times = interleave(contestants, setup.how_often(30), "cpu", warmup=3)  # by the clock of the host, on a GPU too
        calls, rows = self.calls(), []
        for c, number in zip(contestants, (calls["perturb()"] + calls["step()"], calls["fused"]), strict=True):
            own = [t / REPEATS for t in times[c.name]]
            x_ours = ratio(times[c.name], times[contestants[0].name])
            bound = {} if c.ours else target((1 / MOST_TIME, math.inf), x_ours)
            row = timing(c.name, own) | {"ours": c.ours, "x_ours": x_ours, "calls": number, **bound}
            rows.append(row | {"rounds_ms": [float(f"{1e3 * t:.6g}") for t in own]})
        return rows

    def describe(self) -> Row:
        calls = self.calls()
        return {"tensors": self.count, "calls of perturb()": calls["perturb()"], "calls of step()": calls["step()"]}


def cases() -> Iterator[run.Case]:
    for base in BASES:
        for count in COUNTS:
            yield run.Case(f"{base}, {count} tensors", lambda setup, base=base, count=count: Host(base, count, setup.device))


if __name__ == "__main__":
    raise SystemExit(run.main("host", cases()))
