"""The command line that all benchmarks share: check, time, print, write; no number where a check is red."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from cram_kernels import _triton
from cram_kernels.backend import use_backend, why_missing

from . import report
from .measure import Row, Setup


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


OK, RED, CANNOT_RUN = 0, 1, 2


def main(
    name: str, cases: Iterable[Case], argv: list[str] | None, column: str = "x_copy", label: str = "time / time of the faster copy"
) -> int:
    """Run the cases. Returns the exit status: 0; 1 where a check was red, an op raised or no case was chosen; 2 where the backend cannot
    run here.

    Args:
        name: of the benchmark, of its JSON and its picture.
        argv: None: the command line's.
        column, label: what the picture shows.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="small shapes and two rounds: a smoke test, not a measurement")
    parser.add_argument("--backend", choices=("cpu", "cuda", "triton"), default="cpu")
    parser.add_argument("--rounds", type=int, help="how often each contestant runs")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of NAME.json and NAME.png")
    options = parser.parse_args(argv)
    reason = why_missing(options.backend)
    if options.backend == "triton" and _triton.INTERPRETED:
        reason = "the times of Triton's interpreter (TRITON_INTERPRET) say nothing about the kernels"
    if reason is not None:
        print(f"{name}: backend {options.backend} cannot run here: {reason}")
        return CANNOT_RUN
    json, picture = (options.out / f"{name}.{kind}" for kind in ("json", "png"))
    for path in (json, picture):  # of an earlier run
        path.unlink(missing_ok=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    setup = Setup(options.backend, options.quick, options.rounds)
    environment = report.environment(setup.backend)
    print(f"{name}: {report.described(environment)}")
    if setup.quick:
        print("quick: small shapes, not a measurement")
    chosen = [case for case in cases if options.only in case.name]
    if not chosen:
        print(f"{name}: no case has {options.only!r} in its name")
    record: Row = {"benchmark": name, "quick": setup.quick, "environment": environment, "results": [], "red": []}
    with use_backend(setup.backend):
        for case in chosen:
            try:
                record["results"].append(measured(case, setup))
            except (AssertionError, RuntimeError) as error:
                record["red"].append({"case": case.name, "why": str(error)})
                print(f"{case.name}: RED, not measured: {error}\n", flush=True)
            report.write_json(json, record)  # after every case: some take minutes
    if record["results"]:
        title = f"{name}: {environment['backend']}, {environment['CPU']}, torch {environment['torch']}"
        if (why := report.write_picture(picture, title, record["results"], column, label)) is not None:
            print(why)
    return RED if record["red"] or not chosen else OK


def measured(case: Case, setup: Setup) -> Row:
    """Check, then measure and print; the tensors of the case are gone when it returns."""
    experiment = case.build(setup)
    experiment.check()
    facts = experiment.describe() | {"load_average": report.load_average()}
    rows = experiment.rows(setup)
    if setup.quick:
        rows = [{column: value for column, value in row.items() if column not in ("target", "met")} for row in rows]
    print(f"{case.name}: {report.described(facts)}\n{report.table(rows)}\n", flush=True)
    return {"case": case.name, **facts, "rows": rows}
