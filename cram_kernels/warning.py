"""The package's warnings: a class of their own, and shown at the line of the user's code that led to them."""

import contextlib
import os
import sys
import warnings

import torch

_PACKAGE = os.path.join(os.path.dirname(__file__), "")
_TORCH = os.path.join(os.path.dirname(torch.__file__), "")  # its wrappers of step() and no_grad() stand between the user and us


class CrAMWarning(UserWarning):
    """Something that a user of cram_kernels should look at, though it is no error.

    Example:
        import warnings
        warnings.simplefilter("error", CrAMWarning)
    """


def warn(message: str) -> None:
    """Warn with `CrAMWarning`, as if from the innermost line that is outside of this package and of torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, _TORCH, contextlib.__file__)):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, CrAMWarning, stacklevel=level)
