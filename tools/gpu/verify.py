"""`make verify-gpu`: everything that only an NVIDIA GPU can show, in one report, build/verify_gpu/report.md.

Needs no registry: torch with CUDA, triton, nvcc, ninja, pytest, hypothesis and numpy, as installed. Every step is a process with
a time limit, so that a kernel that hangs or spoils the CUDA context ends with its step, and the report is written after each. Run it again
until nothing is left: what passed on this code, software and machine is not repeated.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
SOURCES = ("cram_kernels", "csrc", "tests", "tools", "benchmarks", "native_build.py")
PASSED, FAILED, TOO_LONG, LEFT = "passed", "FAILED", "FAILED: stopped at --limit", "not run yet"
BACKENDS = ("cuda", "triton")
OPS = ("topk", "histogram", "nm", "perturb", "restore", "sgd", "adam", "norm", "schema", "threads", "install", "export_load")
SANITIZERS = {
    tool: r"RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else r"ERROR SUMMARY: 0 errors"
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
}


class Step(NamedTuple):
    """A command that must end with 0, and what its output must hold: a tool that refuses the device may end with 0 too."""

    command: list[str]
    says: str = ""
    beside: bool = False  # others may run at the same time


def steps(dry: bool, out: Path) -> dict[str, Step]:
    """By name. A dry run has the same steps without a GPU: the CPU backend in place of the GPU's, no tool, little to measure."""
    python, backends = sys.executable, ("cpu",) if dry else BACKENDS
    pytest = [python, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider"]
    passed = r"\b[1-9]\d* passed"
    made = {"build": Step([python, "native_build.py", "cram_kernels"])} if not dry else {}
    made["info"] = Step([python, "-m", "cram_kernels", "info"], "|".join(rf"backend {name} +available" for name in backends))
    made["tests of a GPU"] = Step([*pytest, "tests/test_gpu.py"], passed)
    for tool, says in SANITIZERS.items():
        watch = [shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
        for name in backends:
            command = [*([] if dry else [*watch, "--target-processes", "all"]), *pytest, "-s", "tests/test_gpu.py", "-k"]
            made[f"{tool}, {name}"] = Step([*command, f"test_bits and small and {name}"], passed if dry else says)
    for name in backends:
        command = [python, "-m", "benchmarks.bandwidth", "--backend", name, "--out", str(out / name), *["--quick"] * dry]
        made[f"bandwidth, {name}"] = Step(command, "share of copy")
    for name in OPS:
        made[f"tests of {name}"] = Step([*pytest, f"tests/test_{name}.py", *["--collect-only"] * dry], "" if dry else passed, beside=True)
    return made


def run(step: Step, log: Path, limit: float) -> str:
    """The step's status. After `limit` seconds it ends with all that it started."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    # every tensor has an allocation of its own under a sanitizer, so that an access beside it is seen
    environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "--tool" in step.command else {}
    with log.open("w") as out:
        try:
            where: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": out, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(step.command, start_new_session=True, **where)
        except OSError as error:
            out.write(str(error))
            return FAILED
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return TOO_LONG
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return PASSED if status == 0 and re.search(step.says, log.read_text(errors="replace")) else FAILED


@functools.cache
def facts() -> dict[str, Any]:
    """What a result depends on: code, software, machine. A report of other facts is not continued."""
    digest = hashlib.sha256()
    for place in (ROOT / name for name in SOURCES):
        for path in sorted(place.rglob("*") if place.is_dir() else [place]):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    shown = [f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors" for p in gpus]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which(query[0]) else "no nvidia-smi"
    return {
        "code": digest.hexdigest()[:16],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "GPU": "; ".join(shown) or "none: a dry run, which verifies nothing",
        "driver": driver.split("\n")[0],
    }


class Report:
    """Results by step, in `folder`; those of an earlier run with the same facts are there from the start."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, dict[str, Any]] = {name: {"status": LEFT, "seconds": 0, "ends": ""} for name in names}
        record = folder / "report.json"
        earlier = json.loads(record.read_text()) if record.exists() else {}
        if earlier.get("facts") == facts():
            self.results |= {name: result for name, result in earlier["results"].items() if name in self.results}

    def put(self, name: str, status: str, seconds: float, log: Path) -> None:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        ends = lines[-1] if status == PASSED and lines else " / ".join(lines[-12:])
        self.results[name] = {"status": status, "seconds": round(seconds), "ends": ends, "log": log.name}
        self.write()

    @property
    def verdict(self) -> str:
        wrong = [name for name, result in self.results.items() if result["status"] != PASSED]
        return f"NOT VERIFIED: {', '.join(wrong)}" if wrong else "VERIFIED"

    def write(self) -> None:
        rows = [f"| {name} | {r['status']} | {r['seconds']} | {r['ends'].replace('|', '/')} |" for name, r in self.results.items()]
        head = [f"# cram_kernels on a GPU: {self.verdict}", "", *(f"- {name}: {value}" for name, value in facts().items()), ""]
        tables = [f"\n## {path.stem}\n\n```\n{path.read_text()}```" for path in sorted(self.folder.glob("bandwidth*.log"))]
        text = "\n".join([*head, "| step | | seconds | ends with |", "|---|---|---|---|", *rows, *tables, ""])
        for name, content in (("report.json", json.dumps({"facts": facts(), "results": self.results}, indent=1)), ("report.md", text)):
            (self.folder / f"{name}.new").write_text(content)
            (self.folder / f"{name}.new").replace(self.folder / name)  # whatever stops the process, the last whole report stays


def main(argv: list[str] | None = None) -> int:
    """Returns 0 where all is verified, 1 where something failed or is left, 2 where there is no GPU. A dry run verifies nothing."""
    parser = argparse.ArgumentParser(prog="make verify-gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="the same steps without a GPU, on the CPU backend")
    parser.add_argument("--only", default="", help="steps whose name this pattern finds")
    parser.add_argument("--limit", type=float, default=280, help="seconds a step (default: %(default)g)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no step begins: run it again")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "verify_gpu", help="folder of the report and the logs")
    options = parser.parse_args(argv)
    if not options.dry_run:
        if not torch.cuda.is_available():
            print("verify-gpu: torch finds no GPU; --dry-run shows what would run")
            return 2
        capability = "".join(map(str, torch.cuda.get_device_capability()))
        os.environ |= {"CRAM_KERNELS_GPU": "1", "CRAM_KERNELS_GPU_ARCHS": os.environ.get("CRAM_KERNELS_GPU_ARCHS", capability)}
    begin, out = time.monotonic(), options.out.resolve()
    made = steps(options.dry_run, out)
    report = Report(out, list(made))
    wanted = [name for name in made if re.search(options.only, name) and report.results[name]["status"] != PASSED]

    def execute(name: str) -> None:
        if time.monotonic() - begin > options.budget:
            return
        log, start = out / (re.sub(r"\W+", "_", name) + ".log"), time.monotonic()
        status = run(made[name], log, options.limit)
        report.put(name, "dry run" if options.dry_run and status == PASSED else status, time.monotonic() - start, log)
        print(f"{name}: {report.results[name]['status']}: {report.results[name]['ends']}", flush=True)

    for name in wanted:
        if not made[name].beside:
            execute(name)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(execute, (name for name in wanted if made[name].beside)))
    report.write()
    print(f"{report.verdict}\n{out / 'report.md'}")
    if options.dry_run:
        return int(any(result["status"].startswith(FAILED) for result in report.results.values()))
    return int(report.verdict != "VERIFIED")


if __name__ == "__main__":
    sys.exit(main())
