"""What a pattern does to each parameter: pruned, or why it stays dense, and how much of it is left."""

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from . import ops
from .distributed import why_not_nm
from .params import embedding_tables, outputs_on_axis_1, reparametrized
from .patterns import NM, Pattern, TopK
from .report import table
from .schedule import Groups

if TYPE_CHECKING:
    from collections.abc import Callable

    from .optim.bucket import Bucket, Slot
    from .optim.workspace import Workspace


class Coverage(NamedTuple):
    """One parameter under a pattern.

    Attributes:
        why_dense: None where the pattern prunes it.
        kept: how many of its weights would be left if it were pruned now; None where nobody can say: it is dense, sharded, perturbed, or
            a weight that it is ranked with is NaN.

    Example:
        [row.name for row in opt.coverage(NM(2, 4)) if row.why_dense is not None]
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
    """The coverage of all parameters, in order; `str()` is a table.

    Example:
        table = opt.coverage(TopK(sparsity=0.9))
        print(table)
    """

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


def name_of(group: dict[str, Any], slot: "Slot") -> str:
    """The name that the user gave the parameter, or "group.position"."""
    names = group.get("param_names")
    return names[slot.position] if names else f"{slot.group}.{slot.position}"


def dense_in(model: nn.Module, names: list[tuple[str, int]], prune_embeddings: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Why a model keeps parameters dense, under any pattern and under N:M: name -> reason. `names` are those of the ids of parameters."""
    always = reparametrized(model) | ({} if prune_embeddings else embedding_tables(model))
    under_nm = outputs_on_axis_1(model)
    return {name: always[p] for name, p in names if p in always}, {name: under_nm[p] for name, p in names if p in under_nm}


def why_dense(
    group: dict[str, Any], slot: "Slot", pattern: Pattern, exclude: tuple[str, ...], always: dict[str, str], under_nm: dict[str, str]
) -> str | None:
    """None where the pattern prunes this parameter of an optimizer.

    Args:
        exclude: globs of the names of those that stay dense.
        always, under_nm: see `dense_in`.
    """
    if not slot.param.requires_grad:
        return "frozen (requires_grad=False)"
    if not group["prune"]:
        return "prune=False"
    name = name_of(group, slot)
    if (glob := next((glob for glob in exclude if fnmatchcase(name, glob)), None)) is not None:
        return f"excluded by {glob!r}"
    if name in always:
        return always[name]
    if isinstance(pattern, NM) and (wrong := under_nm.get(name) or why_not_nm(slot.param, pattern.m)) is not None:
        return wrong
    return pattern.why_dense(slot.param.shape)


@torch.no_grad()
def coverage_of(
    workspace: "Workspace", groups: Groups, pattern: Pattern, dense_because: "Callable[[Slot, Pattern], str | None]"
) -> CoverageTable:
    """The coverage of an optimizer's parameters; `dense_because` is None where the pattern prunes a slot."""
    slots = workspace.follow(groups)
    is_open = workspace.open is not None and workspace.open.perturbed
    if not is_open:
        slots = workspace.renew(workspace.stale(slots))
    dense = {s.param: why for s in slots if (why := dense_because(s, pattern)) is not None}
    pruned = [s for s in slots if s.param not in dense and s.holds()]
    buckets = workspace.make_buckets((pattern,) * len(groups), pruned, dense_because) if pruned and not is_open else []
    kept = kept_counts(buckets, pattern)
    return CoverageTable(
        Coverage(name_of(groups[s.group], s), s.param.shape, s.param.numel(), dense.get(s.param), kept.get(s.param)) for s in slots
    )


def kept_counts(buckets: "list[Bucket]", pattern: Pattern) -> dict[Tensor, int]:
    """How many weights of each parameter `pattern` would keep, of those that it prunes and whose weights are all on this rank.

    For a `TopK` this is the contract's rule on the weights as they are: kept is what is larger in magnitude than the threshold.
    """
    found = {}
    for bucket in buckets:
        whole = [not s.spread for s in bucket.slots]
        if isinstance(pattern, TopK):
            if not all(whole) or not bucket.pruned or any(bool(s.local.isnan().any()) for s in bucket.pruned):
                continue
            thresholds = ops.topk_threshold(bucket.params, bucket.sets, bucket.k).tolist()
            for slot, own in zip(bucket.slots, bucket.sets, strict=True):
                if own >= 0:
                    keys = slot.local.float().abs().view(torch.int32)
                    found[slot.param] = int((keys > thresholds[own]).sum())
        else:
            found.update({s.param: s.param.numel() * pattern.n // pattern.m for s in bucket.pruned if not s.spread})
    return found
