"""Tuning numbers as data: nothing is tried out in a training step."""

from typing import Any, NamedTuple

import torch
from triton import knobs


class Tuning(NamedTuple):
    block: int  # elements a program, a multiple of 1024
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        """Of a launch; every product and sum is rounded on its own."""
        return {"BLOCK": self.block, "num_warps": self.num_warps, "enable_fp_fusion": False}


# By bytes a number. 8 elements, two or one 16-byte accesses, a thread and turn; more turns for smaller numbers: as many bytes in flight.
BY_SIZE = {4: Tuning(1024, 4), 2: Tuning(2048, 4), 1: Tuning(4096, 4)}
INTERPRETED = Tuning(32768, 1)  # a program costs the interpreter about as much whatever its size


def tuning(dtype: torch.dtype) -> Tuning:
    return INTERPRETED if knobs.runtime.interpret else BY_SIZE[dtype.itemsize]


def records() -> int:
    """Top-k candidates of a chunk at a time."""
    return 2048 if knobs.runtime.interpret else 128
