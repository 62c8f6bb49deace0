"""Processes, each with a time limit: parts of the command, files of tests, and short selections under compute-sanitizer's tools."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .problems import PROBLEMS
from .report import FAILED, Section

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SELECTING = ("topk_threshold", "topk_histogram", "prune_topk_", "perturb_topk_")
OPS = {"selecting": SELECTING, "other": tuple(op for op in PROBLEMS if op not in SELECTING)}  # of a process under a tool
SANITIZER_ERROR = 86  # exit status where a tool found something
TIMED_OUT = None  # in place of an exit status: no process has it, so that what somebody else killed is not taken for it
SUMMARIES = {"racecheck": "RACECHECK SUMMARY: 0 hazards"}  # of a tool that watched and found nothing
SUMMARY = "ERROR SUMMARY: 0 errors"  # of the others
NOTHING_COLLECTED = 5  # exit status of pytest, of a file that was skipped as a whole too
LAST_LINES = 15  # of a log, in the report
SELECTION = [sys.executable, "-m", "cram_kernels.verify.selection"]
PACKAGE = Path(__file__).parents[1]  # the one that is verified; every process runs beside it, so that `-m` imports no other one
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "cram_kernels.verify.plugin"]
VERIFIED = "CRAM_KERNELS_VERIFIED"  # environment variable for the plugin: __file__ of the package that is verified
PART = [sys.executable, "-m", "cram_kernels.verify.part"]
KILLED_WITHIN = 10.0  # seconds; one that waits for a driver that hangs may outlive a kill
ELSEWHERE = "test_cuda_*.py"  # execute the device code on the CPU, in a GPU's place
ALLOWED_SKIPS = (  # what a machine with a GPU need not run. A test that was skipped for any other reason was not run
    "device code was not executed",  # but on the GPU
    "CRAM_KERNELS_PTXEMU does not name a PTX executor",
    "there is a GPU here",
    "every backend runs here",
    "the Triton backend runs here",
    "on a GPU the flag is not read",
    "no GPU needed",
    "takes many minutes: `make test-triton` runs it",
    "this CPU has no",
    "this CPU cannot flush denormals",
    "float8 needs compute capability",
)


def part(name: str, out: Path, dry_run: bool, limit: float) -> list[Section]:
    """A part of the command."""
    stem = re.sub(r"\W+", "_", name)
    results, log = out / f"{stem}.json", out / f"{stem}.log"
    results.unlink(missing_ok=True)
    status = run([*PART, *["--dry-run"] * dry_run, name, str(results)], log, limit)
    if status is TIMED_OUT:
        return [Section(name).not_run(f"stopped after {limit:g} s (--limit); {end_of(log)}")]
    if status != 0:
        return [Section(name, FAILED, f"its process {ended(status)}; {end_of(log)}")]
    return [Section(**section) for section in json.loads(results.read_text())]


def find_tests(folder: Path | None) -> Path:
    """The folder of the tests: the one that was named, or that of the checkout in which this package lies."""
    return folder or PACKAGE.parent / "tests"


def test_files(folder: Path) -> list[Path]:
    """Empty where there are no tests."""
    return [] if not (folder / "conftest.py").exists() else sorted(set(folder.glob("test_*.py")) - set(folder.glob(ELSEWHERE)))


def tests(file: Path, out: Path, dry_run: bool, limit: float) -> Section:
    """A file of tests; a dry run only collects them."""
    section = Section(f"tests: {file.name}")
    results, log = out / f"{file.stem}.xml", out / f"{file.stem}.log"
    results.unlink(missing_ok=True)
    command = [*PYTEST, f"--junitxml={results}", str(file)]
    status = run([*command, "--collect-only"] if dry_run else command, log, limit, **{VERIFIED: str(PACKAGE / "__init__.py")})
    if status is TIMED_OUT:
        return section.not_run(f"stopped after {limit:g} s (--limit); {end_of(log)}")
    section.require(status in (0, NOTHING_COLLECTED), f"{' '.join(command)} {ended(status)}; {end_of(log)}")
    if dry_run:
        return section if section.status == FAILED else section.not_run("dry run: collected only")
    if results.exists():
        section.rows += [dict(counts(results)), *skips(results)]
    if section.status == FAILED:
        return section
    if left_out := sum(int(row["tests"]) for row in section.rows if not row.get("allowed", True)):
        return section.not_run(f"skipped, though a machine with a GPU should run them: {left_out}; the reasons are below")
    return (
        section
        if results.exists() and passed(results)
        else section.not_run(f"no test of this file passed, or there is none; {end_of(log)}")
    )


def passed(junit: Path) -> int:
    """Tests that ran to their end."""
    totals = counts(junit)
    return totals.pop("tests") - sum(totals.values())


def end_of(log: Path) -> str:
    """Where the log is, and its last lines: often they are all that is left of a machine."""
    lines = log.read_text(errors="replace").splitlines()
    return f"see {log}, which ends: {' / '.join(line.strip() for line in lines[-LAST_LINES:])}"


def counts(junit: Path) -> dict[str, int]:
    """How many tests there were, and how many of them failed or were skipped."""
    suites = ElementTree.parse(junit).getroot().iter("testsuite")
    totals = {name: 0 for name in ("tests", "failures", "errors", "skipped")}
    for suite in suites:
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    return totals


def skips(junit: Path) -> list[dict[str, object]]:
    """Why tests were skipped, how many for each reason, and whether it is one that a machine with a GPU may have."""
    reasons = Counter(str(skip.get("message")) for skip in ElementTree.parse(junit).getroot().iter("skipped"))
    return [{"skipped": reason, "tests": number, "allowed": is_allowed(reason)} for reason, number in reasons.most_common()]


def is_allowed(reason: str) -> bool:
    return any(re.search(re.escape(allowed), reason) for allowed in ALLOWED_SKIPS)


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def sanitizer(tool: str, ops: Sequence[str], backends: Sequence[str], name: str, out: Path, dry_run: bool, limit: float) -> Section:
    """A tool that watches some ops on each backend; a dry run starts them without the tool, on the CPU."""
    program = find_sanitizer()
    section = Section(f"compute-sanitizer {tool}, {name} ops")
    log = out / f"{tool}_{name}.log"
    options = ["--tool", tool, "--error-exitcode", str(SANITIZER_ERROR), "--target-processes", "all"]
    if tool == "memcheck":
        options += ["--leak-check", "no"]  # torch keeps what it has
    command = [program or "compute-sanitizer", *options, *SELECTION, *ops]
    if not dry_run and program is None:
        return section.not_run("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    # every tensor has an allocation of its own, so that an access beside it is seen
    status = run([*SELECTION, "--dry-run", *ops] if dry_run else command, log, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if status is TIMED_OUT:
        return section.not_run(f"stopped after {limit:g} s (--limit); {end_of(log)}")
    # a status of 0 alone says little: a tool that refuses the device can end with it, and watched nothing
    said = log.read_text(errors="replace")
    missing = [row for op in ops for backend in backends if (row := str(selection_row(op, backend))) not in said.splitlines()]
    section.require(not missing, f"{tool}'s log has no line {', '.join(missing)}: that did not run or differs; {end_of(log)}")
    section.require(dry_run or watched(tool, said), f"{tool} did not say {SUMMARIES.get(tool, SUMMARY)!r}; {end_of(log)}")
    section.require(status == 0, f"{tool} {ended(status)} ({SANITIZER_ERROR}: it found something); {end_of(log)}")
    return section if section.status == FAILED or not dry_run else section.not_run(f"dry run: {' '.join(command)}")


def watched(tool: str, said: str) -> bool:
    """Whether the tool summed up what it watched, in every process it watched, and found nothing."""
    summaries = [line for line in said.splitlines() if re.search(r"\b(ERROR|RACECHECK) SUMMARY: ", line)]
    return bool(summaries) and all(re.search(rf"{SUMMARIES.get(tool, SUMMARY)}\b", line) for line in summaries)


def selection_row(op: str, backend: str) -> dict[str, object]:
    """What `selection` prints of an op that has the reference's bits."""
    return {"what": f"{op}, {backend}", "elements that differ": 0}


def ended(status: int) -> str:
    return f"ended with {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}, not by --limit"


def run(command: list[str], log: Path, limit: float, **environment: str) -> int | None:
    """The exit status; TIMED_OUT, and the end of all that it started, after `limit` seconds. The log gets what it says."""
    log.parent.mkdir(parents=True, exist_ok=True)
    own = os.environ | {"PYTHONSAFEPATH": ""} | environment
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=PACKAGE.parent, env=own, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return TIMED_OUT
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(KILLED_WITHIN)
