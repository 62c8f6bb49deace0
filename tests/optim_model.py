"""CrAM in plain torch, from docs/contract.md alone: what the optimizer must do, without fusion, caches, or any line of the package.

It keeps its own copies of the weights as float32 numbers, of which each is one of `dtype` unless there are master weights, and takes
gradients as lists of tensors, None where a parameter has none.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

Grads = list[Tensor | None]


@dataclass(frozen=True)
class Top:
    """Keep what is larger than the k-th largest of all."""

    sparsity: float


@dataclass(frozen=True)
class NofM:
    n: int
    m: int


def draw(seed: int, step: int, levels: int) -> int:
    """levels * hash / 2^64, the hash being splitmix64's finalizer of (finalizer of the seed + step * the golden ratio)."""

    def mix(x: int) -> int:
        x &= 2**64 - 1
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    return mix(mix(seed) + step * 0x9E3779B97F4A7C15) * levels // 2**64


@dataclass
class Model:
    weights: list[Tensor]
    base: str  # "sgd", "adam", "adamw", "rmsprop"
    patterns: list[list[Top | NofM]]  # those among which a step draws, of each weight
    rho: float = 0.05
    plus: bool = True
    sparse_grad: bool = True
    normalize_grad: bool = False
    max_grad_norm: float | None = None
    mask_period: int = 1
    seed: int = 0
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    dtype: torch.dtype = torch.float32
    master_weights: bool = False
    step_count: int = 0
    state: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    masks: dict[Top | NofM, list[Tensor | None]] = field(default_factory=dict)  # kept ones
    uses: dict[Top | NofM, int] = field(default_factory=dict)

    def rounded(self, t: Tensor) -> Tensor:
        """As a parameter holds it."""
        return t.to(self.dtype).float()

    def stored(self, t: Tensor) -> Tensor:
        """As state and clean weights are held."""
        return t if self.master_weights else self.rounded(t)

    def reset(self, i: int) -> None:
        """Another parameter takes this place: it has no state, and no masks."""
        self.state.pop(i, None)
        for masks in self.masks.values():
            masks[i] = None

    def touch(self, grads: Grads) -> None:
        """The state of parameters with a gradient takes their dtype, also in a step that is skipped."""
        for i, state in self.state.items():
            if grads[i] is not None:
                state.update({key: self.stored(t) for key, t in state.items() if key != "t"})

    # --- the first half ---

    def perturb(self, grads: Grads) -> list[Tensor]:
        """The perturbed and pruned weights; what the second half needs is noted."""
        grads, norm = self._clipped(grads)
        rho = torch.tensor(self.rho)
        if self.normalize_grad and norm is not None:
            rho = rho / (norm + 1e-12)
        moved = [self.rounded(w if g is None else w + rho * g) for w, g in zip(self.weights, grads, strict=True)]
        drawn = [choice[draw(self.seed, self.step_count, len(choice))] if choice else None for choice in self.patterns]
        masks: list[Tensor | None] = [None] * len(moved)
        for pattern in set(drawn) - {None}:
            active = [g is not None and p == pattern for g, p in zip(grads, drawn, strict=True)]
            masks = [m if own is None else own for m, own in zip(masks, self._masks(pattern, moved, active), strict=True)]
        self.first, self.second_masks = grads, masks if self.sparse_grad else [None] * len(masks)
        self.used = {p for g, p in zip(grads, drawn, strict=True) if g is not None and p is not None}
        self.perturbed = [u if m is None else torch.where(m, u, 0.0) for u, m in zip(moved, masks, strict=True)]
        return self.perturbed

    def _masks(self, pattern: Top | NofM, moved: list[Tensor], active: list[bool]) -> list[Tensor | None]:
        prunable = [
            a and u.dim() >= 2 and (isinstance(pattern, Top) or u.shape[1] % pattern.m == 0) for a, u in zip(active, moved, strict=True)
        ]
        if self.mask_period > 1:
            kept = self.masks.get(pattern)
            there = kept is not None and all(m is not None for m, p in zip(kept, prunable, strict=True) if p)
            if there and self.uses.get(pattern, 0) % self.mask_period:
                return [m if p else None for m, p in zip(kept, prunable, strict=True)]
        if isinstance(pattern, NofM):
            masks = [self._nm(u, pattern) if p else None for u, p in zip(moved, prunable, strict=True)]
        else:
            magnitudes = torch.cat([u.abs().flatten() for u, p in zip(moved, prunable, strict=True) if p] or [torch.zeros(0)])
            k = math.ceil(magnitudes.numel() * (1 - pattern.sparsity))
            threshold = magnitudes.sort(descending=True).values[k - 1] if magnitudes.numel() else 0.0
            masks = [u.abs() > threshold if p else None for u, p in zip(moved, prunable, strict=True)]
        if self.mask_period > 1:
            old = self.masks.get(pattern, [None] * len(moved))
            self.masks[pattern] = [o if m is None else m for o, m in zip(old, masks, strict=True)]
        return masks

    @staticmethod
    def _nm(u: Tensor, pattern: NofM) -> Tensor:
        """Of each m along axis 1, all but the first m - n in stable ascending order of magnitude."""
        groups = u.movedim(1, -1).unflatten(-1, (-1, pattern.m))
        order = groups.abs().argsort(dim=-1, stable=True)
        mask = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order[..., : pattern.m - pattern.n], False)
        return mask.flatten(-2).movedim(-1, 1)

    def _clipped(self, grads: Grads) -> tuple[Grads, Tensor | None]:
        """The clipped gradients and their norm, where an option needs it."""
        present = [g for g in grads if g is not None]
        if not present or not (self.normalize_grad or self.max_grad_norm):
            return grads, None
        norm = torch.cat([g.double().flatten() for g in present]).square().sum().sqrt().float()
        if self.max_grad_norm is None:
            return grads, norm
        coefficient = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        return [None if g is None else g * coefficient for g in grads], norm * coefficient

    # --- the second half ---

    def finish(self, grads: Grads) -> None:
        grads, _ = self._clipped(grads)
        perturbed = [g is not None for g in self.first]
        combined: Grads = []
        for g1, g2, mask, moved in zip(self.first, grads, self.second_masks, perturbed, strict=True):
            second = None if g2 is None else g2 if mask is None or not moved else torch.where(mask, g2, 0.0)
            first = g1 if self.plus and moved else None
            combined.append(second if first is None else first if second is None else first + second)
        self._update(combined)
        for pattern in self.used if self.mask_period > 1 else ():
            self.uses[pattern] = self.uses.get(pattern, 0) + 1
        self.step_count += 1

    def plain(self, grads: Grads) -> None:
        self._update(self._clipped(grads)[0])

    def _update(self, grads: Grads) -> None:
        """The formulas of torch's documentation, every operation rounded to float32 by itself."""
        lr = torch.tensor(self.lr)
        for i, g in enumerate(grads):
            if g is None:
                continue
            w, state = self.weights[i], self.state.setdefault(i, {})
            if self.base == "rmsprop":
                self.weights[i] = self._rmsprop(w, g, state)
                continue
            if self.base == "sgd":
                if self.weight_decay:
                    g = g + torch.tensor(self.weight_decay) * w
                if self.momentum:
                    g = torch.tensor(self.momentum) * self.stored(state["b"]) + g if "b" in state else g.clone()
                    state["b"] = self.stored(g)
                self.weights[i] = self.stored(w - lr * g)
                continue
            t = state["t"] = state.get("t", torch.zeros(())) + 1
            if self.weight_decay and self.base == "adamw":
                w = w - (lr * torch.tensor(self.weight_decay)) * w
            elif self.weight_decay:
                g = g + torch.tensor(self.weight_decay) * w
            zero = torch.zeros_like(w)
            m = torch.tensor(0.9) * self.stored(state.get("m", zero)) + torch.tensor(1 - 0.9) * g
            v = torch.tensor(0.999) * self.stored(state.get("v", zero)) + torch.tensor(1 - 0.999) * (g * g)
            state["m"], state["v"] = self.stored(m), self.stored(v)
            c1, c2 = (torch.tensor(1 - beta ** int(t)) for beta in (0.9, 0.999))
            self.weights[i] = self.stored(w - (lr / c1) * (m / (_sqrt(v) / _sqrt(c2) + torch.tensor(1e-8))))

    def _rmsprop(self, w: Tensor, g: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Any other base takes its own step with the combined gradient."""
        param = torch.nn.Parameter(w.clone())
        param.grad = g.clone()
        base = torch.optim.RMSprop([param], lr=self.lr, weight_decay=self.weight_decay)
        base.state[param] = state
        base.step()
        return param.detach()


def _sqrt(t: Tensor) -> Tensor:
    """Rounded once, as IEEE 754 has it; torch's own of float32 may be an ulp off."""
    return t.double().sqrt().float()
