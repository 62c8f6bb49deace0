"""The inputs: what to run (`Case`: values x layout x dtype, by name) and how to make it (`Case.tensors`)."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import torch
from compare import INTEGERS, LINE
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Spec(NamedTuple):
    """Where one tensor lies."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    order: tuple[int, ...] = ()  # dims from outermost to innermost in memory; (): contiguous
    offset: int = 0  # elements behind the start of a cache line

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def strides(self) -> tuple[int, ...]:
        strides, step = [0] * len(self.shape), 1
        for dim in reversed(self.order or range(len(self.shape))):
            strides[dim] = step
            step *= max(1, self.shape[dim])
        return tuple(strides)

    def place(self, values: Tensor, shift: int = 0) -> Tensor:
        """values [numel], laid in memory as this spec says, `shift` elements further on."""
        start = LINE // values.element_size() + self.offset + shift
        buffer = values.new_zeros(start + self.numel)
        buffer[start:] = values
        return buffer.as_strided(self.shape, self.strides, start)


def random_bits(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bit pattern of the dtype: every kind of number, denormals, Inf, NaN of every payload."""
    integer = INTEGERS[torch.tensor([], dtype=dtype).element_size()]
    info = torch.iinfo(integer)
    return torch.randint(info.min, info.max + 1, (n,), dtype=integer, generator=generator).view(dtype)


def choice(values: list[float], n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (n,), generator=g)]


def sparse_mix(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Normal numbers; one in four is Inf, -Inf or a NaN of some payload and sign."""
    special = choice([float("inf"), -float("inf"), float("nan"), -float("nan")], n, dtype, g)
    payload = torch.where(special.isnan(), random_nan(n, dtype, g), special)
    return torch.where(torch.rand(n, generator=g) < 0.25, payload, torch.randn(n, generator=g).to(dtype))


def random_nan(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    x = random_bits(n, dtype, g)
    nan = torch.tensor([float("inf"), -float("inf")], dtype=dtype).view(INTEGERS[x.element_size()])
    mantissa = x.view(nan.dtype) & ~nan[1]
    return (nan[torch.randint(2, (n,), generator=g)] | mantissa.where(mantissa != 0, 1)).view(dtype)


def denormal(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Between the smallest number and twice the smallest normal one, both signs, zeros too."""
    smallest = torch.finfo(dtype).smallest_normal
    return ((torch.rand(n, generator=g, dtype=torch.float64) * 4 - 2) * smallest).to(dtype)


def wide_range(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Every exponent that the dtype has, equally often."""
    low, high = {torch.float16: (-24, 16)}.get(dtype, (-140, 128))
    exponents = torch.rand(n, generator=g, dtype=torch.float64) * (high - low) + low
    return (torch.exp2(exponents) * choice([-1, 1], n, torch.float64, g)).to(dtype)


def rows(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Rows of 48 numbers, each row at a scale of its own, as in an embedding."""
    scales = torch.exp(2 * torch.randn(-(-n // 48), generator=g)).repeat_interleave(48)[:n]
    return (scales * torch.randn(n, generator=g)).to(dtype)


def narrow(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Nine in ten within a few thousand steps of the dtype above 1/2: more candidates than any bracket expects."""
    close = 0.5 + torch.rand(n, generator=g, dtype=torch.float64) * torch.finfo(dtype).eps * 512
    return torch.where(torch.rand(n, generator=g) < 0.9, close, torch.randn(n, generator=g)).to(dtype)


VALUES: dict[str, Callable[[int, torch.dtype, torch.Generator], Tensor]] = {
    "normal": lambda n, dtype, g: torch.randn(n, generator=g).to(dtype),
    "ties": lambda n, dtype, g: (torch.randint(-3, 4, (n,), generator=g) / 4).to(dtype),
    "equal": lambda n, dtype, g: torch.full((n,), 0.5, dtype=dtype),
    "two": lambda n, dtype, g: choice([0.25, -0.5], n, dtype, g),
    "zeros": lambda n, dtype, g: choice([0.0, -0.0], n, dtype, g),
    "denormal": denormal,
    "nonfinite": sparse_mix,
    "nan": random_nan,
    "range": wide_range,
    "sorted": lambda n, dtype, g: torch.randn(n, generator=g).sort().values.to(dtype),
    "reversed": lambda n, dtype, g: torch.randn(n, generator=g).abs().sort(descending=True).values.to(dtype),
    "rows": rows,
    "narrow": narrow,
    "bits": random_bits,
}


def mixed(specs: list[Spec]) -> list[Spec]:
    """fp32, bf16 and fp16 in turn."""
    return [spec._replace(dtype=list(DTYPES.values())[i % 3]) for i, spec in enumerate(specs)]


SHAPES = [Spec(shape) for shape in [(), (1,), (7,), (3, 5), (0,), (8, 8), (65,), (4, 0), (2, 3, 4), (33, 31), (1, 128), (257,)]]
ORDERS = [
    Spec((8, 6, 3, 3), order=(0, 2, 3, 1)),  # channels_last
    Spec((2, 5, 2, 3, 3), order=(0, 2, 3, 4, 1)),  # channels_last_3d
    Spec((24, 17), order=(1, 0)),  # transposed
    Spec((5, 6, 7), order=(2, 0, 1)),
    Spec((16, 8, 1, 1), order=(0, 2, 3, 1)),
    Spec((1, 9, 4), order=(2, 1, 0)),
]
LAYOUTS: dict[str, list[Spec]] = {
    "shapes": SHAPES,
    "orders": ORDERS,
    "one": [Spec((1,))],
    "none": [],
    "empty": [Spec((0,)), Spec((3, 0, 2))],
    "offsets": [Spec((67,), offset=i) for i in range(32)],  # every place of a 16-bit number within a cache line
    "scales": [Spec((5, 3)), Spec((3000,)), Spec((1,)), Spec((130, 70)), Spec((2,))],
    "many": [Spec((1 + 7 * i % 23,)) for i in range(5000)],
    "large": [Spec((1100, 1000)), Spec((3, 3)), Spec((300_001,)), Spec((64, 32, 3, 3), order=(0, 2, 3, 1)), Spec((700, 801), offset=3)],
    "rows": [Spec((30_000, 48))],
    "uneven": [Spec((11,)), Spec((1_100_000,), offset=1), Spec((7, 1))],  # one tensor 10^5 times larger than the others
    "pieces": [Spec((10_007 + i,), offset=i % 16) for i in range(150)],
}
SHORTER = {  # where kernels are interpreted or executed by software; Triton's top-k samples sets of more than 16384
    "many": LAYOUTS["many"][:200],
    "large": [Spec((300, 200)), Spec((3, 3)), Spec((70_001,)), Spec((64, 32, 3, 3), order=(0, 2, 3, 1)), Spec((100, 401), offset=3)],
    "rows": [Spec((3000, 48))],
    "uneven": [Spec((11,)), Spec((110_000,), offset=1), Spec((7, 1))],
    "pieces": LAYOUTS["pieces"][:20],
}


class Case(NamedTuple):
    """One input by name."""

    values: str
    layout: str
    dtype: str  # a key of DTYPES, or "mixed"

    def __str__(self) -> str:
        return "-".join(self)

    @property
    def specs(self) -> list[Spec]:
        specs = LAYOUTS[self.layout]
        return mixed(specs) if self.dtype == "mixed" else [spec._replace(dtype=DTYPES[self.dtype]) for spec in specs]

    def tensors(self, role: str) -> list[Tensor]:
        """One tensor a spec; other numbers and other alignments for each role (params, grads, ...)."""
        return fill(self.specs, self.values, role)


def fill(specs: list[Spec], values: str, role: str) -> list[Tensor]:
    seed = zlib.crc32(role.encode())
    generator = torch.Generator().manual_seed(seed)
    return [spec.place(VALUES[values](spec.numel, spec.dtype, generator), shift=seed % 5) for spec in specs]


SMALL = [
    *(Case(values, "shapes", "mixed") for values in VALUES),
    *(Case(values, "orders", "mixed") for values in ("normal", "ties", "bits")),
    *(Case(values, "scales", dtype) for values, dtype in zip(("normal", "bits", "denormal"), DTYPES, strict=True)),
    *(Case("bits", "offsets", dtype) for dtype in DTYPES),
    *(Case("normal", layout, "fp32") for layout in ("one", "none", "empty")),
]
MANY = Case("normal", "many", "mixed")
LARGE = [  # big enough that a backend samples, brackets and looks at candidates
    Case("normal", "large", "fp32"),
    Case("normal", "large", "mixed"),
    Case("range", "large", "bf16"),
    Case("nonfinite", "large", "fp16"),
    Case("rows", "rows", "fp32"),
    Case("normal", "uneven", "fp32"),
    Case("sorted", "uneven", "fp32"),
    Case("reversed", "uneven", "bf16"),
    Case("bits", "pieces", "mixed"),
]
HOSTILE = [  # big, and no bracket around the threshold is narrow: a backend must fall back
    Case("equal", "uneven", "fp32"),
    Case("two", "uneven", "bf16"),
    Case("zeros", "uneven", "fp16"),
    Case("ties", "large", "mixed"),
    Case("narrow", "large", "fp32"),
    Case("nan", "uneven", "fp32"),
]


class Drawn(NamedTuple):
    """One input drawn by hypothesis; used like a Case."""

    values: str
    specs: list[Spec]

    def tensors(self, role: str) -> list[Tensor]:
        return fill(self.specs, self.values, role)


@st.composite
def drawn_specs(draw: st.DrawFn, min_dims: int = 0, unit: int = 1) -> Spec:
    """Any small tensor; axis 1 is a multiple of unit."""
    shape = draw(st.lists(st.integers(0, 9), min_size=min_dims, max_size=4))
    if len(shape) > 1:
        shape[1] *= unit
    order = tuple(draw(st.permutations(range(len(shape)))))
    return Spec(tuple(shape), draw(st.sampled_from(list(DTYPES.values()))), order, draw(st.integers(0, 31)))


def drawn_cases(min_dims: int = 0, unit: int = 1) -> st.SearchStrategy[Drawn]:
    return st.builds(Drawn, st.sampled_from(list(VALUES)), st.lists(drawn_specs(min_dims, unit), max_size=6))


# the same examples in every run; the backend fixture stays as it is from one example to the next
SEARCH = hypothesis.settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
