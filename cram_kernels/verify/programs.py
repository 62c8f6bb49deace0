"""What runs in processes of its own: the tests, and a short selection under compute-sanitizer's tools."""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from .report import Section

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZER_ERROR = 86  # exit status where a tool found something
LAST_LINES = 15  # of a log, in the report
MOST_WORKERS = 8  # processes of tests, each with its share of the GPU's memory
SELECTION = [sys.executable, "-m", "cram_kernels.verify.selection"]


def find_tests(folder: Path | None) -> Path | None:
    """The folder of the tests: the one that was named, or that of the checkout in which this package lies."""
    found = folder or Path(__file__).parents[2] / "tests"
    return found if (found / "conftest.py").exists() else None


def tests(folder: Path | None, out: Path, dry_run: bool) -> Section:
    """All tests of the checkout; a dry run only collects them."""
    section = Section("the package's tests")
    found = find_tests(folder)
    if found is None:
        where = folder or Path(__file__).parents[2] / "tests"
        return section.not_run(f"no tests in {where}: they come with a source checkout; name its tests folder with --tests")
    out.mkdir(parents=True, exist_ok=True)
    results = out / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}", str(found)]
    if find_spec("xdist") is not None:
        command += ["-n", str(min(MOST_WORKERS, os.cpu_count() or 1)), "--dist", "loadfile"]
    log = out / "tests.log"
    result = run([*command, "--collect-only"] if dry_run else command, found.parent, log)
    section.require(result.returncode == 0, f"{' '.join(command)} ended with {result.returncode}; {end_of(log)}")
    if dry_run:
        return section if section.status == "FAILED" else section.not_run("dry run: collected only")
    if results.exists():
        section.rows.append(counts(results))
        section.rows += skips(results)
        if section.status != "FAILED" and none_on_a_gpu(results):
            section.not_run("every test that is named on_a_gpu was skipped; the reasons are below")
    return section


def end_of(log: Path) -> str:
    """Where the log is, and its last lines: often they are all that is left of a machine."""
    lines = log.read_text(errors="replace").splitlines()
    return f"see {log}, which ends: {' / '.join(line.strip() for line in lines[-LAST_LINES:])}"


def counts(junit: Path) -> dict[str, object]:
    """How many tests there were, and how many of them failed or were skipped."""
    suites = ElementTree.parse(junit).getroot().iter("testsuite")
    totals = {name: 0 for name in ("tests", "failures", "errors", "skipped")}
    for suite in suites:
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    return dict(totals)


def skips(junit: Path) -> list[dict[str, object]]:
    """Why tests were skipped, and how many for each reason."""
    reasons = Counter(str(skip.get("message")) for skip in ElementTree.parse(junit).getroot().iter("skipped"))
    return [{"skipped": reason, "tests": number} for reason, number in reasons.most_common()]


def none_on_a_gpu(junit: Path) -> bool:
    """Whether the tests that only a GPU can run were there, and all of them were skipped."""
    found = [case for case in ElementTree.parse(junit).getroot().iter("testcase") if "on_a_gpu" in str(case.get("name"))]
    return bool(found) and all(case.find("skipped") is not None for case in found)


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def sanitizer_command(program: str, tool: str) -> list[str]:
    options = ["--tool", tool, "--error-exitcode", str(SANITIZER_ERROR), "--target-processes", "all"]
    if tool == "memcheck":
        options += ["--leak-check", "no"]  # torch keeps what it has
    return [program, *options, *SELECTION]


def sanitizers(out: Path, dry_run: bool) -> list[Section]:
    """A section a tool; a dry run starts the selection without the tool, on the CPU."""
    program = find_sanitizer()
    sections = []
    for tool in TOOLS:
        section = Section(f"compute-sanitizer {tool}")
        log = out / f"{tool}.log"
        if dry_run:
            command = [*sanitizer_command(program or "compute-sanitizer", tool)[-len(SELECTION) :], "--dry-run"]
            result = run(command, Path.cwd(), log)
            section.require(result.returncode == 0, f"{' '.join(command)} ended with {result.returncode}; {end_of(log)}")
            if section.status != "FAILED":
                section.not_run(f"dry run: {' '.join(sanitizer_command(program or 'compute-sanitizer', tool))}")
        elif program is None:
            section.not_run("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
        else:
            result = run(sanitizer_command(program, tool), Path.cwd(), log)
            section.require(
                result.returncode == 0, f"{tool} ended with {result.returncode} ({SANITIZER_ERROR}: it found something); {end_of(log)}"
            )
        sections.append(section)
    return sections


def run(command: list[str], folder: Path, log: Path) -> subprocess.CompletedProcess[str]:
    """Both outputs go to the log. Every tensor has an allocation of its own, so that an access beside it is seen."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if SELECTION[-1] in command else dict(os.environ)
    with log.open("w") as out:
        return subprocess.run(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True)
