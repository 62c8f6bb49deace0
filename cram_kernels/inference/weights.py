"""A weight with zeros as the kernels of sparse inference read it, and as the bitmask and values that a state dict holds.

The packed form, described in csrc/sparse/matrix.h, is one vector of bytes: values float32 or bfloat16 [steps, 16], columns uint8
[steps, 16], order uint8 [rows * blocks], its inverse alike, steps of each slice uint8 [slices].
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..reference.key import pack_bits, unpack_bits

LANES = 16  # rows of a slice
MAX_BLOCK = 255  # columns of a block: 8 bits, and one more number that stands for no column
# Columns of a block where more than DENSER of the weight is stored: with 64 columns of activations its panel fits in the first-level cache,
# and 127 elements of a single row of input, with a 0 behind them, in half of the registers. Where less is stored larger blocks pay more,
# since each costs the loading and storing of sums.
DENSE_BLOCK, DENSER = 127, 0.15
SECTION = 128  # rows of a section: their sums fit in registers


@dataclass(frozen=True)
class Layout:
    """How a weight is cut: rows and columns of the matrix, columns of a block, rows of a section."""

    rows: int
    columns: int
    block: int
    section: int
    values: torch.dtype = torch.float32

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.block)

    def numbers(self) -> list[int]:
        return [self.rows, self.columns, self.block, self.section, self.values.itemsize]

    def form(self, plan: list[int]) -> Tensor:
        """These numbers, and behind them those of a plan: what the ops take."""
        return torch.tensor([*self.numbers(), *plan])


def best_layout(weight: Tensor, values: torch.dtype = torch.float32) -> Layout:
    """The one that was fastest for weights of such a density."""
    density = weight.count_nonzero().item() / max(1, weight.numel())
    layout = layout_of(tuple(weight.shape), DENSE_BLOCK if density > DENSER else MAX_BLOCK)
    return replace(layout, values=values)


def layout_of(shape: tuple[int, ...], block: int = MAX_BLOCK, section: int = SECTION) -> Layout:
    """Blocks of `block` columns and sections of `section` rows at most, all about as large."""
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    sections = max(1, -(-rows // section))
    return Layout(rows, columns, -(-columns // -(-columns // block)), LANES * -(-rows // (LANES * sections)) or LANES)


@dataclass(frozen=True)
class _Slices:
    """Where the slices lie. Their order is that of storage: section, block, slice."""

    row: Tensor  # [slices, 16]: the row of each lane, -1 where there is none
    block: Tensor  # [slices]
    steps: Tensor  # [slices]

    @property
    def start(self) -> Tensor:
        return self.steps.cumsum(0) - self.steps


def _slices(places: Tensor, steps: Tensor, layout: Layout) -> _Slices:
    rows, blocks, at = [], [], 0
    for first in range(0, layout.rows, layout.section):
        n = min(layout.section, layout.rows - first)
        padded = torch.full((layout.blocks, -(-n // LANES) * LANES), -1)
        padded[:, :n] = first + places[at : at + n * layout.blocks].reshape(layout.blocks, n)
        at += n * layout.blocks
        rows.append(padded.reshape(-1, LANES))
        blocks.append(torch.arange(layout.blocks).repeat_interleave(padded.shape[1] // LANES))
    return _Slices(torch.cat(rows) if rows else steps.new_empty(0, LANES), torch.cat(blocks) if blocks else steps, steps)


def pack(weight: Tensor, layout: Layout) -> Tensor:
    """The elements with any bit set, so that -0 and NaN come back; in bfloat16, if the layout says so, each rounded to its nearest one.

    Raises:
        ValueError: weight is not float32 of 2 or more dims, or a row has no element.
    """
    check_weight(weight)
    matrix = weight.detach().reshape(layout.rows, -1).contiguous().to(layout.values).float()
    padded = torch.nn.functional.pad(matrix.view(torch.int32) != 0, (0, layout.blocks * layout.block - layout.columns))
    counts = padded.reshape(layout.rows, layout.blocks, layout.block).sum(2)
    orders, places, steps = [], [], []
    for first in range(0, layout.rows, layout.section):
        own, order = counts[first : first + layout.section].T.sort(dim=1, descending=True, stable=True)
        orders.append(order.flatten())
        places.append(order.argsort(dim=1).flatten())
        steps.append(own[:, ::LANES].flatten())  # the first of 16 rows has most
    slices = _slices(_joined(orders), _joined(steps), layout)
    total = int(slices.steps.sum())
    values, columns = matrix.new_zeros(total * LANES), torch.full((total * LANES,), layout.block, dtype=torch.uint8)
    # Where the first non-zero of each row and block goes; the others follow at distances of 16.
    starts = torch.empty_like(counts)
    own = slices.row >= 0
    starts[slices.row[own], slices.block[:, None].expand_as(own)[own]] = (slices.start[:, None] * LANES + torch.arange(LANES))[own]
    row, column = padded.nonzero(as_tuple=True)
    run = row * layout.blocks + column // layout.block
    before = counts.flatten().cumsum(0) - counts.flatten()
    to = starts.flatten()[run] + LANES * (torch.arange(len(run)) - before[run])
    values[to] = matrix[row, column]
    columns[to] = (column % layout.block).to(torch.uint8)
    tables = (part.to(torch.uint8) for part in (_joined(orders), _joined(places), slices.steps))
    parts = (values.to(layout.values), columns, *tables)
    return torch.cat([part.view(torch.uint8) for part in parts])


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def stored(name: str, value: object) -> Tensor:
    """An entry of a state dict on the CPU.

    Raises:
        ValueError: it has no plain numbers: it is no tensor, sparse, or on the meta device.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        found = f"{value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a strided tensor with values, got {found}")
    return value.detach().cpu()


