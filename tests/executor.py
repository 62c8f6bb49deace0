"""The CUDA library on a machine without a GPU: an executor of PTX runs on CPU tensors what nvcc made of the kernels and of their launchers.

CRAM_KERNELS_PTXEMU names the folder of the executor: a Python module `ptxemu` whose `Cudart` stands in for libcudart. The library's own
registration is used: its kernels for the key CUDA are called with CPU tensors. Every tensor of a call, and all that the call allocates, is
made known to the executor byte for byte, which refuses any other access; what is allocated is poisoned first.
"""

import contextlib
import ctypes
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compare import SENTINEL, named_tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cram_kernels import backend, ops

FOLDER = os.environ.get("CRAM_KERNELS_PTXEMU")
ROOT = Path(__file__).parent.parent

BLOCK_THREADS = os.environ.get("CRAM_KERNELS_EXECUTED_THREADS", "256")  # of the library that is built and executed

CHECK, RACE, PREEMPT, SHUFFLE, PREEMPT_ALL, WEAK = 1, 2, 4, 8, 32, 64
WAYS = {  # name -> environment of the executor; a card of no multiprocessor gets the smallest grid, of one block
    "plain": {"PTXEMU_FLAGS": CHECK},
    "captured": {"PTXEMU_FLAGS": CHECK},  # each call into a graph, which is then replayed
    "race": {"PTXEMU_FLAGS": CHECK | RACE},
    "weak": {"PTXEMU_FLAGS": CHECK | WEAK, "PTXEMU_SMS": 3},
    "shuffled": {"PTXEMU_FLAGS": CHECK | WEAK | SHUFFLE | PREEMPT_ALL, "PTXEMU_SEED": 1, "PTXEMU_THREADS": 2},
    "one sm": {"PTXEMU_FLAGS": CHECK | RACE | SHUFFLE | PREEMPT, "PTXEMU_SEED": 2, "PTXEMU_SMS": 1},
    "one block": {"PTXEMU_FLAGS": CHECK | RACE, "PTXEMU_SMS": 0},
}
THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: what would synchronize, or allocate past torch, breaks the capture


def why_missing() -> str | None:
    """None where device code can be executed, else what is missing."""
    if FOLDER is None:
        return "CRAM_KERNELS_PTXEMU does not name a PTX executor"
    if shutil.which("nvcc") is None:
        return "nvcc is not on PATH"
    if torch.version.cuda is not None and f"release {torch.version.cuda.split('.')[0]}." in nvcc_version():
        return "this torch has loaded the libcudart that the executor stands in for: a torch without CUDA executes device code"
    if not (ROOT / "native_build.py").exists():
        return "not run from a source checkout"
    return None


def nvcc_version() -> str:
    return subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout


ALLOCATING = (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.new_zeros, torch.ops.aten.zeros)


class Memory(TorchDispatchMode):
    """Makes known to the executor what is allocated while a call runs, and poisons it. There is none after `left` allocations."""

    def __init__(self, executor: "Executor", left: float = math.inf) -> None:
        super().__init__()
        self.executor, self.left = executor, left
        self.tensors: list[Tensor] = []  # kept alive until forgotten: a captured graph goes on using them
        self.bytes = 0  # bytes of the last call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in ALLOCATING:
            if self.left == 0:
                raise torch.OutOfMemoryError("no memory is left")
            self.left -= 1
        out = func(*args, **(kwargs or {}))
        for _, t in named_tensors(out):
            if func.overloadpacket in ALLOCATING and t.numel() > 0:
                if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.new_empty):
                    t.view(-1).view(torch.uint8).fill_(SENTINEL)
                self.executor.know(t)
                self.tensors.append(t)
        return out

    def forget(self) -> None:
        self.bytes = sum(t.numel() * t.element_size() for t in self.tensors)
        for t in self.tensors:
            self.executor.forget(t)
        self.tensors.clear()


