"""Tuning numbers as data: nothing is tried out in a training step."""

from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.runtime import driver


class Tuning(NamedTuple):
    block: int  # elements a program, a multiple of 1024
    num_warps: int
    room: int | None = None  # registers that a thread may take where ptxas, left to itself, spills to fit more warps

    @property
    def options(self) -> dict[str, Any]:
        """Of a launch; every product and sum is rounded on its own."""
        return {"BLOCK": self.block, "num_warps": self.num_warps, "enable_fp_fusion": False}

    @property
    def roomy(self) -> dict[str, Any]:
        """Further options: of chunks that are not aligned, which are few, and of N:M in columns."""
        return {} if self.room is None else {"maxnreg": self.room}


# By the bytes of a number. Chosen from the static report (`make triton-static`), not on a GPU: 8 elements a thread, two or one 16-byte
# accesses a stream. With 16 the streams of top-k, N:M and Adam need twice the registers, so that as many bytes are in flight from half the
# warps, and more of them wait for each other. The archs of a maker have the same rows as long as nobody has timed one; (maker, arch) would
# be looked up first.
TABLE: dict[Any, dict[int, Tuning]] = {
    "cuda": {4: Tuning(1024, 4, 128), 2: Tuning(2048, 8, 128)},
    # Warps of 64 threads; 4 elements a thread: with 8 gfx90a and gfx942 spill in some kernels.
    "hip": {4: Tuning(1024, 4), 2: Tuning(2048, 8)},
    # A program costs the interpreter about as much whatever its size.
    "interpreter": dict.fromkeys((4, 2), Tuning(32768, 1)),
}


def target() -> tuple[str, Any]:
    """The maker and the arch that kernels are compiled for here: ("cuda", 90), ("hip", "gfx942"); ("interpreter", None)."""
    if knobs.runtime.interpret:
        return "interpreter", None
    found = driver.active.get_current_target()
    return found.backend, found.arch


def tuning(dtype: torch.dtype) -> Tuning:
    own = target()
    return TABLE.get(own, TABLE[own[0]])[dtype.itemsize]


def group() -> dict[str, int]:
    """Of the phases of top-k that serve its candidates: chunks a program, candidates of each at a time."""
    return {"GROUP": 8, "RECORDS": 2048} if knobs.runtime.interpret else {"GROUP": 16, "RECORDS": 32}
