"""The memory that CrAM keeps beside the parameters, and the parameters sorted into the lists that the ops take.

Nothing of it is optimizer state, which torch casts to the parameter's dtype when it loads a checkpoint.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed import Spread, is_spread, local_of, spread_of, whole_of
from ..patterns import Pattern, TopK
from ..schedule import Groups, key_of
from ..warning import warn
from .step_info import StepInfo

if TYPE_CHECKING:
    from .open_step import OpenStep

ALIGNMENT = 16  # bytes, between the masks in their common buffer
STRIDED = torch.strided
MAX_PLANS = 16  # a sparsity warm-up draws a new pattern in every step


class Slot:
    """One parameter: its place in the groups, the tensor that the ops work on, and the memory beside it that lasts from step to step.
    `nothing`, of 0 elements, stands for what is absent, as in the ops."""

    def __init__(self, param: Tensor, group: int, position: int) -> None:
        self.param, self.group, self.position = param, group, position
        self.spread = is_spread(param)
        self.local = local_of(param)  # the parameter, or this rank's shard of it
        self.dtype, self.device, self.shape = self.local.dtype, self.local.device, self.local.shape
        self.strides = self.local.stride() if self.local.layout is STRIDED else None
        self.pointer = -1  # of `local`, when `holds` last looked
        self.nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        self.saved: Tensor | None = None  # where perturb() puts the weights
        self.borrowed: Tensor | None = None  # where first gradients are copied that are not ours to keep
        self.masks: dict[Pattern | None, Tensor] = {}  # uint8 [ceil(numel / 8)]; None: the mask of this step only
        self.finished: set[Pattern] = set()  # patterns whose mask is computed, to be used again
        self.master = self.nothing  # float32; the parameter is its rounded copy
        self.version = (-1, -1)  # of a parameter with a master, when it was last written here

    def holds(self) -> bool:
        """Whether the parameter still has the dtype, device, shape and strides for which the memory was made."""
        if self.spread:
            self.local = local_of(self.param)  # Module.to() puts another shard under a DTensor
        t = self.local
        same = t.dtype is self.dtype and t.shape == self.shape and t.stride() == self.strides and t.device == self.device
        self.pointer = t.data_ptr() if same else -1
        return same

    def fitted(self, grad: Tensor) -> Tensor:
        """This rank's part of the gradient, with the parameter's strides.

        Raises:
            RuntimeError: the gradient is sparse.
        """
        if grad.layout is not STRIDED:
            where = f"parameter {self.position} of group {self.group}"
            raise RuntimeError(f"CrAM: the gradient of {where} must be dense, got a sparse one ({grad.layout})")
        if is_spread(grad):
            if grad.placements != self.param.placements:  # type: ignore[attr-defined]
                grad = grad.redistribute(placements=self.param.placements)  # type: ignore[attr-defined]
            grad = local_of(grad)
        if grad.stride() == self.strides:
            return grad
        if all(a == b or size == 1 for a, b, size in zip(grad.stride(), self.strides or (), grad.shape, strict=True)):
            return grad.as_strided(grad.shape, self.strides)  # the stride of an axis of size 1 means nothing
        return torch.empty_like(self.local).copy_(grad)

    def versions(self) -> tuple[int, int]:
        """A write to a DTensor counts there, one to the shard here."""
        return self.param._version, self.local._version

    def state_dtype(self) -> torch.dtype:
        """The dtype of the base optimizer's state."""
        return self.dtype if self.master is self.nothing else torch.float32


class Bucket:
    """The parameters that one call of an op perturbs, and one restores: those of one device, under one pattern.

    Args:
        pattern: None: perturbed only.
        slots: in the order of the groups.
        pruned: those that the pattern prunes.
        ranked: slot -> number, equal for slots that a `TopK` ranks together.
        flag: int32 [], the ops' own record of whether these weights are perturbed.
    """

    def __init__(self, pattern: Pattern | None, slots: list[Slot], pruned: set[Slot], ranked: dict[Slot, int], flag: Tensor) -> None:
        self.pattern, self.slots, self.flag, self.device = pattern, slots, flag, slots[0].device
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
        self.params = [s.local for s in slots]
        self.saved: list[Tensor] = []  # where the op puts the weights
        self.masters: list[Tensor] = []

    def prepare(self, masters: bool) -> None:
        """Gather what may have changed since the last step. The memory for the weights is made here, for those that have no master.

        Args:
            masters: whether the optimizer keeps master weights.
        """
        if self.spread:
            self.params = [s.local for s in self.slots]
        if masters or not self.saved:
            for slot in self.slots:
                if slot.saved is None and slot.master is slot.nothing:
                    slot.saved = torch.empty_like(slot.local)
            saved = [s.nothing if s.saved is None or s.master is not s.nothing else s.saved for s in self.slots]
            self.saved, self.masters = present(saved, self.slots), present([s.master for s in self.slots], self.slots)


