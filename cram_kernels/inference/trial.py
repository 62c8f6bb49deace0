"""Which kernel of a layer is fastest here, and is it faster than the dense layer? Short trials, side by side."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .modules import SparseLayer, SparseLinear

Run = Callable[[], Tensor]
Input = tuple[tuple[int, ...], tuple[int, ...] | None]  # a shape, and strides where it is not contiguous
FEW_ROWS = 4  # of input, up to which a Linear multiplies row by row
LAST = 2**62  # the largest number of columns of the last entry of a plan


@dataclass(frozen=True)
class Trial:
    """One shape of input: the fastest plan, and its speed.

    Example:
        [trial for layer in sparsify(model.eval(), (images,)).rows for trial in layer.trials]
    """

    input_shape: tuple[int, ...]
    columns: int  # of the matrix of activations: rows of a Linear's input, output positions of a convolution
    tile: int  # columns that are handled together
    speedup: float  # time of the dense layer over time of the sparse one
    bf16_speedup: float | None  # of the dense layer in bfloat16, where this CPU has matrix units for it (AMX)
    strides: tuple[int, ...] | None = None  # of the input; None: contiguous. Others, such as channels_last, are copied first

    def __str__(self) -> str:
        kernel = "one row" if self.tile == 1 else f"tile {self.tile}"
        bf16 = "" if self.bf16_speedup is None else f"; dense bfloat16 (AMX): {self.bf16_speedup:.2f}x"
        strides = "" if self.strides is None else f" with strides {list(self.strides)}"
        return f"{list(self.input_shape)}{strides}: {self.speedup:.2f}x ({kernel}{bf16})"


def rounds_of(runs: list[Run], rounds: int) -> list[list[float]]:
    """Seconds of each run in each round, the first one not counted; each round begins with another run."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for i in [(turn + i) % len(runs) for i in range(len(runs))]:
            begin = time.perf_counter()
            runs[i]()
            times[i].append(time.perf_counter() - begin)
    return [own[1:] for own in times]


def low(times: list[float]) -> float:
    """Their lowest decile: what the machine can do, where other work delays some of the rounds."""
    return sorted(times)[len(times) // 10]


def candidates(layer: SparseLayer, columns: int) -> list[int]:
    """Tiles that may be fastest for so many columns."""
    tiles = [tile for tile in (8, 16, 32, 64, 128) if tile < 2 * columns or tile == 8]
    return ([1] if isinstance(layer, SparseLinear) and columns <= FEW_ROWS else []) + tiles[-4:]


def try_layer(
    dense: nn.Module, sparse: SparseLayer, input_shape: tuple[int, ...], strides: tuple[int, ...] | None = None, rounds: int = 15
) -> Trial:
    """The trial of one input; the sparse layer's plan is left as it was."""
    x = torch.randn(input_shape, dtype=torch.float32)
    if strides is not None:
        x = torch.empty_strided(input_shape, strides, dtype=torch.float32).copy_(x)
    with torch.inference_mode():
        y = dense(x)
        columns = x.numel() // x.shape[-1] if isinstance(sparse, SparseLinear) else y.shape[-1] * y.shape[-2]
        own, before = sparse._buffers, sparse.form

        def run(tile: int) -> Run:
            form = sparse.layout.form([LAST, tile])

            def call() -> Tensor:
                own["form"] = form
                return sparse(x)

            return call

        try:
            tiles = candidates(sparse, columns)
            lows = [low(own) for own in rounds_of([run(tile) for tile in tiles], 5)]
            best = sorted(range(len(tiles)), key=lows.__getitem__)[:2]
            contest = [lambda: dense(x), *(run(tiles[i]) for i in best)]
            if matrix_units():
                half, half_x = copy.deepcopy(dense).bfloat16(), x.bfloat16()
                contest.append(lambda: half(half_x))
            times = rounds_of(contest, rounds)
        finally:
            own["form"] = before
    ratios = [low(times[0]) / low(other) for other in times[1:]]
    winner = max(range(len(best)), key=ratios.__getitem__)
    bf16 = ratios[-1] if matrix_units() else None
    return Trial(tuple(input_shape), columns, tiles[best[winner]], ratios[winner], bf16, strides)


def matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in units of its own (AMX)."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def plan_from(trials: list[Trial]) -> list[int]:
    """The plan of a layer: each entry is good up to the geometric mean of its number of columns and the next one's."""
    by_columns = {trial.columns: trial for trial in trials}
    order = sorted(by_columns)
    plan: list[int] = []
    for columns, following in zip(order, [*order[1:], None], strict=True):
        last = LAST if following is None else max(columns, int((columns * following) ** 0.5))
        if columns == 1 and by_columns[1].tile == 1:
            last = min(last, FEW_ROWS)  # a dot product for each row of the input
        plan += [last, by_columns[columns].tile]
    return plan
