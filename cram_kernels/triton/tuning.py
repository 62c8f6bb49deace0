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


# 8 elements, two or one 16-byte accesses, a thread and turn; two turns for 16-bit numbers to keep as many bytes in flight.
BY_DTYPE = {
    torch.float32: Tuning(1024, 4),
    torch.bfloat16: Tuning(2048, 4),
    torch.float16: Tuning(2048, 4),
}
INTERPRETED = Tuning(32768, 1)  # a program costs the interpreter about as much whatever its size


def tuning(dtype: torch.dtype) -> Tuning:
    return INTERPRETED if knobs.runtime.interpret else BY_DTYPE[dtype]


def records() -> int:
    """Top-k candidates of a chunk at a time."""
    return 2048 if knobs.runtime.interpret else 128
