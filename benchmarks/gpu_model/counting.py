"""What the ops execute on ResNet-50's shapes, counted by an executor of PTX (CRAM_KERNELS_PTXEMU)."""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import shapes
from ..bandwidth import MAKE
from ..measure import Setup
from ..shapes import Shape

ROOT = Path(__file__).parent.parent.parent
SECTOR = 32  # bytes
PROCESSORS = 108  # of the card that is executed
WAITING = ("perturb_topk_",)  # ops whose blocks wait for others
FIXED = "start_kernel"  # part of the name of kernels that move as much for a quarter as for all: top-k's sample of 65,536 weights
Record = dict[str, Any]


@dataclass(frozen=True)
class Counts:
    """The launches of one call, as the executor recorded them."""

    op: str
    dtype: str  # fp32, bf16, fp16
    weights: int
    masked: int  # of these, weights with a mask bit
    launches: list[Record]
    stands_for: int = 0  # weights, of which these are a part; 0: these are all

    def total(self, *path: str) -> int:
        """The sum over the launches of the number at this path of the record."""
        found = 0
        for launch in self.launches:
            value: Any = launch
            for key in path:
                value = value.get(key, {})
            found += value or 0
        return found

    def accesses(self, space: str, what: str) -> int:
        """Of loads, stores and atomics to `global` or `shared` memory: sectors, wavefronts, conflicts, ..."""
        return sum(self.total(space, kind, what) for kind in ("load", "store", "atomic"))

    @property
    def bytes(self) -> float:
        """Memory must move so many a weight, if caches hold all within a launch and nothing from launch to launch."""
        whole = max(self.weights, self.stands_for)
        moved = [
            (launch["sectors_read"] + launch["sectors_written"]) / (whole if FIXED in launch.get("kernel", "") else self.weights)
            for launch in self.launches
        ]
        return SECTOR * sum(moved)

    @property
    def conflicts(self) -> float:
        """Share of the wavefronts to shared memory that bank conflicts add."""
        return self.accesses("shared", "conflicts") / max(1, self.accesses("shared", "wavefronts"))


def resnet50(quarter: bool) -> list[Shape]:
    """Its shapes; a quarter of the weights: half of the output and of the input channels."""
    model = shapes.resnet50()
    return [tuple(max(1, d // 2) if i < 2 and len(shape) > 1 else d for i, d in enumerate(shape)) for shape in model] if quarter else model


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def count(call: Any, op: str, dtype: str, model: list[Shape], target: Path, processors: int = PROCESSORS) -> Counts:
    """Call an op on the executor `call` (tests/executor.py), for a card of so many SMs; its records go to the file `target`.

    Blocks that wait for others execute a loop, as often as this machine lets them. The time of it is in the model's serial phases, so it is
    not to be counted: on one thread a block that waits is put aside.
    """
    arguments = MAKE[op](model, dtype, Setup()).arguments
    target.unlink(missing_ok=True)
    threads = 1 if op in WAITING else os.cpu_count()
    more = {"PTXEMU_COUNTERS": target.resolve(), "PTXEMU_SMS": processors, "PTXEMU_THREADS": threads}
    before = {name: os.environ.get(name) for name in more}
    os.environ.update({name: str(value) for name, value in more.items()})
    try:
        call(op, arguments)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    masks = arguments.get("masks", ())
    weights, whole = sum(map(math.prod, model)), sum(map(math.prod, shapes.resnet50()))
    return Counts(op, dtype, weights, min(weights, 8 * sum(m.numel() for m in masks)), read(target), whole)


def executor() -> Any:
    """The CUDA library, built for the executor and loaded.

    Raises:
        RuntimeError: something is missing; the message says what.
    """
    sys.path.append(str(ROOT / "tests"))
    from executor import Executor, why_missing

    if (reason := why_missing()) is not None:
        raise RuntimeError(reason)
    os.environ.update(PTXEMU_TIMEOUT="3600")
    call = Executor()
    call.select("plain")
    return call
