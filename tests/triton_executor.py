"""The Triton backend on a machine without a GPU: its kernels are compiled for one, and their PTX is executed on CPU tensors.

CRAM_KERNELS_PTXEMU names the folder of the executor: a Python module `tritonemu` that becomes Triton's device, for the whole process.
"""

import os
import sys
from typing import Any

from compare import named_tensors

sys.path.insert(0, os.environ["CRAM_KERNELS_PTXEMU"])
import tritonemu

from cram_kernels import triton as kernels

WAYS = {  # name -> arch and the executor's options
    "plain": (80, {}),
    "race and weak memory": (90, {"race": True, "weak": True}),
    "shuffled": (120, {"order": "shuffle", "preempt": "all", "seed": 1, "threads": 2, "weak": True}),
}


class Compiled:
    """Used like the backends of conftest.py."""

    name, device = "triton, compiled", "cpu"

    def __init__(self, variants: tuple[str, ...]) -> None:
        self.variants = variants

    def select(self, variant: str) -> None:
        arch, options = WAYS[variant]
        tritonemu.install(cc=arch, **options)

    def __call__(self, op: str, arguments: dict[str, Any]) -> Any:
        tritonemu.reachable.clear()
        tritonemu.register(*(t for _, t in named_tensors(arguments) if t.numel()))  # kernels reach them through stored pointers
        return getattr(kernels, op)(**arguments)
