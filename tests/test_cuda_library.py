"""The CUDA library finds its symbols under a torch with CUDA, whichever torch it was built against."""

import subprocess

from executor import ROOT


def test_libtorch_is_needed(executed) -> None:
    """It is what brings libtorch_cuda.so, whose symbols the library uses."""
    library = ROOT / "build" / "executed" / "libcram_kernels_cuda.so"
    needed = subprocess.run(["readelf", "-d", library], check=True, capture_output=True, text=True).stdout
    assert "[libtorch.so]" in needed, needed
