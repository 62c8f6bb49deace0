"""A parameter and the memory that CrAM keeps beside it; parameters in the lists that the ops take.

Nothing of it is optimizer state, which torch casts to the parameter's dtype when it loads a checkpoint.
"""

from collections.abc import Iterable
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import as_dtensor, check_not_fsdp1, is_spread, local_of
from ..patterns import Pattern

STRIDED = torch.strided


class Lists(NamedTuple):
    """What of a `Columns` goes from step to step; `spread`: whether a parameter is a DTensor."""

    params: list[Tensor]
    saved: list[Tensor]
    masters: list[Tensor]
    spread: bool


class Slot:
    """One parameter: its place in the groups, the tensor that the ops work on, and the memory beside it that lasts from step to step.
    `nothing` is an empty tensor, the ops' convention for an absent argument."""

    def __init__(self, param: Tensor, group: int, position: int, name: str | None = None) -> None:
        check_not_fsdp1("CrAM", [param])  # which has wrapped the model since the optimizer was made
        self.param, self.group, self.position, self.name = param, group, position, name
        self.spread = is_spread(param)
        self.local = local_of(param)  # the parameter, or this rank's shard of it
        self.dtype, self.device, self.shape = self.local.dtype, self.local.device, self.local.shape
        self.strides = self.local.stride() if self.local.layout is STRIDED else None
        self.nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        self.saved = self.nothing  # where perturb() puts the weights of a parameter that has no master
        self.borrowed: Tensor | None = None  # where first gradients are copied that are not ours to keep
        self.mask: Tensor | None = None  # uint8 [ceil(numel / 8)], for one step
        self.masks: dict[Pattern, Tensor] = {}  # the same, computed and kept for later steps (mask_period)
        self.master = self.nothing  # float32; the parameter is its rounded copy
        self.version = -1  # of a parameter with a master, when it was last written here

    @property
    def clean(self) -> Tensor:
        """Where the weights are while the parameter is perturbed."""
        return self.saved if self.master is self.nothing else self.master

    def holds(self) -> bool:
        """Whether the parameter still has the dtype, device, shape and strides for which the memory was made."""
        if self.spread:
            self.local = local_of(self.param)  # Module.to() puts another shard under a DTensor
        t = self.local
        return t.dtype is self.dtype and t.shape == self.shape and t.stride() == self.strides and t.device == self.device

    def fitted(self, grad: Tensor) -> Tensor:
        """This rank's part of the gradient, with the parameter's strides.

        Raises:
            RuntimeError: the gradient is sparse.
        """
        if grad.layout is not STRIDED:
            raise RuntimeError(f"CrAM: the gradient of {self} must be dense, got a sparse one ({grad.layout})")
        if is_spread(grad):
            if grad.placements != self.param.placements:  # type: ignore[attr-defined]
                grad = grad.redistribute(placements=self.param.placements)  # type: ignore[attr-defined]
            grad = local_of(grad)
        if grad.stride() == self.strides:
            return grad
        if all(a == b or size == 1 for a, b, size in zip(grad.stride(), self.strides or (), grad.shape, strict=True)):
            return grad.as_strided(grad.shape, self.strides or ())  # the stride of an axis of size 1 means nothing
        return torch.empty_like(self.local).copy_(grad)

    def versions(self) -> int:
        """Goes up with every write that torch sees: to a DTensor there, to the shard here."""
        return self.param._version + self.local._version

    def __str__(self) -> str:
        return f"parameter {self.position} of group {self.group}" if self.name is None else f"parameter {self.name!r}"

    @property
    def label(self) -> str:
        """Its name, or "group.position"."""
        return self.name or f"{self.group}.{self.position}"

    def state_dtype(self) -> torch.dtype:
        """The dtype of the base optimizer's state."""
        return self.dtype if self.master is self.nothing else torch.float32


