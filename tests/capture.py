"""An op captured into a CUDA graph and replayed on other values."""

import ctypes
from typing import Any

from compare import Arena, compare_all, contract_part
from executor import Executor

from cram_kernels import reference


def check_captured(executed: Executor, op: str, arguments: dict[str, Any]) -> None:
    """Capture op while its arguments hold other values, replay it twice on the true ones: both times the reference's bits."""
    model, arena = Arena(arguments), Arena(arguments)
    expected = getattr(reference, op)(**model.arguments)
    start = arena.bytes.clone()
    with executed.stream() as stream, executed.known(arena.arguments):
        try:
            arena.bytes.fill_(1)
            before = arena.bytes.clone()
            with executed.captured(stream) as graph:
                result = executed.enqueue(op, arena.arguments)
            assert arena.bytes.equal(before), f"{op}: work was done while it was captured"
            with executed.instance(graph) as ready:
                for replay in ("first", "second"):
                    arena.bytes.copy_(start)
                    executed.cudart.check(executed.cudart.lib.cudaGraphLaunch(ready, stream))
                    executed.cudart.synchronize()
                    compare_all(f"{op}, {replay} replay", arena.arguments, model.arguments)
                    compare_all(f"{op}, {replay} replay", contract_part(result), contract_part(expected))
        finally:
            executed.memory.forget()


def launches(executed: Executor, op: str, arguments: dict[str, Any]) -> int:
    """The nodes of the graph that op becomes."""
    with executed.stream() as stream, executed.known(arguments):
        try:
            with executed.captured(stream) as graph:
                executed.enqueue(op, arguments)
        finally:
            executed.memory.forget()
    return nodes(executed, graph)


def nodes(executed: Executor, graph: ctypes.c_void_p) -> int:
    """How many nodes a graph has; ends it."""
    count = ctypes.c_size_t()
    executed.cudart.check(executed.cudart.lib.cudaGraphGetNodes(graph, None, ctypes.byref(count)))
    executed.cudart.check(executed.cudart.lib.cudaGraphDestroy(graph))
    return count.value
