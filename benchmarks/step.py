"""The whole CrAM+ step of the optimizer, both halves without forward and backward: ours, the published algorithm in our own port, eager
torch, the same under torch.compile, and torch's fused step alone, which is the lower bound."""

import logging
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import published
import torch
from torch import Tensor, nn

from cram_kernels import CrAM
from cram_kernels.patterns import NM, Pattern, TopK

from . import gate, inputs, run
from .eager import Eager
from .inputs import RHO
from .measure import PUBLISHED_ROUNDS, ROUNDS, Contest, Contestant, Setup

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-4, "weight_decay": 1e-2}),
}
PERTURB_BYTES = 16.125  # a weight, fp32; an eighth is the mask's
BYTES = {"SGD": PERTURB_BYTES + 24.125, "AdamW": PERTURB_BYTES + 32.125}
PATTERNS = (TopK(0.5), TopK(0.9), NM(2, 4))
# The targets on the time over ours: (pattern, contestant). Ours may take 2.2 of torch's fused steps.
BOUNDS: dict[tuple[Pattern, str], tuple[float, float]] = {
    (pattern, name): (least, math.inf)
    for pattern, published_bound in ((TopK(0.5), 80), (TopK(0.9), 40))
    for name, least in (("published", published_bound), ("eager torch", 8), ("torch.compile", 5), ("plain fused", 1 / 2.2))
}


GIB = 2**30
MEMORY = {"ResNet-50": 6 * GIB, "BERT-base": 16 * GIB, "ViT-B": 14 * GIB}


