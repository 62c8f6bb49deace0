"""The command `verify-gpu`: its options, its order, its exit status."""

import argparse
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from .. import backend
from . import checks, programs
from .machine import Machine, machines
from .part import Runs, parts
from .report import DRY, FAILED, PASSED, Report, Section, hash_of_code, table

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
LIMIT = 280.0  # seconds
MOST_WORKERS = 8  # files of tests at a time, each with its share of the GPU's memory


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
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="leave out what an earlier run of the same code in the same folder has passed"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that the process of a part may take; default: %(default)g")
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
    report = Report(options.dry_run, [machine.facts() for machine in found], code=hash_of_code(programs.find_tests(options.tests)))
    if options.go_on or set(options.only) != set(STEPS):
        report.take_over(out)
    runs = steps(options, found, out)
    report.sections = [section for section in report.sections if section.step in runs]
    for step in runs:
        if step not in {section.step for section in report.sections}:
            report.put(step, [Section(step).not_run("not yet, or left out by --only")])
    wanted = {name: run for name, run in runs.items() if name.split(":")[0] in options.only and not (options.go_on and report.done(name))}
    for step, made, seconds in executed(wanted):
        print(f"{step}: {seconds:.0f} s", flush=True)
        for section in made:
            if options.dry_run and section.status == PASSED:
                section.status = DRY
            print(f"  {section.name}: {section.status}{f': {section.why}' if section.why else ''}", flush=True)
            if section.shown() and not options.dry_run:
                print(*table(section.shown()), sep="\n", flush=True)
        report.put(step, made)
        report.write(out)  # after every part: a later one may take the process down
    paths = report.write(out)
    print(f"{report.verdict}\n{' '.join(map(str, paths))}")
    return OK if report.ok() else NOT_VERIFIED


def executed(runs: Runs) -> Iterator[tuple[str, list[Section], float]]:
    """Each part's sections as soon as it is through, and the seconds it took; one after the other, but for the files of tests."""
    beside = {name: run for name, run in runs.items() if name.startswith("tests: ")}
    for name in runs:
        if name not in beside:
            print(f"{name} ...", flush=True)
            yield guarded(name, runs[name])
    with ThreadPoolExecutor(min(MOST_WORKERS, os.cpu_count() or 1)) as pool:
        for future in as_completed([pool.submit(guarded, name, run) for name, run in beside.items()]):
            yield future.result()


def steps(options: argparse.Namespace, found: list[Machine], out: Path) -> Runs:
    dry = options.dry_run
    runs: Runs = {"backends": lambda: [checks.backends(machine) for machine in found]}
    for part, run in parts(found).items():
        # a kernel that hangs, or spoils the CUDA context, must end with its part; a dry run has none, and spares the imports of torch
        in_this_process = dry
        runs[part] = run if in_this_process else partial(programs.part, part, out, dry, options.limit)
    for tool in programs.TOOLS:
        for name, ops in programs.OPS.items():
            runs[f"sanitizers: {tool}, {name}"] = partial(
                alone, programs.sanitizer, tool, ops, found[0].backends, name, out, dry, options.limit
            )
    folder = programs.find_tests(options.tests)
    for file in programs.test_files(folder):
        runs[f"tests: {file.name}"] = partial(alone, programs.tests, file.resolve(), out, dry, options.limit)
    if not any(name.startswith("tests: ") for name in runs):
        why = f"no tests in {folder}: they come with a source checkout; name its tests folder with --tests"
        runs["tests"] = lambda: [Section("tests").not_run(why)]
    return runs


def alone(run: Callable[..., Section], *arguments: object) -> list[Section]:
    return [run(*arguments)]


def guarded(name: str, run: Callable[[], list[Section]]) -> tuple[str, list[Section], float]:
    """A part that raises is a failed one; the others still run."""
    start = time.monotonic()
    try:
        made = run()
    except Exception as error:
        traceback.print_exc()
        made = [Section(name, FAILED, f"{type(error).__name__}: {error}")]
    return name, made, time.monotonic() - start
