"""What a compression is: data. `TopK` keeps the largest weights, `NM` keeps n of every m along the input channels."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from torch import Size

Scope = Literal["model", "group", "tensor"]


@dataclass(frozen=True)
class TopK:
    """Unstructured: prune the share `sparsity` of the weights, the smallest, ranked over the model, a parameter group, or a tensor.

    Raises:
        ValueError: sparsity outside [0, 1), or an unknown scope.
    """

    sparsity: float
    scope: Scope = "model"

    def __post_init__(self) -> None:
        if not isinstance(self.sparsity, Real) or not 0 <= self.sparsity < 1:  # also refuses NaN
            raise ValueError(f"TopK: sparsity must be a number in [0, 1), 0.9 for 90 %, got {self.sparsity!r}")
        if self.scope not in ("model", "group", "tensor"):
            raise ValueError(f"TopK: scope must be 'model', 'group' or 'tensor', got {self.scope!r}")

    def k(self, numel: int) -> int:
        """The rank of the threshold among numel weights: what is larger than the k-th largest stays (contract: Top-k)."""
        return numel + 1 if self.sparsity == 0 else math.ceil(numel * (1 - self.sparsity))

    def why_dense(self, shape: Size) -> str | None:
        """None where a weight of this shape can be pruned, else the reason why it stays dense."""
        return "fewer than 2 dims" if len(shape) < 2 else None

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g} %" + ("" if self.scope == "model" else f" per {self.scope}")


@dataclass(frozen=True)
class NM:
    """Semi-structured: keep n of every m consecutive weights along axis 1 (2:4 is what sparse tensor cores read).

    Raises:
        ValueError: not ints with 1 <= n < m <= 1024.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or not isinstance(self.m, int) or not 1 <= self.n < self.m <= 1024:
            raise ValueError(f"NM: n and m must be ints with 1 <= n < m <= 1024, got n={self.n!r}, m={self.m!r}")

    def why_dense(self, shape: Size) -> str | None:
        """None where a weight of this shape can be pruned, else the reason why it stays dense."""
        if len(shape) < 2:
            return "fewer than 2 dims"
        if shape[1] % self.m:
            return f"{shape[1]} input channels are not a multiple of {self.m}"
        return None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = TopK | NM