class Step:
    """A contestant: parameters of its own, and gradients that are the same for all.

    Most contestants write to `grads`, a copy of the second gradients, which several may share; `refresh` brings it back before each step.
    """

    def __init__(self, start: list[Tensor], first: list[Tensor], second: list[Tensor], grads: list[Tensor] | None = None) -> None:
        self.params = [nn.Parameter(p.clone()) for p in start]
        self.first, self.second = first, second
        self.grads = [g.clone() for g in second] if grads is None else grads

    def refresh(self) -> None:
        torch._foreach_copy_(self.grads, self.second)

    def give(self, grads: list[Tensor]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g

    def perturb(self) -> None:
        """The first half."""

    def update(self) -> None:
        """The last half."""

    def __call__(self) -> None:
        self.perturb()
        self.update()


class Ours(Step):
    def __init__(self, pattern: Pattern, base: str, *lists: list[Tensor]) -> None:
        super().__init__(*lists)
        kind, options = BASES[base]
        self.optimizer = CrAM(self.params, kind, compression=[pattern], rho=RHO, **options)

    def perturb(self) -> None:
        self.give(self.first)
        self.optimizer.perturb()

    def update(self) -> None:
        self.give(self.grads)
        self.optimizer.step()


class Published(Step):
    def __init__(self, pattern: Pattern, base: str, *lists: list[Tensor]) -> None:
        super().__init__(*lists)
        kind, options = BASES[base]
        if isinstance(pattern, NM):
            levels = iter(lambda: (pattern.n, pattern.m), None)
            self.optimizer: Any = published.NMTopkCrAM(self.params, kind, rho=RHO, levels=levels, **options)
        else:
            self.optimizer = published.TopkCrAM(self.params, kind, rho=RHO, sparsities=(pattern.sparsity,), **options)

    def perturb(self) -> None:
        self.give(self.first)
        self.optimizer.first_step(zero_grad=True)

    def update(self) -> None:
        self.give(self.grads)
        self.optimizer.second_step(zero_grad=True)


class EagerStep(Step):
    def __init__(self, pattern: Pattern, base: str, *lists: list[Tensor]) -> None:
        super().__init__(*lists)
        kind, options = BASES[base]
        self.eager = Eager([p.data for p in self.params], pattern, RHO)
        self.optimizer = kind(self.params, fused=True, **options)

    def perturb(self) -> None:
        self.eager.perturb(self.first)

    def update(self) -> None:
        self.eager.combine(self.grads, self.first)
        self.give(self.grads)
        self.optimizer.step()


class CompiledStep(Step):
    """The perturb of `EagerStep`, compiled; the update and torch's SGD are one compiled function, which writes no gradient."""

    def __init__(self, pattern: Pattern, compile: Any, *lists: list[Tensor]) -> None:
        super().__init__(*lists)
        self.eager = Eager([p.data for p in self.params], pattern, RHO, compile)
        self.buffers = [torch.zeros_like(p) for p in self.eager.params]

    def perturb(self) -> None:
        self.eager.perturb(self.first)

    def update(self) -> None:
        self.eager.restore_sgd(self.grads, self.first, self.buffers, **BASES["SGD"][1])


class Fused(Step):
    """The base optimizer alone, on one gradient."""

    def __init__(self, base: str, *lists: list[Tensor]) -> None:
        super().__init__(*lists)
        kind, options = BASES[base]
        self.optimizer = kind(self.params, fused=True, **options)

    def update(self) -> None:
        self.give(self.grads)
        self.optimizer.step()


def same_weights(name: str, ours: Step, other: Step, start: list[Tensor], pattern: Pattern, lr: float) -> None:
    """After one step from the same weights: perturbed weights and masks are equal to the bit, so the update differs in roundings only, by 4
    units in the last place of each term. The published N:M lets groups straddle kernel positions where m does not divide the input
    channels: these tensors are not compared."""
    for one in (ours, other):
        one.refresh()
        one()
    eps = torch.finfo(start[0].dtype).eps
    for i, (a, b, w) in enumerate(zip(ours.params, other.params, start, strict=True)):
        if name == "published" and isinstance(pattern, NM) and w.dim() > 1 and pattern.why_dense(w.shape) is not None:
            continue
        allowed = 4 * eps * (w.abs() + b.abs() + lr * (1 + ours.first[i].abs() + ours.second[i].abs()))
        wrong = int((~((a - b).abs() <= allowed)).sum())  # a NaN is wrong
        gate.require(wrong == 0, f"{name}: {wrong} of {a.numel()} weights of params[{i}] are not ours after a step")


def step(model: str, pattern: Pattern, base: str, setup: Setup, dtype: str = "fp32", compiled: bool = True) -> Contest:
    """compiled: torch.compile beside us, which takes minutes. Eager torch is written for fp32."""
    shapes = setup.shapes(model)
    lists = [inputs.tensors(shapes, role, inputs.DTYPES[dtype], setup.device) for role in ("params", "first_grads", "grads")]
    lists.append([g.clone() for g in lists[2]])
    torch._dynamo.reset()
    torch._logging.set_logs(dynamo=logging.ERROR)  # a graph break where the threshold is read is meant
    # Compiling takes minutes; --quick only traces, which shows as well that it can be done.
    compile = partial(torch.compile, backend="eager" if setup.quick else "inductor")
    steps: dict[str, Step] = {"cram_kernels": Ours(pattern, base, *lists), "published": Published(pattern, base, *lists)}
    if setup.device == "cpu" and dtype == "fp32":
        steps["eager torch"] = EagerStep(pattern, base, *lists)
        if base == "SGD" and compiled:  # the base that has a target
            steps["torch.compile"] = CompiledStep(pattern, compile, *lists)
    fused = Fused(base, *lists)
    bounds = BOUNDS if (model, base, dtype) == ("ResNet-50", "SGD", "fp32") else {}
    contestants = [
        Contestant(name, s, s.refresh, bounds.get((pattern, name), (0, math.inf)), ours=isinstance(s, Ours)) for name, s in steps.items()
    ]
    if model != "ResNet-50":
        contestants[1].rounds = PUBLISHED_ROUNDS
    contestants.append(
        Contestant(f"torch.optim.{base}(fused=True)", fused, fused.refresh, bounds.get((pattern, "plain fused"), (0, math.inf)))
    )

    def check() -> None:
        for name, other in list(steps.items())[1:]:
            mine = Ours(pattern, base, *lists)
            same_weights(name, mine, other, lists[0], pattern, BASES[base][1]["lr"])

    weights = sum(p.numel() for p in lists[0])
    perturb, update = ((b - 0.125) * lists[0][0].element_size() / 4 + 0.125 for b in (PERTURB_BYTES, BYTES[base] - PERTURB_BYTES))
    formula = f"{perturb + update} a weight: perturb {perturb} + update {update}"
    return Contest(contestants, int((perturb + update) * weights), formula, weights, setup.device, [check], rounds=ROUNDS)


def cases() -> Iterator[run.Case]:
    for base in BASES:
        for pattern in PATTERNS:
            yield run.Case(f"ResNet-50 {base} {pattern}", partial(step, "ResNet-50", pattern, base))
    for model in ("BERT-base", "ViT-B"):
        for pattern in PATTERNS:
            yield run.Case(f"{model} AdamW {pattern}", partial(step, model, pattern, "AdamW"), MEMORY[model])


if __name__ == "__main__":
    raise SystemExit(run.main("step", cases()))
