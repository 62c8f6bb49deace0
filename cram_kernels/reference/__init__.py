"""The contract (docs/contract.md) in plain torch: written to be read, and the judge of every backend. Imports only torch.

Each function has the name, the arguments and the results of the op in `cram_kernels.ops`.
"""

from .adam import restore_adam_
from .key import KEEP_ALL, NAN_KEY, canonical, magnitude_key
from .nm import nm_keep, perturb_nm_, prune_nm_
from .norm import grad_norm
from .perturb import perturb_masked_
from .restore import restore_, restore_combine_
from .sgd import restore_sgd_
from .topk import perturb_topk_, prune_topk_, topk_histogram, topk_threshold
