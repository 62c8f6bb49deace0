"""What the last step did. Its tensors stay on the device and cost nothing until somebody reads them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..patterns import Pattern
from .bucket import Bucket


@dataclass(frozen=True)
class StepInfo:
    """What `perturb()`, and then `step()`, did.

    Thresholds and statistics have one entry for each set of weights that a `TopK` ranked together. They are None for N:M, without a
    pattern, and where the masks of an earlier step were used. On a sharded model the thresholds are those over all ranks, and statistics
    count the weights of this rank.

    Attributes:
        patterns: the pattern of each parameter group, None where it was not pruned.
        pattern_index: which entry of its `compression` the first group drew, from 0.
        thresholds: int32 [sets], magnitude keys as `ops.topk_threshold` gives them.
        stats: int64 [sets, 3], see `ops.prune_topk_`.
        numels: how many weights each set has on this rank.
        ranked: what `emptied` needs to find the weights again; not for users.
        first_grad_norm, second_grad_norm: float32 [], the norm of the gradients of each pass, unscaled and before clipping; None where no
            option needed it and `grad_norms` is False.

    Example:
        opt.step(closure)
        print(opt.last.to_dict())
    """

    patterns: tuple[Pattern | None, ...] = ()
    pattern_index: int | None = None
    thresholds: Tensor | None = None
    stats: Tensor | None = None
    numels: tuple[int, ...] = ()
    first_grad_norm: Tensor | None = None
    second_grad_norm: Tensor | None = None
    ranked: tuple[Callable[[], Bucket | None], ...] = field(default=(), repr=False, compare=False)  # weakly: a log keeps no weights alive

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ranked": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In pickles of earlier versions the index is called `level`."""
        self.__dict__.update({"pattern_index" if name == "level" else name: value for name, value in state.items()})

    @property
    def emptied(self) -> tuple[str, ...]:
        """The names of the parameters that would be pruned to zero by the step's thresholds, judged by their present weights. Waits for the
        device, and reads all ranked weights. Sharded parameters are left out. It is empty once the parameters or groups have changed."""
        found: list[str] = []
        buckets = [bucket for held in self.ranked if (bucket := held()) is not None]  # all of a step, or none
        limits = [] if self.magnitudes is None else self.magnitudes.tolist()
        for bucket in buckets:
            own, limits = limits[: len(bucket.numels)], limits[len(bucket.numels) :]
            for slot, i in zip(bucket.slots, bucket.sets, strict=True):
                if i >= 0 and slot.local.numel() > 0 and not slot.spread and not bool((slot.local.float().abs() > own[i]).any()):
                    found.append(slot.label)
        return tuple(found)

    def __repr__(self) -> str:
        """The numbers of `to_dict`. Waits for the device."""
        return f"StepInfo({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"

    @property
    def pattern(self) -> Pattern | None:
        """The pattern of the first parameter group."""
        return self.patterns[0] if self.patterns else None

    @property
    def magnitudes(self) -> Tensor | None:
        """float32 [sets]: weights up to this magnitude are pruned; NaN where none is kept, -1 where all are."""
        if self.thresholds is None:
            return None
        return torch.where(self.thresholds < 0, -1.0, self.thresholds.view(torch.float32))

    def _share(self, column: int) -> Tensor | None:
        return None if self.stats is None else self.stats[:, column].sum() / max(1, sum(self.numels))

    @property
    def kept_share(self) -> Tensor | None:
        """float32 []: the share of the ranked weights that was kept."""
        return self._share(0)

    @property
    def candidate_share(self) -> Tensor | None:
        """float32 []: the share of ranked weights so close to the threshold that the backend looked twice; it affects speed only."""
        return self._share(1)

    @property
    def fallback(self) -> Tensor | None:
        """bool []: whether the backend's first estimate missed a threshold, so that it took a slower way to the same result."""
        return None if self.stats is None else self.stats[:, 2].any()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a log. This waits for the device.

        Returns:
            `pattern_index`, `pattern` as text, `threshold` (of magnitudes, the largest of several), `kept` and `candidates` (shares of the
            ranked weights), `fallback` (0 or 1), `first_grad_norm` and `second_grad_norm`. What the step did not compute is left out.

        Example:
            opt.step(closure)
            print(opt.last.to_dict()["kept"])
        """
        found: dict[str, Any] = {"pattern_index": self.pattern_index, "pattern": None if self.pattern is None else str(self.pattern)}
        if len(set(self.patterns)) > 1:
            found["pattern"] = ", ".join(map(str, dict.fromkeys(self.patterns)))
        if self.magnitudes is not None and self.magnitudes.numel() > 0:
            found["threshold"] = float(self.magnitudes.max())
        numbers = {"kept": self.kept_share, "candidates": self.candidate_share, "fallback": self.fallback}
        numbers |= {"first_grad_norm": self.first_grad_norm, "second_grad_norm": self.second_grad_norm}
        return found | {name: float(value) for name, value in numbers.items() if value is not None}

    def log(self, writer: Any, step: int, prefix: str = "cram/") -> None:
        """Write the numbers of `to_dict`, `pattern_index` among them, for TensorBoard.

        Args:
            writer: a SummaryWriter, or anything with `add_scalar(tag, value, step)`.
            step: the number of the step.
            prefix: what the tags begin with.

        Example:
            class Printer:
                def add_scalar(self, tag, value, step):
                    print(step, tag, value)

            opt.step(closure)
            opt.last.log(Printer(), step=1)
        """
        for name, value in self.to_dict().items():
            if isinstance(value, int | float):
                writer.add_scalar(prefix + name, value, step)
