"""What an optimizer holds that changes from step to step: its open step, its slots and buckets, numbers on the device, kept masks."""

from collections.abc import Callable, Collection, Iterable
from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..patterns import Pattern, TopK
from ..schedule import Groups, key_of
from ..warning import warn
from .bucket import Bucket, new_masks
from .columns import Slot, by_device, per_tensor
from .options import unwrapped
from .settings import Settings
from .step_info import StepInfo

if TYPE_CHECKING:
    from .cram import CrAM
    from .open_step import OpenStep

MAX_PLANS = 16  # a sparsity warm-up draws a new pattern in every step
WhyDense = Callable[[Slot, Pattern], str | None]  # None where the pattern prunes this slot


class Workspace:
    """What an optimizer holds that changes from step to step. (Lightning calls methods on an object of its own, with the optimizer's
    attributes: this one is common to both.) The slots follow the groups: whatever is replaced, added or removed there is replaced, added
    or let go here."""

    def __init__(self) -> None:
        self.open: OpenStep | None = None
        self.last: StepInfo | tuple[Any, ...] | None = None  # or what to make it of, for who asks
        self.settings: Settings | None = None
        self.updating = False  # whether the base may step although a step is open
        self.plain_wanted = self.warned_plain = self.warned_written = False
        self.counters: dict[str, Any] = {}  # those of the groups, for groups that are made anew
        self.names: Callable[[], dict[int, str]] = dict  # of the parameters of an attached model, by id
        self.slots: list[Slot] = []
        self.params: list[Tensor] = []  # theirs
        self.sizes: list[int] = []  # parameters of each group
        self.fitting: list[Slot] | None = None  # see `gradients`
        self.plans: dict[tuple[Pattern | None, ...], tuple[list[bool], list[Slot], list[Bucket]]] = {}  # by the pattern of each group
        self.options: dict[tuple[str, torch.device], tuple[list[Any], list[Slot], list[float], Tensor]] = {}  # see `option`

    def settings_of(self, optimizer: "CrAM") -> Settings:
        """The options of the optimizer and its groups, checked."""
        if self.settings is None or not self.settings.hold(optimizer):
            self.settings = Settings(optimizer)
        return self.settings

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

    def renew(self, step: "OpenStep | None" = None) -> list[Slot]:
        """Replace slots whose parameter was converted or moved since they were made; the memory beside these is let go. Returns the slots
        of all parameters.

        Raises:
            RuntimeError: one of these is perturbed by this step.
        """
        if stale := [s for s in self.slots if not s.holds()]:
            if step is not None and (broken := [s for s in stale if s in step.perturbed_slots]):
                wanted = "keep its dtype, device, shape and strides between perturb() and step()"
                raise RuntimeError(f"CrAM: {broken[0]} must {wanted}, got it converted")
            new = {s: Slot(s.param, s.group, s.position, s.name) for s in stale}
            self.slots = [new.get(s, s) for s in self.slots]
            self.plans.clear()
        return self.slots

    def gradients(self, careful: bool, step: "OpenStep | None" = None) -> tuple[list[Slot], list[Tensor], bool]:
        """The slots whose parameter has a gradient, those gradients as the ops take them, and whether each was looked at.

        Not each is where the same slots, with memory of their own, fitted the last time. An op refuses what does not fit this memory before
        it changes anything: who calls without `careful` then calls again with it. `step`: see `renew`.
        """
        grads: list[Any] = [p.grad for p in self.params]
        active, given = self.slots, grads
        if any(map(is_, grads, repeat(None))):
            active, given = [s for s, g in zip(self.slots, grads, strict=True) if g is not None], [g for g in grads if g is not None]
        if active == self.fitting and not careful:
            return active, given, False
        active = [s for s, g in zip(self.renew(step), grads, strict=True) if g is not None]
        fitted = [s.fitted(g) for s, g in zip(active, given, strict=True)]
        fits = all(map(is_, fitted, given)) and all([s.saved is not s.nothing and not s.spread for s in active])
        self.fitting = active if fits else None
        return active, fitted, True

    def state_of(self, state: dict[Tensor, Any], slots: list[Slot]) -> list[dict[str, Any]]:
        """The entries of an optimizer's state for these slots. Where it has them in the same order they are not looked up: torch's hash of
        a tensor is slow."""
        if len(state) == len(slots) and all(map(is_, state, [s.param for s in slots])):
            return list(state.values())
        return [state[s.param] for s in slots]

    def buckets(self, patterns: tuple[Pattern | None, ...], active: list[Slot], prune: list[bool], why_dense: WhyDense) -> list[Bucket]:
        """The buckets of a step, from the last one with these patterns (one a group) where it still holds. `active`: what is perturbed;
        `prune`: which groups may be pruned."""
        allowed = prune + [s.param.requires_grad for s in active]
        kept = self.plans.get(patterns)
        if kept is None or kept[0] != allowed or kept[1] != active:
            while len(self.plans) >= MAX_PLANS:
                del self.plans[next(iter(self.plans))]
            kept = self.plans[patterns] = allowed, list(active), self.make_buckets(patterns, active, why_dense)
        return kept[2]

    @staticmethod
    def make_buckets(patterns: tuple[Pattern | None, ...], active: list[Slot], why_dense: WhyDense) -> list[Bucket]:
        """These slots in buckets, with the pattern of their group.

        Raises:
            RuntimeError: weights of several devices, or of several device meshes, would be ranked together.
        """
        made: list[Bucket] = []
        for pattern in dict.fromkeys(patterns):
            slots = [s for s in active if patterns[s.group] == pattern]
            pruned = {s for s in slots if pattern is not None and why_dense(s, pattern) is None}
            ranked: dict[Slot, int] = {}
            if isinstance(pattern, TopK):
                ranked = {s: {"model": 0, "group": s.group, "tensor": i}[pattern.scope] for i, s in enumerate(slots) if s in pruned}
            homes: dict[int, torch.device] = {}
            for slot, key in ranked.items():
                if homes.setdefault(key, slot.device) != slot.device:
                    raise RuntimeError(
                        f"CrAM: weights that {pattern} ranks together must be on one device, got {homes[key]} and {slot.device}"
                    )
            made += [Bucket(pattern, part, pruned, ranked) for part in by_device(slots).values()]
            if pattern is not None and slots and not pruned:
                warn(f"CrAM: {pattern} prunes none of the {len(slots)} parameters; coverage(pattern) says why")
        return made

    # --- hyperparameters on the device ---

    def option(self, name: str, values: list[Any], slots: list[Slot], device: torch.device) -> Tensor:
        """An option of which `values` has one a group, as float32 [] or [n]; a tensor (of lr, rho) is read on the device, without a
        synchronisation. Numbers become a tensor anew only when they change: a step that changes none copies nothing to a GPU."""
        kept = self.options.get((name, device))
        if kept is not None and kept[1] is slots and all(map(is_, values, kept[0])):
            return kept[3]
        if any([isinstance(value, Tensor) for value in values]):
            each = [torch.as_tensor(value, dtype=torch.float32, device=device).reshape(()) for value in values]
            return each[0] if len(values) == 1 else torch.stack([each[s.group] for s in slots])
        numbers = per_tensor([float(value) for value in values], slots)
        value: Any = numbers[0] if len(numbers) == 1 else numbers
        made = torch.tensor(value, dtype=torch.float32, device=device) if kept is None or kept[2] != numbers else kept[3]
        lasting = all([type(value) in (int, float) for value in values])  # an array of NumPy may say something else in the next step
        self.options[name, device] = values if lasting else [None] * len(values), slots, numbers, made
        return made

    # --- masks that are kept for later steps (mask_period) ---

    def keep_masks(self, patterns: Collection[Pattern]) -> None:
        """Let the masks of all other patterns go."""
        for slot in self.slots:
            slot.masks = {pattern: mask for pattern, mask in slot.masks.items() if pattern in patterns}

    def pack_masks(self) -> dict[int, dict[str, dict[str, Any]]]:
        """The masks that are kept, copied: {index of the parameter: {key of the pattern: {"bits": uint8 [ceil(numel / 8)], "stride"}}}."""
        return {
            i: {key_of(pattern): {"bits": mask.clone(), "stride": slot.strides} for pattern, mask in slot.masks.items()}
            for i, slot in enumerate(self.slots)
            if slot.masks and not slot.spread  # the mask of a shard means nothing to another number of ranks
        }

    def load_masks(self, packed: dict[int, dict[str, dict[str, Any]]], patterns: Iterable[Pattern]) -> None:
        """What `pack_masks` gave, in place of all masks. Bits are in memory order: a parameter with other strides gets none, they are
        computed anew."""
        for i, slot in enumerate(self.slots):
            found = {} if slot.spread else {p: packed[i][key_of(p)] for p in patterns if key_of(p) in packed.get(i, {})}
            slot.masks = {
                p: new_masks([slot], [None])[slot].copy_(m["bits"]) for p, m in found.items() if tuple(m["stride"]) == slot.strides
            }
