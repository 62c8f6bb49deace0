"""What an optimizer holds that changes from step to step: its open step, its slots and buckets, numbers on the device, kept masks."""

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..patterns import Pattern, TopK
from ..schedule import Groups, key_of
from ..warning import warn
from .bucket import Bucket, Slot, by_device, per_tensor
from .options import unwrapped
from .step_info import StepInfo

if TYPE_CHECKING:
    from .open_step import OpenStep

ALIGNMENT = 16  # bytes, between the masks in their common buffer
MAX_PLANS = 16  # a sparsity warm-up draws a new pattern in every step


class Workspace:
    """What an optimizer holds that changes from step to step. (Lightning calls methods on an object of its own, with the optimizer's
    attributes: this one is common to both.) The slots follow the groups: whatever is replaced, added or removed there is replaced, added
    or let go here."""

    def __init__(self) -> None:
        self.open: OpenStep | None = None
        self.last: StepInfo | None = None
        self.updating = False  # whether the base may step although a step is open
        self.plain_wanted = self.warned_plain = self.warned_written = False
        self.counters: dict[str, Any] = {}  # those of the groups, for groups that are made anew
        self.names: Callable[[], dict[int, str]] = dict  # of the parameters of an attached model, by id
        self.slots: list[Slot] = []
        self.params: list[Tensor] = []  # theirs
        self.sizes: list[int] = []  # parameters of each group
        self.fitting: list[Slot] | None = None  # see `gradients`
        self.flags: dict[tuple[torch.device, int], Tensor] = {}
        self.plans: dict[tuple[Pattern | None, ...], tuple[list[bool], list[Slot], list[Bucket]]] = {}  # by the pattern of each group
        self.kept: dict[tuple[str, torch.device], tuple[Any, Tensor]] = {}  # see `tensor`

    def follow(self, groups: Groups) -> list[Slot]:
        """The slots of all parameters, in order."""
        sizes = [len(group["params"]) for group in groups]
        params = [p for group in groups for p in group["params"]]
        if sizes != self.sizes or not all(map(is_, params, self.params)):
            known, attached = {id(s.param): s for s in self.slots}, self.names()
            slots = []
            for i, group in enumerate(groups):
                names = group.get("param_names")
                for j, param in enumerate(group["params"]):
                    slot = known.get(id(param)) or Slot(param, i, j)
                    slot.group, slot.position, slot.name = i, j, names[j] if names and j < len(names) else attached.get(id(param))
                    slots.append(slot)
            self.plans.clear()
            self.slots, self.sizes, self.params = slots, sizes, params
        return self.slots

    def name_by(self, model: nn.Module) -> None:
        """From now on messages have the names of this model for parameters that have none in their group."""
        held = ref(unwrapped(model))
        self.names = lambda: {} if (model := held()) is None else {id(p): name for name, p in model.named_parameters()}
        self.sizes = []

    def gradients(self, careful: bool, held: Collection[Slot] = ()) -> tuple[list[Slot], list[Tensor], bool]:
        """The slots whose parameter has a gradient, those gradients as the ops take them, and whether each was looked at.

        Not each is where the same slots, with memory of their own, fitted the last time. An op refuses what does not fit this memory before
        it changes anything: who calls without `careful` then calls again with it.

        Args:
            held: by an open step. Where a parameter was converted or moved since its slot was made, that is an error for these; any other
                slot is replaced.
        """
        active, grads = self.slots, [p.grad for p in self.params]
        if any(map(is_, grads, repeat(None))):
            active = [s for s, g in zip(self.slots, grads, strict=True) if g is not None]
            grads = [g for g in grads if g is not None]
        given: list[Any] = grads
        if active == self.fitting and not careful:
            return active, given, False
        if stale := self.stale(self.slots):
            if broken := [s for s in stale if s in held]:
                wanted = "keep its dtype, device, shape and strides between perturb() and step()"
                raise RuntimeError(f"CrAM: {broken[0]} must {wanted}, got it converted")
            self.renew(stale)
            return self.gradients(careful, held)
        fitted = [s.fitted(g) for s, g in zip(active, given, strict=True)]
        fits = all(map(is_, fitted, given)) and all([s.saved is not None and not s.spread for s in active])
        self.fitting = active if fits else None
        return active, fitted, True

    @staticmethod
    def stale(slots: list[Slot]) -> list[Slot]:
        """Those whose parameter was converted or moved since the slot was made."""
        return [
            s
            for s in slots
            if s.spread
            or s.param.dtype is not s.dtype
            or s.param.shape != s.shape
            or s.param.stride() != s.strides
            or s.param.device != s.device
            if not s.holds()
        ]

    def renew(self, stale: list[Slot]) -> list[Slot]:
        """Replace these slots; the memory beside the old ones is let go. Returns the slots of all parameters."""
        if stale:
            new = {s: Slot(s.param, s.group, s.position, s.name) for s in stale}
            self.slots = [new.get(s, s) for s in self.slots]
            self.plans.clear()
        return self.slots

    def state_of(self, state: dict[Tensor, Any], slots: list[Slot]) -> list[dict[str, Any]]:
        """The entries of an optimizer's state for these slots. Where it has them in the same order they are not looked up: torch's hash of
        a tensor is slow."""
        if len(state) == len(slots) and all(map(is_, state, [s.param for s in slots])):
            return list(state.values())
        return [state[s.param] for s in slots]

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
        allowed = [group["prune"] for group in groups] + [s.param.requires_grad for s in active]
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
        """`values`, a number or a list, as a tensor, made anew only when the numbers change: a step that changes none copies nothing to a
        GPU. `name` says which one it replaces."""
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
        """The masks that are kept, copied: {index of the parameter: {key of the pattern: {"bits": uint8 [ceil(numel / 8)], "stride"}}}."""
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
