"""What each op must move per weight, and which kernels stream it: what the machine code is held against.

The bytes are those of float32 without master weights, counted from what the streaming kernel loads and stores once a weight. A 16-byte
access holds 4 weights, so that each stream is at least one such load or store in the machine code of every kernel that runs the op.
"""

from dataclasses import dataclass

MASK = 1 / 8  # bytes: one bit


@dataclass(frozen=True)
class Op:
    """An op's floor. `kernels`: the names, without template arguments, of the kernels that see every weight."""

    name: str
    origin: str  # "cuda", "triton"
    kernels: tuple[str, ...]
    loads: tuple[str, ...]  # streams read
    stores: tuple[str, ...]  # streams written
    masks: int  # mask bits read or written
    launches: int  # for up to 450 tensors

    @property
    def bytes(self) -> float:
        """A weight."""
        return 4 * (len(self.loads) + len(self.stores)) + MASK * self.masks

    @property
    def formula(self) -> str:
        return " + ".join([*(f"{s} in" for s in self.loads), *(f"{s} out" for s in self.stores), *(["mask"] * self.masks)])


OPS: tuple[Op, ...] = ()
