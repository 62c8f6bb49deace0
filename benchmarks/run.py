"""The command line that all benchmarks share: check, time, print, write; no number where a check is red."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from cram_kernels import _triton
from cram_kernels.backend import use_backend, why_missing
from cram_kernels.terminal import Parser, progress, say, show

from . import report
from .measure import Row, Setup
from .shapes import MODELS, free_memory


class Experiment(Protocol):
    """What a case makes. `measure.Contest` is one."""

    def check(self) -> None:
        """Raises AssertionError where a result is wrong; an op, RuntimeError."""

    def rows(self, setup: Setup) -> list[Row]:
        """What was measured: "name" and numbers."""

    def describe(self) -> Row:
        """Facts beside the rows."""


@dataclass(frozen=True)
class Case:
    """One table: its name, and what makes its tensors when its turn comes."""

    name: str
    build: Callable[[Setup], Experiment]
    memory: int = 0  # bytes that must be free


def of_models(op: str, contest: Callable[[str, Setup], Experiment], dtypes: Callable[[Setup], Experiment]) -> Iterator[Case]:
    """A case a model, and one that has all dtypes."""
    for model in MODELS:
        yield Case(f"{op} {model}", partial(contest, model))
    yield Case(f"{op} ResNet-50, dtypes", dtypes)


OK, RED, CANNOT_RUN = 0, 1, 2


def count(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")


def main(
    name: str,
    cases: Iterable[Case],
    argv: list[str] | None = None,
    prog: str | None = None,
    finish: Callable[[Row, Path], Any] = lambda record, folder: "",
    **more: Any,
) -> int:
    """Run the cases. Returns the exit status: 0; 1 where a check was red, an op raised or no case was chosen; 2 where the backend cannot
    run here.

    Args:
        name: of the benchmark and of its JSON.
        argv: None: the command line's.
        prog: how the program is called.
        finish: what else is made of the whole record, in the folder of its JSON; what it returns is shown last.
        more: arguments of the parser.
    """
    parser = Parser(prog=prog or f"python -m benchmarks.{name}", **more)
    parser.add_argument("--quick", action="store_true", help="small shapes and two rounds: a smoke test, not a measurement")
    parser.add_argument("--backend", choices=("cpu", "cuda", "triton"), default="cpu", help="what runs the ops; cpu if absent")
    parser.add_argument("--rounds", type=count, metavar="N", help="how often each contestant runs; as many as the case needs if absent")
    parser.add_argument("--threads", type=count, metavar="N", help="torch.set_num_threads; torch's own choice if absent")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has this in it")
    folder = Path("build/benchmarks")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=folder, help=f"where {name}.json goes; {folder} if absent")
    parser.add_argument("--json", action="store_true", help="print the record as JSON, and nothing else")
    options = parser.parse_args(argv)
    reason = why_missing(options.backend)
    if options.backend == "triton" and _triton.INTERPRETED:
        reason = "the times of Triton's interpreter (TRITON_INTERPRET) say nothing about the kernels"
    if reason is not None:
        say(f"{name}: backend {options.backend} cannot run here: {reason}")
        return CANNOT_RUN
    path = options.out / f"{name}.json"
    path.unlink(missing_ok=True)  # of an earlier run
    if options.threads:
        torch.set_num_threads(options.threads)
    setup, begin = Setup(options.backend, options.quick, options.rounds), time.perf_counter()
    environment = report.environment(setup.backend)
    chosen = [case for case in cases if options.only in case.name]
    record: Row = {"benchmark": name, "quick": setup.quick, "environment": environment, "results": [], "red": [], "not_measured": []}
    with use_backend(setup.backend), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if options.json else sys.stdout):
        show(f"{name}: {report.described(environment)}")
        if setup.quick:
            print("quick: small shapes, not a measurement")
        if not chosen:
            say(f"{name}: no case has {options.only!r} in its name")
        for i, case in enumerate(chosen):
            try:
                with progress(f"{i + 1} of {len(chosen)}: {case.name}"):
                    result = measured(case, setup)
                record["results"].append(result)
                show(Shown(result))
            except NotHere as reason:
                record["not_measured"].append({"case": case.name, "why": str(reason)})
                print(f"{case.name}: not measured: {reason}\n", flush=True)
            except (AssertionError, RuntimeError) as error:
                record["red"].append({"case": case.name, "why": str(error)})
                print(f"{case.name}: RED, not measured: {error}\n", flush=True)
            record["seconds"] = round(time.perf_counter() - begin, 1)  # of the whole run so far
            report.write_json(path, record)  # after every case: some take minutes
        if record["results"]:
            show(finish(record, options.out))
    if options.json:
        print(json.dumps(record, indent=1))
    return RED if record["red"] else OK if chosen else CANNOT_RUN


class NotHere(Exception):
    """A case that this machine cannot take: what it needs and what there is."""


def measured(case: Case, setup: Setup) -> Row:
    """Check, then measure; the tensors of the case are gone when it returns."""
    if (there := free_memory(setup.device)) < case.memory and not setup.quick:
        raise NotHere(f"it needs {case.memory / 1e9:.0f} GB of memory, and {there / 1e9:.0f} are free")
    experiment = case.build(setup)
    experiment.check()
    facts = experiment.describe() | {"load_average": report.load_average()}
    rows = experiment.rows(setup)
    if setup.quick:
        rows = [{column: value for column, value in row.items() if column not in ("target", "met")} for row in rows]
    return {"case": case.name, **facts, "rows": rows}


@dataclass(frozen=True)
class Shown:
    """A case as text, in as many columns as there are when it is printed."""

    result: Row

    def __str__(self) -> str:
        facts = {name: value for name, value in self.result.items() if name not in ("case", "rows")}
        return f"{self.result['case']}: {report.described(facts)}\n{report.table(self.result['rows'])}\n"
