"""A PyTorch optimizer for networks that can be pruned in one shot: CrAM, the Compression-Aware Minimizer, as native kernels."""

from . import _native, _registration
from .backend import BackendUnavailable, use_backend
from .batch import split_batch
from .batchnorm import frozen_batchnorm, tune_batchnorm
from .checkpoint import save
from .compat import SAM, NMTopkCrAM, TopkCrAM, TopkCrAMPeriod
from .coverage import Coverage, CoverageTable
from .hold import HeldZeros, hold_zeros
from .optim import CrAM, StepInfo
from .patterns import NM, Pattern, TopK
from .prune import prune
from .reconstruct import reconstruct
from .report import Report
from .schedule import RhoWarmup, SparsityWarmup
from .train_step import train_step
from .version import __version__
from .warning import CrAMWarning

if _native.why_missing("cpu") is None:
    _registration.register()

__all__ = [
    "NM",
    "SAM",
    "BackendUnavailable",
    "Coverage",
    "CoverageTable",
    "CrAM",
    "CrAMWarning",
    "HeldZeros",
    "NMTopkCrAM",
    "Pattern",
    "Report",
    "RhoWarmup",
    "SparsityWarmup",
    "StepInfo",
    "TopK",
    "TopkCrAM",
    "TopkCrAMPeriod",
    "__version__",
    "frozen_batchnorm",
    "hold_zeros",
    "prune",
    "reconstruct",
    "save",
    "split_batch",
    "train_step",
    "tune_batchnorm",
    "use_backend",
]
