"""Global top-k: perturb + prune against a copy and eager torch; selection alone against torch.topk, torch.kthvalue and numpy.partition."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from cram_kernels.patterns import TopK

from . import gate, inputs, run
from .eager import against_eager
from .inputs import OpRun
from .measure import ROUNDS, Contest, Contestant, Setup
from .partition import Partition, features_above_avx2
from .shapes import MODELS

SPARSITIES = (0.5, 0.7, 0.9, 0.95)
COPY_BOUND = 1 / 1.25


perturb_run = partial(inputs.perturb_run, "perturb_topk_")


def perturb(model: str, sparsity: float, setup: Setup) -> Contest:
    op = perturb_run(setup.shapes(model), TopK(sparsity), "fp32", setup)
    return against_eager(op, TopK(sparsity), COPY_BOUND) if setup.device == "cpu" else op.contest(copy_bound=COPY_BOUND)


dtypes = inputs.by_dtype(lambda shapes, *rest, **more: perturb_run(shapes, TopK(0.9), *rest, **more))


def prune(model: str, setup: Setup) -> Contest:
    op = inputs.prune_run("prune_topk_", model, TopK(0.9), setup)
    pruned = GlobalUnstructured(op.arguments["weights"], 0.9)
    contest = op.contest(Contestant("torch.nn.utils.prune", pruned.run, pruned.reset), rounds=ROUNDS)
    contest.checks.append(partial(pruned.check, op.arguments["weights"]))
    return contest


class GlobalUnstructured:
    """torch.nn.utils.prune.global_unstructured, with its masks made permanent."""

    def __init__(self, weights: list[Tensor], amount: float) -> None:
        self.start, self.amount = [w.clone() for w in weights], amount
        self.layers = [nn.Module() for _ in weights]
        self.reset()

    def reset(self) -> None:
        for layer, start in zip(self.layers, self.start, strict=True):
            layer.weight = nn.Parameter(start.clone())

    def run(self) -> None:
        pairs = [(layer, "weight") for layer in self.layers]
        torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=self.amount)
        for pair in pairs:
            torch_prune.remove(*pair)

    def check(self, ours: list[Tensor]) -> None:
        """The same weights are left, but for the k-th, which goes by the published rule, and rounding of the count."""
        self.run()
        other = sum(int(((layer.weight != 0) != (w != 0)).sum()) for layer, w in zip(self.layers, ours, strict=True))
        self.reset()
        gate.require(other <= 2, f"torch.nn.utils.prune: {other} weights are pruned by one of both only")


def threshold(model: str, sparsity: float, setup: Setup) -> Contest:
    """The peers get the magnitudes as one flat tensor, already there."""
    pattern = TopK(sparsity)

    def arguments(shapes):
        return inputs.weights_only(shapes, pattern, setup.device, with_masks=False)

    op = OpRun(setup, "topk_threshold", setup.shapes(model), arguments, {"weights": 1})
    peers = list(threshold_peers(op))
    contest = op.contest(*peers, rounds=ROUNDS)
    contest.checks += [partial(same_threshold, op, peer) for peer in peers]
    return contest


def threshold_peers(op: OpRun) -> Iterator[Contestant]:
    magnitudes = torch.cat([w.abs().flatten() for w in op.arguments["weights"]])
    k, n = int(op.arguments["k"]), magnitudes.numel()
    yield Contestant("torch.topk", lambda: magnitudes.topk(k).values[-1], bound=(40, math.inf))
    yield Contestant("torch.topk, unsorted", lambda: magnitudes.topk(k, sorted=False).values.min())
    yield Contestant("torch.kthvalue", lambda: magnitudes.kthvalue(n - k + 1).values, bound=(20, math.inf))
    if op.device == "cpu":
        for name, features in {"numpy.partition": "", "numpy.partition, AVX2": features_above_avx2()}.items():
            numpy = Partition(magnitudes, k, features)
            yield Contestant(name, numpy.run, numpy.reset, bound=(3, math.inf))


def same_threshold(op: OpRun, peer: Contestant) -> None:
    """A peer that selects something else is no peer."""
    op.run()
    peer.reset()
    found = peer.run()
    ours = float(op.result.view(torch.float32))
    gate.require(float(found) == ours, f"{peer.name}: threshold must be {ours}, got {float(found)}")


def cases() -> Iterator[run.Case]:
    for model in MODELS:
        for sparsity in SPARSITIES:
            yield run.Case(f"perturb_topk_ {model} {TopK(sparsity)}", partial(perturb, model, sparsity))
    yield run.Case("perturb_topk_ ResNet-50 90 %, dtypes", dtypes)
    for model in MODELS:
        yield run.Case(f"prune_topk_ {model} 90 %", partial(prune, model))
    for sparsity in SPARSITIES:
        yield run.Case(f"topk_threshold ResNet-50 {TopK(sparsity)}", partial(threshold, "ResNet-50", sparsity))


if __name__ == "__main__":
    raise SystemExit(run.main("bench_topk", cases()))
