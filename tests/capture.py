"""An op captured into a CUDA graph and replayed on other values."""

import ctypes
from typing import Any

from compare import Arena, compare_all, contract_part
from executor import Executor

from cram_kernels import reference

THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: what would synchronize, or allocate past torch, breaks the capture


def check_captured(executed: Executor, op: str, arguments: dict[str, Any]) -> None:
    """Capture op while its arguments hold other values, replay it twice on the true ones: both times the reference's bits."""
    model, arena = Arena(arguments), Arena(arguments)
    expected = getattr(reference, op)(**model.arguments)
    start = arena.bytes.clone()
    runtime, graph, graph_exec = executed.cudart, ctypes.c_void_p(), ctypes.c_void_p()
    with executed.stream() as stream, executed.known(arena.arguments):
        try:
            arena.bytes.fill_(1)
            before = arena.bytes.clone()
            runtime.check(runtime.lib.cudaStreamBeginCapture(stream, THREAD_LOCAL))
            result = executed.enqueue(op, arena.arguments)
            runtime.check(runtime.lib.cudaStreamEndCapture(stream, ctypes.byref(graph)))
            assert arena.bytes.equal(before), f"{op}: work was done while it was captured"
            runtime.check(runtime.lib.cudaGraphInstantiate(ctypes.byref(graph_exec), graph, ctypes.c_ulonglong(0)))
            for replay in ("first", "second"):
                arena.bytes.copy_(start)
                runtime.check(runtime.lib.cudaGraphLaunch(graph_exec, stream))
                runtime.synchronize()
                compare_all(f"{op}, {replay} replay", arena.arguments, model.arguments)
                compare_all(f"{op}, {replay} replay", contract_part(result), contract_part(expected))
        finally:
            executed.memory.forget()
    runtime.check(runtime.lib.cudaGraphExecDestroy(graph_exec))
    runtime.check(runtime.lib.cudaGraphDestroy(graph))


def launches(executed: Executor, op: str, arguments: dict[str, Any]) -> int:
    """The nodes of the graph that op becomes."""
    graph, runtime = ctypes.c_void_p(), executed.cudart
    with executed.stream() as stream, executed.known(arguments):
        try:
            runtime.check(runtime.lib.cudaStreamBeginCapture(stream, THREAD_LOCAL))
            executed.enqueue(op, arguments)
            runtime.check(runtime.lib.cudaStreamEndCapture(stream, ctypes.byref(graph)))
        finally:
            executed.memory.forget()
    return nodes(executed, graph)


def nodes(executed: Executor, graph: ctypes.c_void_p) -> int:
    """How many nodes a graph has; ends it."""
    count = ctypes.c_size_t()
    executed.cudart.check(executed.cudart.lib.cudaGraphGetNodes(graph, None, ctypes.byref(count)))
    executed.cudart.check(executed.cudart.lib.cudaGraphDestroy(graph))
    return count.value
