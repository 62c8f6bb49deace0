"""The CUDA library as it was built: the symbols that it finds, the blocks and grids that it runs with, the launches that its ops take."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import flag
from capture import launches
from executor import BLOCK_THREADS, WAYS
from test_schema import SAMPLES

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.cuda_static.traffic import OPS


def test_libtorch_is_needed(executed) -> None:
    """Under a torch with CUDA it brings libtorch_cuda.so, whose symbols the library uses, whichever torch it was built against."""
    needed = subprocess.run(["readelf", "-d", executed.library], check=True, capture_output=True, text=True).stdout
    assert "[libtorch.so]" in needed, needed


@pytest.mark.parametrize("way", WAYS)
def test_each_way_has_its_grid(executed, way: str) -> None:
    """Blocks that are through are counted in the upper half of the flag, which is not lowered where it began with a number of its own."""
    executed.select(way)
    flags, begun = flag(0x40000001), 0x4000
    weights = torch.zeros(5000 * 8 * int(BLOCK_THREADS))
    executed("restore_", {"params": [weights], "saved": [weights.clone()], "perturbed": flags})
    on_an_sm = 2048 // int(BLOCK_THREADS)
    assert (int(flags) >> 16) - begun == max(1, WAYS[way].get("PTXEMU_SMS", 108) * on_an_sm)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_no_more_launches_than_promised(executed, op) -> None:
    """`make cuda-static` prints how many launches an op takes; the graph that a call becomes has as many nodes at most."""
    assert launches(executed, op.name, SAMPLES[op.name]()) <= op.launches
