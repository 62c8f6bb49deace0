"""What pruning did to a model: plain data that prints as a table and goes to JSON."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """One parameter; a tied one appears once, under its first name."""

    name: str
    shape: tuple[int, ...] | None  # None: of a lazy module that is not initialised, or a nested tensor
    pattern: str | None  # None: left dense
    numel: int
    zeros: int | None  # counted after pruning, in dense parameters too; None: torch cannot count them (no data, float8, sparse, ...)
    why_dense: str | None

    @property
    def emptied(self) -> bool:
        """Whether it was pruned and has only zeros left."""
        return self.pattern is not None and self.zeros == self.numel > 0


@dataclass(frozen=True)
class Report:
    """What `prune` did to each parameter of a model, as exact data; `str()` is a table.

    Attributes:
        layers: every parameter: name, shape, the pattern or why it stayed dense, how many elements, how many of them are zero.
        remarks: what `prune` warned about, in sentences.
        pruned, dense, emptied: the layers that were pruned, that stayed dense, and that were pruned and have only zeros (in `remarks` are
            those that had others before).

    Example:
        >>> report = prune(model, NM(2, 4))
        >>> [layer.name for layer in report.emptied]
        []
        >>> json.loads(report.to_json())["all"]["sparsity"]
        0.4954
    """

    layers: tuple[Layer, ...]
    remarks: tuple[str, ...] = ()

    @property
    def pruned(self) -> tuple[Layer, ...]:
        """The layers that were pruned."""
        return tuple(layer for layer in self.layers if layer.pattern is not None)

    @property
    def dense(self) -> tuple[Layer, ...]:
        """The layers that stayed dense; `why_dense` of each is the reason."""
        return tuple(layer for layer in self.layers if layer.pattern is None)

    @property
    def emptied(self) -> tuple[Layer, ...]:
        """The layers that were pruned and have only zeros."""
        return tuple(layer for layer in self.layers if layer.emptied)

    def to_dict(self) -> dict[str, Any]:
        """Layers, totals (of zeros that could be counted), the names of emptied layers and the remarks, of JSON's types only."""
        return {
            "layers": [asdict(layer) | {"shape": None if layer.shape is None else list(layer.shape)} for layer in self.layers],
            "pruned": _total(self.pruned),
            "all": _total(self.layers),
            "emptied": [layer.name for layer in self.emptied],
            "remarks": list(self.remarks),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON.

        Args:
            indent: spaces a level, as in `json.dumps`; None: all in one line.

        Example:
            print(prune(model, NM(2, 4)).to_json(indent=None))
        """
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        """A table, which sums up in one line what is dense for having fewer than 2 dims, with the remarks below."""
        vectors = [layer for layer in self.dense if layer.shape is not None and len(layer.shape) < 2 and layer.zeros is not None]
        rows = [
            _row(
                layer.name,
                _shape(layer),
                f"{layer.pattern or 'dense'}{' (emptied)' if layer.emptied else ''}",
                [layer],
                layer.why_dense or "",
            )
            for layer in self.layers
            if layer not in vectors
        ]
        if vectors:
            rows.append(_row(f"({len(vectors)} more)", "", "dense", vectors, "fewer than 2 dims"))
        rows += [_row("pruned layers", "", "", self.pruned), _row("all parameters", "", "", self.layers)]
        return "\n".join(
            [table(("layer", "shape", "pattern", "weights", "zeros", "sparsity", "why dense"), rows, "<<<>>><"), *self.remarks]
        )


def _total(layers: Sequence[Layer]) -> dict[str, int | float]:
    """The sparsity is that of the parameters whose zeros are known."""
    known = [layer for layer in layers if layer.zeros is not None]
    numel, zeros = sum(layer.numel for layer in known), sum(layer.zeros or 0 for layer in known)
    return {
        "layers": len(layers),
        "numel": sum(layer.numel for layer in layers),
        "zeros": zeros,
        "sparsity": zeros / numel if numel else 0.0,
    }


def _shape(layer: Layer) -> str:
    return "unknown" if layer.shape is None else " x ".join(map(str, layer.shape))


def _row(name: str, shape: str, pattern: str, layers: Sequence[Layer], note: str = "") -> tuple[str, ...]:
    total, unknown = _total(layers), sum(layer.zeros is None for layer in layers)
    if unknown and len(layers) == unknown:
        return name, shape, pattern, f"{total['numel']:,}", "unknown", "unknown", note
    note = f"{note}, zeros of {unknown} unknown".lstrip(", ") if unknown else note
    return name, shape, pattern, f"{total['numel']:,}", f"{total['zeros']:,}", f"{total['sparsity']:.2%}", note


_WIDTH: ContextVar[int | None] = ContextVar("width of a table", default=None)


@contextmanager
def table_width(columns: int | None) -> Iterator[None]:
    """Tables that are made within the block fit so many columns; None: they are as wide as their cells need."""
    token = _WIDTH.set(columns)
    try:
        yield
    finally:
        _WIDTH.reset(token)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Rows below their head; where that is wider than `table_width` allows, a paragraph a row that names its cells."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)).rstrip() for row in (head, *rows)]
    limit = _WIDTH.get()
    if limit is None or max(map(len, lines)) <= limit:
        return "\n".join(lines)
    paragraphs = []
    for first, *others in rows:
        named = [f"{name} {cell}".strip() for name, cell in zip(head[1:], others, strict=True) if cell not in ("", "-")]
        paragraphs += textwrap.wrap(first, limit) + textwrap.wrap("; ".join(named), limit, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(paragraphs)
