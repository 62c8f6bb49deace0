"""The backends under test, as one fixture. For one that cannot run here, one test of test_install.py is skipped in the name of all."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LAYOUTS, SHORTER
from compare import map_tensors, named_tensors
from executor import WAYS, Executor
from executor import why_missing as why_not_executed

from cram_kernels import _native, _triton, ops
from cram_kernels.backend import DEVICES, use_backend, why_missing

BACKENDS = DEVICES  # name -> device of its tensors
# Device code: without an executor of PTX one test of test_install.py is skipped in the name of all.
collect_ignore_glob = [] if why_not_executed() is None else ["test_cuda_[!s]*.py"]  # test_cuda_static.py reads, and executes nothing
if _triton.INTERPRETED:
    import interpreter

    interpreter.hurry()
    LAYOUTS.update(SHORTER)
TRITON_EXECUTED = os.environ.get("CRAM_KERNELS_TRITON_EXECUTED") == "1"  # in place of all other backends: `make test-triton-executed`
if TRITON_EXECUTED:
    from triton_executor import Compiled

    LAYOUTS.update(SHORTER)
# `make test-executed`: the CUDA library takes part in every op test, its device code executed on the CPU in these ways ("plain, race"):
# plainly with the sizes that every backend gets, in other ways with shorter ones.
EXECUTED_WAYS = tuple(way for part in os.environ.get("CRAM_KERNELS_EXECUTED_WAYS", "").split(",") if (way := part.strip()))
assert set(EXECUTED_WAYS) <= set(WAYS), f"CRAM_KERNELS_EXECUTED_WAYS: wanted some of {', '.join(WAYS)}; found {', '.join(EXECUTED_WAYS)}"
CUDA_EXECUTED = bool(EXECUTED_WAYS) and why_not_executed() is None
if CUDA_EXECUTED and EXECUTED_WAYS != ("plain",):
    LAYOUTS.update(SHORTER)
SIMD_LEVELS = ("portable", "avx2", "avx512")


@dataclass(frozen=True)
class Backend:
    """Calls public ops on one backend. Its variants compute the same bits in other ways: the SIMD levels of the CPU."""

    name: str
    device: str
    variants: tuple[str, ...]

    def __call__(self, op: str, arguments: dict[str, Any]) -> Any:
        """Tensors of another device are copied there and back."""
        given = [t for _, t in named_tensors(arguments)]
        with use_backend(self.name):
            if all(t.device.type == self.device for t in given):
                return getattr(ops, op)(**arguments)
            moved = map_tensors(arguments, lambda t: t.to(self.device))
            result = getattr(ops, op)(**moved)
        for t, (_, own) in zip(given, named_tensors(moved), strict=True):
            t.copy_(own)
        return map_tensors(result, lambda t: t.to(given[0].device))

    def select(self, variant: str) -> None:
        if self.name == "cpu":
            _native.host.set_simd_level(variant)


RUNNABLE = [name for name in BACKENDS if name == "cpu" or why_missing(name) is None]


@pytest.fixture(params=["triton_executed"] if TRITON_EXECUTED else RUNNABLE + ["cuda_executed"] * CUDA_EXECUTED)
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Compare with `compare.check`, which runs every variant; a bare call runs the one that a user gets."""
    name = request.param
    if name == "triton_executed":
        yield Compiled(("plain",))
        return
    if name == "cuda_executed":
        library = request.getfixturevalue("executed")
        library.select(EXECUTED_WAYS[0])
        library.variants = EXECUTED_WAYS
        yield library
        return
    assert why_missing(name) is None
    if name != "cpu":
        yield Backend(name, BACKENDS[name], ("default",))
        return
    yield request.getfixturevalue("cpu")


@pytest.fixture
def cpu() -> Iterator[Backend]:
    """The CPU backend, at every SIMD level, for what it alone promises."""
    chosen = _native.host.simd_level()
    yield Backend("cpu", "cpu", tuple(_native.host.simd_levels()))
    _native.host.set_simd_level(chosen)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cuda_library() -> Executor:
    return Executor()


@pytest.fixture
def executed(cuda_library: Executor) -> Iterator[Executor]:
    """The CUDA backend on CPU tensors, to be used like `backend`. Its ways: `executor.WAYS`."""
    cuda_library.select("plain")
    yield cuda_library
    cuda_library.variants = ("plain",)


@pytest.fixture
def executed_in_all_ways(executed: Executor) -> Executor:
    """`executed`, whose `compare.check` runs an op in all ways: as a graph, with race detection, weak memory, other orders and grids."""
    executed.variants = tuple(WAYS)
    return executed


# What `make test` leaves out and CI runs (`make test MARKS=`), by file.
MARKS = {
    "executed": tuple(
        f"test_cuda_{name}" for name in ("bad_input", "histogram", "indices", "library", "model", "nm", "perturb", "topk", "update")
    ),
    "frameworks": ("test_framework_examples", "test_framework_ranks", "test_lightning", "test_recipe_language", "test_transformers"),
    "tools": ("test_benchmarks", "test_bench_suite", "test_cuda_static", "test_docs", "test_site", "test_verify_gpu"),
    "slow": ("test_demo", "test_ranks", "test_recipe_images_train", "test_triton"),
}
# Files that take long, and those that wait for other processes: first, so that no worker of pytest-xdist is left with one at the end.
FIRST = ("test_triton.py", "test_demo.py", "test_ranks.py", "test_benchmarks.py", "test_framework_examples.py", "test_cuda_topk.py")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "executed" and (reason := why_not_executed()) is not None:
        raise pytest.UsageError(f"device code cannot be executed: {reason}; needed are nvcc and CRAM_KERNELS_PTXEMU, an executor's folder")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark, files in MARKS.items():
            if item.path.stem in files:
                item.add_marker(mark)
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    """A folder of CIFAR-10's format: 120 images to train and 40 to test."""
    import image_sets  # NumPy and Pillow, which the other tests do not need

    return image_sets.write_cifar(tmp_path_factory.mktemp("cifar"))
