"""Which pattern a step takes, from plain numbers in the parameter groups: each checkpoint format keeps them, and all ranks agree."""

from .scalars import Groups

COUNTERS = ("cram_seed", "cram_step", "cram_mask_uses")  # the same in every group


def first_counters(seed: int, levels: int) -> dict[str, int | tuple[int, ...]]:
    """`cram_step` counts whole steps, `cram_mask_uses` those of each pattern."""
    return {"cram_seed": seed, "cram_step": 0, "cram_mask_uses": (0,) * levels}


def draw(groups: Groups, levels: int) -> int:
    """The pattern of the step that comes next: one of range(levels), uniform."""
    hashed = _mix(_mix(groups[0]["cram_seed"]) + groups[0]["cram_step"] * 0x9E3779B97F4A7C15)
    return hashed * levels >> 64


def uses(groups: Groups, levels: int) -> tuple[int, ...]:
    """How often each pattern was used."""
    counted = tuple(groups[0]["cram_mask_uses"])
    return counted if len(counted) == levels else (0,) * levels  # a checkpoint of a run with another list of patterns


def count(groups: Groups, levels: int) -> None:
    """A step is complete. (One that is given up is not counted, so the next draws the same pattern.)"""
    level, step = draw(groups, levels), groups[0]["cram_step"] + 1
    counted = tuple(n + (i == level) for i, n in enumerate(uses(groups, levels)))
    for group in groups:
        group["cram_step"], group["cram_mask_uses"] = step, counted


def _mix(x: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): 64 bits in, 64 well-mixed bits out."""
    mask = 2**64 - 1
    x &= mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31
