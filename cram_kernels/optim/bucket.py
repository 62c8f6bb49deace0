"""The parameters sorted into what one call of an op takes."""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._registration import InBuffer
from ..distributed import Spread, local_ranks, spread_of
from ..patterns import NM, Pattern, TopK
from .columns import Columns, Lists, Slot, present

NOT_SPREAD = -2  # in place of a threshold over all ranks: that of the op holds
ALIGNMENT = 64  # bytes, of what lies in a common buffer


class Bucket:
    """The parameters that one call of an op perturbs, and one restores: those of one device, under one pattern.

    Args:
        pattern: None: perturbed only.
        slots: in the order of the groups.
        pruned: those that the pattern prunes.
        ranked: slot -> number, equal for slots that a `TopK` ranks together.
    """

    def __init__(self, pattern: Pattern | None, slots: list[Slot], pruned: set[Slot], ranked: dict[Slot, int]) -> None:
        self.pattern, self.slots, self.device = pattern, slots, slots[0].device
        self.flag = torch.zeros((), dtype=torch.int32, device=self.device)  # the ops' own record of whether these weights are perturbed
        self.pruned = [s for s in slots if s in pruned]
        self.prune = [int(s in pruned) for s in slots]
        sets: dict[int, list[Slot]] = {}
        for slot in slots:
            if slot in ranked:
                sets.setdefault(ranked[slot], []).append(slot)
        number = {key: i for i, key in enumerate(sets)}
        self.sets = [number[ranked[s]] if s in ranked else -1 for s in slots]
        self.numels = tuple(sum(s.local.numel() for s in members) for members in sets.values())  # on this rank
        self.spreads: list[Spread | None] = [spread_of([s.param for s in members]) for members in sets.values()]
        k = [pattern.k(sum(s.param.numel() for s in members)) for members in sets.values()] if isinstance(pattern, TopK) else []
        self.k = torch.tensor(k, dtype=torch.int64, device=self.device)
        self.spread = any([s.spread for s in slots])
        self.lists: Lists | None = None  # see `columns`
        self.masks: tuple[list[bool], list[Tensor]] | None = None  # of the last step that kept none for later: its `sparse`, and they

    def columns(self, masters: bool) -> Columns:
        """The lists of a step, without its gradients. The memory for the weights is made here, for those that have no master.

        Args:
            masters: whether the optimizer keeps master weights.
        """
        if masters or self.spread or self.lists is None:  # else nothing of it changes while the bucket holds
            new = [s for s in self.slots if s.clean is s.nothing]
            for slot, piece in zip(new, pieces([s.local.nbytes for s in new], self.device), strict=True):
                slot.saved = piece.view(slot.dtype).as_strided(slot.shape, slot.local.stride())
            saved = [s.saved if s.master is s.nothing else s.nothing for s in self.slots]
            saved = present(saved, self.slots) if masters or self.spread else handed_over(saved)
            self.lists = Lists([s.local for s in self.slots], saved, present([s.master for s in self.slots], self.slots), self.spread)
        return Columns(self.slots, self.flag, [], self.lists)

    def masks_of_step(self, sparse: list[bool], keep: bool, reuse: bool) -> list[Tensor]:
        """Where the op writes, or where `reuse` reads, the mask of each slot; a mask that nobody will read is not made.

        Args:
            sparse: which groups mask their second gradients.
            keep: the masks are for later steps, too; they are taken away here until `keep_masks` says that they are computed.
        """
        if not keep and self.masks is not None and self.masks[0] == sparse:
            return self.masks[1]
        pattern: Any = self.pattern
        masked = [s for s in self.pruned if keep or sparse[s.group]]
        if reuse:
            by_slot = {s: s.masks[pattern] for s in masked}
        else:
            by_slot = new_masks(masked, self.take_masks() if keep else [s.mask for s in masked])
        masks = [by_slot.get(s, s.nothing) for s in self.slots] if masked else []
        if not keep:
            for slot in masked:
                slot.mask = by_slot[slot]
            masks = handed_over(masks)
            self.masks = sparse, masks
        return masks

    def take_masks(self) -> list[Tensor | None]:
        """The kept masks of what is pruned, which from here on are not to be used again."""
        pattern: Any = self.pattern
        return [s.masks.pop(pattern, None) for s in self.pruned]

    def keep_masks(self, masks: list[Tensor]) -> None:
        """The op has computed these, one a slot: later steps may use them."""
        pattern: Any = self.pattern
        for slot, mask in zip(self.slots, masks, strict=bool(masks)):
            if mask is not slot.nothing:
                slot.masks[pattern] = mask

    def perturb(
        self, part: Columns, rho: Tensor, reuse: bool, inv_scale: Tensor | None, found_inf: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """The op that moves the weights uphill and prunes them; thresholds and statistics where it ranks.

        Args:
            part: the columns of this bucket.
            reuse: the masks are those of an earlier step.
            inv_scale, found_inf: of the gradients, on this device.
        """
        common = (part.params, part.grads, part.saved, part.masks, self.flag, rho)
        options: Any = {"masters": part.masters}
        if inv_scale is not None or found_inf is not None:
            options |= {"inv_scale": inv_scale, "found_inf": found_inf}
        if isinstance(self.pattern, TopK) and not reuse:
            k, over_ranks = self.local_k(part, rho, inv_scale)
            thresholds, stats = ops.perturb_topk_(*common, self.sets, k, **options)
            return thresholds if over_ranks is None else torch.where(over_ranks == NOT_SPREAD, thresholds, over_ranks), stats
        if isinstance(self.pattern, NM) and not reuse:
            ops.perturb_nm_(*common, self.prune, self.pattern.n, self.pattern.m, **options)
        else:
            ops.perturb_masked_(*common, **options)
        return None

    def local_k(self, part: Columns, rho: Tensor, inv_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """k on this rank, and the thresholds over all ranks; k itself and None where no set is spread over ranks."""
        k, thresholds = self.k, None
        if not self.spread:
            return k, None

        def histogram(sets: list[int], prefix: Tensor, shift: int, bits: int) -> Tensor:
            return ops.topk_histogram(part.params, part.grads, rho, sets, prefix, shift, bits, inv_scale=inv_scale, masters=part.masters)

        for spread in dict.fromkeys([s for s in self.spreads if s is not None]):  # in the same order on all ranks
            chosen = [i for i, s in enumerate(self.spreads) if s == spread]
            number = {own: i for i, own in enumerate(chosen)}
            sets = [number.get(s, -1) for s in self.sets]
            here, over_ranks = local_ranks(histogram, [s.param for s in self.slots], sets, self.k[chosen], spread)
            if thresholds is None:
                k, thresholds = k.clone(), torch.full_like(k, NOT_SPREAD, dtype=torch.int32)
            k[chosen], thresholds[chosen] = here, over_ranks
        return k, thresholds


def pieces(sizes: list[int], device: torch.device) -> list[Tensor]:
    """Parts of a new buffer with so many bytes each."""
    room = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    parts = torch.zeros(sum(room), dtype=torch.uint8, device=device).split(room) if sizes else ()
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def new_masks(slots: list[Slot], there: list[Tensor | None]) -> dict[Slot, Tensor]:
    """The memory for the mask of each slot, uint8 [ceil(numel / 8)]; where none is there parts of one buffer."""
    new = [s for s, mask in zip(slots, there, strict=True) if mask is None]
    made = dict(zip(new, pieces([-(-s.local.numel() // 8) for s in new], slots[0].device), strict=True)) if new else {}
    return {s: made[s] if mask is None else mask for s, mask in zip(slots, there, strict=True)}


def handed_over(tensors: list[Tensor]) -> list[Tensor]:
    """The list, for many steps; of tensors in one buffer ops take the buffer alone."""
    buffers = {t.untyped_storage().data_ptr() for t in tensors if t.numel() > 0}
    return InBuffer(tensors) if len(buffers) == 1 < len(tensors) else tensors


def joined(tensors: list[Tensor]) -> Tensor | None:
    """The entries of all buckets, on the device of the first."""
    if len(tensors) < 2:
        return tensors[0] if tensors else None
    return torch.cat([t.to(tensors[0].device) for t in tensors])
