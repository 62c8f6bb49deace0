"""The first half of a step: the op that saves, moves uphill and prunes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..distributed import local_ranks, whole_mesh
from ..patterns import NM, Pattern, TopK
from .arena import Arena, tensors_of
from .factor import Factor, on
from .last import Perturbation
from .scalars import Groups, Scalars
from .selection import Selection, Side

UNSPREAD = -2  # no threshold: that of the op holds


def perturb_(
    arena: Arena,
    selection: Selection,
    groups: Groups,
    scalars: Scalars,
    factor: Factor,
    norm: Tensor | None,
    level: int | None,
    place: int | None,
    reuse: bool,
) -> Perturbation:
    """Perturb the slots of the selection, which all have a gradient, and prune as it says.

    Args:
        factor: of the gradients.
        norm: float32 []: divides rho.
        level: the index of the pattern.
        place: where the masks are kept for later steps; None: nowhere.
        reuse: take the masks that are there.
    """
    masked = [s for s in selection.pruned if place is not None or groups[s.group]["sparse_grad"]]
    arena.allocate_bits(masked, place)
    arena.begin(selection.slots)
    for slot in masked:
        slot.mask = slot.bits[place]
    if place is not None and not reuse:
        for slot in masked:
            slot.finished.discard(place)
    results = []
    for side in selection.sides:
        rho = scalars.option("rho", groups, side.slots, side.device)
        if norm is not None:
            rho = rho / (norm.to(side.device) + 1e-12)
        results.append(_on_device(arena, side, rho, factor, None if reuse else selection.pattern, scalars))
    if factor.found_inf is not None:
        for mesh in whole_mesh([s.param for s in selection.slots]):
            mesh.reduce_(factor.found_inf, dist.ReduceOp.MAX)
    if place is not None:
        for slot in masked:
            slot.finished.add(place)
            if not reuse:
                arena.renewed.append((slot, place))
            if not groups[slot.group]["sparse_grad"]:
                slot.mask = slot.nothing
    numels = tuple(size for side in selection.sides for size in side.numels)
    thresholds, stats = _joined([r for r in results if r is not None])
    return Perturbation(selection.pattern, level, thresholds, stats, numels)


def _on_device(
    arena: Arena, side: Side, rho: Tensor, factor: Factor, pattern: Pattern | None, scalars: Scalars
) -> tuple[Tensor, Tensor] | None:
    """The op; without a pattern the masks that are there prune."""
    slots = side.slots
    params, grads = [s.local for s in slots], [s.grad for s in slots]
    common = (params, grads, tensors_of(slots, "origin"), tensors_of(slots, "mask"), arena.flag(side.device), rho)
    found_inf = on(factor.found_inf, side.device)
    amp: dict[str, Any] = {"inv_scale": on(factor.inv_scale, side.device), "found_inf": found_inf, "masters": tensors_of(slots, "master")}
    result = None
    if isinstance(pattern, TopK):
        k = scalars.tensor(f"k of {pattern}", side.k, torch.int64, side.device)
        k, over_ranks = _local_k(side, k, rho, amp)
        thresholds, stats = ops.perturb_topk_(*common, side.sets, k, **amp)
        result = thresholds if over_ranks is None else torch.where(over_ranks == UNSPREAD, thresholds, over_ranks), stats
    elif isinstance(pattern, NM):
        ops.perturb_nm_(*common, side.prune, pattern.n, pattern.m, **amp)
    else:
        ops.perturb_masked_(*common, **amp)
    if factor.found_inf is not None and found_inf is not None and found_inf is not factor.found_inf:  # a device that is not the scaler's
        factor.found_inf.add_(found_inf.to(factor.found_inf.device))
    return result


def _local_k(side: Side, k: Tensor, rho: Tensor, amp: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """k on this rank, and the thresholds over all; k itself and None where no set is spread over ranks."""
    slots, thresholds = side.slots, None
    params, grads = [s.local for s in slots], [s.grad for s in slots]
    options = {key: amp[key] for key in ("inv_scale", "masters")}

    def histogram(sets: list[int], prefix: Tensor, shift: int, bits: int) -> Tensor:
        return ops.topk_histogram(params, grads, rho, sets, prefix, shift, bits, **options)

    for spread in dict.fromkeys(s for s in side.spreads if s is not None):  # in the same order on all ranks
        chosen = [i for i, s in enumerate(side.spreads) if s == spread]
        number = {own: i for i, own in enumerate(chosen)}
        sets = [number.get(s, -1) for s in side.sets]
        here, over_ranks = local_ranks(histogram, [s.param for s in slots], sets, k[chosen], spread)
        if thresholds is None:
            k, thresholds = k.clone(), torch.full_like(k, UNSPREAD, dtype=torch.int32)
        k[chosen], thresholds[chosen] = here, over_ranks
    return k, thresholds


def _joined(results: list[tuple[Tensor, Tensor]]) -> tuple[Tensor | None, Tensor | None]:
    """Thresholds and statistics of all devices, on the first."""
    if len(results) < 2:
        return results[0] if results else (None, None)
    device = results[0][0].device
    thresholds, stats = zip(*results, strict=True)
    return torch.cat([t.to(device) for t in thresholds]), torch.cat([t.to(device) for t in stats])
