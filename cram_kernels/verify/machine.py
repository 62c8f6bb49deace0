"""What the sections run on: a GPU, or in a dry run the CPU in its place, so that the same lines run without one."""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from .. import backend


class Event(Protocol):
    def record(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...  # ms


class Machine(Protocol):
    """One device under test."""

    device: torch.device
    backends: list[str]  # of this package, that serve the device
    dry: bool  # nothing that this machine times is a measurement

    def facts(self) -> dict[str, Any]: ...
    def current(self) -> Any: ...  # a context manager in which this device is torch's current one
    def l2_bytes(self) -> int: ...
    def flush_l2(self) -> None: ...  # puts work on the stream that leaves nothing else in the L2
    def event(self) -> Event: ...
    def synchronize(self) -> None: ...
    def new_stream(self) -> Callable[[], Any]: ...  # a stream behind what was queued so far -> a context manager, as often as wanted
    def no_sync(self) -> Any: ...  # a context manager in which a synchronisation by torch raises
    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]: ...  # -> its replay


class Gpu:
    """A CUDA device."""

    dry = False

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.backends = [name for name in ("cuda", "triton") if backend.why_missing(name) is None]
        self.properties = torch.cuda.get_device_properties(self.device)
        self.scratch: torch.Tensor | None = None

    def facts(self) -> dict[str, Any]:
        p = self.properties
        return {
            "GPU": p.name,
            "compute capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory": f"{p.total_memory / 2**30:.1f} GiB",
            "L2": f"{self.l2_bytes() / 2**20:.0f} MiB",
            "CUDA": torch.version.cuda,
            "driver": driver(),
        }

    def current(self) -> Any:
        return torch.cuda.device(self.device)

    def l2_bytes(self) -> int:
        return self.properties.L2_cache_size

    def flush_l2(self) -> None:
        if self.scratch is None:
            self.scratch = torch.empty(2 * self.l2_bytes(), dtype=torch.uint8, device=self.device)
        self.scratch.zero_()

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def new_stream(self) -> Callable[[], Any]:
        own = torch.cuda.Stream(self.device)
        own.wait_stream(torch.cuda.current_stream(self.device))
        return lambda: torch.cuda.stream(own)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


@functools.cache
def driver() -> str:
    """The version of the NVIDIA driver, or where NVML does not tell it, of CUDA that it was made for: 580.65.06, or for CUDA 13000."""
    text = ctypes.create_string_buffer(80)
    with contextlib.suppress(OSError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            return text.value.decode()
    return f"for CUDA {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


class FakeEvent:
    """Counts events in place of time: every run takes 1 ms."""

    clock = 0.0

    def record(self) -> None:
        FakeEvent.clock += 1.0
        self.at = FakeEvent.clock

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


class Dry:
    """The CPU in a GPU's place: the ops run on the CPU backend, time stands still, a replay is a call."""

    dry = True

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cpu")
        self.backends = ["cpu"]
        self.index = index

    def facts(self) -> dict[str, Any]:
        return {"GPU": "none: dry run on the CPU"}

    def current(self) -> Any:
        return contextlib.nullcontext()

    def l2_bytes(self) -> int:
        return 2**16

    def flush_l2(self) -> None:
        pass

    def event(self) -> Event:
        return FakeEvent()

    def synchronize(self) -> None:
        pass

    def new_stream(self) -> Callable[[], Any]:
        return contextlib.nullcontext

    def no_sync(self) -> Any:
        return contextlib.nullcontext()

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        return run


def machines(dry_run: bool) -> list[Machine]:
    """Every GPU, Ampere and the older archs first; in a dry run two that stand for them. Empty: there is no GPU."""
    if dry_run:
        return [Dry(0), Dry(1)]
    if not torch.cuda.is_available():
        return []
    gpus = (Gpu(index) for index in range(torch.cuda.device_count()))
    return [*sorted(gpus, key=lambda gpu: (gpu.properties.major, gpu.properties.minor))]
