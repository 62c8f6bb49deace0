"""The ops on Triton: for NVIDIA GPUs without the CUDA library, and one file an op to read. Needs the package triton (`pip install triton`).

Each function has the name, the arguments and the results of the op in `cram_kernels.ops`, and computes the reference's bits. With
TRITON_INTERPRET=1 in the environment from the start, Triton's interpreter runs the same kernels on CPU tensors: slowly, to learn and to
debug.
"""

from importlib import import_module
from pkgutil import iter_modules

from .._registration import OPS

for _module in iter_modules(__path__):
    globals().update((_name, _it) for _name, _it in vars(import_module(f"{__name__}.{_module.name}")).items() if _name in OPS)
