"""What the ops and the optimizer cost, beside a copy of as many bytes and peers: `python -m benchmarks.NAME`, docs/performance.md."""

import sys
from pathlib import Path

# The tests' oracles serve here too: `published`, our port of the published optimizers; `compare`, bitwise comparison with the reference.
sys.path.append(str(Path(__file__).parent.parent / "tests"))
