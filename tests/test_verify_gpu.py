"""tools/gpu/verify.py as far as it goes without a GPU: its processes, its report, and a dry run of the steps."""

import importlib.util
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

PATH = Path(__file__).parent.parent / "tools" / "gpu" / "verify.py"
spec = importlib.util.spec_from_file_location("verify", PATH)
assert spec is not None and spec.loader is not None
verify = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verify)


@pytest.mark.parametrize(
    "command, says, expected",
    [
        (["sh", "-c", "echo 12 passed"], r"\b[1-9]\d* passed", verify.PASSED),
        (["sh", "-c", "echo Device not supported"], r"\b[1-9]\d* passed", verify.FAILED),
        (["sh", "-c", "echo 12 passed; exit 3"], r"\b[1-9]\d* passed", verify.FAILED),
        (["sh", "-c", "echo 12 passed; kill -9 $$"], r"\b[1-9]\d* passed", verify.FAILED),
        (["/no/such/program"], "", verify.FAILED),
        (["sh", "-c", "echo '= ERROR SUMMARY: 10 errors'"], verify.SANITIZERS["memcheck"], verify.FAILED),
        (["sh", "-c", "echo '= RACECHECK SUMMARY: 0 hazards displayed (0 errors)'"], verify.SANITIZERS["racecheck"], verify.PASSED),
    ],
)
def test_status_of_a_step(command: list[str], says: str, expected: str, tmp_path: Path) -> None:
    assert verify.run(verify.Step(command, says), tmp_path / "log", 60) == expected


def test_what_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    sleeper = "import subprocess; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    assert verify.run(verify.Step([sys.executable, "-c", sleeper]), tmp_path / "log", 3) == verify.TOO_LONG
    time.sleep(0.5)
    state = Path(f"/proc/{int((tmp_path / 'log').read_text())}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_the_report_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passed stays, until the code, the software or the machine is another."""
    (tmp_path / "log").write_text("first line\nlast line\n")
    report = verify.Report(tmp_path, ["a", "b"])
    report.put("a", verify.PASSED, 1.4, tmp_path / "log")
    assert report.verdict == "NOT VERIFIED: b" and "| a | passed | 1 | last line |" in (tmp_path / "report.md").read_text()
    again = verify.Report(tmp_path, ["b", "a"])
    assert again.results["a"]["status"] == verify.PASSED and again.results["b"]["status"] == verify.LEFT
    again.put("b", verify.PASSED, 1, tmp_path / "log")
    assert again.verdict == "VERIFIED"
    other = verify.facts() | {"code": "changed"}
    monkeypatch.setattr(verify, "facts", lambda: other)
    assert {result["status"] for result in verify.Report(tmp_path, ["a", "b"]).results.values()} == {verify.LEFT}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: `make verify-gpu` runs the steps themselves")
def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every kind of step but the build; it verifies nothing."""
    assert verify.main(["--out", str(tmp_path)]) == 2
    assert verify.main(["--dry-run", "--only", "info|initcheck|bandwidth|tests of norm", "--out", str(tmp_path)]) == 0, (
        capsys.readouterr().out
    )
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    ran = {name: result["status"] for name, result in report["results"].items() if result["status"] != verify.LEFT}
    assert ran == dict.fromkeys(("info", "initcheck, cpu", "bandwidth, cpu", "tests of norm"), "dry run")
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# cram_kernels on a GPU: NOT VERIFIED") and "GPU: none: a dry run" in text


def test_a_gpu_has_every_step(tmp_path: Path) -> None:
    """Both backends under every sanitizer and every test of the ops; the files are there."""
    made = verify.steps(False, tmp_path)
    for name in verify.BACKENDS:
        assert {f"{tool}, {name}" for tool in verify.SANITIZERS} | {f"bandwidth, {name}"} <= set(made)
    files = [part for step in made.values() for part in step.command if part.startswith("tests/")]
    assert all((PATH.parents[2] / file).exists() for file in files)
    every_backend = re.compile(r"^def test_\w+\(backend\b", re.M)
    tests = [path for path in Path(__file__).parent.glob("test_*.py") if "inference" not in path.name]  # which is the CPU's alone
    users = {path.name for path in tests if every_backend.search(path.read_text())}
    assert users <= {Path(file).name for file in files}