class Columns:
    """Parameters of one device in the lists that the ops take, with one entry each. An empty list: absent for all.

    Attributes:
        grads: the gradients of this half of a step, or of a plain step.
        saved, masters: where the clean weights are, of those that are perturbed.
        first: the first gradients that the update adds; masks: of the second gradients.
        flag: int32 [], the ops' own record of whether these weights are perturbed.
        watched, versions: the first gradients, and what they were made of; how many writes to these torch has counted.
        perturbed_versions: the same of the perturbed weights; empty: not known.
    """

    def __init__(self, slots: list[Slot], flag: Tensor, grads: list[Tensor], lists: Lists | None = None) -> None:
        self.slots, self.flag, self.grads, self.device = slots, flag, grads, flag.device
        self.params, self.saved, self.masters, self.spread = lists or Lists(
            [s.local for s in slots], [], present([s.master for s in slots], slots), any([s.spread for s in slots])
        )
        self.first: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.watched: list[Tensor] = []
        self.versions: list[int] = []
        self.perturbed_versions: list[int] = []

    def common(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """The arguments with which every restoring op begins: params ... perturbed."""
        return self.params, self.saved, self.grads, self.first, self.masks, self.flag

    def only(self, chosen: list[bool]) -> "Columns":
        """Those of the parameters that are chosen."""
        part = Columns(list(compress(self.slots, chosen)), self.flag, list(compress(self.grads, chosen)))
        part.saved, part.first, part.masks = ([*compress(c, chosen)] for c in (self.saved, self.first, self.masks))
        return part

    def keep_first(self, plus: list[bool], fitted: bool) -> None:
        """Keep `grads` as the first gradients.

        Args:
            plus: which groups add them to the second ones.
            fitted: they may be other tensors than those in `p.grad`.
        """
        first: list[Any] = list(self.grads)
        owners = first
        if fitted := fitted or not all(plus):
            first = [g if plus[s.group] else s.nothing for s, g in zip(self.slots, first, strict=True)]
            owners = [s.param.grad if plus[s.group] else s.nothing for s in self.slots]
        # A view belongs to somebody who will write to it again (a bucket of DDP, even one that holds a single gradient).
        looked_at = map(local_of, owners) if fitted else owners
        for i in [i for i, t in enumerate(looked_at) if t._base is not None or t.untyped_storage().nbytes() != t.nbytes]:
            slot = self.slots[i]
            if slot.borrowed is None:
                slot.borrowed = torch.empty_like(slot.local)
            first[i] = owners[i] = slot.borrowed.copy_(first[i])
        self.first, self.watched = first, [*first, *owners] if fitted else first
        self.versions = [t._version for t in self.watched]

    def weight_versions(self) -> list[int]:
        """How many writes to each parameter torch has counted, see `Slot.versions`."""
        return [s.versions() if s.spread else s.local._version for s in self.slots] if self.spread else [p._version for p in self.params]

    def written_to(self) -> list[Slot]:
        """The parameters that somebody has written to since they were perturbed."""
        if not self.perturbed_versions or (now := self.weight_versions()) == self.perturbed_versions:
            return []
        return [s for s, a, b in zip(self.slots, now, self.perturbed_versions, strict=True) if a != b]


def sorted_into(parts: list[Columns], active: list[Slot], grads: list[Tensor]) -> dict[Slot, Tensor]:
    """Give these parts their gradients. Returns those of slots that are in none of them."""
    if len(parts) == 1 and parts[0].slots == active:
        parts[0].grads = grads
        return {}
    by_slot = dict(zip(active, grads, strict=True))
    for part in parts:
        part.grads = [by_slot.pop(s, s.nothing) for s in part.slots]
    return by_slot


def per_tensor(values: list[Any], slots: list[Slot]) -> list[Any]:
    """[one value] where it is the same for all groups, else one a slot."""
    return values[:1] if values.count(values[0]) == len(values) else [values[s.group] for s in slots]


def by_device(slots: Iterable[Slot]) -> dict[torch.device, list[Slot]]:
    """The slots of each device, in order: an op takes the tensors of one device."""
    devices: dict[torch.device, list[Slot]] = {}
    for slot in slots:
        devices.setdefault(slot.device, []).append(slot)
    return devices


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
        state[key] = as_dtensor(slot.param, local)
    return local
