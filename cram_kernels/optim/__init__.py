"""CrAM around torch's optimizers, and the published names for it."""

from .cram import Coverage, CrAM
from .last import Perturbation
from .published import SAM, NMTopkCrAM, TopkCrAM, TopkCrAMPeriod

__all__ = ["SAM", "Coverage", "CrAM", "NMTopkCrAM", "Perturbation", "TopkCrAM", "TopkCrAMPeriod"]
