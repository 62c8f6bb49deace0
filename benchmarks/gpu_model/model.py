"""The bound: what a card would need at the least for what was counted, beside what a copy of the formula's bytes would need.

Every number here is an assumption, listed in docs/gpu-model.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..cuda_static.gpus import Card
from ..cuda_static.traffic import OPS
from .counting import Counts

ISSUED, ALU, HEAVY, SPECIAL = 4, 2, 2, 0.5  # warp instructions a cycle and SM, on all of these archs
FP32 = {"80": 2, "86": 4, "89": 4, "90": 4}
FP64 = {"80": 1, "86": 1 / 16, "89": 1 / 16, "90": 2}
LAUNCH = 2.5e-6  # seconds of a launch that waits for the one before
ROUND_TRIP = 0.7e-6  # seconds of a load from memory, or of an atomic that returns, that the next step waits for

BRACKET = "bracket: sampled keys beside the set, their counts, counter, sums of groups, the bins of three ranks side by side"
BRACKET_SENT = "the bracket on its way to the other blocks"
# Op -> phases in which the card waits for single loads, and how many one after the other; first loads of a launch are in LAUNCH.
SERIAL: dict[str, dict[str, float]] = {
    "perturb_nm_": {"rho, before a block's first gradient": 1},
    "perturb_masked_": {"rho, before a block's first gradient": 1},
    "restore_": {"the flag, before a block's first load": 1, "the last block's counter": 2},
    "restore_combine_": {"the flag and scales": 1, "the last block's counter": 2},
    "restore_sgd_": {"the flag and scales": 1, "the learning rate, for each of a block's few tensors": 2, "the last block's counter": 2},
    "restore_adam_": {
        "the flag and scales": 1,
        "learning rate and step, for each of a block's few tensors": 2,
        "powers of beta in fp64": 4,
        "the last block's counter and the steps": 4,
    },
    "perturb_topk_": {
        "start: the tensor in the table, weights beside gradients": 2,
        BRACKET: 5,
        BRACKET_SENT: 2,
        "select: candidates beside the first digit": 1,
    },
}
# The same, of float32 alone. 16-bit keys of a bracket are told apart by the first digit, and every block finds the threshold of one set.
SERIAL_FP32 = {
    "perturb_topk_": {
        "select: counts of the second digit, counter, second digit": 3,
        "the threshold on its way to the other blocks": 2,
    }
}
# Op -> phases in which memory is not idle: blocks have had their first weights sent for, into a part of the second-level cache in all.
FILLING = {"perturb_topk_": (BRACKET, BRACKET_SENT)}
FILLED = 1 / 3  # of the cache: kPrefetchedShare in csrc/cuda/tuning.h


@dataclass(frozen=True)
class Bound:
    """Seconds."""

    parts: dict[str, float]  # what overlaps: the largest counts
    launches: float
    serial: float
    copy: float

    @property
    def by(self) -> str:
        return max(self.parts, key=lambda part: self.parts[part])

    @property
    def seconds(self) -> float:
        return self.parts[self.by] + self.launches + self.serial

    @property
    def share(self) -> float:
        """Of the bandwidth of a copy, at the most."""
        return self.copy / self.seconds


def formula(counts: Counts) -> float:
    """Bytes a weight that the op cannot do without."""
    op = next(op for op in OPS if op.name == counts.op)
    size = 4 if counts.dtype == "fp32" else 2
    return size * (len(op.loads) + len(op.stores)) + op.masks * counts.masked / 8 / counts.weights


def serial(op: str, dtype: str) -> float:
    """Seconds."""
    more = SERIAL_FP32.get(op, {}) if dtype == "fp32" else {}
    return ROUND_TRIP * sum((SERIAL[op] | more).values())


def filling(op: str, card: Card) -> float:
    """Seconds of the serial phases in which memory already works for what comes later: as long as that takes, or as long as they last."""
    phases = ROUND_TRIP * sum(SERIAL[op][phase] for phase in FILLING.get(op, ()))
    return min(phases, FILLED * card.cache * 2**20 / (card.gigabytes * 1e9))


def bound(counts: Counts, pipes: Mapping[str, int], card: Card, weights: int) -> Bound:
    """For a call on so many weights, of which what was counted is a sample; launches and serial phases do not grow with them."""
    scale = weights / counts.weights
    cycle = card.multiprocessors * card.megahertz * 1e6 / scale
    bandwidth = card.gigabytes * 1e9
    fp32, heavy = pipes.get("fp32", 0), pipes.get("heavy", 0)
    l1 = counts.accesses("global", "sectors") / 4 + counts.accesses("shared", "wavefronts")
    parts = {
        "memory": counts.bytes * weights / bandwidth - filling(counts.op, card),
        "issue": sum(pipes.values()) / (ISSUED * cycle),
        "ALU": pipes.get("alu", 0) / (ALU * cycle),
        "fp32": max((fp32 + heavy) / FP32[card.arch], heavy / HEAVY) / cycle,
        "special": pipes.get("special", 0) / (SPECIAL * cycle),
        "fp64": pipes.get("fp64", 0) / (FP64[card.arch] * cycle),
        "L1": l1 / cycle,
    }
    return Bound(parts, LAUNCH * len(counts.launches), serial(counts.op, counts.dtype), formula(counts) * weights / bandwidth)


@dataclass(frozen=True)
class Bars:
    """What `--check` asks of an op; docs/gpu-model.md says why."""

    instructions: float = 1e9  # warp instructions for 32 weights, on every arch
    conflicts: float = 0.05
    launches: int = 1
    serial: float = 15e-6

    @staticmethod
    def share(dtype: str, card: str) -> float:
        return 0.85 if dtype != "fp32" or card.startswith("H100") else 0.90


BARS = {op: Bars() for op in SERIAL} | {"perturb_nm_": Bars(instructions=80), "perturb_topk_": Bars(instructions=65, launches=3)}


def missed(counts: Counts, instructions: Mapping[str, float], bounds: Mapping[str, Bound]) -> list[str]:
    """What is worse than its bar, in words. instructions: of each arch, for 32 weights; bounds: of each card."""
    bars, name = BARS[counts.op], f"{counts.op} {counts.dtype}"
    found = [
        f"{name} on sm_{arch}: {own:.0f} warp instructions for 32 weights; the bar is {bars.instructions:.0f}"
        for arch, own in instructions.items()
        if own > bars.instructions
    ]
    if counts.conflicts > bars.conflicts:
        found.append(
            f"{name}: bank conflicts add {counts.conflicts:.0%} of the wavefronts to shared memory; the bar is {bars.conflicts:.0%}"
        )
    if len(counts.launches) > bars.launches:
        found.append(f"{name}: {len(counts.launches)} launches; the bar is {bars.launches}")
    if serial(counts.op, counts.dtype) > bars.serial:
        found.append(f"{name}: {1e6 * serial(counts.op, counts.dtype):.0f} us of serial phases; the bar is {1e6 * bars.serial:.0f}")
    return found + [
        f"{name}: {own.share:.0%} of a copy at the most on {card}; the bar is {bars.share(counts.dtype, card):.0%}"
        for card, own in bounds.items()
        if own.share < bars.share(counts.dtype, card)
    ]
