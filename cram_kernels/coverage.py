"""What a pattern does to each parameter: pruned, or why it stays dense, and how much of it is left."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Size, Tensor

from . import ops
from .patterns import Pattern, TopK
from .report import table

if TYPE_CHECKING:
    from .optim.bucket import Bucket


class Coverage(NamedTuple):
    """One parameter under a pattern.

    Attributes:
        why_dense: None where the pattern prunes it.
        kept: how many of its weights would be left if it were pruned now; None where nobody can say: it is dense, sharded, or perturbed.
    """

    name: str
    shape: Size
    numel: int
    why_dense: str | None
    kept: int | None = None

    @property
    def emptied(self) -> bool:
        """Whether the pattern leaves nothing of it."""
        return self.kept == 0 < self.numel


class CoverageTable(tuple[Coverage, ...]):
    """The coverage of all parameters, in order; `str()` is a table."""

    def __str__(self) -> str:
        rows = []
        for c in self:
            kept = "" if c.kept is None else f"{c.kept / max(1, c.numel):.2%}"
            note = c.why_dense or ("EMPTIED: no weight is left" if c.emptied else "")
            rows.append((c.name, " x ".join(map(str, c.shape)), f"{c.numel:,}", "dense" if c.why_dense else "pruned", kept, note))
        pruned = sum(c.numel for c in self if c.why_dense is None)
        rows.append(("pruned parameters", "", f"{pruned:,}", "", "", f"of {sum(c.numel for c in self):,}"))
        return table(("parameter", "shape", "weights", "", "kept", "note"), rows, "<<><><")

    @property
    def emptied(self) -> tuple[str, ...]:
        """The names of the parameters of which the pattern leaves nothing."""
        return tuple(c.name for c in self if c.emptied)


@torch.no_grad()
def kept_counts(buckets: "list[Bucket]", pattern: Pattern) -> dict[Tensor, int]:
    """How many weights of each parameter `pattern` would keep, of those that it prunes and whose weights are all on this rank.

    For a `TopK` this is the contract's rule on the weights as they are: kept is what is larger in magnitude than the threshold.
    """
    found = {}
    for bucket in buckets:
        whole = [not s.spread for s in bucket.slots]
        if isinstance(pattern, TopK):
            if not all(whole) or not bucket.pruned:
                continue
            thresholds = ops.topk_threshold(bucket.params, bucket.sets, bucket.k).tolist()
            for slot, own in zip(bucket.slots, bucket.sets, strict=True):
                if own >= 0:
                    keys = slot.local.float().abs().view(torch.int32)
                    found[slot.param] = int(((keys > thresholds[own]) & ~slot.local.isnan()).sum())
        else:
            found.update({s.param: s.param.numel() * pattern.n // pattern.m for s in bucket.pruned if not s.spread})
    return found
