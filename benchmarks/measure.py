"""Times contestants side by side, copies of as many bytes among them: in every round each of them runs once."""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from cram_kernels import _native

from .shapes import BILLION, MODELS, Shape, billion, shrink

Row = dict[str, Any]
PUBLISHED_ROUNDS = 3  # on large models: it takes longer than all others together, and nothing of ours is judged by it
ROUNDS = 7  # at least, of a case of `make bench`: two runs of so many can be told apart in up to 85 comparisons (compare.py)


@dataclass(frozen=True)
class Setup:
    """What was asked for on the command line."""

    backend: str = "cpu"
    quick: bool = False
    rounds: int | None = None  # None: as many as the contest wants, two with `quick`

    def how_often(self, wanted: int) -> int:
        return self.rounds or (2 if self.quick else wanted)

    @property
    def device(self) -> str:
        return "cpu" if self.backend == "cpu" else "cuda"

    def shapes(self, model: str) -> list[Shape]:
        """Of a model by name; `quick`: every seventh tensor of the shrunk model."""
        shapes = billion(self.device) if model == BILLION else MODELS[model]()
        return shrink(shapes)[::7] if self.quick else shapes


@dataclass
class Contestant:
    """Something that is timed. `bound`: the issue's target, the lowest and highest time over ours that it may take, per byte."""

    name: str
    run: Callable[[], Any]
    reset: Callable[[], Any] = lambda: None  # before every run, not timed
    bound: tuple[float, float] = (0.0, math.inf)
    bytes: int | None = None  # where it moves others than the contest
    facts: Callable[[], Row] = dict  # more columns, asked for after the last round
    ours: bool = False  # code of this repository: what `compare` judges
    rounds: int | None = None  # a peer that takes longer than all others may stop after so many
    busy: int = 10**6  # on a GPU: clock cycles that it waits before the run, grown by `seconds` until the host is ahead of it


@dataclass
class Contest:
    """Contestants that do the same work, ours first, on as many bytes as the work has to move at least."""

    contestants: list[Contestant]
    bytes: int
    formula: str  # of the bytes
    weights: int
    device: str = "cpu"
    checks: list[Callable[[], None]] = field(default_factory=list)  # each raises where something is not right
    copy_bound: float = 0.0  # a copy takes at least this share of our time
    rounds: int = 15

    def check(self) -> None:
        """Raises AssertionError where a result is wrong: then nothing is timed."""
        for check in self.checks:
            check()

    def rows(self, setup: Setup) -> list[Row]:
        """One row a contestant; times in ms, ratios are medians of the ratios within each round."""
        copies = copy_contestants(self.copied, self.device)
        contestants = [*self.contestants, *copies]
        times = interleave(contestants, setup.how_often(self.rounds), self.device)
        fastest = min(copies, key=lambda c: statistics.median(times[c.name]))
        fastest.bound = (self.copy_bound, math.inf)
        return [self._row(c, times, fastest.name) for c in contestants]

    def _row(self, c: Contestant, times: dict[str, list[float]], copy: str) -> Row:
        own, moved = times[c.name], c.bytes or self.bytes
        x_ours = ratio(own, times[self.contestants[0].name]) * self.bytes / moved
        x_copy = ratio(own, times[copy]) * self.copied / moved
        return {
            **timing(c.name, own),
            "ours": c.ours,
            "gb_per_s": moved / statistics.median(own) / 1e9,
            "x_copy": x_copy,
            "share_of_copy": 1 / x_copy,
            "x_ours": x_ours,
            **target(c.bound, x_ours),
            **({"host": "waits"} if c.busy >= MOST_BUSY else {}),
            **c.facts(),
            "rounds_ms": [float(f"{1e3 * t:.6g}") for t in own],
        }

    @property
    def copied(self) -> int:
        """Bytes that the copies move: large ones would need more memory than the op, and are no faster."""
        return min(self.bytes, MOST_COPIED)

    def describe(self) -> Row:
        return {"weights": self.weights, "bytes": self.bytes, "bytes_per_weight": self.bytes / self.weights, "formula": self.formula}


def target(bound: tuple[float, float], value: float) -> Row:
    """The target of a row and whether it is met; nothing where there is none."""
    low, high = bound
    if low == 0 and high == math.inf:
        return {}
    return {"target": f">= {low:.3g}" if low else f"<= {high:.3g}", "met": low <= value <= high}


def ratio(times: list[float], others: list[float]) -> float:
    """Median of the ratios within each round: a machine that slows down for a while slows both."""
    return statistics.median(a / b for a, b in zip(times, others, strict=False))  # a peer may stop earlier


def timing(name: str, times: list[float]) -> Row:
    """The row of a name and its times. spread: between the quartiles, as a share of the median."""
    first, _, third = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
    median = statistics.median(times)
    return {"name": name, "median_ms": 1e3 * median, "spread": (third - first) / median, "min_ms": 1e3 * min(times)}


def interleave(contestants: list[Contestant], rounds: int, device: str, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each contestant in each round. Each round begins with another one, so that nobody always follows the same."""
    times: dict[str, list[float]] = {c.name: [] for c in contestants}
    gc.collect()
    gc.disable()
    try:
        for turn in range(warmup + rounds):
            start = turn % len(contestants)
            for c in contestants[start:] + contestants[:start]:
                if c.rounds is not None and turn >= warmup + c.rounds:
                    continue
                c.reset()
                times[c.name].append(seconds(c, device))
    finally:
        gc.enable()
    return {name: own[warmup:] for name, own in times.items()}


MOST_BUSY = 2**28  # clock cycles: about a seventh of a second


def seconds(c: Contestant, device: str) -> float:
    """One run. On a GPU the time between two events, with an L2 that holds nothing of the tensors.

    The host must not be part of it. So the GPU is kept busy until the whole run is queued: where it came to the first event before that,
    the run is reset and timed again behind twice the wait. A contestant that waits for the GPU itself (reads a number back) reaches the
    longest wait; its time holds the host's share, and its row says so.
    """
    if device == "cpu":
        begin = time.perf_counter()
        c.run()
        return time.perf_counter() - begin
    while True:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device).zero_()
        torch.cuda._sleep(c.busy)
        first.record()
        c.run()
        last.record()
        drained = first.query()
        torch.cuda.synchronize()
        if not drained or c.busy >= MOST_BUSY:
            return first.elapsed_time(last) / 1e3
        c.busy *= 2
        c.reset()


MOST_COPIED = 2**30
COPY_BUFFERS = 3  # where memory lies decides a third of a copy's time: the copies take turns on several


def copy_contestants(moved: int, device: str) -> list[Contestant]:
    """Copies that move `moved` bytes: half of them read, half of them written."""
    sources = [torch.ones(max(1, moved // 8), device=device) for _ in range(COPY_BUFFERS)]
    pairs = [(source, torch.ones_like(source)) for source in sources]
    turns = {name: itertools.cycle(pairs) for name in ("copy_", "streaming copy")}

    def copy() -> None:
        source, target = next(turns["copy_"])
        target.copy_(source)

    def streaming_copy() -> None:
        source, target = next(turns["streaming copy"])
        _native.host.streaming_copy(target.data_ptr(), source.data_ptr(), source.nbytes, torch.get_num_threads())

    copies = [Contestant("copy_", copy, bytes=moved)]
    if device == "cpu":
        copies.append(Contestant("streaming copy", streaming_copy, bytes=moved))
    return copies
