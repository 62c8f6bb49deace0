"""What lives between the two halves of a step. The optimizer has one `OpenStep` or none; it alone brings the weights back."""

import contextlib
import sys
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from .. import ops
from ..distributed import local_of, whole_mesh, whole_of
from ..params import OPEN_STEPS, listed
from ..patterns import Pattern
from ..schedule import Groups
from ..warning import warn
from .bucket import Bucket, Columns, Slot, joined, present
from .model_hooks import ModelHooks
from .precision import Factor, note_versions, on
from .workspace import Workspace


class OpenStep:
    """A step that `perturb()` has begun.

    Args:
        slots: of all parameters of the optimizer.
        hooks: of the model, whose batch norms keep still meanwhile.
        factor, scaler: of the first gradients.

    Attributes:
        perturbed: whether weights are, or may be, perturbed: True before the op runs, False after it is undone.
        given_up: why the step ended without an update, for the error of the `step()` that does not know of it yet.
    """

    def __init__(
        self, buckets: list[Bucket], slots: list[Slot], hooks: ModelHooks | None, factor: Factor, scaler: GradScaler | None
    ) -> None:
        self.buckets, self.slots, self.hooks, self.factor, self.scaler = buckets, slots, hooks, factor, scaler
        self.masks: list[list[Tensor]] = [[] for _ in buckets]  # of the second gradients
        self.first: list[list[Tensor]] = [[] for _ in buckets]  # the first gradients, where they are part of the update
        self.watched: list[list[Tensor]] = [[] for _ in buckets]  # they, and what they were made of
        self.versions: list[list[int]] = [[] for _ in buckets]  # of the watched
        self.weight_versions: list[list[int]] = [[] for _ in buckets]  # of the perturbed weights; empty: not known yet
        self.renewed: list[tuple[Slot, Pattern]] = []  # masks that this step has computed, to be kept
        self.kept_patterns: list[Pattern] = []
        self.written: set[Slot] = set()  # what somebody has written to since, and which is left as it is
        self.perturbed = False
        self.given_up: str | None = None
        self.frozen: AbstractContextManager[None] = contextlib.nullcontext()

    # --- the first half ---

    def perturb(
        self,
        grads: list[list[Tensor]],
        groups: Groups,
        workspace: Workspace,
        rhos: list[Any],
        norm: Tensor | None,
        reused: set[Pattern | None],
        keep: bool,
        masters: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Save the weights, move them uphill and prune them. Returns thresholds and statistics, for a `StepInfo`.

        Args:
            grads: the gradients of each bucket.
            rhos: one a group.
            norm: float32 []: divides rho.
            reused: patterns whose masks of an earlier step are taken.
            keep: the masks are kept for later steps.
            masters: the optimizer keeps master weights.
        """
        for bucket in self.buckets:
            bucket.prepare(masters)
        self.perturbed = True
        OPEN_STEPS.add(self)
        if self.hooks is not None:
            self.frozen = self.hooks.frozen_batchnorm()
            self.frozen.__enter__()
        results, sparse = [], [group["sparse_grad"] for group in groups]
        for i, bucket in enumerate(self.buckets):
            rho = workspace.option("rho", rhos, bucket.slots, bucket.device)
            if norm is not None:
                rho = rho / (norm.to(bucket.device) + 1e-12)
            reuse = bucket.pattern in reused
            masks = self._masks(bucket, sparse, workspace, keep, reuse)
            results.append(self._run(bucket, grads[i], masks, rho, reuse))
            self.weight_versions[i] = bucket.versions()
            for slot in bucket.pruned if keep else ():
                slot.finished.add(bucket.pattern)  # type: ignore[arg-type]
                if not reuse:
                    self.renewed.append((slot, bucket.pattern))  # type: ignore[arg-type]
            if keep and masks and not all(sparse):  # some are for later steps only
                masks = present([m if sparse[s.group] else s.nothing for s, m in zip(bucket.slots, masks, strict=True)], bucket.slots)
            self.masks[i] = masks
        self.kept_patterns = [b.pattern for b in self.buckets if b.pattern is not None] if keep else []
        if self.factor.found_inf is not None:
            for mesh in whole_mesh([s.param for s in self.perturbed_slots]):
                mesh.reduce_(self.factor.found_inf, dist.ReduceOp.MAX)
        thresholds, stats = ([r[i] for r in results if r is not None] for i in (0, 1))
        return joined(thresholds), joined(stats)

    def _masks(self, bucket: Bucket, sparse: list[bool], workspace: Workspace, keep: bool, reuse: bool) -> list[Tensor]:
        """Where the op writes, or where `reuse` reads, the mask of each slot; a mask that nobody will read is not made."""
        if not keep and bucket.masks is not None and bucket.masks[0] == sparse:
            return bucket.masks[1]
        key = bucket.pattern if keep else None
        masked = {s for s in bucket.pruned if keep or sparse[s.group]}
        workspace.allocate_masks([s for s in bucket.slots if s in masked], key)
        masks = [s.masks[key] if s in masked else s.nothing for s in bucket.slots] if masked else []
        if not keep:
            bucket.masks = sparse, masks
        elif not reuse:
            for slot in masked:
                slot.finished.discard(bucket.pattern)  # type: ignore[arg-type]
        return masks

    def _run(self, bucket: Bucket, grads: list[Tensor], masks: list[Tensor], rho: Tensor, reuse: bool) -> tuple[Tensor, Tensor] | None:
        """The op of this bucket; thresholds and statistics where it ranks."""
        found_inf = on(self.factor.found_inf, bucket.device)
        amp = {"inv_scale": on(self.factor.inv_scale, bucket.device), "found_inf": found_inf}
        result = bucket.perturb(grads, masks, rho, reuse, amp)
        shared = self.factor.found_inf
        if shared is not None and found_inf is not None and found_inf is not shared:  # a device that is not the scaler's
            shared.add_(found_inf.to(shared.device))
        return result

    def keep_gradients(self, grads: list[list[Tensor]], groups: Groups, fitted: bool) -> None:
        """Keep the first gradients of the groups that add them to the second ones (`plus`).

        Args:
            grads: those of each bucket.
            fitted: they may be other tensors than those in `p.grad`.
        """
        plus = [group["plus"] for group in groups]
        fitted = fitted or not all(plus)
        for i, bucket in enumerate(self.buckets if any(plus) else ()):
            first = [g if plus[s.group] else s.nothing for s, g in zip(bucket.slots, grads[i], strict=True)] if fitted else list(grads[i])
            owners: list[Any] = [s.param.grad if plus[s.group] else s.nothing for s in bucket.slots] if fitted else first
            # A view belongs to somebody who will write to it again (a bucket of DDP, even one that holds a single gradient).
            for j, t in enumerate([local_of(o) for o in owners] if bucket.spread else owners):
                if t._base is not None or t.untyped_storage().nbytes() != t.nbytes:
                    slot = bucket.slots[j]
                    if slot.borrowed is None:
                        slot.borrowed = torch.empty_like(slot.local)
                    first[j] = owners[j] = slot.borrowed.copy_(first[j])
            self.first[i], self.watched[i] = first, [*first, *owners] if fitted else first
            self.versions[i] = [t._version for t in self.watched[i]]

    # --- the second half ---

    @property
    def perturbed_slots(self) -> list[Slot]:
        return [s for bucket in self.buckets for s in bucket.slots]

    def check_first(self) -> None:
        """Raise RuntimeError where somebody has written to a first gradient, which perturb() took away."""
        for i, bucket in enumerate(self.buckets):
            now = [t._version for t in self.watched[i]]
            if now != self.versions[i]:
                slot = next(s for s, a, b in zip(bucket.slots * 2, now, self.versions[i], strict=False) if a != b)
                raise RuntimeError(
                    f"CrAM: the first gradient of {slot} must be left alone after perturb(), got it overwritten: copy it before"
                )
        self.weight_versions = [[] for _ in self.buckets]

    def written_to(self) -> list[Slot]:
        """The parameters that somebody has written to since they were perturbed, as torch's version counters say."""
        return [slot for i in range(len(self.buckets)) for slot in self._written_to(i)]

    def _written_to(self, i: int) -> list[Slot]:
        """As `written_to`, of one bucket."""
        bucket, versions = self.buckets[i], self.weight_versions[i]
        if not (self.perturbed and versions) or (now := bucket.versions()) == versions:
            return []
        return [s for s, a, b in zip(bucket.slots, now, versions, strict=True) if a != b]

    def forget_masks(self) -> None:
        """The masks of this step are not to be used again."""
        for slot, pattern in self.renewed:
            slot.finished.discard(pattern)

    def columns(self, active: list[Slot], grads: list[Tensor]) -> tuple[list[Columns], list[Slot]]:
        """The perturbed parameters as an update takes them, and those of `active` that are not perturbed. Parameters with neither gradient
        are restored here, with all others, and left out.

        Args:
            active: slots with a second gradient, and those gradients.
        """
        found: list[Columns] = []
        if len(self.buckets) == 1 and self.buckets[0].slots == active:
            bucket = self.buckets[0]
            return [Columns(active, grads, bucket.flag, bucket.saved, self.first[0], self.masks[0], bucket.masters)], []
        second = dict(zip(active, grads, strict=True))
        perturbed = set(self.perturbed_slots)
        for i, bucket in enumerate(self.buckets):
            lists = [
                bucket.saved or [s.nothing for s in bucket.slots],
                self.first[i] or [s.nothing for s in bucket.slots],
                self.masks[i] or [s.nothing for s in bucket.slots],
            ]
            rows = [
                (slot, second.get(slot, slot.nothing), *rest)
                for slot, *rest in zip(bucket.slots, *lists, strict=True)
                if slot in second or rest[1] is not slot.nothing
            ]
            if len(rows) < len(bucket.slots):
                self.restore()
            if rows:
                slots, gradients, *rest = (list(column) for column in zip(*rows, strict=True))
                found.append(Columns(slots, present(gradients, slots), bucket.flag, *(present(column, slots) for column in rest)))
        return found, [s for s in active if s not in perturbed]

    def is_untouched(self) -> bool:
        """Whether no op has undone any of it: one that refuses its arguments changes nothing. Waits for the device."""
        return self.perturbed and len(self.buckets) > 0 and all([int(bucket.flag) != 0 for bucket in self.buckets])

    # --- the end ---

    @torch.no_grad()
    def restore(self, keep_written: bool = False) -> None:
        """Bring the weights back, to the bit. Idempotent: the ops know by their flag whether they have something to do. A parameter that
        was given another shape meanwhile is left as it is.

        Args:
            keep_written: leave parameters as they are that somebody has written to since they were perturbed: for a step that its user has
                forgotten, and went on with a loaded checkpoint or another optimizer. Within a step the model itself may write (an embedding
                with max_norm, a clamp), and its weights come back all the same.
        """
        if not self.perturbed:
            return
        kept: list[Slot] = []
        for i, bucket in enumerate(self.buckets):
            if bucket.device.type == "cpu" and int(bucket.flag) == 0:
                continue  # the op refused its arguments: it would refuse them here, too
            if keep_written:
                self.written.update(self._written_to(i))
            self.weight_versions[i] = []  # from here on it is us who write
            same = [s for s in bucket.slots if s.holds() and s not in self.written]
            if len(same) < len(bucket.slots) and int(bucket.flag) != 0:
                for slot in set(bucket.slots).difference(same):
                    clean = slot.saved if slot.master is slot.nothing else slot.master
                    if slot in self.written or clean is None or local_of(slot.param).shape != clean.shape:
                        kept.append(slot)
                    else:  # the model was converted within the step: no op takes such a pair
                        local_of(slot.param).copy_(clean)
            saved = [s.saved if s.master is s.nothing and s.saved is not None else s.nothing for s in same]
            ops.restore_([s.local for s in same], present(saved, same), bucket.flag, masters=present([s.master for s in same], same))
            note_versions(same)
        self.end()
        if kept:
            some = listed([*map(str, kept)], 3)
            warn(f"CrAM: what was written to {some} after perturb() stays there; the other weights are the clean ones again")

    def end(self) -> None:
        """The weights are back, by `restore` or by an update."""
        torch.clear_autocast_cache()  # of casts of the perturbed weights
        if self.hooks is not None:
            self.hooks.reshard()
        self.frozen.__exit__(None, None, None)
        OPEN_STEPS.discard(self)
        self.perturbed = False

    def give_up(self, reason: str) -> None:
        """End the step from outside; the next step() of its optimizer says why."""
        self.restore(keep_written=True)
        self.given_up = reason
        self.first, self.watched = [], []

    def __del__(self) -> None:
        """An optimizer that is collected within a step leaves the clean weights behind."""
        if getattr(self, "perturbed", False) and not sys.is_finalizing():
            self.restore(keep_written=True)

    # --- questions from outside ---

    @cached_property
    def _places(self) -> dict[int, tuple[Bucket, Slot]]:
        return {id(slot.param): (bucket, slot) for bucket in self.buckets for slot in bucket.slots}

    def _place(self, param: Tensor) -> tuple[Bucket, Slot] | None:
        place = self._places.get(id(param)) if self.perturbed else None
        return None if place is None or int(place[0].flag) == 0 else place

    def holds(self, param: Tensor) -> bool:
        """Whether the parameter is perturbed now."""
        return self._place(param) is not None

    def unperturbed(self, param: Tensor) -> Tensor | None:
        """A copy of the unperturbed weights of a parameter that is perturbed now, else None."""
        if (place := self._place(param)) is None:
            return None
        slot = place[1]
        saved = slot.saved if slot.master is slot.nothing and slot.saved is not None else slot.master.to(param.dtype)
        return whole_of(param, saved.clone())
