"""What CrAM keeps beside the parameters: saved weights, mask bits, first gradients, the flags of the ops. Nothing of it is optimizer state,
which torch casts to the parameter's dtype when it loads a checkpoint; but for the mask bits of `mask_period` it matters within a step only.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from .. import ops
from ..batchnorm import frozen_batchnorm
from ..distributed import is_spread, local_of, whole_of
from ..params import OPEN_STEPS
from .factor import Factor

ALIGNMENT = 16  # bytes
STRIDED = torch.strided


class Slot:
    """One parameter and what is kept beside it. `nothing`, of 0 elements, stands for what is absent, as in the ops."""

    def __init__(self, param: Tensor) -> None:
        self.param = param
        self.local = local_of(param)  # what the ops work on: the parameter, or this rank's shard of it
        self.layout = layout_of(self.local)
        self.nothing = torch.empty(0, dtype=param.dtype, device=self.local.device)
        self.group = self.position = 0  # where it is in param_groups
        self.saved: Tensor | None = None  # memory for the weights, once it has been perturbed
        self.master = self.nothing  # float32, of which the parameter is the rounded copy
        self.version = (-1, -1)  # of the parameter when it was last written here
        self.borrowed: Tensor | None = None  # memory for first gradients that are not ours to keep
        self.bits: dict[int | None, Tensor] = {}  # uint8 [ceil(numel / 8)] a pattern whose masks are kept; None: of this step
        self.finished: set[int] = set()  # patterns whose mask is there
        self.grad = self.nothing  # the parameter's gradient, with the parameter's strides
        self.forget()

    def forget(self) -> None:
        """Drop what belongs to one step."""
        self.origin = self.nothing  # where a restore finds the weights
        self.first = self.nothing  # the first gradient
        self.first_owner: Tensor | None = None  # whose shard it is
        self.first_version = 0
        self.mask = self.nothing  # what masks the second gradient

    def versions(self) -> tuple[int, int]:
        """A write to a DTensor counts there, one to the shard here."""
        return self.param._version, self.local._version

    def state_dtype(self) -> torch.dtype:
        """Of the base optimizer's state."""
        return self.layout[0] if self.master is self.nothing else torch.float32

    def has_gradient(self) -> bool:
        """Whether the parameter has a gradient, and if so `grad` is set.

        Raises:
            RuntimeError: it is sparse.
        """
        grad = self.param.grad
        if grad is None:
            self.grad = self.nothing
            return False
        if grad.layout is not STRIDED:
            where = f"parameter {self.position} of group {self.group}"
            raise RuntimeError(f"CrAM: the gradient of {where} must be dense, got a sparse one ({grad.layout})")
        if is_spread(grad):
            if grad.placements != self.param.placements:  # type: ignore[attr-defined]
                grad = grad.redistribute(placements=self.param.placements)  # type: ignore[attr-defined]
            grad = local_of(grad)
        strides = self.layout[-1]
        if grad.stride() == strides:
            self.grad = grad
        elif all(a == b or size == 1 for a, b, size in zip(grad.stride(), strides, grad.shape, strict=True)):
            self.grad = grad.as_strided(grad.shape, strides)  # the stride of an axis of size 1 means nothing
        else:
            self.grad = torch.empty_like(self.local).copy_(grad)
        return True

    def keep_gradient(self) -> None:
        """Keep the gradient as the first of two."""
        owner = self.param.grad
        grad = None if owner is None else local_of(owner)
        # A view belongs to somebody who will write to it again (a bucket of DDP, even one that holds a single gradient).
        if grad is not None and (grad._is_view() or grad.untyped_storage().nbytes() != grad.nbytes):
            if self.borrowed is None:
                self.borrowed = torch.empty_like(self.local)
            self.first = self.borrowed.copy_(self.grad)
            self.first_owner = None
        else:
            self.first, self.first_owner = self.grad, None if owner is self.grad else owner
        self.first_version = self.first_versions()

    def first_versions(self) -> int:
        """Both only count up. (One number a parameter and step: thousands of tuples would call for Python's garbage collector.)"""
        return self.first._version + (0 if self.first_owner is None else self.first_owner._version)

    def check_first(self) -> None:
        """Raise RuntimeError where somebody has written to the first gradient, which perturb() took away."""
        if self.first is not self.nothing and self.first_versions() != self.first_version:
            where = f"parameter {self.position} of group {self.group}"
            raise RuntimeError(
                f"CrAM: the first gradient of {where} must be left alone after perturb(), got it overwritten: copy it before"
            )


