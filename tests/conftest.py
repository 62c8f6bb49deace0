"""The backends under test, as one fixture. For one that cannot run here, one test of test_install.py is skipped in the name of all."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compare import map_tensors, named_tensors
from executor import WAYS, Executor
from executor import why_missing as why_not_executed

from cram_kernels import _native, _triton, ops
from cram_kernels.backend import DEVICES, use_backend, why_missing

BACKENDS = DEVICES  # name -> device of its tensors
# Device code: without an executor of PTX one test of test_install.py is skipped in the name of all.
collect_ignore_glob = [] if why_not_executed() is None else ["test_cuda_*.py"]
if _triton.INTERPRETED:
    import interpreter

    interpreter.hurry()
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


# `make test-executed`: the CUDA library takes part in every op test, its device code executed on the CPU.
EXECUTED = ["executed"] if os.environ.get("CRAM_KERNELS_ALL_EXECUTED_TESTS") == "1" and why_not_executed() is None else []


@pytest.fixture(params=[*(name for name in BACKENDS if name == "cpu" or why_missing(name) is None), *EXECUTED])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend | Executor]:
    """Compare with `compare.check`, which runs every variant; a bare call runs the one that a user gets."""
    name = request.param
    if name == "executed":
        yield request.getfixturevalue("executed")
        return
    assert why_missing(name) is None
    if name != "cpu":
        yield Backend(name, BACKENDS[name], ("default",))
        return
    chosen = _native.host.simd_level()
    yield Backend(name, "cpu", tuple(_native.host.simd_levels()))
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
    """`executed`, whose `compare.check` runs an op plainly, with race detection, with weak memory, in other orders and on other grids."""
    executed.variants = tuple(WAYS)
    return executed
