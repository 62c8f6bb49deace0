"""Instructions a weight, counted by valgrind's callgrind: exact where times are noisy.

On one thread and at the AVX2 level, since valgrind knows no AVX-512. Each case takes a process, in which torch's imports alone last a
minute, uncounted.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cram_kernels.patterns import NM, TopK

from . import bench_adam, bench_nm, bench_sgd, bench_topk, run
from .inputs import OpRun
from .measure import Row, Setup
from .shapes import Shape

Make = Callable[[Setup], OpRun]
LINEAR: list[Shape] = [(1024, 1024)] * 4
CONVOLUTION: list[Shape] = [(256, 256, 3, 3)] * 7


def of_dtype(dtype: str) -> dict[str, Make]:
    return {
        "perturb_topk_ 50 %": partial(bench_topk.perturb_run, LINEAR, TopK(0.5), dtype),
        "perturb_topk_ 90 %": partial(bench_topk.perturb_run, LINEAR, TopK(0.9), dtype),
        "perturb_nm_ 2:4": partial(bench_nm.perturb_run, LINEAR, NM(2, 4), dtype),
        "perturb_nm_ 4:8": partial(bench_nm.perturb_run, LINEAR, NM(4, 8), dtype),
        "restore_sgd_": partial(bench_sgd.sgd_run, LINEAR, dtype),
        "restore_adam_": partial(bench_adam.adam_run, LINEAR, dtype),
    }


def convolutions() -> dict[str, Make]:
    return {
        f"perturb_nm_ {pattern}{layout}": partial(bench_nm.perturb_run, CONVOLUTION, pattern, "fp32", channels_last=bool(layout))
        for pattern in bench_nm.PATTERNS
        for layout in ("", ", channels_last")
    }


CASES = {dtype: of_dtype(dtype) for dtype in ("fp32", "bf16", "fp16")} | {"3 x 3 convolutions, fp32": convolutions()}


class Instructions:
    """The ops of one case."""

    def __init__(self, case: str, setup: Setup) -> None:
        self.case = case
        self.runs = {name: make(setup) for name, make in CASES[case].items()}

    def check(self) -> None:
        for op in self.runs.values():
            op.check()

    def rows(self, setup: Setup) -> list[Row]:
        return [
            {"name": name, "instructions_a_weight": found / self.runs[name].weights, "instructions_a_byte": found / self.runs[name].bytes}
            for name, found in self.count().items()
        ]

    def count(self) -> dict[str, int]:
        """Instructions of each op, below its glue to torch."""
        with TemporaryDirectory() as folder:
            toggles = [f"--toggle-collect={entry(op.op)}" for op in self.runs.values()]
            valgrind = ["valgrind", "--tool=callgrind", *dict.fromkeys(toggles), f"--callgrind-out-file={folder}/%p"]
            command = [*valgrind, sys.executable, "-m", "benchmarks.instructions", "--child", self.case]
            done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"instructions: the process of {self.case} ended with status {done.returncode}: {done.stderr}")
            pids: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
            return {name: total(Path(folder, str(pid)).read_text(), name) for name, pid in pids.items()}

    def describe(self) -> Row:
        return {"counted_at": "avx2, 1 thread", "bytes_a_weight": {name: round(op.bytes / op.weights, 3) for name, op in self.runs.items()}}


def entry(op: str) -> str:
    """The native function below an op's glue."""
    return f"cram::{op.removesuffix('_')}(*"


def total(profile: str, name: str) -> int:
    """Instructions in a profile of callgrind's.

    Raises:
        RuntimeError: it counted none: the entry has another name, or was not called.
    """
    counted = sum(int(line.split()[1]) for line in profile.splitlines() if line.startswith("totals:"))
    if counted == 0:
        raise RuntimeError(f"instructions: callgrind must have counted some of {name}, got none")
    return counted


def child(case: str) -> dict[str, int]:
    """Under callgrind: a process for each op, which leaves a profile of its own. Returns op -> process id."""
    torch.set_num_threads(1)
    pids = {}
    for name, make in CASES[case].items():
        if (pid := os.fork()) == 0:
            make(Setup()).run()
            os._exit(0)
        if os.waitpid(pid, 0)[1] != 0:
            raise RuntimeError(f"instructions: the process of {name} failed")
        pids[name] = pid
    return pids


def cases() -> Iterator[run.Case]:
    for case in CASES:
        yield run.Case(case, partial(Instructions, case))


def main(argv: list[str] | None = None) -> int:
    if shutil.which("valgrind") is None:
        print("instructions: needs valgrind, which is not on PATH")
        return run.CANNOT_RUN
    return run.main("instructions", cases(), argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2])))
        sys.exit()
    sys.exit(main())
