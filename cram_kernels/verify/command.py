"""The command `verify-gpu`: its options, its order, its exit status."""

import argparse
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from .. import backend
from . import checks, programs
from .bandwidth import bandwidth, launches
from .machine import Machine, machines
from .report import DRY, FAILED, PASSED, Report, Section, table

OK, NOT_VERIFIED, CANNOT_RUN = 0, 1, 2
STEPS = (
    "backends",
    "bits",
    "graphs",
    "streams",
    "devices",
    "bandwidth",
    "launches",
    "sanitizers",
    "tests",
)  # what takes longest comes last


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: run everything that needs none, measure nothing")
    parser.add_argument("--tests", type=Path, help="folder of the tests; default: that of the checkout in which the package lies")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=STEPS,
        default=list(STEPS),
        help="some steps; those of an earlier run in the same folder stay in the report, and what never ran is NOT RUN there",
    )
    parser.add_argument("--out", type=Path, default=Path("build/verify_gpu"), help="folder of the report and the logs")


def main(options: argparse.Namespace) -> int:
    """Returns 0; 1 where something failed or was not run; 2 where there is no GPU or no backend for it."""
    found = machines(options.dry_run)
    if not found:
        print("verify-gpu: torch finds no CUDA device; `--dry-run` executes what needs none")
        return CANNOT_RUN
    if not found[0].backends:
        reasons = "; ".join(f"{name}: {backend.why_missing(name)}" for name in ("cuda", "triton"))
        print(f"verify-gpu: no backend serves this GPU: {reasons}")
        return CANNOT_RUN
    out = options.out.resolve()
    report = Report(options.dry_run, [machine.facts() for machine in found])
    if set(options.only) != set(STEPS):
        report.take_over(out)
    for step in STEPS:
        if step not in {section.step for section in report.sections}:
            report.put(step, [Section(step).not_run("not yet, or left out by --only")])
    runs = steps(options, found, out)
    for step in (step for step in STEPS if step in options.only):
        print(f"{step} ...", flush=True)
        start = time.monotonic()
        made = guarded(step, runs[step])
        for section in made:
            if options.dry_run and section.status == PASSED:
                section.status = DRY
            print(f"  {section.name}: {section.status}{f': {section.why}' if section.why else ''}", flush=True)
            if section.shown() and not options.dry_run:
                print(*table(section.shown()), sep="\n", flush=True)
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
        report.put(step, made)
        paths = report.write(out)  # after every step: a later one may take the process down
    print(f"{report.verdict}\n{' '.join(map(str, paths))}")
    return OK if report.ok() else NOT_VERIFIED


def steps(options: argparse.Namespace, found: list[Machine], out: Path) -> dict[str, Callable[[], list[Section]]]:
    first, kinds = found[0], of_each_kind(found)
    return {
        "backends": lambda: [checks.backends(machine) for machine in found],
        "bits": lambda: [on(machine, checks.bits) for machine in found],
        "graphs": lambda: [on(first, checks.graphs)],
        "streams": lambda: [on(first, checks.streams)],
        "devices": lambda: [checks.second_device(found)],
        "bandwidth": lambda: [on(machine, bandwidth) for machine in kinds],
        "launches": lambda: [on(machine, launches) for machine in kinds],
        "sanitizers": lambda: programs.sanitizers(out, options.dry_run),
        "tests": lambda: [programs.tests(options.tests, out, options.dry_run)],
    }


def on(machine: Machine, check: Callable[[Machine], Section]) -> Section:
    with machine.current():
        return check(machine)


def of_each_kind(found: list[Machine]) -> list[Machine]:
    """One GPU a model, in the order of `machines`: Ampere first."""
    return list({machine.facts()["GPU"]: machine for machine in reversed(found)}.values())[::-1]


def guarded(name: str, run: Callable[[], list[Section]]) -> list[Section]:
    """A section that raises is a failed one; the others still run."""
    try:
        return run()
    except Exception as error:
        traceback.print_exc()
        return [Section(name, FAILED, f"{type(error).__name__}: {error}")]
