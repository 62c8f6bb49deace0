"""What a pattern prunes among the parameters of a step, in the words of the ops."""

from typing import NamedTuple

import torch

from ..distributed import Spread, spread_of
from ..patterns import Pattern, TopK
from .arena import Slot, by_device


class Side(NamedTuple):
    """The slots of one device."""

    device: torch.device
    slots: list[Slot]
    prune: list[int]  # [n] 0 or 1
    sets: list[int]  # [n] the selection set of TopK, -1: in none
    k: list[int]  # a selection set
    numels: list[int]  # a selection set: weights on this rank
    spreads: list[Spread | None]  # a selection set: the ranks over which it lies


class Selection:
    """Which of the slots are pruned, and which are ranked together. Computed anew only when slots or groups change.

    Args:
        pattern: None: nothing is pruned.
        slots: of the step, in order.
        pruned: [n] whether the pattern applies.

    Raises:
        RuntimeError: weights of several devices, or of several device meshes, would be ranked together.
    """

    def __init__(self, pattern: Pattern | None, slots: list[Slot], pruned: list[bool]) -> None:
        self.pattern, self.slots = pattern, slots
        self.pruned = [s for s, yes in zip(slots, pruned, strict=True) if yes]
        self.sides: list[Side] = []
        marked = set(self.pruned)
        ranked = {s: _ranked_with(pattern, s, i) for i, s in enumerate(slots) if s in marked} if isinstance(pattern, TopK) else {}
        homes: dict[int, torch.device] = {}
        for device, part in by_device(slots):
            for key in {ranked[s] for s in part if s in ranked}:
                if homes.setdefault(key, device) != device:
                    raise RuntimeError(f"CrAM: weights that {pattern} ranks together must be on one device, got {homes[key]} and {device}")
            sizes: dict[int, int] = {}
            for slot in part:
                if slot in ranked:
                    sizes[ranked[slot]] = sizes.get(ranked[slot], 0) + slot.param.numel()
            number = {key: i for i, key in enumerate(sizes)}
            sets = [number[ranked[s]] if s in ranked else -1 for s in part]
            k = [pattern.k(size) for size in sizes.values()] if isinstance(pattern, TopK) else []
            members: list[list[Slot]] = [[] for _ in k]
            for slot, own in zip(part, sets, strict=True):
                if own >= 0:
                    members[own].append(slot)
            spreads = [spread_of([s.param for s in slots]) for slots in members]
            numels = [sum(s.local.numel() for s in slots) for slots in members]
            self.sides.append(Side(device, part, [int(s in marked) for s in part], sets, k, numels, spreads))


def _ranked_with(pattern: TopK, slot: Slot, index: int) -> int:
    """Equal for slots that are ranked together."""
    if pattern.scope == "model":
        return 0
    return slot.group if pattern.scope == "group" else index
