"""Of pytest, where `programs.tests` starts it: stops if the tests import another cram_kernels than the one that is verified."""

import importlib
import os
from pathlib import Path

import pytest

from .programs import VERIFIED


def pytest_collection_finish() -> None:
    wanted, found = Path(os.environ[VERIFIED]).resolve(), Path(str(importlib.import_module("cram_kernels").__file__)).resolve()
    if found != wanted:
        pytest.exit(f"tests of verify-gpu: wanted the cram_kernels that is verified, {wanted}; the tests import {found}", returncode=1)
