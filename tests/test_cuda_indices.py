"""Places in tensors of more than 2^31 numbers, and in lists of 2^31 chunks, as the CUDA kernels compute them, equal Python's integers."""

import random
import subprocess
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).parent / "native" / "indices.cu"
THREADS, ITEMS, CAPACITY = 256, 8, 450  # of a block; weights of a thread; tensors of a table
CHUNK = THREADS * ITEMS
ALIGNED, BETWEEN = 1 << 40, (1 << 40) + 6  # addresses; nothing is read there
SIZES = (2**31 - 1, 2**31, 2**31 + 5, 2**32 + 8, 2**33 + 2047, 2**40 + 1)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory, cuda_library):
    import ptxemu

    ptx = tmp_path_factory.mktemp("ptx") / "indices.ptx"
    flags = ["-std=c++17", "-O3", "-arch=sm_80", "-ptx"]
    subprocess.run(["nvcc", *flags, str(SOURCE), "-o", str(ptx)], check=True, timeout=600)
    return ptxemu.Module(ptx.read_text())


def test_chunks_of_large_tensors(module) -> None:
    asked = []
    for numel in SIZES:
        for p in (ALIGNED, BETWEEN):
            size = CHUNK if p == ALIGNED else CHUNK - 8
            last = (numel - 1) // size
            asked += [(p, numel, number) for number in (0, 1, last // 2, last - 1, last)]
    found = np.zeros((len(asked), 4), np.int64)
    p, numel, number = (np.array(column) for column in zip(*asked, strict=True))
    module.launch("chunks", 1, THREADS, [p, numel, number.astype(np.uint32), found, len(asked)])
    for (p, numel, number), own in zip(asked, found.tolist(), strict=True):
        size = CHUNK if p == ALIGNED else CHUNK - 8
        whole = number * CHUNK
        assert own == [number * size, min((number + 1) * size, numel), whole, min(whole + CHUNK, numel)]


@pytest.mark.parametrize("p", [ALIGNED, BETWEEN])
@pytest.mark.parametrize("numel", SIZES)
def test_vectors_cover_the_last_chunk_once(module, p: int, numel: int) -> None:
    size = CHUNK if p == ALIGNED else CHUNK - 8
    last = (numel - 1) // size
    found = np.zeros((THREADS, 2), np.int64)
    module.launch("vectors", 1, THREADS, [p, numel, last, found])
    numbers = [i for first, end in found.tolist() for i in range(first, end)]
    assert numbers == list(range(last * size, numel))


def test_tasks_of_a_full_table(module) -> None:
    """450 tensors with 2^31 - 1 tasks together, which is the most that a table takes."""
    rng = random.Random(0)
    own = [rng.choice([1, 7, 4_000_000, 9_000_000]) for _ in range(CAPACITY)]
    own[200] += 2**31 - 1 - sum(own)
    ends = list(accumulate(own))
    assert own[200] > 0 and ends[-1] == 2**31 - 1
    table = np.array([CAPACITY, 0, 0, 0, *ends, *range(CAPACITY)], np.uint32).tobytes()
    asked = sorted({0, 2**31 - 2, *(e for e in ends[:-1]), *(e - 1 for e in ends)})
    found = np.zeros((len(asked), 2), np.int64)
    module.launch("tasks", -(-len(asked) // THREADS), THREADS, [table, np.array(asked, np.uint32), found, len(asked)])
    for task, (entry, number) in zip(asked, found.tolist(), strict=True):
        expected = bisect_right(ends, task)
        assert (entry, number) == (expected, task - (ends[expected - 1] if expected else 0))
