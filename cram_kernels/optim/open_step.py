"""What lives between the two halves of a step. The optimizer has one `OpenStep` or none; it alone brings the weights back."""

import contextlib
import sys
from contextlib import AbstractContextManager
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler

from .. import ops
from ..batchnorm import frozen_batchnorm
from ..distributed import as_dtensor, local_of, whole_mesh
from ..params import OPEN_STEPS, listed
from ..patterns import Pattern
from ..warning import warn
from .bucket import Bucket, joined
from .columns import Columns, Slot, sorted_into
from .hooks import ModelHooks
from .precision import Factor, note_versions, on

NOTHING_FROZEN = contextlib.nullcontext()


class OpenStep:
    """A step that `perturb()` has begun.

    Args:
        slots: of all parameters of the optimizer.
        hooks: of the model, whose batch norms keep still meanwhile.
        factor, scaler: of the first gradients.

    Attributes:
        parts: the columns of each bucket.
        perturbed: whether weights are, or may be, perturbed: True before the op runs, False after it is undone.
        given_up: why the step ended without an update, for the error of the `step()` that does not know of it yet.
    """

    def __init__(
        self, buckets: list[Bucket], slots: list[Slot], hooks: ModelHooks | None, factor: Factor, scaler: GradScaler | None
    ) -> None:
        self.buckets, self.slots, self.hooks, self.factor, self.scaler = buckets, slots, hooks, factor, scaler
        self.parts: list[Columns] = []
        self.renewed: list[Bucket] = []  # whose masks this step has computed, to be kept
        self.written: set[Slot] = set()  # what somebody has written to since, and which is left as it is
        self.perturbed = False
        self.given_up: str | None = None
        self.frozen: AbstractContextManager[None] = NOTHING_FROZEN

    # --- the first half ---

    def begin(self, active: list[Slot], grads: list[Tensor], masters: bool) -> None:
        """Gather what the ops take, and from here on be responsible for the weights.

        Args:
            active, grads: the slots of all buckets, and their gradients.
            masters: the optimizer keeps master weights.
        """
        self.parts = [bucket.columns(masters) for bucket in self.buckets]
        sorted_into(self.parts, active, grads)
        self.perturbed = True
        OPEN_STEPS.add(self)
        if self.hooks is not None:
            self.frozen = frozen_batchnorm(self.hooks.model)
            self.frozen.__enter__()

    def perturb(
        self, rhos: list[Tensor], sparse: list[bool], reused: set[Pattern | None], keep: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Save the weights, move them uphill and prune them. Returns thresholds and statistics, for a `StepInfo`.

        Args:
            rhos: for each bucket, float32 [] or one a slot.
            sparse: which groups mask their second gradients.
            reused: patterns whose masks of an earlier step are taken.
            keep: the masks are kept for later steps.
        """
        results, found_inf = [], self.factor.found_inf
        for bucket, part, rho in zip(self.buckets, self.parts, rhos, strict=True):
            reuse = bucket.pattern in reused
            part.masks = bucket.masks_of_step(sparse, keep, reuse)
            own_inf = on(found_inf, bucket.device)
            result = bucket.perturb(part, rho, reuse, on(self.factor.inv_scale, bucket.device), own_inf)
            part.perturbed_versions = part.weight_versions()
            results += [] if result is None else [result]
            if found_inf is not None and own_inf is not None and own_inf is not found_inf:  # a device that is not the scaler's
                found_inf.add_(own_inf.to(found_inf.device))
            if keep and not reuse:
                bucket.keep_masks(part.masks)
                self.renewed.append(bucket)
            if keep and part.masks and not all(sparse):  # some are for later steps only
                part.masks = [m if sparse[s.group] else s.nothing for s, m in zip(part.slots, part.masks, strict=True)]
        if found_inf is not None:
            for mesh in whole_mesh([s.param for s in self.perturbed_slots]):
                mesh.reduce_(found_inf, dist.ReduceOp.MAX)
        return joined([thresholds for thresholds, _ in results]), joined([stats for _, stats in results])

    def keep_gradients(self, plus: list[bool], fitted: bool) -> None:
        """Keep the first gradients of the groups that add them to the second ones (`plus`); see `Columns.keep_first`."""
        for part in self.parts:
            if any(plus):
                part.keep_first(plus, fitted)
            part.grads = []

    # --- the second half ---

    @property
    def perturbed_slots(self) -> list[Slot]:
        return [s for bucket in self.buckets for s in bucket.slots]

    def check_first(self) -> None:
        """Raise RuntimeError where somebody has written to a first gradient, which perturb() took away."""
        for part in self.parts:
            now = [t._version for t in part.watched]
            if now != part.versions:
                slot = next(s for s, a, b in zip(part.slots * 2, now, part.versions, strict=False) if a != b)
                raise RuntimeError(
                    f"CrAM: the first gradient of {slot} must be left alone after perturb(), got it overwritten: copy it before"
                )
            part.perturbed_versions = []  # from here on it is us who write

    def written_to(self) -> list[Slot]:
        """The parameters that somebody has written to since they were perturbed, as torch's version counters say."""
        return [slot for part in self.parts for slot in part.written_to()] if self.perturbed else []

    def forget_masks(self) -> None:
        """The masks of this step are not to be used again."""
        for bucket in self.renewed:
            bucket.take_masks()

    def columns(self, active: list[Slot], grads: list[Tensor]) -> tuple[list[Columns], dict[Slot, Tensor]]:
        """The perturbed parameters as an update takes them, and the gradients of those that are not perturbed. Parameters with neither
        gradient are restored here, with all others, and left out.

        Args:
            active, grads: slots with a second gradient, and those gradients.
        """
        others = sorted_into(self.parts, active, grads)
        if len(active) - len(others) == sum([len(part.slots) for part in self.parts]):
            return self.parts, others
        found = []
        for part in self.parts:
            either = zip(part.slots, part.grads, part.first or part.grads, strict=True)
            used = [g is not s.nothing or first is not s.nothing for s, g, first in either]
            if not all(used):
                self.restore()
            found.append(part if all(used) else part.only(used))
        return [part for part in found if part.slots], others

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
        for part in self.parts:
            if part.device.type == "cpu" and int(part.flag) == 0:
                continue  # the op refused its arguments: it would refuse them here, too
            if keep_written:
                self.written.update(part.written_to())
            part.perturbed_versions = []  # from here on it is us who write
            same = [s.holds() and s not in self.written for s in part.slots]
            if not all(same) and int(part.flag) != 0:
                for slot in part.only([not yes for yes in same]).slots:
                    if slot in self.written or local_of(slot.param).shape != slot.clean.shape:
                        kept.append(slot)
                    else:  # the model was converted within the step: no op takes such a pair
                        local_of(slot.param).copy_(slot.clean)
            whole = part.only(same)
            ops.restore_(whole.params, whole.saved, part.flag, masters=whole.masters)
            note_versions(whole.slots)
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
        self.given_up, self.parts = reason, []

    def __del__(self) -> None:
        """An optimizer that is collected within a step leaves the clean weights behind."""
        if getattr(self, "perturbed", False) and not sys.is_finalizing():
            self.restore(keep_written=True)

    # --- questions from outside ---

    @cached_property
    def _places(self) -> dict[int, tuple[Columns, Slot]]:
        return {id(slot.param): (part, slot) for part in self.parts for slot in part.slots}

    def _perturbed(self, param: Tensor) -> Slot | None:
        """The slot of a parameter that is perturbed now, else None."""
        part, slot = self._places.get(id(param), (None, None)) if self.perturbed else (None, None)
        return None if part is None or int(part.flag) == 0 else slot

    def holds(self, param: Tensor) -> bool:
        """Whether the parameter is perturbed now."""
        return self._perturbed(param) is not None

    def unperturbed(self, param: Tensor) -> Tensor | None:
        """A copy of the unperturbed weights of a parameter that is perturbed now, else None."""
        slot = self._perturbed(param)
        return None if slot is None else as_dtensor(param, slot.clean.to(param.dtype, copy=True))
