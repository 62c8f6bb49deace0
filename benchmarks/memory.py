"""Memory: what a CrAM step holds beyond a step of its base optimizer, and what its perturb takes for a moment, in bytes a prunable weight.

Each contestant takes its steps in a process of its own, in which every tensor and buffer is mapped and given back by itself, so that the
resident size is what is really held. Needs /proc (Linux).
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import compare
import torch
from torch import Tensor

from cram_kernels.backend import use_backend
from cram_kernels.patterns import NM, Pattern, TopK

from . import gate, inputs, run
from .measure import Row, Setup, target
from .shapes import MODELS, shrink
from .step import BASES, EagerStep, Fused, Ours, Published, Step, same_weights

MODEL, BASE = "ResNet-50", "SGD"
PATTERNS: dict[str, Pattern] = {str(pattern): pattern for pattern in (TopK(0.5), TopK(0.9), NM(2, 4))}
KINDS = {"cram_kernels": Ours, "published": Published, "eager torch": EagerStep}
PLAIN = f"torch.optim.{BASE}(fused=True)"
HELD, PEAK = 8.2, 0.2  # bytes a prunable fp32 weight
# glibc maps every block of this size and more by itself: no free memory is kept for later
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "60000"}


def resident() -> int:
    """Bytes of this process in memory, counted page by page: the figure of /proc/self/statm lags behind by some pages a core."""
    line = next(line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Rss:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The largest resident size since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def make(name: str, pattern: Pattern, shapes: list, dtype: str) -> Step:
    lists = [inputs.tensors(shapes, role, inputs.DTYPES[dtype], "cpu") for role in ("params", "first_grads", "grads")]
    return Fused(BASE, *lists) if name == PLAIN else KINDS[name](pattern, BASE, *lists)


def gradients(step: Step) -> list[Tensor]:
    """As a backward makes them: nobody else holds them."""
    return [torch.randn_like(p) for p in step.params]


def child(name: str, pattern: Pattern, dtype: str, quick: bool) -> dict[str, int]:
    """Bytes beside the weights between two steps, and before the update, when both gradients are there; and those of the perturb alone."""
    shapes = Setup(quick=quick).shapes(MODEL)
    take_step(make(name, pattern, shrink(shapes), dtype))  # imports, threads
    step = make(name, pattern, shapes, dtype)
    step.first, step.second, step.grads = [], [], []
    weights = resident()
    take_step(step)
    found = take_step(step)
    return found | {moment: found[moment] - weights for moment in ("between", "held")}


def take_step(step: Step) -> dict[str, int]:
    step.first = gradients(step)
    forget_peak()
    step.perturb()
    moment = peak()
    after = resident()
    if not isinstance(step, EagerStep):  # which takes them out of the list again
        step.first = []
    step.grads = gradients(step)
    held = resident()
    step.update()
    step.first, step.grads = [], []
    for p in step.params:
        p.grad = None
    return {"between": resident(), "held": held, "peak": max(0, moment - after)}


@dataclass
class Memory:
    """One pattern and dtype."""

    pattern: str
    dtype: str
    setup: Setup

    def names(self) -> list[str]:
        return list(KINDS) if self.dtype == "fp32" else ["cram_kernels"]

    def check(self) -> None:
        """A whole step, small: ours is finite and the reference's to the bit, the others' weights are ours."""
        pattern, shapes = PATTERNS[self.pattern], shrink(MODELS[MODEL]())
        make_small = partial(make, pattern=pattern, shapes=shapes, dtype=self.dtype)
        expected, start = make_small("cram_kernels"), make_small(PLAIN).params
        with use_backend("reference"):
            expected()
        for name in self.names():
            ours, other = make_small("cram_kernels"), make_small(name)
            if name != "cram_kernels":
                same_weights(name, ours, other, start, pattern, BASES[BASE][1]["lr"])
                continue
            ours()
            for i, (a, e) in enumerate(zip(ours.params, expected.params, strict=True)):
                gate.require(bool(a.isfinite().all()), f"{name}: params[{i}] is not finite after a step")
                compare.assert_bitwise_equal(a, e, f"{name}: params[{i}] after a step")

    def measure(self, name: str) -> dict[str, int]:
        """`child`, in a process of its own."""
        command = [sys.executable, "-m", "benchmarks.memory", "--child", name, self.pattern, self.dtype, str(int(self.setup.quick))]
        root = Path(__file__).parent.parent
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, cwd=root, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"memory: the process of {name} ended with status {done.returncode}: {done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    def prunable(self) -> int:
        pattern = PATTERNS[self.pattern]
        return sum(torch.Size(s).numel() for s in self.setup.shapes(MODEL) if pattern.why_dense(torch.Size(s)) is None)

    def rows(self, setup: Setup) -> list[Row]:
        names = self.names()[:1] if setup.quick else self.names()
        measure = partial(child, pattern=PATTERNS[self.pattern], dtype=self.dtype, quick=True) if setup.quick else self.measure
        plain = measure(PLAIN)
        rows: list[Row] = []
        for name in names:
            found = measure(name)
            held, between = ((found[moment] - plain[moment]) / self.prunable() for moment in ("held", "between"))
            taken = found["peak"] / self.prunable()
            rows.append({"name": name, "held": held, "held_between_steps": between, "perturb_for_a_moment": taken})
        if self.dtype == "fp32":
            met = target((0, HELD), rows[0]["held"])["met"] and target((0, PEAK), rows[0]["perturb_for_a_moment"])["met"]
            rows[0] |= {"target": f"held <= {HELD}, for a moment <= {PEAK}", "met": met}
        return rows

    def describe(self) -> Row:
        return {"prunable_weights": self.prunable(), "unit": "bytes a prunable weight beyond the base optimizer"}


def cases() -> Iterator[run.Case]:
    for pattern in PATTERNS:
        yield run.Case(f"{MODEL} {BASE} {pattern}", partial(Memory, pattern, "fp32"))
    for dtype in ("bf16", "fp16"):  # many weights of equal magnitude: what ties cost
        yield run.Case(f"{MODEL} {BASE} 90 % {dtype}", partial(Memory, "90 %", dtype))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _, _, name, pattern, dtype, quick = sys.argv
        print(json.dumps(child(name, PATTERNS[pattern], dtype, quick == "1")))
    else:
        sys.exit(run.main("memory", cases()))
