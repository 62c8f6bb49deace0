"""What a compression is: data. `TopK` prunes a share of the weights, `NM` keeps n of every m along the input channels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

Scope = Literal["model", "group", "tensor"]


@dataclass(frozen=True)
class TopK:
    """Unstructured pruning: of the weights that are ranked together, set the share `sparsity`, the smallest in magnitude, to zero.

    `TopK(sparsity=0.9)` prunes 90 % and keeps 10 %. Of n weights those stay whose magnitude is larger than the k-th largest,
    k = ceil(n * (1 - sparsity)): the k-th itself and all that tie with it go, as in the published code.

    Args:
        sparsity: the share that becomes zero, in [0, 1); 0 prunes nothing.
        scope: which weights are ranked together: of the whole "model", of a parameter "group" of the optimizer, or of each "tensor".

    Raises:
        ValueError: sparsity is outside of [0, 1), or the scope is unknown.

    Example:
        >>> CrAM(model, torch.optim.SGD, lr=0.1, compression=[TopK(sparsity=0.5), TopK(sparsity=0.9)])
        >>> prune(model, TopK(sparsity=0.9))

    Source: "CrAM: A Compression-Aware Minimizer", arXiv 2207.14200: global magnitude pruning, the Top-K compression of its experiments.
    """

    sparsity: float
    scope: Scope = "model"

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, Real) or not 0 <= self.sparsity < 1:  # also refuses NaN
            raise ValueError(f"TopK: sparsity must be a number in [0, 1), 0.9 for 90 %, got {self.sparsity!r}")
        if self.scope not in ("model", "group", "tensor"):
            raise ValueError(f"TopK: scope must be 'model', 'group' or 'tensor', got {self.scope!r}")

    def k(self, numel: int) -> int:
        """The rank of the threshold: what is larger than the k-th largest stays (contract: Top-k).

        Args:
            numel: how many weights are ranked together.

        Example:
            >>> TopK(sparsity=0.9).k(1000)
            100
        """
        return numel + 1 if self.sparsity == 0 else math.ceil(numel * (1 - self.sparsity))

    def why_dense(self, shape: Sequence[int]) -> str | None:
        """None where a weight of this shape can be pruned, else the reason why it stays dense.

        Args:
            shape: of the weight.

        Example:
            TopK(sparsity=0.9).why_dense(model.conv.weight.shape)
        """
        return "fewer than 2 dims" if len(shape) < 2 else None

    def __repr__(self) -> str:
        return f"TopK(sparsity={self.sparsity!r}" + (")" if self.scope == "model" else f", scope={self.scope!r})")

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g} %" + ("" if self.scope == "model" else f" per {self.scope}")


@dataclass(frozen=True)
class NM:
    """Semi-structured pruning: keep the n largest of every m consecutive weights along the input channels, axis 1 of Linear and Conv.

    `NM(2, 4)` keeps 2 of 4: 50 % become zero, in the pattern that sparse tensor cores read. On a tie the later weight stays. A weight
    whose axis 1 is not a multiple of m stays dense as a whole, and reports say so.

    Args:
        n, m: ints, 1 <= n < m <= 1024.

    Raises:
        ValueError: n or m is anything else.

    Example:
        >>> CrAM(model, torch.optim.SGD, lr=0.1, compression=[NM(2, 4), NM(4, 8)])
        >>> prune(model, NM(2, 4))

    Source: "CrAM: A Compression-Aware Minimizer", arXiv 2207.14200: CrAM+ N:M, trained with 2:4 and 4:8 in turn.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if type(self.n) is not int or type(self.m) is not int or not 1 <= self.n < self.m <= 1024:
            raise ValueError(f"NM: n and m must be ints with 1 <= n < m <= 1024, got n={self.n!r}, m={self.m!r}")

    def why_dense(self, shape: Sequence[int]) -> str | None:
        """None where a weight of this shape can be pruned, else the reason why it stays dense.

        Args:
            shape: of the weight.

        Example:
            NM(2, 4).why_dense(model.conv.weight.shape)
        """
        if len(shape) < 2:
            return "fewer than 2 dims"
        if shape[1] % self.m:
            return f"{shape[1]} input channels are not a multiple of {self.m}"
        return None

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = TopK | NM
