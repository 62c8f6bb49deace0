"""What reconstruction did to a model: plain data that prints as a table and goes to JSON."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from ..report import table


@dataclass(frozen=True)
class LayerError:
    """One layer. Errors are relative: |y - dense y|^2 over all rows, divided by the same of the mean of dense y."""

    name: str
    before: float | None  # None: left as it was
    after: float | None
    rows: int  # samples, times tokens or pixels
    why_left: str | None


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` did, in the order of execution. `str()` is a table; the rest is plain data."""

    layers: tuple[LayerError, ...]
    samples: int
    memory: int  # bytes of the largest sums that were held at a time

    def to_dict(self) -> dict[str, Any]:
        """Of JSON's types only."""
        return {"samples": self.samples, "memory": self.memory, "layers": [asdict(layer) for layer in self.layers]}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        rows = [(x.name, f"{x.rows:,}", _percent(x.before), _percent(x.after), x.why_left or "") for x in self.layers]
        return table(("layer", "rows", "error before", "after", "why left"), rows, "<>>><")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"
