"""Pruned networks that run faster on a CPU: `sparsify` puts layers on sparse weights where that pays (docs/cpu-inference.md)."""

from .. import _native
from ..backend import BackendUnavailable

if (_why := _native.why_missing("cpu")) is not None:
    raise BackendUnavailable(f"cram_kernels.inference needs the native library: {_why}")

from .convert import LayerReport, SparsifyReport, sparsify, to_dense
from .modules import SparseConv2d, SparseLayer, SparseLinear
from .trial import Trial

__all__ = ["LayerReport", "SparseConv2d", "SparseLayer", "SparseLinear", "SparsifyReport", "Trial", "sparsify", "to_dense"]
