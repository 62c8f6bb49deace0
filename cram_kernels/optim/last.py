"""What the last `perturb()` did. Its tensors stay on the device and cost nothing until somebody reads them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..patterns import Pattern


@dataclass(frozen=True)
class Perturbation:
    """Tensors have one entry a selection set of a `TopK`; they are None for N:M, without a pattern, and where masks of an earlier step were
    used. On a sharded model thresholds are over all ranks, statistics of this rank."""

    pattern: Pattern | None
    level: int | None = None  # its index in the optimizer's `compression`
    thresholds: Tensor | None = None  # int32 [sets]: keys, see `ops.topk_threshold`
    stats: Tensor | None = None  # int64 [sets, 3], see `ops.prune_topk_`
    numels: tuple[int, ...] = ()  # a set: weights on this rank

    @property
    def magnitudes(self) -> Tensor | None:
        """float32 [sets]: weights up to this are pruned; NaN where none is kept, -1 where all are."""
        if self.thresholds is None:
            return None
        return torch.where(self.thresholds < 0, -1.0, self.thresholds.view(torch.float32))

    def _share(self, column: int) -> Tensor | None:
        return None if self.stats is None else self.stats[:, column].sum() / max(1, sum(self.numels))

    @property
    def kept_share(self) -> Tensor | None:
        """float32 []: of the weights that were ranked."""
        return self._share(0)

    @property
    def candidate_share(self) -> Tensor | None:
        """float32 []: weights that the backend looked at twice."""
        return self._share(1)

    @property
    def fallback(self) -> Tensor | None:
        """bool []: whether a guess failed somewhere, and a slower way was taken."""
        return None if self.stats is None else self.stats[:, 2].any()

    def to_dict(self) -> dict[str, Any]:
        """Numbers for a log: level, pattern, threshold (the largest, of several sets), kept, candidates, fallback. Reads the device."""
        found: dict[str, Any] = {"level": self.level, "pattern": None if self.pattern is None else str(self.pattern)}
        if self.magnitudes is not None and self.magnitudes.numel() > 0:
            found["threshold"] = float(self.magnitudes.max())
        for name, value in (("kept", self.kept_share), ("candidates", self.candidate_share), ("fallback", self.fallback)):
            if value is not None:
                found[name] = float(value)
        return found

    def log(self, writer: Any, step: int, prefix: str = "cram/") -> None:
        """The numbers of `to_dict` to a TensorBoard SummaryWriter, or to anything with add_scalar(tag, value, step)."""
        for name, value in self.to_dict().items():
            if isinstance(value, int | float):
                writer.add_scalar(prefix + name, value, step)
