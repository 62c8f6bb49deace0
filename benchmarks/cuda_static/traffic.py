"""What each op must move per weight, and how many accesses of 16 bytes each kernel must have: what the machine code is held against.

An op's bytes are those of float32 without master weights: each stream once a weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

MASK = 1 / 8  # bytes: one bit
VECTOR = 16  # bytes
THREADS = 256  # of a block: CRAM_BLOCK_THREADS in csrc/cuda/tuning.h
OTHER_THREADS = {"norm_finish_kernel": 1024}


@dataclass(frozen=True)
class Op:
    """An op's floor. `kernels`: those that see every weight, by name; one without template arguments stands for all that have some."""

    name: str
    kernels: tuple[str, ...]
    loads: tuple[str, ...]  # streams read
    stores: tuple[str, ...]  # streams written
    masks: int  # mask bits read or written
    launches: int  # for up to 450 tensors, 16 settings of an optimizer, and N:M tiles that fit into a chunk: docs/cuda.md
    ahead: int = 1  # vectors of each stream in float32 that a thread loads before it waits for one; of several kernels the fewest
    passes: int = 1  # kernels that share out `loads`, one after the other

    def streams_through(self, kernel: str) -> bool:
        """Whether the kernel of this name is one of those."""
        return kernel in self.kernels or kernel.split("<")[0] in self.kernels

    @property
    def bytes(self) -> float:
        """A weight."""
        return 4 * (len(self.loads) + len(self.stores)) + MASK * self.masks

    @property
    def together(self) -> int:
        """Loads of 16 bytes that a thread sends before it waits for one."""
        return self.ahead * len(self.loads) // self.passes

    @property
    def formula(self) -> str:
        return " + ".join([*(f"{s} in" for s in self.loads), *(f"{s} out" for s in self.stores), *(["mask"] * self.masks)])


GRADIENTS = ("saved", "grad", "first grad")
NM = ("nm_kernel<4>", "nm_kernel<8>", "nm_kernel<0>")
OPS = (
    Op("topk_threshold", ("stream_kernel<false>",), ("weight",), (), 0, 3, 2),
    Op("topk_histogram", ("histogram_kernel<true>", "histogram_kernel<false>"), ("param", "grad"), (), 0, 1),
    # a pass that only looks, then one that writes: unlike perturb_topk_, it has no copy from which a wrong guess could be set right
    Op("prune_topk_", ("stream_kernel<false>", "finish_kernel"), ("weight", "weight"), ("weight",), 1, 3, passes=2),
    Op("perturb_topk_", ("stream_kernel<true>",), ("param", "grad"), ("saved", "param"), 1, 3, 2),
    Op("prune_nm_", NM, ("weight",), ("weight",), 1, 1, 2),
    Op("perturb_nm_", NM, ("param", "grad"), ("saved", "param"), 1, 1, 2),
    Op("perturb_masked_", ("perturb_masked_kernel",), ("param", "grad"), ("saved", "param"), 1, 1, 2),
    Op("restore_", ("restore_kernel<false>",), ("saved",), ("param",), 0, 1),
    Op("restore_combine_", ("restore_kernel<true>",), GRADIENTS, ("param", "grad"), 1, 1),
    Op("restore_sgd_", ("update_kernel<SgdStep>",), (*GRADIENTS, "momentum"), ("param", "momentum"), 1, 1),
    Op("restore_adam_", ("update_kernel<AdamStep>",), (*GRADIENTS, "m", "v"), ("param", "m", "v"), 1, 1),
    Op("grad_norm", ("norm_kernel",), ("grad",), (), 0, 2, 8),
)


@dataclass(frozen=True)
class Vectors:
    """Accesses of 16 bytes in a kernel's machine code. `again`: arch -> loads that nvcc 13.0 has on top there, mostly second copies."""

    load: int
    store: int = 0
    again: Mapping[str, int] = field(default_factory=dict)

    def wanted(self, kind: str, arch: str) -> int:
        return self.store if kind == "store" else self.load + self.again.get(arch, 0)

    def times(self, count: int) -> "Vectors":
        return Vectors(count * self.load, count * self.store)


