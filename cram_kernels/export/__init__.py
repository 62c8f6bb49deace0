"""2:4 weights that engines read: check them, write them, load them. docs/inference.md says what runs where."""

from .check import check_nm
from .files import read, weights_in
from .load import LoadReport, load_sparse, read_cutlass
from .report import NMReport
from .write import FORMATS, export

__all__ = ["FORMATS", "LoadReport", "NMReport", "check_nm", "export", "load_sparse", "read", "read_cutlass", "weights_in"]
