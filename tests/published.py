"""The published optimizers, restated plainly in torch: the oracle for our drop-in names.

Written anew from what the method (Peste et al., CrAM, ICLR 2023, arXiv 2207.14200) and the code published with it do
(github.com/IST-DASLab/CrAM, commit b89d9ff, optimization/custom_optimizers.py). Where that code is
wrong this oracle is wrong in the same way: docs/migrating.md lists those places, test_published.py asserts them. Two things are handed in
and not drawn or taken here: the compression level of each step (`levels`) and the normalized rho (`scale`). Nothing is printed.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat

import torch
from torch import Tensor


def normalized_rho(rho: float, grads: list[Tensor]) -> Tensor:
    """rho over the norm of all gradients, [] float32, the way most torch code takes it."""
    return rho / (torch.stack([g.norm() for g in grads]).norm() + 1e-12)


def magnitude_threshold(weights: list[Tensor], sparsity: float) -> Tensor | float:
    """The magnitude that a weight has to exceed in order to stay; -1 keeps all."""
    if sparsity == 0:
        return -1.0
    magnitudes = torch.cat([w.detach().abs().view(-1) for w in weights])  # view: a channels_last weight raises here
    k = math.ceil(magnitudes.numel() * (1 - sparsity))
    return magnitudes.topk(k).values[-1]


def nm_mask(w: Tensor, n: int, m: int) -> Tensor:
    """1 for the n largest of m neighbours, float32, the shape of w [out, in] or [out, in, kh, kw].

    Neighbours are counted off in the flattened [out, kh, kw, in]: where m does not divide `in`, groups straddle kernel positions and rows.
    """
    last = w.detach().movedim(1, -1)
    groups = last.reshape(-1, m)
    smallest = groups.abs().argsort(dim=1)[:, : m - n]
    return torch.ones_like(groups, dtype=torch.float32).scatter_(1, smallest, 0.0).reshape(last.shape).movedim(-1, 1)


class SAM(torch.optim.Optimizer):
    """theta -= eta * grad L(theta + rho * g / |g|): uphill, a second gradient there, back, a step of the base optimizer."""

    normalized, plus, sparse = True, False, False

    def __init__(
        self, params, base_optimizer, rho=0.05, *, levels: Iterable | None = None, scale: Callable = normalized_rho, **base_options
    ):
        super().__init__(params, {"rho": rho, **base_options})
        self.base_optimizer = base_optimizer(self.param_groups, **base_options)
        self.param_groups = self.base_optimizer.param_groups
        self.levels: Iterator | None = None if levels is None else iter(levels)
        self.scale = scale

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group in self.param_groups:
            rho = self.scale(group["rho"], grads) if self.normalized else group["rho"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.state[p] |= {"old_p": p.data.clone(), "clean_grad": p.grad.clone()}
                p.add_(p.grad * rho)
        if self.levels is not None:
            self.compress(next(self.levels))
        if zero_grad:
            self.zero_grad()

    def compress(self, level) -> None:
        """Prune in place, and leave the masks (1 or 0, float32) in the state."""

    def prune(self, p: Tensor, mask: Tensor) -> None:
        self.state[p]["mask"] = mask
        p.mul_(mask)

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue  # a parameter without a second gradient is left where it is: perturbed and pruned
                state = self.state[p]
                if self.sparse and "mask" in state:
                    p.grad.mul_(state["mask"])
                p.data = state["old_p"]  # other storage than before, and the state's `old_p` is the live weight from here on
                if self.plus:
                    p.grad.add_(state["clean_grad"])
        self.base_optimizer.step()
        for p, state in self.base_optimizer.state.items():
            self.state[p].update(state)  # saved with the state_dict; loading never hands it back to the base optimizer
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable | None = None) -> None:
        """The first gradients are there already; the closure is run once and makes the second ones. Returns nothing."""
        if closure is None:
            raise AssertionError("a closure is needed")
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            closure()
        self.second_step()


class TopkCrAM(SAM):
    """Top-k pruning at the perturbed point: one threshold for each parameter group, or for each tensor (`unif_prune`)."""

    def __init__(
        self,
        params,
        base_optimizer,
        rho=0.05,
        sparsities=(0.5, 0.7, 0.9),
        grad_norm=False,
        plus_version=True,
        unif_prune=False,
        sparse_grad=True,
        *,
        levels=None,
        **base_options,
    ):
        super().__init__(params, base_optimizer, rho, levels=repeat(sparsities[0]) if levels is None else levels, **base_options)
        self.normalized, self.plus, self.sparse, self.uniform = grad_norm, plus_version, sparse_grad, unif_prune

    def threshold_sets(self) -> Iterator[list[Tensor]]:
        """Weights that are ranked together."""
        for group in self.param_groups:
            params = group["params"]
            if self.uniform:  # not the first entry of the group and not the last two, whatever they are
                yield from ([p] for p in params[1:-2] if p.dim() > 1 and p.grad is not None)
            elif weights := [p for p in params if p.dim() > 1 and p.grad is not None]:
                yield weights

    def compress(self, level: float) -> None:
        for weights in self.threshold_sets():
            t = magnitude_threshold(weights, level)
            for p in weights:
                self.prune(p, (p.abs() > t).float())


class TopkCrAMPeriod(TopkCrAM):
    """TopkCrAM with one mask for each level, renewed every `mask_freq` times that the level is drawn."""

    def __init__(self, params, base_optimizer, rho=0.05, sparsities=(0.5,), *args, mask_freq=1, **options):
        super().__init__(params, base_optimizer, rho, sparsities, *args, **options)
        self.mask_freq, self.times_drawn = mask_freq, {}

    def compress(self, level: float) -> None:
        drawn = self.times_drawn.get(level, 0)
        self.times_drawn[level] = drawn + 1
        if drawn % self.mask_freq == 0:
            super().compress(level)
        for weights in self.threshold_sets():
            for p in weights:
                if drawn % self.mask_freq == 0:
                    self.state[p][f"mask-{level}"] = self.state[p]["mask"]
                else:
                    self.prune(p, self.state[p][f"mask-{level}"])  # KeyError where p had no gradient when the masks were made


class NMTopkCrAM(SAM):
    """N:M pruning at the perturbed point, of every 2-d and 4-d parameter; a level is (n, m)."""

    def __init__(
        self, params, base_optimizer, rho=0.05, grad_norm=False, sparse_grad=True, plus_version=True, *, levels=None, **base_options
    ):
        super().__init__(params, base_optimizer, rho, levels=repeat((2, 4)) if levels is None else levels, **base_options)
        self.normalized, self.plus, self.sparse = grad_norm, plus_version, sparse_grad

    def compress(self, level: tuple[int, int]) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() in (2, 4):  # with or without a gradient
                    self.prune(p, nm_mask(p, *level))

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]  # of this step, or of the last one in which p had a gradient; KeyError if there was none
        super().second_step(zero_grad)
