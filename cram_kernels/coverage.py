"""What a pattern does to each parameter: pruned, or why it stays dense, and how much of it is left."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from . import ops
from .distributed import why_not_nm
from .params import embedding_tables, outputs_on_axis_1, reparametrized
from .patterns import NM, Pattern, TopK
from .report import table
from .schedule import Compression, Groups, choices
from .warning import warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from .optim.bucket import Bucket
    from .optim.columns import Slot
    from .optim.workspace import Workspace


class Coverage(NamedTuple):
    """One parameter under a pattern.

    Attributes:
        why_dense: None where the pattern prunes it.
        kept: how many of its weights would be left if it were pruned now; None where nobody can say: it is dense, sharded, perturbed, or
            a weight that it is ranked with is NaN.
        pattern: this pattern; None where no group has one.

    Example:
        [row.name for row in opt.coverage(NM(2, 4)) if row.why_dense is not None]
    """

    name: str
    shape: Size
    numel: int
    why_dense: str | None
    kept: int | None = None
    pattern: Pattern | None = None

    @property
    def emptied(self) -> bool:
        """Whether the pattern leaves nothing of it."""
        return self.kept == 0 < self.numel


class CoverageTable(tuple[Coverage, ...]):
    """The coverage of all parameters, in order, under one pattern after the other; `str()` is a table with a column for each pattern.

    Example:
        table = opt.coverage()
        print(table)
    """

    def __str__(self) -> str:
        patterns = list(dict.fromkeys(c.pattern for c in self))
        count = len(self) // max(1, len(patterns))
        columns = [self[i * count : (i + 1) * count] for i in range(len(patterns))]
        rows = [
            (cells[0].name, " x ".join(map(str, cells[0].shape)), f"{cells[0].numel:,}", *map(_cell, cells), _note(cells))
            for cells in zip(*columns, strict=True)
        ]
        pruned = [f"{sum(c.numel for c in column if c.why_dense is None):,}" for column in columns]
        rows.append(("pruned parameters", "", f"{sum(c.numel for c in self[:count]):,}", *pruned, ""))
        told = {p: f"sparsity {p}" if isinstance(p, TopK) else str(p) for p in patterns}
        head = ["no pattern" if p is None else f"kept at {told[p]}" for p in patterns]
        return table(("parameter", "shape", "weights", *head, "note"), rows, "<<>" + ">" * len(patterns) + "<")

    @property
    def emptied(self) -> tuple[str, ...]:
        """The names of the parameters of which a pattern leaves nothing."""
        return tuple(dict.fromkeys(c.name for c in self if c.emptied))


def _cell(c: Coverage) -> str:
    return "dense" if c.why_dense else "unknown" if c.kept is None else f"{c.kept / max(1, c.numel):.2%}"


def _note(cells: Sequence[Coverage]) -> str:
    """Why a parameter stays dense, and which patterns empty it."""
    reasons: dict[str, list[str]] = {}
    for c in cells:
        if (reason := c.why_dense or ("EMPTIED: no weight is left" if c.emptied else None)) is not None:
            reasons.setdefault(reason, []).append(str(c.pattern))
    return "; ".join(why if len(where) == len(cells) else f"{', '.join(where)}: {why}" for why, where in reasons.items())


def dense_in(model: nn.Module, groups: Groups, prune_embeddings: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Why a model keeps parameters of these groups dense, under any pattern and under N:M: name -> reason."""
    names = [(name, id(p)) for group in groups for name, p in zip(group.get("param_names", ()), group["params"], strict=False)]
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
    if (glob := next((glob for glob in exclude if fnmatchcase(slot.label, glob)), None)) is not None:
        return f"excluded by {glob!r}"
    if slot.label in always:
        return always[slot.label]
    if isinstance(pattern, NM) and (wrong := under_nm.get(slot.label) or why_not_nm(slot.param, pattern.m)) is not None:
        return wrong
    return pattern.why_dense(slot.param.shape)


@torch.no_grad()
def coverage_of(
    workspace: "Workspace",
    groups: Groups,
    compression: Compression,
    pattern: Pattern | None,
    why_dense: "Callable[[Slot, Pattern], str | None]",
) -> CoverageTable:
    """See `CrAM.coverage`; `why_dense` is None where a pattern prunes a slot."""
    if not isinstance(pattern, TopK | NM | None):
        raise ValueError(f"CrAM.coverage: pattern must be TopK(sparsity=...), NM(n, m) or absent, got {pattern!r}")
    lists, rows = choices(groups, compression), []
    drawn = dict.fromkeys(p for choice in lists for p in choice)
    for one in [pattern] if pattern is not None else drawn or [None]:
        takes = [one in choice for choice in lists] if one in drawn else [group["compression"] is None for group in groups]
        found = _coverage_under(workspace, groups, one, takes, lists, why_dense)
        if emptied := [row.name for row in found if row.emptied]:
            warn(f"CrAM: {one} leaves no weight of {', '.join(emptied)}: exclude it, or rank by tensor (scope='tensor')")
        rows += found
    return CoverageTable(rows)


def _coverage_under(
    workspace: "Workspace",
    groups: Groups,
    pattern: Pattern | None,
    takes: list[bool],
    lists: list[tuple[Pattern, ...]],
    why_dense: "Callable[[Slot, Pattern], str | None]",
) -> list[Coverage]:
    """The coverage under one pattern, of which `takes` says whether a group draws it."""

    def why(slot: "Slot", pattern: Pattern | None) -> str | None:
        if pattern is None or not takes[slot.group]:
            return "its group draws " + (" or ".join(map(str, lists[slot.group])) or "no pattern")
        return why_dense(slot, pattern)

    slots = workspace.follow(groups)
    is_open = workspace.open is not None and workspace.open.perturbed
    if not is_open:
        slots = workspace.renew()
    dense = {s.param: reason for s in slots if (reason := why(s, pattern)) is not None}
    pruned = [s for s in slots if s.param not in dense and s.holds()]
    buckets = workspace.make_buckets((pattern,) * len(groups), pruned, why) if pruned and not is_open else []
    kept = {} if pattern is None else kept_counts(buckets, pattern)
    return [Coverage(s.label, s.param.shape, s.param.numel(), dense.get(s.param), kept.get(s.param), pattern) for s in slots]


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
            thresholds = ops.topk_threshold([s.local for s in bucket.slots], bucket.sets, bucket.k).tolist()
            for slot, own in zip(bucket.slots, bucket.sets, strict=True):
                if own >= 0:
                    keys = slot.local.float().abs().view(torch.int32)
                    found[slot.param] = int((keys > thresholds[own]).sum())
        else:
            found.update({s.param: s.param.numel() * pattern.n // pattern.m for s in bucket.pruned if not s.spread})
    return found