class Executor:
    """The CUDA library, loaded; calls ops of `cram_kernels.ops` on it."""

    name, device, variants = "cuda executed", "cpu", ("plain",)

    def __init__(self) -> None:
        sys.path[:0] = [str(FOLDER), str(ROOT)]
        import fcntl

        import ptxemu

        import native_build

        folder = ROOT / "build" / f"executed-{BLOCK_THREADS}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:  # for pytest's other workers
            fcntl.flock(lock, fcntl.LOCK_EX)
            native_build.build_executed(folder, BLOCK_THREADS)
        self.library = folder / "libcram_kernels_cuda.so"
        self.cudart = ptxemu.Cudart()
        self.torch_cuda = ctypes.CDLL(str(folder / "libtorch_cuda_stand_in.so"), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(self.library))
        self.memory = Memory(self)
        self.environment: dict[str, str] = {}
        self.captures = False

    def select(self, way: str) -> None:
        self.captures = way == "captured"
        for name in self.environment:
            del os.environ[name]
        self.environment = {name: str(value) for name, value in WAYS[way].items()}
        os.environ.update(self.environment)

    def know(self, t: Tensor) -> None:
        self.cudart.lib.ptxemu_register(ctypes.c_void_p(t.data_ptr()), ctypes.c_size_t(t.numel() * t.element_size()))

    def forget(self, t: Tensor) -> None:
        self.cudart.lib.ptxemu_unregister(ctypes.c_void_p(t.data_ptr()))

    @contextlib.contextmanager
    def known(self, arguments: Any) -> Iterator[None]:
        tensors = [t for _, t in named_tensors(arguments) if t.numel() > 0]
        for t in tensors:
            self.know(t)
        try:
            yield
        finally:
            for t in tensors:
                self.forget(t)

    def enqueue(self, op: str, arguments: dict[str, Any]) -> Any:
        """Call an op; its memory is known until `memory.forget()`."""
        chosen, backend.select = backend.select, lambda tensors: CudaOps()
        try:
            with self.memory:
                return getattr(ops, op)(**arguments)
        finally:
            backend.select = chosen

    def __call__(self, op: str, arguments: dict[str, Any]) -> Any:
        try:
            with self.known(arguments):
                result = self.replayed(op, arguments) if self.captures else self.enqueue(op, arguments)
                self.cudart.synchronize()
                return result
        finally:
            self.memory.forget()

    def replayed(self, op: str, arguments: dict[str, Any]) -> Any:
        """The op's result, from one launch of the graph that its call became."""
        with self.stream() as stream:
            with self.captured(stream) as graph:
                result = self.enqueue(op, arguments)
            with self.instance(graph) as ready:
                self.cudart.check(self.cudart.lib.cudaGraphLaunch(ready, stream))
        return result

    @contextlib.contextmanager
    def captured(self, stream: ctypes.c_void_p) -> Iterator[ctypes.c_void_p]:
        """What is put on the stream meanwhile is not done: it is the graph's, once this ends."""
        graph, runtime = ctypes.c_void_p(), self.cudart
        runtime.check(runtime.lib.cudaStreamBeginCapture(stream, THREAD_LOCAL))
        try:
            yield graph
        finally:
            runtime.check(runtime.lib.cudaStreamEndCapture(stream, ctypes.byref(graph)))

    @contextlib.contextmanager
    def instance(self, graph: ctypes.c_void_p) -> Iterator[ctypes.c_void_p]:
        """The graph, ready to launch; it ends with this."""
        ready, runtime = ctypes.c_void_p(), self.cudart
        runtime.check(runtime.lib.cudaGraphInstantiate(ctypes.byref(ready), graph, ctypes.c_ulonglong(0)))
        try:
            yield ready
        finally:
            runtime.check(runtime.lib.cudaGraphExecDestroy(ready))
            runtime.check(runtime.lib.cudaGraphDestroy(graph))

    def reset(self) -> None:
        """After a fault, which sticks as on a device."""
        self.cudart.lib.ptxemu_reset()
        self.memory.forget()

    @contextlib.contextmanager
    def stream(self) -> Iterator[ctypes.c_void_p]:
        """A stream of its own as the current one."""
        stream = ctypes.c_void_p()
        self.cudart.check(self.cudart.lib.cudaStreamCreate(ctypes.byref(stream)))
        self.torch_cuda.stand_in_set_stream(stream)
        try:
            yield stream
        finally:
            self.torch_cuda.stand_in_set_stream(ctypes.c_void_p())
            self.cudart.check(self.cudart.lib.cudaStreamDestroy(stream))


class CudaOps:
    """torch.ops.cram_kernels, called as for CUDA tensors."""

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.cram_kernels, name).default
        return lambda *args, **kwargs: op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
