"""The command `verify-gpu`: its options, its order, its exit status."""

import argparse
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .. import backend
from . import checks, programs
from .bandwidth import bandwidth
from .machine import Machine, machines
from .report import DRY, FAILED, PASSED, Report, Section

OK, NOT_VERIFIED, CANNOT_RUN = 0, 1, 2


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: run everything that needs none, measure nothing")
    parser.add_argument("--tests", type=Path, help="folder of the tests; default: that of the checkout in which the package lies")
    parser.add_argument(
        "--skip-tests", action="store_true", help="do not run the tests; the report says so, and the verdict is not VERIFIED"
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
    for name, run in sections(options, found, out):
        print(f"{name} ...", flush=True)
        for section in guarded(name, run):
            if options.dry_run and section.status == PASSED:
                section.status = DRY
            report.sections.append(section)
            print(f"  {section.name}: {section.status}{f': {section.why}' if section.why else ''}", flush=True)
        paths = report.write(out)  # after every section: a later one may take the process down
    print(f"{report.verdict}\n{' '.join(map(str, paths))}")
    return OK if report.ok() else NOT_VERIFIED


def sections(options: argparse.Namespace, found: list[Machine], out: Path) -> list[tuple[str, Callable[[], list[Section]]]]:
    """In order: what is right before what is fast."""
    first = found[0]
    steps: list[tuple[str, Callable[[], list[Section]]]] = [
        ("bits", lambda: [on(machine, checks.bits) for machine in found]),
        ("tests", lambda: [run_tests(options, out)]),
        ("sanitizers", lambda: programs.sanitizers(out, options.dry_run)),
        ("graphs", lambda: [on(first, checks.graphs)]),
        ("streams", lambda: [on(first, checks.streams)]),
        ("devices", lambda: [checks.second_device(found)]),
    ]
    timed = [partial(lambda machine: [on(machine, bandwidth)], machine) for machine in of_each_kind(found)]
    return [*steps, *(("bandwidth", run) for run in timed)]


def on(machine: Machine, check: Callable[[Machine], Section]) -> Section:
    with machine.current():
        return check(machine)


def run_tests(options: argparse.Namespace, out: Path) -> Section:
    if options.skip_tests:
        return Section("the package's tests").not_run("--skip-tests")
    return programs.tests(options.tests, out, options.dry_run)


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
