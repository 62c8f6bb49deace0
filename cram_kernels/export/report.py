"""What the checker found: plain data that prints as a table and goes to JSON."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ..patterns import NM
from ..report import table
from .consumers import CONSUMERS, Verdict

MARKS = {"yes": "yes", "seldom": "seldom", "no": "-"}


@dataclass(frozen=True)
class Row:
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    axis: int | None  # of the input channels, in the tensor as it is stored; None: not known, or they lie along several
    violations: int | None  # groups; None: it cannot be n:m, see why_dense
    numel: int
    zeros: int | None  # None: torch cannot count them
    groups: int = 0
    first: str | None = None  # the first group that violates
    holds_along: str | None = None  # where the pattern holds instead
    why_dense: str | None = None
    unchecked: bool = False  # it may be a weight, but could not be checked, see why_dense; not excluded
    verdicts: dict[str, Verdict] = field(default_factory=dict)  # consumer -> can it run this tensor
    aliases: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return self.violations == 0

    @property
    def violates(self) -> bool:
        """It could be n:m, is not, and was not excluded."""
        return bool(self.violations) and self.why_dense is None

    def describe(self) -> str:
        """Of a tensor that violates: count and place."""
        text = f"{self.violations:,} of {self.groups:,} groups, the first {self.first}"
        return text + (f"; it holds along {self.holds_along}" if self.holds_along else "")


@dataclass(frozen=True)
class NMReport:
    """All tensors. `str()` is a table, which sums up in one line what has fewer than 2 dims; the rest is exact data.

    Attributes:
        pattern: what was checked.
        rows: each tensor, with the groups that violate the pattern, or why it stays dense.
        pruned: by `export`: name of a tensor -> how many of its weights it set to zero.

    Example:
        report = check_nm(model)
        print(report)
    """

    pattern: NM
    rows: tuple[Row, ...]
    pruned: dict[str, int] = field(default_factory=dict)

    @property
    def holding(self) -> tuple[Row, ...]:
        """The rows that hold the pattern."""
        return tuple(row for row in self.rows if row.holds)

    @property
    def violating(self) -> tuple[Row, ...]:
        """The rows that could hold the pattern, do not, and were not excluded."""
        return tuple(row for row in self.rows if row.violates)

    @property
    def unchecked(self) -> tuple[Row, ...]:
        """The rows of what may be a weight, and could not be checked."""
        return tuple(row for row in self.rows if row.unchecked)

    @property
    def ok(self) -> bool:
        """No tensor violates the pattern, at least one holds it, and none that may be a weight could not be checked."""
        return not self.violating and not self.unchecked and bool(self.holding)

    def to_dict(self) -> dict[str, Any]:
        """JSON's types only."""
        rows = [asdict(row) | {"shape": list(row.shape), "aliases": list(row.aliases)} for row in self.rows]
        return {"pattern": str(self.pattern), "ok": self.ok, "pruned": self.pruned, "tensors": rows}

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON.

        Args:
            indent: spaces a level, as in `json.dumps`; None: all in one line.

        Example:
            print(check_nm(model).to_json(indent=None))
        """
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        small = [row for row in self.rows if len(row.shape) < 2 and row.dtype and not row.unchecked]
        head = ("tensor", "shape", "dtype", "axis", str(self.pattern), "zeros", *(c.name for c in CONSUMERS), "why")
        cells = [self._cells(row) for row in self.rows if row not in small]
        if small:
            cells.append((f"({len(small)} more)", "", "", "", "dense", "", *("-" for _ in CONSUMERS), "fewer than 2 dims"))
        return "\n".join([table(head, cells, "<<<><>" + "<" * (len(CONSUMERS) + 1)), self.summary()])

    def _cells(self, row: Row) -> tuple[str, ...]:
        status = "yes" if row.holds else "VIOLATED" if row.violates else "UNKNOWN" if row.unchecked else "dense"
        axis = "" if row.axis is None else str(row.axis)
        verdicts = [row.verdicts.get(c.name, Verdict("no")) for c in CONSUMERS]
        why = [row.describe()] if row.violates else [row.why_dense] if row.why_dense else []
        if row.holds:
            reasons = {v.why: [name for name, other in row.verdicts.items() if other.why == v.why] for v in verdicts if v.why}
            why += [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
        shape = " x ".join(map(str, row.shape))
        share = f"{row.zeros / row.numel:.2%}" if row.numel and row.zeros is not None else ""
        return row.name, shape, row.dtype, axis, status, share, *(MARKS[v.runs] for v in verdicts), "; ".join(filter(None, why))

    def summary(self) -> str:
        """The last line of the table: how many tensors hold or violate the pattern."""
        if self.violating:
            return f"{len(self.violating)} of {len(self.rows)} tensors violate {self.pattern}"
        if self.unchecked:
            row = self.unchecked[0]
            return f"{len(self.unchecked)} of {len(self.rows)} tensors could not be checked, the first {row.name!r}: {row.why_dense}"
        if not self.holding:
            return f"no tensor is {self.pattern}"
        return f"{len(self.holding)} of {len(self.rows)} tensors are {self.pattern}, none violates it"
