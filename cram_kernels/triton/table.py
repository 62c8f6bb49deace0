"""Lists of tensors as kernels see them: a row of pointers and numbers a tensor, and a list of chunks, both on the device.

One program serves one chunk, so that a pass over any number of tensors is one launch for each `Kind` among them: for models of one dtype
one, and a second one for chunks whose addresses or sizes allow no 16-byte accesses.
"""

import struct
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Action, launch
from .number import STORED
from .tuning import Tuning, tuning

# The columns of a row, int64. Pointers are 0 where the tensor is absent; numbers are the bits of a float64.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
FIRST_GRAD = tl.constexpr(2)
SAVED = tl.constexpr(3)
MASTER = tl.constexpr(4)
STATE = tl.constexpr(5)  # and the two behind it: optimizer state
MASK = tl.constexpr(8)
STEP = tl.constexpr(9)  # Adam's
PLACE = tl.constexpr(10)  # top-k: the selection set; N:M: elements between neighbours along axis 1; norm: chunks of the tensors before
NUMBER = tl.constexpr(11)  # and the four behind it
WIDTH = tl.constexpr(16)
WEIGHTS = range(0, 8)  # columns whose tensors have the parameter's elements


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    dtype: torch.dtype
    master: bool  # with float32 master weights
    aligned: bool  # all addresses are multiples of 16 bytes, all chunks of 8 elements

    @property
    def constants(self) -> dict[str, Any]:
        state = tl.float32 if self.master else STORED[self.dtype]
        return {"T": STORED[self.dtype], "S": state, "MASTERS": self.master, "ALIGNED": self.aligned}

    @property
    def tuning(self) -> Tuning:
        return tuning(torch.float32 if self.master else self.dtype)

    @property
    def options(self) -> dict[str, Any]:
        """Of a launch."""
        return self.constants | self.tuning.options | ({} if self.aligned else self.tuning.roomy)


def bits(values: Sequence[float], n: int) -> list[int]:
    """n float64, of one for all or one a tensor, as the int64 with their bits."""
    return [struct.unpack("<q", struct.pack("<d", x))[0] for x in each(values, n)]


def each(values: Sequence, n: int) -> list:
    """n values, of one for all or one a tensor."""
    return [values[i if len(values) > 1 else 0] for i in range(n)]


def flags(*lists: Sequence[int], n: int) -> list[int]:
    """Bit i of a tensor's number is set where the i-th list is not 0 for it."""
    return [sum((flag != 0) << i for i, flag in enumerate(own)) for own in zip(*(each(values, n) for values in lists), strict=True)]


KEPT = {"upload_rows": 32}  # tables that are remembered, by their build function's name; of others: 256
_constants: dict[Any, OrderedDict[Any, Any]] = {}  # build function -> (device, stream, key) -> device tensors that depend on nothing else
_lock = threading.RLock()  # of it: optimizers may step in several threads
_captured: list[Any] = []  # what a captured graph reads must live as long as the process
ROWS_IN_RESERVE = 32  # tables of rows


