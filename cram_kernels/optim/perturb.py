"""The first half of a step: the op that saves, moves uphill and prunes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..patterns import NM, Pattern, TopK
from .arena import Arena
from .scalars import Groups, Scalars
from .selection import Selection, Side


@dataclass(frozen=True)
class Perturbation:
    """What a perturb did. Tensors stay on the device; None for N:M, without a pattern, and where masks of an earlier step were used."""

    pattern: Pattern | None
    thresholds: Tensor | None = None  # int32 [selection sets]: keys, see `ops.topk_threshold`
    stats: Tensor | None = None  # int64 [selection sets, 3], see `ops.prune_topk_`


def perturb_(
    arena: Arena, selection: Selection, groups: Groups, scalars: Scalars, place: int | None, reuse: bool, normalize: bool
) -> Perturbation:
    """Perturb the slots of the selection, which all have a gradient, and prune as it says.

    Args:
        place: where the masks are kept for later steps; None: nowhere.
        reuse: take the masks that are there.
        normalize: divide rho by the norm of all gradients.
    """
    norm = _norm(selection.sides) if normalize and selection.slots else None
    masked = [s for s in selection.pruned if place is not None or groups[s.group]["sparse_grad"]]
    arena.allocate_bits(masked, place)
    arena.begin(selection.slots)
    for slot in masked:
        slot.mask = slot.bits[place]
        if not reuse:
            slot.finished.discard(place)
    results = []
    for side in selection.sides:
        rho = scalars.option("rho", groups, side.slots, side.device)
        if norm is not None:
            rho = rho / (norm.to(side.device) + 1e-12)
        results.append(_on_device(arena, side, rho, None if reuse else selection.pattern, scalars))
    for slot in masked:
        if place is not None:
            slot.finished.add(place)
        if not groups[slot.group]["sparse_grad"]:
            slot.mask = slot.nothing
    return Perturbation(selection.pattern, *_joined([r for r in results if r is not None]))


def _on_device(arena: Arena, side: Side, rho: Tensor, pattern: Pattern | None, scalars: Scalars) -> tuple[Tensor, Tensor] | None:
    """The op; without a pattern the masks that are there prune."""
    slots = side.slots
    params, grads, saved = [s.param for s in slots], [s.grad for s in slots], [s.origin for s in slots]
    common = (params, grads, saved, [s.mask for s in slots], arena.flag(side.device), rho)
    if isinstance(pattern, TopK):
        return ops.perturb_topk_(*common, side.sets, scalars.tensor(f"k of {pattern}", side.k, torch.int64, side.device))
    if isinstance(pattern, NM):
        ops.perturb_nm_(*common, side.prune, pattern.n, pattern.m)
    else:
        ops.perturb_masked_(*common)
    return None


def _norm(sides: list[Side]) -> Tensor:
    """The norm of all gradients, float32 []."""
    norms = [ops.grad_norm([s.grad for s in side.slots]) for side in sides]
    if len(norms) == 1:
        return norms[0]
    return torch.stack([n.to(norms[0].device, torch.float64) for n in norms]).square().sum().sqrt().float()


def _joined(results: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Thresholds and statistics of all devices, on the first."""
    if len(results) < 2:
        return [t for r in results for t in r]
    return [torch.cat([t.to(tensors[0].device) for t in tensors]) for tensors in zip(*results, strict=True)]
