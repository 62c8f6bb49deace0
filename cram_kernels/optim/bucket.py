"""The memory that CrAM keeps beside the parameters, and the parameters sorted into the lists that the ops take.

Nothing of it is optimizer state, which torch casts to the parameter's dtype when it loads a checkpoint.
"""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..distributed import Spread, is_spread, local_of, local_ranks, spread_of, whole_of
from ..patterns import NM, Pattern, TopK

STRIDED = torch.strided
NOT_SPREAD = -2  # in place of a threshold over all ranks: that of the op holds


class Slot:
    """One parameter: its place in the groups, the tensor that the ops work on, and the memory beside it that lasts from step to step.
    `nothing` is an empty tensor, the ops' convention for an absent argument."""

    def __init__(self, param: Tensor, group: int, position: int, name: str | None = None) -> None:
        self.param, self.group, self.position, self.name = param, group, position, name
        self.spread = is_spread(param)
        self.local = local_of(param)  # the parameter, or this rank's shard of it
        self.dtype, self.device, self.shape = self.local.dtype, self.local.device, self.local.shape
        self.strides = self.local.stride() if self.local.layout is STRIDED else None
        self.nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        self.saved: Tensor | None = None  # where perturb() puts the weights
        self.borrowed: Tensor | None = None  # where first gradients are copied that are not ours to keep
        self.masks: dict[Pattern | None, Tensor] = {}  # uint8 [ceil(numel / 8)]; None: the mask of this step only
        self.finished: set[Pattern] = set()  # patterns whose mask is computed, to be used again
        self.master = self.nothing  # float32; the parameter is its rounded copy
        self.version = -1  # of a parameter with a master, when it was last written here

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
        self.masks: tuple[list[bool], list[Tensor]] | None = None  # of the last step that kept none for later: its `sparse_grad`, and they

    def versions(self) -> list[int]:
        """Of the parameters, see `Slot.versions`."""
        return [s.versions() for s in self.slots] if self.spread else [p._version for p in self.params]

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

    def perturb(
        self, grads: list[Tensor], masks: list[Tensor], rho: Tensor, reuse: bool, amp: dict[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """The op that moves the weights uphill and prunes them; thresholds and statistics where it ranks.

        Args:
            reuse: the masks are those of an earlier step.
            amp: inv_scale and found_inf, on this device.
        """
        common = (self.params, grads, self.saved, masks, self.flag, rho)
        if isinstance(self.pattern, TopK) and not reuse:
            k, over_ranks = self.local_k(grads, rho, {"inv_scale": amp["inv_scale"], "masters": self.masters})
            thresholds, stats = ops.perturb_topk_(*common, self.sets, k, **amp, masters=self.masters)
            return thresholds if over_ranks is None else torch.where(over_ranks == NOT_SPREAD, thresholds, over_ranks), stats
        if isinstance(self.pattern, NM) and not reuse:
            ops.perturb_nm_(*common, self.prune, self.pattern.n, self.pattern.m, **amp, masters=self.masters)
        else:
            ops.perturb_masked_(*common, **amp, masters=self.masters)
        return None

    def local_k(self, grads: list[Tensor], rho: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """k on this rank, and the thresholds over all ranks; k itself and None where no set is spread over ranks."""
        k, thresholds = self.k, None

        def histogram(sets: list[int], prefix: Tensor, shift: int, bits: int) -> Tensor:
            return ops.topk_histogram(self.params, grads, rho, sets, prefix, shift, bits, **options)

        for spread in dict.fromkeys([s for s in self.spreads if s is not None]):  # in the same order on all ranks
            chosen = [i for i, s in enumerate(self.spreads) if s == spread]
            number = {own: i for i, own in enumerate(chosen)}
            sets = [number.get(s, -1) for s in self.sets]
            here, over_ranks = local_ranks(histogram, [s.param for s in self.slots], sets, self.k[chosen], spread)
            if thresholds is None:
                k, thresholds = k.clone(), torch.full_like(k, NOT_SPREAD, dtype=torch.int32)
            k[chosen], thresholds[chosen] = here, over_ranks
        return k, thresholds


class Columns:
    """What an update takes: the parameters of one device as lists with one entry each. Empty lists: absent for all.

    Attributes:
        saved: where the clean weights are, of those that are perturbed; first: their first gradients; masks: of their second gradients.
        grads: the second gradients, or those of a plain step.
        flag: int32 [], whether they are perturbed.
    """

    def __init__(
        self,
        slots: list[Slot],
        grads: list[Tensor],
        flag: Tensor,
        saved: Any = (),
        first: Any = (),
        masks: Any = (),
        masters: list[Tensor] | None = None,
    ) -> None:
        self.slots, self.grads, self.flag, self.saved, self.first, self.masks = slots, grads, flag, saved, first, masks
        self.device, self.params = slots[0].device, [s.local for s in slots]
        self.masters = present([s.master for s in slots], slots) if masters is None else masters

    def common(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
        """The arguments with which every restoring op begins: params ... perturbed."""
        return self.params, self.saved, self.grads, self.first, self.masks, self.flag


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


def joined(tensors: list[Tensor]) -> Tensor | None:
    """The entries of all buckets, on the device of the first."""
    if len(tensors) < 2:
        return tensors[0] if tensors else None
    return torch.cat([t.to(tensors[0].device) for t in tensors])