# A kernel has its code five times: for float32, and for bfloat16 and float16, each without and with float32 master weights. A thread has 8
# weights, two vectors of float32 or one of 16 bits; where the loop over them is not unrolled, one vector of the parameter at a time.
OWN = 2 + 1 + 1 + 1 + 1  # a stream of the parameter's type
MASTERS = 2 + 2
FROM = OWN + MASTERS - 2  # the master weights where there are some, else the parameter or its saved copy
LOOP_OWN = 1 + 1 + 1 + 1 + 1
LOOP_FROM = 1 + 1 + 2 + 1 + 2  # of the type of master weights and state
PERTURB = Vectors(OWN + MASTERS + OWN, 2 * OWN)  # param, masters, grad; saved, param
LOOK = Vectors(FROM + OWN)  # weights, grad
DIGIT = 6  # RankedBins: two groups of 2,048 counts of 64 bits, then four counts of the group that holds the rank
SMALL_DIGIT = 2  # the same of 32 bits, where the counts of the group are kept
BRACKET = 1 + 1 + 1  # keys of the sample, the bins of one rank; of a set, where its candidates lie and are counted

# Kernel -> its accesses, exactly: one more would hide the loss of another. What is not here has no stream of weights in vectors.
VECTORS = {
    # vectors that are cut, and those that are not; without a gradient u is the weight itself
    "stream_kernel<false>": Vectors(BRACKET + 2 * PERTURB.load),
    "stream_kernel<true>": Vectors(BRACKET + 2 * PERTURB.load, 2 * PERTURB.store),
    # three digits of the candidates; the passes that count digits of all keys, then the one that writes: the parameter too, whose bits stay
    # where nothing moves. On top come the sets' own words, in 20 vectors or in 10 of 32 bytes, and a second copy of two digits of all keys;
    # `select` is there twice, for one set of 16 bits and for slices of all sets: 19 vectors, or 7
    "finish_kernel": Vectors(
        3 * SMALL_DIGIT + 2 * LOOK.load + OWN + 3 * DIGIT,
        OWN,
        again=dict.fromkeys(("80", "86", "89", "90"), 20 + 2 * DIGIT + 19) | dict.fromkeys(("100", "120"), 10 + 7),
    ),
    "histogram_kernel<false>": LOOK.times(2),
    "histogram_kernel<true>": LOOK.times(2),
    # tensors that are not pruned, with vectors that are cut and without; for m = 4 and 8 also groups within a vector
    "nm_kernel<0>": PERTURB.times(2),
    "nm_kernel<4>": PERTURB.times(3),
    "nm_kernel<8>": PERTURB.times(3),
    # here and below: vectors that are cut, and those that are not
    "perturb_masked_kernel": PERTURB.times(2),
    "restore_kernel<false>": Vectors(FROM, OWN).times(2),
    "restore_kernel<true>": Vectors(FROM + 2 * OWN, OWN + OWN).times(2),  # both gradients; param, grad
    # a restore for skipped steps; both gradients, weights, states; param, masters, states. The first vectors of m and v are loaded in two
    # branches, with amsgrad and without
    "update_kernel<SgdStep>": Vectors(FROM + 2 * LOOP_OWN + 2 * LOOP_FROM, OWN + LOOP_OWN + 2 * LOOP_FROM).times(2),
    "update_kernel<AdamStep>": Vectors(
        2 * (FROM + 2 * LOOP_OWN + 4 * LOOP_FROM),
        2 * (OWN + LOOP_OWN + 4 * LOOP_FROM),
        again=dict.fromkeys(("80", "86", "89", "90"), 4 * LOOP_OWN - 2) | dict.fromkeys(("100", "120"), 2 * LOOP_OWN),
    ),
    "norm_kernel": Vectors(8 + 4 + 4),  # a lane has 32 numbers; three types
}