class Workspace:
    """What an optimizer holds that changes from step to step. (Lightning calls methods on an object of its own, with the optimizer's
    attributes: this one is common to both.) The slots follow the groups: whatever is replaced, added or removed there is replaced, added
    or let go here."""

    def __init__(self) -> None:
        self.open: OpenStep | None = None
        self.last: StepInfo | None = None
        self.updating = False  # whether the base may step although a step is open
        self.warned_plain = False
        self.slots: list[Slot] = []
        self.sizes: list[int] = []  # parameters of each group
        self.flags: dict[tuple[torch.device, int], Tensor] = {}
        self.plans: dict[tuple[Pattern | None, ...], tuple[list[bool], list[Slot], list[Bucket]]] = {}  # by the pattern of each group
        self.kept: dict[tuple[str, torch.device], tuple[Any, Tensor]] = {}  # see `tensor`

    def follow(self, groups: Groups) -> list[Slot]:
        """The slots of all parameters, in order."""
        sizes = [len(group["params"]) for group in groups]
        params = [p for group in groups for p in group["params"]]
        if sizes != self.sizes or not all(map(is_, params, [s.param for s in self.slots])):
            known = {id(s.param): s for s in self.slots}
            slots = []
            for i, group in enumerate(groups):
                for j, param in enumerate(group["params"]):
                    slot = known.get(id(param)) or Slot(param, i, j)
                    slot.group, slot.position = i, j
                    slots.append(slot)
            self.slots, self.sizes = slots, sizes
            self.plans.clear()
        return self.slots

    def gradients(self, converted: bool) -> tuple[list[Slot], list[Tensor]]:
        """The slots whose parameter has a gradient, and those gradients as the ops take them.

        Args:
            converted: replace the slots of parameters that were converted or moved since their slot was made.
        """
        active = [s for s in self.slots if s.param.grad is not None]
        # Whatever converts a parameter gives it other memory: where that is the same, nothing else need be looked at.
        if converted and (stale := [s for s in active if (s.spread or s.param.data_ptr() != s.pointer) and not s.holds()]):
            new = {s: Slot(s.param, s.group, s.position) for s in stale}
            self.slots = [new.get(s, s) for s in self.slots]
            self.plans.clear()
            active = [new.get(s, s) for s in active]
        if len(active) == len(self.slots):
            active = self.slots
        given: list[Any] = [s.param.grad for s in active]
        grads = [
            g if g.layout is STRIDED and g.stride() == s.strides and not s.spread else s.fitted(g)
            for s, g in zip(active, given, strict=True)
        ]
        return active, grads

    def flag(self, device: torch.device, number: int) -> Tensor:
        """int32 [] on the device, 0 unless the bucket of this number is perturbed."""
        if (device, number) not in self.flags:
            self.flags[device, number] = torch.zeros((), dtype=torch.int32, device=device)
        return self.flags[device, number]

    def buckets(
        self, patterns: tuple[Pattern | None, ...], active: list[Slot], groups: Groups, why_dense: Callable[[Slot, Pattern], str | None]
    ) -> list[Bucket]:
        """The buckets of a step, from the last one with these patterns where it still holds.

        Args:
            patterns: one a group.
            active: the slots that are perturbed.
            why_dense: None where the pattern prunes this slot.

        Raises:
            RuntimeError: weights of several devices, or of several device meshes, would be ranked together.
        """
        allowed = [group["prune"] for group in groups]
        kept = self.plans.get(patterns)
        if kept is None or kept[0] != allowed or kept[1] != active:
            while len(self.plans) >= MAX_PLANS:
                del self.plans[next(iter(self.plans))]
            kept = self.plans[patterns] = allowed, list(active), self.make_buckets(patterns, active, why_dense)
        return kept[2]

    def make_buckets(
        self, patterns: tuple[Pattern | None, ...], active: list[Slot], why_dense: Callable[[Slot, Pattern], str | None]
    ) -> list[Bucket]:
        """As `buckets`, made anew."""
        made: list[Bucket] = []
        numbers: dict[torch.device, int] = {}
        for pattern in dict.fromkeys(patterns):
            slots = [s for s in active if patterns[s.group] == pattern]
            pruned = {s for s in slots if pattern is not None and why_dense(s, pattern) is None}
            ranked = {s: _ranked_with(pattern, s, i) for i, s in enumerate(slots) if s in pruned} if isinstance(pattern, TopK) else {}
            homes: dict[int, torch.device] = {}
            for slot, key in ranked.items():
                if homes.setdefault(key, slot.device) != slot.device:
                    raise RuntimeError(
                        f"CrAM: weights that {pattern} ranks together must be on one device, got {homes[key]} and {slot.device}"
                    )
            for device, part in by_device(slots):
                number = numbers[device] = numbers.get(device, 0) + 1
                made.append(Bucket(pattern, part, pruned, ranked, self.flag(device, number)))
            if pattern is not None and slots and not pruned:
                warn(f"CrAM: {pattern} prunes none of the {len(slots)} parameters; coverage(pattern) says why")
        return made

    # --- hyperparameters on the device ---

    def tensor(self, name: str, values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`values`, a number or a list, as a tensor, made anew only when the numbers change: a step that changes none copies nothing to a GPU.
        `name` says which one it replaces."""
        kept = self.kept.get((name, device))
        if kept is None or kept[0] != values:
            kept = self.kept[name, device] = (values, torch.tensor(values, dtype=dtype, device=device))
        return kept[1]

    def option(self, name: str, values: list[Any], slots: list[Slot], device: torch.device) -> Tensor:
        """An option of which `values` has one a group, as float32 [] or [n]; a tensor (of lr, rho) is read on the device, without a
        synchronisation."""
        if any(isinstance(value, Tensor) for value in values):
            each = [torch.as_tensor(value, dtype=torch.float32, device=device).reshape(()) for value in values]
            return each[0] if len(values) == 1 else torch.stack([each[s.group] for s in slots])
        numbers = per_tensor([float(value) for value in values], slots)
        return self.tensor(name, numbers[0] if len(numbers) == 1 else numbers, torch.float32, device)

    # --- masks that are kept for later steps (mask_period) ---

    def allocate_masks(self, slots: list[Slot], pattern: Pattern | None) -> None:
        """Memory for the mask of each slot: aligned slices of one buffer a device."""
        for device, lacking in by_device([s for s in slots if pattern not in s.masks]):
            sizes = [-(-s.local.numel() // 8) for s in lacking]
            room = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
            parts = torch.zeros(sum(room), dtype=torch.uint8, device=device).split(room)
            for slot, part, size in zip(lacking, parts, sizes, strict=True):
                slot.masks[pattern] = part[:size]

    def keep_masks(self, patterns: Iterable[Pattern]) -> None:
        """Let the masks of all other patterns go."""
        known = {None, *patterns}
        for slot in self.slots:
            for pattern in [p for p in slot.masks if p not in known]:
                del slot.masks[pattern]
                slot.finished.discard(pattern)  # type: ignore[arg-type]

    def drop_masks(self) -> None:
        """They belong to weights that are gone."""
        for slot in self.slots:
            slot.finished.clear()

    def pack_masks(self) -> dict[int, dict[str, dict[str, Any]]]:
        """The masks that are kept, copied: {index of the parameter: {key of the pattern: {"bits": uint8 [ceil(numel / 8)], "stride": tuple}}}."""
        return {
            i: {key_of(pattern): {"bits": slot.masks[pattern].clone(), "stride": slot.strides} for pattern in slot.finished}
            for i, slot in enumerate(self.slots)
            if slot.finished and not slot.spread  # the mask of a shard means nothing to another number of ranks
        }

    def load_masks(self, packed: dict[int, dict[str, dict[str, Any]]], patterns: Sequence[Pattern]) -> None:
        """What `pack_masks` gave. Bits are in memory order: a parameter with other strides gets none, they are computed anew."""
        for i, slot in enumerate(self.slots):
            masks = packed.get(i, {})
            for pattern in patterns:
                mask = masks.get(key_of(pattern))
                if mask is not None and tuple(mask["stride"]) == slot.strides and not slot.spread:
                    self.allocate_masks([slot], pattern)
                    slot.masks[pattern].copy_(mask["bits"])
                    slot.finished.add(pattern)


def _ranked_with(pattern: TopK, slot: Slot, index: int) -> int:
    """Equal for slots that are ranked together."""
    if pattern.scope == "model":
        return 0
    return slot.group if pattern.scope == "group" else index


def per_tensor(values: list[Any], slots: list[Slot]) -> list[Any]:
    """[one value] where it is the same for all groups, else one a slot."""
    return values[:1] if values.count(values[0]) == len(values) else [values[s.group] for s in slots]


def by_device(slots: list[Slot]) -> list[tuple[torch.device, list[Slot]]]:
    """The slots of each device, in order: an op takes the tensors of one device."""
    devices: dict[torch.device, list[Slot]] = {}
    for slot in slots:
        devices.setdefault(slot.device, []).append(slot)
    return list(devices.items())


def present(tensors: list[Tensor], slots: list[Slot]) -> list[Tensor]:
    """The list, or an empty one where all is absent: each list costs an op as much as that of the parameters."""
    return tensors if any([t is not s.nothing for t, s in zip(tensors, slots, strict=True)]) else []


def kept_state(state: dict[str, Any], slot: Slot, key: str) -> Tensor:
    """What this rank holds of a state tensor, with the parameter's strides and our dtype where it has others (a checkpoint of a model in
    another memory format, or one without master weights)."""
    whole = state[key]
    local, dtype = local_of(whole) if slot.spread else whole, slot.state_dtype()
    if local.stride() != slot.strides or local.dtype is not dtype:
        local = torch.empty_like(slot.local, dtype=dtype).copy_(local)
        state[key] = whole_of(slot.param, local)
    return local
