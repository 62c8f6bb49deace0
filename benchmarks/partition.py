"""numpy.partition in a process of its own, since numpy reads NPY_DISABLE_CPU_FEATURES only when it is imported.

Run as a program it is that process: it loads an array, then answers each line "reset" (fill the buffer again) and "run" (partition it).
"""

import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor  # the child needs numpy only


def features_above_avx2() -> str:
    """What this numpy uses beyond AVX2, as NPY_DISABLE_CPU_FEATURES wants it: on some CPUs its AVX-512 partition is the slower one."""
    from numpy._core import _multiarray_umath as umath  # type: ignore[attr-defined]

    return " ".join(f for f in umath.__cpu_dispatch__ if (f == "X86_V4" or f.startswith("AVX512")) and umath.__cpu_features__.get(f))


class Partition:
    """Selects the k-th largest of magnitudes (float32 [n]), in place, in a child process whose numpy has to do without `features`."""

    def __init__(self, magnitudes: "Tensor", k: int, features: str = "") -> None:
        environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": features}
        environment = {name: value for name, value in environment.items() if value}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "magnitudes"
            magnitudes.numpy().tofile(path)
            command = [sys.executable, __file__, str(path), str(magnitudes.numel() - k)]
            self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            weakref.finalize(self, self.process.communicate)  # the end of its input ends it
            self.ask("reset")

    def ask(self, request: str) -> str:
        print(request, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()  # type: ignore[union-attr]
        if not answer:
            raise RuntimeError(f"numpy.partition: the child process ended with status {self.process.wait()}")
        return answer

    def reset(self) -> None:
        self.ask("reset")

    def run(self) -> float:
        """The k-th largest."""
        return float(self.ask("run"))


def serve(path: str, place: int) -> None:
    import numpy as np

    data = np.fromfile(path, dtype=np.float32)
    buffer = np.empty_like(data)
    for line in sys.stdin:
        if line.strip() == "reset":
            buffer[:] = data
            print("ready", flush=True)
        else:
            buffer.partition(place)
            print(float(buffer[place]), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
