"""Which pattern and which rho a step takes. They follow from plain numbers in the parameter groups: every checkpoint format keeps those,
and all ranks agree."""

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .patterns import NM, Pattern, TopK

COUNTERS = ("cram_seed", "cram_step", "cram_mask_uses")  # the same in every group
Groups = list[dict[str, Any]]
Compression = tuple[Pattern, ...] | Callable[[int], Sequence[Pattern]]


@dataclass(frozen=True)
class SparsityWarmup:
    """`compression=` whose sparsities grow from `start` to those of the patterns, by the schedule of Zhu and Gupta (arXiv 1710.01878):

        s(step) = s + (start - s) * (1 - (step - begin) / steps) ** power        for begin <= step <= begin + steps

    Args:
        patterns: what the warm-up ends with. `TopK` patterns are scaled; an `NM` pattern has no sparsity to scale and stays as it is.
        steps: length of the warm-up in optimizer steps, >= 1.
        begin: the first step of the warm-up; `start` holds before it.
        start: the sparsity to start from, in [0, 1), at most that of each pattern.
        power: 3 is the cubic schedule of the paper and of `torch.ao.pruning.CubicSL`, 1 a straight line.

    Raises:
        ValueError: an argument out of its range.

    Example:
        CrAM(model, torch.optim.AdamW, compression=SparsityWarmup([TopK(sparsity=0.5), TopK(sparsity=0.9)], steps=1000), lr=1e-3)
    """

    patterns: Sequence[Pattern]
    steps: int
    begin: int = 0
    start: float = 0.0
    power: float = 3.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", checked_patterns("SparsityWarmup: patterns", self.patterns))
        _check_warmup(type(self).__name__, self.steps, self.begin)
        if not is_number(self.start) or not 0 <= self.start < 1:
            raise ValueError(f"SparsityWarmup: start must be a number in [0, 1), got {self.start!r}")
        if above := [p for p in self.patterns if isinstance(p, TopK) and p.sparsity < self.start]:
            raise ValueError(f"SparsityWarmup: start must be at most the sparsity of each pattern, got {self.start!r} above {above[0]!r}")
        if not is_number(self.power) or not self.power > 0:
            raise ValueError(f"SparsityWarmup: power must be a number > 0, got {self.power!r}")

    def __call__(self, step: int) -> tuple[Pattern, ...]:
        left = (1 - _progress(step, self.begin, self.steps)) ** self.power
        if left == 0:
            return tuple(self.patterns)
        return tuple(
            replace(p, sparsity=p.sparsity + (self.start - p.sparsity) * left) if isinstance(p, TopK) else p for p in self.patterns
        )


@dataclass(frozen=True)
class RhoWarmup:
    """`rho=` that grows on a straight line from `start` to `rho` between the steps `begin` and `begin + steps`.

    Args:
        rho: the value at the end, >= 0.
        steps: how many optimizer steps the growth takes, at least 1.
        begin: the step at which it begins, at least 0.
        start: the value until then, >= 0.

    Raises:
        ValueError: an argument out of its range.

    Example:
        CrAM(model, torch.optim.SGD, rho=RhoWarmup(0.05, steps=500), lr=0.1, momentum=0.9)
    """

    rho: float
    steps: int
    begin: int = 0
    start: float = 0.0

    def __post_init__(self) -> None:
        _check_warmup(type(self).__name__, self.steps, self.begin)
        for name in ("rho", "start"):
            if not is_number(value := getattr(self, name)) or not value >= 0:
                raise ValueError(f"RhoWarmup: {name} must be a number >= 0, got {value!r}")

    def __call__(self, step: int) -> float:
        done = _progress(step, self.begin, self.steps)
        return self.rho if done == 1 else self.start + (self.rho - self.start) * done


def _check_warmup(name: str, steps: Any, begin: Any) -> None:
    if type(steps) is not int or steps < 1:
        raise ValueError(f"{name}: steps must be an int of at least 1, got {steps!r}")
    if type(begin) is not int or begin < 0:
        raise ValueError(f"{name}: begin must be an int of at least 0, got {begin!r}")


def _progress(step: int, begin: int, steps: int) -> float:
    return min(1.0, max(0.0, (step - begin) / steps))


def is_number(value: Any) -> bool:
    """Whether it is a finite int or float, Python's or numpy's; a bool is not."""
    return hasattr(value, "__float__") and not isinstance(value, bool | Tensor | str) and math.isfinite(value)