class Arena:
    """The slots of all parameters, and how far the step is: between steps `begun` is None. Whatever a step changes is undone here."""

    def __init__(self) -> None:
        self.slots: dict[int, Slot] = {}  # by id: the slot keeps its parameter alive
        self.listed: tuple[list[list[int]], list[Slot]] = [], []  # of the groups: the ids of their parameters, and the slots
        self.flags: dict[torch.device, Tensor] = {}  # `perturbed` of the ops: int32 []
        self.begun: list[Slot] | None = None  # what the step perturbs
        self.first = Factor()  # of the first gradients
        self.scaler: GradScaler | None = None  # theirs; not in the optimizer, whose methods Lightning calls on an object of its own
        self.renewed: list[tuple[Slot, int]] = []  # masks that this step has computed, to be kept
        self.uphill = False  # whether weights are, or may be, perturbed: set before the op runs, lowered after it is undone
        self.model: nn.Module | None = None  # whose batch norms are frozen meanwhile
        self.frozen: AbstractContextManager[None] | None = None

    def __reduce__(self) -> tuple[type, tuple, dict[str, Any]]:
        """A copy starts without slots: what lasts of them is in `pack_masks`."""
        if self.begun is not None:
            message = "cannot be copied or pickled (nor the model it is attached to) within a step: step() or restore() first"
            raise RuntimeError(f"CrAM: {message}")
        return type(self), (), {"model": self.model}

    def of(self, param_groups: list[dict[str, Any]]) -> list[Slot]:
        """The slots of all parameters, in order. A parameter whose dtype, device, shape or strides were changed gets a new one."""
        ids = [list(map(id, group["params"])) for group in param_groups]
        if ids != self.listed[0]:
            self._list(ids, param_groups)
        between_steps, changed = self.begun is None, False
        for slot in self.listed[1]:
            local = slot.local = local_of(slot.param)  # Module.to() puts another shard under a DTensor
            if between_steps and slot.layout != layout_of(local):
                changed = True
        if changed:
            self._list(ids, param_groups)
        return self.listed[1]

    def _list(self, ids: list[list[int]], param_groups: list[dict[str, Any]]) -> None:
        slots = []
        for i, group in enumerate(param_groups):
            for j, param in enumerate(group["params"]):
                slot = self.slots.get(id(param))
                if slot is None or (self.begun is None and slot.layout != layout_of(local_of(param))):
                    slot = self.slots[id(param)] = Slot(param)
                slot.group, slot.position = i, j
                slots.append(slot)
        self.listed = ids, slots

    def flag(self, device: torch.device) -> Tensor:
        if device not in self.flags:
            self.flags[device] = torch.zeros((), dtype=torch.int32, device=device)
        return self.flags[device]

    def begin(self, slots: list[Slot]) -> None:
        """From here on `restore` brings the weights of these slots back, whether or not an op has moved them."""
        self.begun, self.uphill = slots, True
        OPEN_STEPS.add(self)
        for slot in slots:
            if slot.master is not slot.nothing:
                continue
            if slot.saved is None:
                slot.saved = torch.empty_like(slot.local)
            slot.origin = slot.saved
        if self.model is not None:
            self.frozen = frozen_batchnorm(self.model)
            self.frozen.__enter__()

    @torch.no_grad()
    def restore(self) -> None:
        """Bring the weights back, to the bit; the step stays open. Idempotent: the op knows by its flag whether it has something to do."""
        if self.uphill:
            for slot in self.begun or ():
                slot.local = local_of(slot.param)
            for device, slots in by_device(self.begun or ()):
                flag = self.flag(device)
                if device.type == "cpu" and int(flag) == 0:
                    continue  # the op refused its arguments: it would refuse them here, too
                same = [s for s in slots if s.layout == layout_of(s.local)]
                if len(same) < len(slots) and int(flag) != 0:  # the model was converted within the step: no op takes such a pair
                    for slot in set(slots).difference(same):
                        local_of(slot.param).copy_(slot.master if slot.origin is slot.nothing else slot.origin)
                ops.restore_([s.local for s in same], tensors_of(same, "origin"), flag, masters=tensors_of(same, "master"))
                self.note_versions(same)
            self.reshard()
            self._back()

    def note_versions(self, slots: Iterable[Slot]) -> None:
        """What the parameters hold now is ours: those that have masters will be asked."""
        for slot in slots:
            if slot.master is not slot.nothing:
                slot.version = slot.versions()

    def end(self) -> None:
        """The weights are back; the step is over, or given up."""
        self._back()
        for slot in self.begun or ():
            slot.forget()
        self.begun, self.first, self.scaler, self.renewed = None, Factor(), None, []

    def reshard(self) -> None:
        """The root of an FSDP model keeps a whole copy of its weights after a forward pass: an old one after a change of the shards."""
        for module in self.model.modules() if self.model is not None else ():
            if hasattr(module, "reshard") and hasattr(module, "unshard"):
                module.reshard()  # type: ignore[operator]

    def _back(self) -> None:
        if self.frozen is not None:
            self.frozen.__exit__(None, None, None)
        self.frozen, self.uphill = None, False
        OPEN_STEPS.discard(self)

    def holds(self, param: Tensor) -> bool:
        """Whether the parameter is perturbed now."""
        slot = self.slots.get(id(param)) if self.uphill else None
        return slot is not None and slot in (self.begun or ()) and int(self.flag(slot.layout[1])) != 0

    def unperturbed(self, param: Tensor) -> Tensor | None:
        """A copy of the unperturbed weights of a parameter that is perturbed now, else None."""
        if not self.holds(param):
            return None
        slot = self.slots[id(param)]
        return whole_of(param, slot.master.to(param.dtype) if slot.origin is slot.nothing else slot.origin.clone())

    def allocate_bits(self, slots: list[Slot], place: int | None) -> None:
        """Memory for a mask of each slot, at `place`: aligned slices of one buffer a device."""
        for device, lacking in by_device(s for s in slots if place not in s.bits):
            sizes = [-(-s.local.numel() // 8) for s in lacking]
            room = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
            parts = torch.zeros(sum(room), dtype=torch.uint8, device=device).split(room)
            for slot, part, size in zip(lacking, parts, sizes, strict=True):
                slot.bits[place] = part[:size]

    def drop_masks(self) -> None:
        for slot in self.slots.values():
            slot.finished.clear()

    def pack_masks(self, param_groups: list[dict[str, Any]]) -> dict[int, dict[int, dict[str, Any]]]:
        """The masks that are kept, copied: {index of the parameter: {place: {"bits": uint8 [ceil(numel / 8)], "stride": tuple}}}."""
        return {
            i: {place: {"bits": slot.bits[place].clone(), "stride": slot.layout[-1]} for place in sorted(slot.finished)}
            for i, slot in enumerate(self.of(param_groups))
            if slot.finished and not is_spread(slot.param)  # a shard's mask means nothing to another number of ranks
        }

    def load_masks(self, packed: dict[int, dict[int, dict[str, Any]]], param_groups: list[dict[str, Any]]) -> None:
        """What `pack_masks` gave. Bits are in memory order: a parameter with other strides gets none, they are computed anew."""
        for i, slot in enumerate(self.of(param_groups)):
            for place, mask in packed.get(i, {}).items():
                if tuple(mask["stride"]) == slot.layout[-1] and not is_spread(slot.param):
                    self.allocate_bits([slot], place)
                    slot.bits[place].copy_(mask["bits"])
                    slot.finished.add(place)


def release_gradients(slots: list[Slot]) -> None:
    """p.grad = None."""
    for slot in slots:
        slot.param.grad, slot.grad = None, slot.nothing


def tensors_of(slots: list[Slot], name: str) -> list[Tensor]:
    """The tensors of this name, a slot each; an empty list where no slot has one: each list costs the ops as much as the parameters do."""
    tensors = list(map(attrgetter(name), slots))
    return tensors if any(t is not s.nothing for t, s in zip(tensors, slots, strict=True)) else []


def layout_of(local: Tensor) -> tuple:
    """Of this rank's part of a parameter."""
    return local.dtype, local.device, local.shape, local.stride() if local.layout is STRIDED else None


def by_device(slots: Iterable[Slot]) -> Iterator[tuple[torch.device, list[Slot]]]:
    """The slots of each device, in order: an op takes the tensors of one device."""
    devices: dict[torch.device, list[Slot]] = {}
    for slot in slots:
        devices.setdefault(slot.layout[1], []).append(slot)
    yield from devices.items()
