"""What pruning did to a model: plain data that prints as a table and goes to JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """One parameter; a tied one appears once, under its first name."""

    name: str
    shape: tuple[int, ...]
    pattern: str | None  # None: left dense
    numel: int
    zeros: int  # counted after pruning, in dense parameters too
    why_dense: str | None


@dataclass(frozen=True)
class Report:
    """All parameters of a model. `str()` is a table, which sums up in one line what has fewer than 2 dims; the rest is exact data."""

    layers: tuple[Layer, ...]

    @property
    def pruned(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.pattern is not None)

    @property
    def dense(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.pattern is None)

    def to_dict(self) -> dict[str, Any]:
        """Layers and totals, of JSON's types only."""
        return {
            "layers": [asdict(layer) | {"shape": list(layer.shape)} for layer in self.layers],
            "pruned": _total(self.pruned),
            "all": _total(self.layers),
        }

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        vectors = [layer for layer in self.dense if len(layer.shape) < 2]
        shown = [layer for layer in self.layers if layer not in vectors]
        rows = [_row(layer.name, _shape(layer), layer.pattern or "dense", [layer], layer.why_dense or "") for layer in shown]
        if vectors:
            rows.append(_row(f"({len(vectors)} more)", "", "dense", vectors, "fewer than 2 dims"))
        rows += [_row("pruned layers", "", "", self.pruned), _row("all parameters", "", "", self.layers)]
        return table(("layer", "shape", "pattern", "weights", "zeros", "sparsity", "why dense"), rows, "<<<>>><")


def _total(layers: Sequence[Layer]) -> dict[str, int | float]:
    numel, zeros = sum(layer.numel for layer in layers), sum(layer.zeros for layer in layers)
    return {"layers": len(layers), "numel": numel, "zeros": zeros, "sparsity": zeros / numel if numel else 0.0}


def _shape(layer: Layer) -> str:
    return " x ".join(map(str, layer.shape))


def _row(name: str, shape: str, pattern: str, layers: Sequence[Layer], note: str = "") -> tuple[str, ...]:
    total = _total(layers)
    return name, shape, pattern, f"{total['numel']:,}", f"{total['zeros']:,}", f"{total['sparsity']:.2%}", note


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join("  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)).rstrip() for row in (head, *rows))
