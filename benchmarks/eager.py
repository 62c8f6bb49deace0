"""CrAM+ in plain torch, as fast as we can write it without a kernel: the rival of the ops and of the step, also under torch.compile.

Exact, for finite weights: u is rounded as the contract says, the threshold is the k-th largest magnitude. Parameters are contiguous
float32; those that are pruned have a multiple of 8 weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cram_kernels.patterns import NM, Pattern

from . import gate
from .inputs import RHO, OpRun
from .measure import Contest, Contestant

Tensors = list[Tensor]
SAMPLE, DEVIATIONS = 65536, 4
hardshrink, hardshrink_backward = torch.ops.aten.hardshrink.out, torch.ops.aten.hardshrink_backward.grad_input


def uphill(params: Tensors, grads: Tensors, saved: Tensors, rho: float, one: Tensor) -> None:
    """addcmul adds (rho * g) * 1: an FMA in it, if any, changes nothing; in add(alpha=rho) it would."""
    torch._foreach_copy_(saved, params)
    torch._foreach_addcmul_(params, grads, [one] * len(params), value=rho)


def sample(pruned: Tensors, places: Tensors) -> Tensor:
    return torch.cat([p.view(-1)[i] for p, i in zip(pruned, places, strict=True)]).abs()


def bracket(magnitudes: Tensor, share: float) -> Tensors:
    """Between which two magnitudes the threshold lies, given a sample of the magnitudes and the share of larger ones."""
    n = magnitudes.numel()
    width = DEVIATIONS * (n * share * (1 - share)) ** 0.5 + 1
    ranks = (min(max(round(n * (1 - share) + sign * width), 1), n) for sign in (-1, 1))
    return [magnitudes.kthvalue(rank).values for rank in ranks]


def search(pruned: Tensors, low: Tensor, high: Tensor) -> tuple[Tensor, Tensors]:
    """How many are larger than the bracket, and which eights of neighbours have one in it: fewer flags make nonzero() cheaper."""
    larger, eights = [], []
    for p in pruned:
        magnitudes = p.view(-1, 8).abs()
        above = magnitudes > high
        larger.append(above.count_nonzero())
        if torch.compiler.is_compiling():  # which fuses a reduction, and is slow where it has to store flags
            eights.append(((magnitudes > low) & (magnitudes <= high)).any(1))
        else:
            eights.append((above.view(torch.int64) != (magnitudes > low).view(torch.int64)).squeeze(1))
    return torch.stack(larger).sum(), eights


def in_bracket(pruned: Tensors, eights: Tensors, low: Tensor, high: Tensor) -> Tensor:
    near = [p.view(-1, 8).index_select(0, e.nonzero().squeeze(1)) for p, e in zip(pruned, eights, strict=True)]
    magnitudes = torch.cat(near).abs()
    return magnitudes[(magnitudes > low) & (magnitudes <= high)]


def shrink(pruned: Tensors, threshold: float) -> None:
    """hardshrink keeps what is larger in magnitude than a number: the strict rule of the contract."""
    for p in pruned:
        hardshrink(p, threshold, out=p)


def combine_topk(params: Tensors, saved: Tensors, grads: Tensors, first_grads: Tensors, prunable: list[int]) -> None:
    """What a top-k kept is not 0 (it is larger than the threshold), so the pruned weights themselves are the mask."""
    for i in prunable:
        hardshrink_backward(grads[i], params[i], 0, grad_input=grads[i])
    torch._foreach_add_(grads, first_grads)
    torch._foreach_copy_(params, saved)


def prune_nm(pruned: Tensors, keep: Tensors, n: int, m: int) -> None:
    """Ranks by counting, the later of two equal ones higher. keep: float32, 1 or 0."""
    compiling = torch.compiler.is_compiling()  # where flags are slow
    for p, kept in zip(pruned, keep, strict=True):
        groups = p.view(p.shape[0], p.shape[1] // m, m, -1)
        keys = groups.abs().unbind(2)
        ranks = [torch.zeros_like(key, dtype=torch.float32 if compiling else torch.int8) for key in keys]
        for i in range(m):
            for j in range(i + 1, m):
                later = keys[i] <= keys[j]
                ranks[j] += later.float() if compiling else later
                ranks[i] += (~later).float() if compiling else ~later
        kept.view_as(groups).copy_(torch.stack([(rank >= m - n).float() if compiling else rank >= m - n for rank in ranks], 2))
        p.mul_(kept)


def combine_nm(params: Tensors, saved: Tensors, grads: Tensors, first_grads: Tensors, prunable: list[int], keep: Tensors) -> None:
    torch._foreach_mul_([grads[i] for i in prunable], keep)
    torch._foreach_add_(grads, first_grads)
    torch._foreach_copy_(params, saved)


def restore_sgd(
    params: Tensors,
    saved: Tensors,
    grads: Tensors,
    first_grads: Tensors,
    buffers: Tensors,
    kept: dict[int, Tensor],
    lr: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """Both halves' gradients, the restore and SGD, to be compiled: a pass over each tensor. kept: of those that are pruned, not 0 is kept.
    A momentum buffer of zeros becomes the first gradient, as in torch."""
    for i, (p, s, g, first, b) in enumerate(zip(params, saved, grads, first_grads, buffers, strict=True)):
        total = first + (torch.where(kept[i] != 0, g, 0.0) if i in kept else g)
        b.copy_(momentum * b + (total + weight_decay * s))
        p.copy_(s - lr * b)


class Eager:
    """The buffers of a model, and the two halves of its step.

    Args:
        compile: makes a function faster, e.g. torch.compile; used where it does.
    """

    def __init__(self, params: Tensors, pattern: Pattern, rho: float, compile: Callable[[Any], Any] = lambda f: f) -> None:
        self.params, self.pattern, self.rho, self.one = params, pattern, rho, torch.tensor(1.0)
        self.saved = [torch.empty_like(p) for p in params]
        self.prunable = [i for i, p in enumerate(params) if pattern.why_dense(p.shape) is None]
        self.pruned = [params[i] for i in self.prunable]
        self.uphill, self.sample, self.search, self.shrink = map(compile, (uphill, sample, search, shrink))
        self.prune_nm, self.fused_sgd = map(compile, (prune_nm, restore_sgd))
        if isinstance(pattern, NM):
            self.keep = [torch.empty_like(p) for p in self.pruned]
        else:
            numels = [p.numel() for p in self.pruned]
            self.k, self.numel = pattern.k(sum(numels)), sum(numels)
            generator = torch.Generator().manual_seed(0)
            sizes = [-(-min(SAMPLE, sum(numels)) * n // sum(numels)) for n in numels]
            self.places = [torch.randint(n, (size,), generator=generator).sort().values for n, size in zip(numels, sizes, strict=True)]

    @torch.no_grad()
    def perturb(self, grads: Tensors) -> None:
        self.uphill(self.params, grads, self.saved, self.rho, self.one)
        if isinstance(self.pattern, NM):
            self.prune_nm(self.pruned, self.keep, self.pattern.n, self.pattern.m)
        else:
            self.shrink(self.pruned, self.threshold())

    def threshold(self) -> float:
        """The k-th largest magnitude."""
        low, high = bracket(self.sample(self.pruned, self.places), self.k / self.numel)
        larger, eights = self.search(self.pruned, low, high)
        candidates = in_bracket(self.pruned, eights, low, high)
        rank = self.k - int(larger)
        if not 1 <= rank <= candidates.numel():  # bad luck
            candidates, rank = torch.cat([p.flatten() for p in self.pruned]).abs(), self.k
        return candidates.kthvalue(candidates.numel() - rank + 1).values.item()

    @torch.no_grad()
    def restore(self) -> None:
        torch._foreach_copy_(self.params, self.saved)

    @torch.no_grad()
    def combine(self, grads: Tensors, first_grads: Tensors) -> None:
        """grads becomes the gradient of the update, and the weights are back."""
        common = (self.params, self.saved, grads, first_grads, self.prunable)
        if isinstance(self.pattern, NM):
            combine_nm(*common, self.keep)
        else:
            combine_topk(*common)

    @torch.no_grad()
    def restore_sgd(self, grads: Tensors, first_grads: Tensors, buffers: Tensors, **options: float) -> None:
        """`combine` and torch.optim.SGD's step, grads read only. What a top-k kept is not 0."""
        kept = dict(zip(self.prunable, self.keep if isinstance(self.pattern, NM) else self.pruned, strict=True))
        self.fused_sgd(self.params, self.saved, grads, first_grads, buffers, kept, **options)


def against_eager(op: OpRun, pattern: Pattern, copy_bound: float) -> Contest:
    """A perturb of contiguous float32 weights beside the same in eager torch."""
    grads = op.arguments["grads"]
    rival = Eager([p.clone() for p in op.arguments["params"]], pattern, RHO)
    rival.perturb(grads)  # saves the weights, so that it can be reset

    def same_weights() -> None:
        """After the check of the op, its weights are perturbed."""
        for i, (ours, theirs) in enumerate(zip(op.arguments["params"], rival.params, strict=True)):
            gate.require(torch.equal(ours, theirs), f"eager torch: params[{i}] is not that of {op.op}")

    contest = op.contest(Contestant("eager torch", lambda: rival.perturb(grads), rival.restore), copy_bound=copy_bound)
    contest.checks.append(same_weights)
    return contest