def is_function(value: Any) -> bool:
    """A schedule, a closure, a factory: whether it can be called. Not a class that somebody forgot to call, nor a model."""
    return callable(value) and not isinstance(value, type | nn.Module)


def checked_patterns(where: str, value: Any) -> tuple[Pattern, ...]:
    """`value`, one pattern or several, as a tuple; ValueError where it is something else."""
    if isinstance(value, TopK | NM):
        return (value,)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} must be a list of patterns such as TopK(sparsity=0.9) or NM(2, 4), got {value!r}")
    if wrong := [p for p in value if not isinstance(p, TopK | NM)]:
        raise ValueError(f"{where} must be patterns such as TopK(sparsity=0.9) or NM(2, 4), got {wrong[0]!r}")
    return tuple(value)


def checked_compression(value: Any) -> Compression:
    """The `compression` option in its stored form: a tuple of patterns, or a callable that gives the patterns of a step."""
    if value is None:
        return ()
    return value if is_function(value) else checked_patterns("CrAM: compression", value)


def patterns_of(compression: Compression, step: int) -> tuple[Pattern, ...]:
    """The patterns among which the step draws."""
    return checked_patterns("CrAM: what compression(step) returns", compression(step)) if callable(compression) else compression


def choices(groups: Groups, default: Compression) -> list[tuple[Pattern, ...]]:
    """The patterns among which each group draws in its next step: those of its own `compression`, or else of the optimizer's."""
    own = [group["compression"] for group in groups]
    given = [default if c is None else c for c in own]
    stored = [c if type(c) is tuple else checked_compression(c) for c in given]  # a script may have put a list there
    return [patterns_of(c, group["cram_step"]) for c, group in zip(stored, groups, strict=True)]


def rho_of(group: dict[str, Any]) -> float | Tensor:
    """The rho of the group's next step; a schedule is asked for it."""
    rho = group["rho"]
    if not callable(rho):
        return rho
    value = rho(group["cram_step"])
    if value.numel() != 1 if isinstance(value, Tensor) else not (is_number(value) and value >= 0):
        raise ValueError(f"CrAM: what rho(step) returns must be a number >= 0, got {value!r} at step {group['cram_step']}")
    return value


def first_counters(seed: int) -> dict[str, Any]:
    """`cram_step` counts whole steps; `cram_mask_uses`, kept where masks are, is JSON: key of a pattern -> how often it was used.

    A container would be taken apart in a distributed checkpoint, and its items missed in an optimizer that has taken no step.
    """
    return {"cram_seed": seed, "cram_step": 0, "cram_mask_uses": "{}"}


def draw(seed: int, step: int, count: int) -> int:
    """The pattern of this step: one of range(count), uniform over steps."""
    return _mix(_mix(seed) + step * 0x9E3779B97F4A7C15) * count >> 64 if count > 1 else 0


def key_of(pattern: Pattern) -> str:
    """A name of the pattern for checkpoints, the same whatever place it has in `compression`."""
    return f"{pattern.n}:{pattern.m}" if isinstance(pattern, NM) else f"topk {float(pattern.sparsity)!r} {pattern.scope}"


def uses_of(groups: Groups) -> dict[str, int]:
    """How often the masks of each pattern were used."""
    uses = groups[0]["cram_mask_uses"] if groups else "{}"
    return json.loads(uses) if isinstance(uses, str) else dict(uses)  # of pairs, in earlier checkpoints


def count(groups: Groups, used: Sequence[Pattern] = (), known: Collection[str] = ()) -> None:
    """One more step is complete. (A step that was given up is not counted, so the next one draws the same pattern.)

    Args:
        used: the patterns of this step whose masks are kept.
        known: the keys of all patterns that can be drawn; counts of others are dropped.
    """
    kept = "{}"
    if known:
        uses = uses_of(groups)
        for pattern in dict.fromkeys(used):  # weights on several devices share one
            uses[key_of(pattern)] = uses.get(key_of(pattern), 0) + 1
        kept = json.dumps({key: n for key, n in uses.items() if key in known})
    step = groups[0]["cram_step"] + 1 if groups else 0
    for group in groups:
        group["cram_step"], group["cram_mask_uses"] = step, kept


def _mix(x: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): 64 bits in, 64 well-mixed bits out."""
    mask = 2**64 - 1
    x &= mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31
