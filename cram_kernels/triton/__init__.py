"""The ops on Triton: for NVIDIA GPUs without the CUDA library, and one file an op to read. Needs the package triton (`pip install triton`).

Each function has the name, the arguments and the results of the op in `cram_kernels.ops`, and computes the reference's bits. With
TRITON_INTERPRET=1 in the environment from the start, Triton's interpreter runs the same kernels on CPU tensors: slowly, to learn and to
debug.
"""

from .adam import restore_adam_
from .nm import perturb_nm_, prune_nm_
from .norm import grad_norm
from .perturb import perturb_masked_
from .restore import restore_, restore_combine_
from .sgd import restore_sgd_
from .topk import perturb_topk_, prune_topk_, topk_threshold
from .topk_histogram import topk_histogram

__all__ = [
    "grad_norm",
    "perturb_masked_",
    "perturb_nm_",
    "perturb_topk_",
    "prune_nm_",
    "prune_topk_",
    "restore_",
    "restore_adam_",
    "restore_combine_",
    "restore_sgd_",
    "topk_histogram",
    "topk_threshold",
]