def pin(size: int) -> Tensor:
    """uint8 [size] that a GPU can copy from while the CPU goes on."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def send(pinned: Tensor, device: torch.device) -> Tensor:
    return pinned.to(device, non_blocking=True)


class Reserve:
    """Pinned memory for the tables of captured calls: while a stream is captured, allocating some would break the capture."""

    def __init__(self) -> None:
        self.left = torch.empty(0, dtype=torch.uint8)

    def prepare(self, size: int) -> None:
        """Outside of a capture: see to it that half of `size` bytes, the first time all of them, are there."""
        if self.left.numel() * 2 < size:
            self.left = pin(size)

    def take(self, host: Tensor) -> Tensor:
        """A copy of host that lies in the reserve."""
        size = host.numel() * host.element_size()
        whole = -(-size // 16) * 16
        if whole > self.left.numel():
            raise RuntimeError(
                f"a table of {size} bytes must go to the GPU while a stream is captured, and of the pinned memory that was set aside for "
                f"this {self.left.numel()} bytes are left: run the same calls once outside of a capture first, between two captures too"
            )
        own, self.left = self.left[:size].view(host.dtype).view(host.shape), self.left[whole:]
        return own.copy_(host)


_reserve = Reserve()


def constant(build: Callable[..., Any], device: torch.device, *key: Any) -> Any:
    """build(upload, *key), remembered for each stream: `upload` brings an integer tensor to the device without waiting for it.

    Captured calls take what earlier ones on any stream have left (a capture begins when the device has done what came before it); other
    copies become part of the graph.
    """
    if device.type != "cuda":
        return build(lambda host: host, *key)
    with _lock:
        tables = _constants.setdefault(build, OrderedDict())
        if torch.cuda.is_current_stream_capturing():
            value = next((value for where, value in tables.items() if where[0] == device and where[2:] == key), None)
            if value is None:
                value = build(lambda host: _captured_copy(host, device), *key)
            _captured.append(value)
            return value
        where = (device, torch.cuda.current_stream(device).cuda_stream, *key)
        if where not in tables:
            tables[where] = build(lambda host: send(host.pin_memory(), device), *key)
            if len(tables) > KEPT.get(build.__name__, 256):
                tables.popitem(last=False)
        tables.move_to_end(where)
        if build is upload_rows:
            _reserve.prepare(ROWS_IN_RESERVE * len(key[0]))
        return tables[where]


def _captured_copy(host: Tensor, device: torch.device) -> Tensor:
    _captured.append(_reserve.take(host))
    return send(_captured[-1], device)


def upload_rows(upload: Callable[[Tensor], Tensor], numbers: bytes) -> Tensor:
    """numbers: int64, in bytes, which are smaller than a tuple, and quicker to compare."""
    of_none = bytes(8 * WIDTH.value)  # torch takes no empty buffer
    return upload(torch.frombuffer(bytearray(numbers or of_none), dtype=torch.int64).view(-1, WIDTH.value))


def upload_chunks(
    upload: Callable[[Tensor], Tensor],
    sizes: tuple[int, ...],
    members: tuple[int, ...],
    aligned: tuple[bool, ...],
    blocks: tuple[int, ...],
    whole: int,
) -> dict[bool, Tensor]:
    """aligned -> int32 [chunks, 3]: tensor, number of the chunk in it, units. sizes: of all tensors; aligned, blocks: of the members."""
    numels, tensors, block = torch.tensor([sizes[i] for i in members]), torch.tensor(members), torch.tensor(blocks)
    counts = (numels + block - 1) // block
    member = torch.arange(len(members)).repeat_interleave(counts)
    local = torch.arange(len(member)) - (counts.cumsum(0) - counts)[member]
    units = torch.minimum(numels[member] - local * block[member], block[member])
    chunks = torch.stack([tensors[member], local, units], 1).int()
    fit = torch.tensor(aligned)[member] & (units % whole == 0)
    return {own: upload(chunks[fit == own].contiguous()) for own in (True, False) if bool((fit == own).any())}


class Table:
    """The rows of one call.

    Args:
        like: the parameters.
        lists: column -> tensors, absent entries having 0 elements, or an empty list.
        numbers: column -> int64 values, one a tensor.
    """

    def __init__(
        self, like: Sequence[Tensor], lists: Mapping[int, Sequence[Tensor]], numbers: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        self.sizes = tuple(t.numel() for t in like)
        self.dtypes = [t.dtype for t in like]
        self.device = like[0].device if len(like) else torch.device("cpu")
        flat = array("q", bytes(8 * WIDTH.value * len(like)))
        for column, tensors in lists.items():
            for i, t in enumerate(tensors):
                flat[i * WIDTH.value + column] = t.data_ptr() if t.numel() else 0
        for column, values in (numbers or {}).items():
            for i, value in enumerate(values):
                flat[i * WIDTH.value + column] = value
        self.flat = flat
        self.rows: Tensor = constant(upload_rows, self.device, flat.tobytes())

    def __getitem__(self, place: tuple[int, tl.constexpr]) -> int:
        tensor, column = place
        return self.flat[tensor * WIDTH.value + column.value]

    def _aligned(self, i: int) -> bool:
        return all(self.flat[i * WIDTH.value + column] % 16 == 0 for column in WEIGHTS)

    def chunks(
        self,
        among: Callable[[int], bool] = lambda i: True,
        sizes: tuple[int, ...] | None = None,
        block: Callable[[Kind, int], int] = lambda kind, i: kind.tuning.block,
        whole: int = 8,
    ) -> Iterator[tuple[Kind, Tensor]]:
        """A kind and its chunks, int32 [chunks, 3], for each launch of a pass.

        Args:
            among: the tensors to serve.
            sizes: of the tensors, where they are not counted in elements.
            block: units of `sizes` a program, for a tensor.
            whole: an aligned chunk has a multiple of so many units.
        """
        sizes = self.sizes if sizes is None else sizes
        groups: dict[tuple[torch.dtype, bool], list[int]] = {}
        for i, size in enumerate(sizes):
            if size > 0 and among(i):
                groups.setdefault((self.dtypes[i], self[i, MASTER] != 0), []).append(i)
        for (dtype, master), members in groups.items():
            aligned = tuple(map(self._aligned, members))
            blocks = tuple(block(Kind(dtype, master, True), i) for i in members)
            chunks = constant(upload_chunks, self.device, sizes, tuple(members), aligned, blocks, whole)
            for own, table in chunks.items():
                yield Kind(dtype, master, own), table

    def launches(self, kernel: Any, *args: Any, among: Callable[[int], bool] = lambda i: True, **constants: Any) -> list[Action]:
        """A pass over all elements of the tensors in `among`."""
        return [launch(kernel, len(chunks), self.rows, chunks, *args, **constants, **kind.options) for kind, chunks in self.chunks(among)]


@triton.jit
def chunk_of(rows, chunks, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr = 8):
    """`chunk_at` of this program."""
    return chunk_at(rows, chunks, tl.program_id(0).to(tl.int64), BLOCK, ALIGNED, WHOLE)


@triton.jit
def chunk_at(rows, chunks, index, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr = 8):
    """Of a chunk: tensor int64, its row, the first element (or other unit) int64, elements int32 (ALIGNED: a multiple of WHOLE)."""
    chunk = chunks + index * 3
    tensor = tl.load(chunk).to(tl.int64)
    size = tl.load(chunk + 2)
    if ALIGNED:
        size = tl.multiple_of(size, WHOLE)
    return tensor, rows + tensor * WIDTH, tl.load(chunk + 1).to(tl.int64) * BLOCK, size


@triton.jit
def group_of(rows, chunks, number, GROUP: tl.constexpr):
    """The GROUP chunks of this program, of `number` in all: which they are int64, which of them there are, their rows and PLACE."""
    chunk = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    there = chunk < number
    row = rows + tl.load(chunks + chunk * 3, mask=there, other=0).to(tl.int64) * WIDTH
    return chunk, there, row, tl.load(row + PLACE, mask=there, other=0)


@triton.jit
def elements_of(size, BLOCK: tl.constexpr):
    """The chunk as [BLOCK / 8, 8], a row a mask byte: places int32, and which of them there are."""
    i = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    return i, i < size


@triton.jit
def only(valid, there):
    """valid, a tensor, where `there`, a scalar (whose own broadcast the interpreter takes for integers)."""
    return valid & (tl.broadcast_to(there.to(tl.int32), valid.shape) != 0)


@triton.jit
def pointer(address, start, T: tl.constexpr, ALIGNED: tl.constexpr):
    """To element `start` behind an address; ALIGNED: a multiple of 16 bytes, which the compiler cannot know of a stored pointer."""
    p = address.to(tl.pointer_type(T)) + start
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def column(row, COLUMN: tl.constexpr, start, T: tl.constexpr, ALIGNED: tl.constexpr):
    return pointer(tl.load(row + COLUMN), start, T, ALIGNED)


@triton.jit
def number(row, COLUMN: tl.constexpr):
    """A float64 of the row."""
    return tl.load(row + COLUMN).to(tl.float64, bitcast=True)


@triton.jit
def load_bits(row, start, size, BLOCK: tl.constexpr):
    """The mask bits of a chunk, bool [BLOCK / 8, 8]; all 1 where there is no mask."""
    byte = tl.arange(0, BLOCK // 8)
    there = tl.load(row + MASK) != 0
    bytes = tl.load(column(row, MASK, start // 8, tl.uint8, False) + byte, mask=only(byte * 8 < size, there), other=255)
    return ((bytes.to(tl.int32)[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def store_bits(row, start, size, keep, BLOCK: tl.constexpr):
    """keep bool [BLOCK / 8, 8], False beyond the chunk, into the mask, where there is one."""
    store_bytes(row, start, size, tl.sum(keep.to(tl.int32) << tl.arange(0, 8)[None, :], 1), BLOCK)


@triton.jit
def store_bytes(row, start, size, bytes, BLOCK: tl.constexpr):
    """The lowest 8 bits of bytes int32 [BLOCK / 8]."""
    byte = tl.arange(0, BLOCK // 8)
    there = tl.load(row + MASK) != 0
    tl.store(column(row, MASK, start // 8, tl.uint8, False) + byte, bytes.to(tl.uint8), mask=only(byte * 8 < size, there))
