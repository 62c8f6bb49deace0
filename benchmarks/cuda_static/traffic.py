"""What each op must move per weight, and which kernels stream it: what the machine code is held against.

The bytes are those of float32 without master weights: each stream once a weight. A thread has 8 weights at a time, so that a stream is
two accesses of 16 bytes in float32, and one in bfloat16 and float16 each, with and without master weights: ACCESSES, if none was lost.
"""

from dataclasses import dataclass

MASK = 1 / 8  # bytes: one bit
ACCESSES = 6
VECTOR = 16  # bytes


@dataclass(frozen=True)
class Op:
    """An op's floor. `kernels`: those that see every weight, by name; one without template arguments stands for all that have some."""

    name: str
    origin: str  # "cuda", "triton"
    kernels: tuple[str, ...]
    loads: tuple[str, ...]  # streams read
    stores: tuple[str, ...]  # streams written
    masks: int  # mask bits read or written
    launches: int  # for up to 450 tensors
    ahead: int = 1  # vectors of each stream in float32 that a thread loads before it waits for one
    accesses: int = ACCESSES  # of 16 bytes that the machine code must have for each stream
    width: int = 4  # bytes a weight of a stream

    def streams_through(self, kernel: str) -> bool:
        """Whether the kernel of this name is one of those."""
        return kernel in self.kernels or kernel.split("<")[0] in self.kernels

    @property
    def bytes(self) -> float:
        """A weight."""
        return self.width * (len(self.loads) + len(self.stores)) + MASK * self.masks

    @property
    def in_flight(self) -> int:
        """Bytes that a thread asks for at a time."""
        return VECTOR * self.ahead * len(self.loads)

    @property
    def formula(self) -> str:
        return " + ".join([*(f"{s} in" for s in self.loads), *(f"{s} out" for s in self.stores), *(["mask"] * self.masks)])


GRADIENTS = ("saved", "grad", "first grad")
OPS = (
    Op("topk_threshold", "cuda", ("stream_kernel<false>",), ("weight",), (), 0, 8, 2),
    Op("topk_histogram", "cuda", ("histogram_kernel<true>", "histogram_kernel<false>"), ("param", "grad"), (), 0, 1),
    Op("prune_topk_", "cuda", ("stream_kernel<true>",), ("weight",), ("weight",), 1, 8, 2),
    Op("perturb_topk_", "cuda", ("stream_kernel<true>",), ("param", "grad"), ("saved", "param"), 1, 8, 2),
    Op("prune_nm_", "cuda", ("nm_kernel",), ("weight",), ("weight",), 1, 1, 2),
    Op("perturb_nm_", "cuda", ("nm_kernel",), ("param", "grad"), ("saved", "param"), 1, 1, 2),
    Op("perturb_masked_", "cuda", ("perturb_masked_kernel",), ("param", "grad"), ("saved", "param"), 1, 1, 2),
    Op("restore_", "cuda", ("restore_kernel<false>",), ("saved",), ("param",), 0, 1),
    Op("restore_combine_", "cuda", ("restore_kernel<true>",), GRADIENTS, ("param", "grad"), 1, 1),
    Op("restore_sgd_", "cuda", ("update_kernel<SgdStep>",), (*GRADIENTS, "momentum"), ("param", "momentum"), 1, 1, accesses=5),
    Op("restore_adam_", "cuda", ("update_kernel<AdamStep>",), (*GRADIENTS, "m", "v"), ("param", "m", "v"), 1, 1, accesses=5),
    Op("grad_norm", "cuda", ("norm_kernel",), ("grad",), (), 0, 2, 8),
    Op("pack_24_", "cuda", ("pack_24_kernel<true>",), ("half the weight", "half the weight"), ("packed",), 2, 1, accesses=3, width=2),
    Op("unpack_24_", "cuda", ("pack_24_kernel<false>",), ("packed",), ("half the weight", "half the weight"), 2, 1, accesses=3, width=2),
    Op("nm_violations", "cuda", ("violations_kernel",), ("weight",), (), 0, 2, 4, accesses=12),
)
