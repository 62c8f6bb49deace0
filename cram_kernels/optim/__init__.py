"""CrAM around torch's optimizers."""

from .cram import CrAM
from .step_info import StepInfo

__all__ = ["CrAM", "StepInfo"]