def check_weight(weight: Tensor) -> None:
    if weight.dtype != torch.float32 or weight.dim() < 2 or torch.Size(weight.shape[1:]).numel() < 1:
        raise ValueError(f"pack: weight must be float32 of 2 or more dims, got {weight.dtype} of shape {list(weight.shape)}")


def elements(packed: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Of each element that is stored, its place in the flattened weight and its value, in the order and the dtype of the packed form."""
    places = layout.rows * layout.blocks
    sections = [min(layout.section, layout.rows - first) for first in range(0, layout.rows, layout.section)]
    slices_of_all = sum(-(-n // LANES) for n in sections) * layout.blocks
    steps = (packed.numel() - 2 * places - slices_of_all) // ((layout.values.itemsize + 1) * LANES)
    values, column, order, _, of_slice = packed.split(
        (layout.values.itemsize * LANES * steps, LANES * steps, places, places, slices_of_all)
    )
    slices = _slices(order.long(), of_slice.long(), layout)
    slice_of_step = torch.arange(len(slices.steps)).repeat_interleave(slices.steps)
    stored = column.reshape(steps, LANES) != layout.block
    place = slices.row * layout.columns + slices.block[:, None] * layout.block
    at = place[slice_of_step] + column.reshape(steps, LANES).long()
    return at[stored], values.view(layout.values).reshape(steps, LANES)[stored]


def unpack(packed: Tensor, layout: Layout, shape: tuple[int, ...]) -> Tensor:
    """The dense weight, to the bit."""
    at, values = elements(packed, layout)
    weight = torch.zeros(shape, dtype=torch.float32)
    weight.view(-1)[at] = values.float()
    return weight


def to_bitmask(packed: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Values and mask of the file format "bitmask": bit i % 8 of byte i // 8 is 1 where element i of the flattened weight is stored."""
    at, values = elements(packed, layout)
    at, order = at.sort()
    kept = torch.zeros(layout.rows * layout.columns, dtype=torch.bool)
    kept[at] = True
    return values[order], pack_bits(kept)


def from_bitmask(values: Tensor, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The dense weight that is stored as values and mask.

    Raises:
        ValueError: they don't fit each other or the shape.
    """
    numel = torch.Size(shape).numel()
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (-(-numel // 8),):
        raise ValueError(f"bitmask must be uint8 [{-(-numel // 8)}] for a weight {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    kept = unpack_bits(mask, numel)
    if values.dtype not in (torch.float32, torch.bfloat16) or tuple(values.shape) != (int(kept.sum()),):
        wanted = f"float32 or bfloat16 [{int(kept.sum())}], as the bitmask says"
        raise ValueError(f"values must be {wanted}, got {values.dtype} {list(values.shape)}")
    if numel % 8 and int(mask[-1]) >> numel % 8:
        raise ValueError(f"bitmask must have zeros behind its {numel} bits, got others")
    weight = torch.zeros(numel, dtype=torch.float32)
    weight[kept] = values.float()
    return weight.reshape(shape)
