"""`python -m cram_kernels verify-gpu`, as far as it goes without a GPU: every line of it but those that talk to CUDA."""

import argparse
import ctypes
import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from cram_kernels import cli
from cram_kernels.verify import bandwidth, checks, command, machine, part, problems, programs, report
from cram_kernels.verify.report import FAILED, NOT_RUN, PASSED, Report, Section

ALL_BUT_TESTS = ["--only", *(step for step in command.STEPS if step != "tests")]


REASON = "there is a GPU here: verify-gpu verifies it"


@pytest.mark.skipif(torch.cuda.is_available(), reason=REASON)
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["verify-gpu"]) == command.CANNOT_RUN
    assert "finds no CUDA device; `--dry-run` executes what needs none" in capsys.readouterr().out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that end at once; `test_the_command_of_the_selection_runs` starts a real one."""

    def run(command: list[str], log: Path, limit: float, **environment: str) -> int:
        rows = [str(programs.selection_row(op, "cpu")) for op in command if op in problems.PROBLEMS]
        log.write_text("\n".join(rows))
        return 0

    monkeypatch.setattr(programs, "run", run)


def test_dry_run(quick, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["verify-gpu", "--dry-run", *ALL_BUT_TESTS, "--out", str(tmp_path)]) == command.OK, capsys.readouterr().out
    assert "DRY RUN: no GPU was used" in capsys.readouterr().out
    record = json.loads((tmp_path / "dry_run.json").read_text())
    sections = [s for s in record["sections"] if not s["step"].startswith("tests")]
    watched = [s["why"] for s in sections if s["step"].startswith("sanitizers")]
    assert record["dry_run"] and len(watched) == 4 * len(programs.OPS) and len(sections) - len(watched) == 17
    assert not [s for s in record["sections"] if s["status"] in (PASSED, FAILED)]  # nothing passed on a GPU, nothing broke
    for tool in programs.TOOLS:
        lines = " ".join(line for line in watched if f"--tool {tool}" in line)
        assert all(op in lines for op in problems.PROBLEMS)
    (times,) = [s["rows"] for s in record["sections"] if s["name"].startswith("bandwidth")]
    assert len(times) == len(bandwidth.TRAFFIC) * 3
    assert {row[column] for row in times for column in row if column not in ("op", "backend", "dtype", "bytes a weight")} == {"dry run"}
    markdown = (tmp_path / "dry_run.md").read_text()
    assert markdown.startswith("# cram_kernels on a GPU: DRY RUN") and "| restore_adam_ | cpu | float16 |" in markdown
    assert not (tmp_path / "verify_gpu.md").exists()


def test_every_op_has_a_problem() -> None:
    from compare import MUTATED

    assert set(problems.PROBLEMS) == set(MUTATED) and set(bandwidth.TRAFFIC) <= set(MUTATED)


def test_a_wrong_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = problems.call

    def wrong(op: str, arguments: problems.Arguments, name: str) -> object:
        result = right(op, arguments, name)
        if op == "restore_sgd_":
            arguments["params"][1].view(torch.int16 if arguments["params"][1].element_size() == 2 else torch.int32)[0] += 1
        return result

    dry = machine.Dry()
    monkeypatch.setattr(problems, "call", wrong)
    for check, names in ((checks.bits, 4), (checks.graphs, 2), (checks.streams, 1), (checks.selection, 1)):
        section = check(dry)
        bad = [row["what"] for row in section.rows if row["elements that differ"]]
        assert section.status == FAILED and len(bad) == names and all("restore_sgd_" in what for what in bad), section
    assert checks.second_device([dry, machine.Dry(1)]).status == FAILED
    assert checks.second_device([dry]).status == report.ABSENT


def test_a_section_that_raises_fails_alone(quick, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "bits", lambda machine, size: 1 / 0)
    monkeypatch.setattr(checks, "SIZES", ("many",))
    monkeypatch.setattr(part, "bandwidth", lambda machine, name: Section("bandwidth"))
    monkeypatch.setattr(part, "launches", lambda machine, name: Section("launches"))
    assert cli.main(["verify-gpu", "--dry-run", *ALL_BUT_TESTS, "--out", str(tmp_path)]) == command.NOT_VERIFIED
    sections = json.loads((tmp_path / "dry_run.json").read_text())["sections"]
    (raised,) = [s for s in sections if s["step"].startswith("bits: ")]
    assert raised["status"] == FAILED and "ZeroDivisionError" in raised["why"]
    assert FAILED not in [s["status"] for s in sections if s is not raised]


def test_steps_of_several_runs_make_one_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For a machine that stops a command after some minutes. What never ran is no success."""

    def run(*arguments: str) -> dict[str, str]:
        cli.main(["verify-gpu", "--dry-run", "--out", str(tmp_path), *arguments])
        return {s["step"]: s["status"] for s in json.loads((tmp_path / "dry_run.json").read_text())["sections"]}

    assert run("--only", "devices")["devices"] == report.DRY
    both = run("--only", "launches")
    assert {step.split(":")[0] for step in both} == set(command.STEPS)
    assert {step for step, status in both.items() if status != NOT_RUN} == {"devices", "launches: cpu"}
    monkeypatch.setattr(checks, "second_device", lambda found: 1 / 0)
    assert run("--only", "devices", "launches", "--continue") == both  # nothing is left to do
    monkeypatch.setattr(command, "hash_of_code", lambda tests: "of other code")
    changed = run("--only", "devices", "--continue")
    assert changed["devices"] == FAILED and changed["launches: cpu"] == NOT_RUN


@pytest.mark.parametrize("gpu, code, taken", [("one", "this", ["bits"]), ("another", "this", []), ("one", "other", [])])
def test_results_of_other_machines_and_code_are_left(tmp_path: Path, gpu: str, code: str, taken: list) -> None:
    made = Report(False, [{"GPU": "one"}], code="this")
    made.put("bits", [Section("bits")])
    made.write(tmp_path)
    later = Report(False, [{"GPU": gpu}], code=code)
    later.take_over(tmp_path)
    assert [s.step for s in later.sections] == taken


def test_the_hash_sees_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("cram_kernels/verify/report.py", "csrc/cuda/a.cu", "own/tests/test_it.py", "native_build.py", "built/libcram_kernels_cuda.so")
    sources = [tmp_path / name for name in names]
    others = [tmp_path / name for name in ("docs/a.py", "tests/test_it.py")]  # --tests names another folder
    for path in [*sources, *others]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    monkeypatch.setattr(report, "__file__", str(sources[0]))
    monkeypatch.setattr(report._native, "_FOLDER", tmp_path / "built")
    seen = [report.hash_of_code(tmp_path / "own/tests")]
    for path in sources:
        path.write_text("after")
        seen.append(report.hash_of_code(tmp_path / "own/tests"))
    for path in others:
        path.write_text("after")
    assert len(set(seen)) == 1 + len(sources) and report.hash_of_code(tmp_path / "own/tests") == seen[-1]


def test_the_driver_is_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nvml:
        status = 0

        def nvmlInit_v2(self) -> int:
            return self.status

        def nvmlSystemGetDriverVersion(self, text: ctypes.Array, length: int) -> int:
            assert length == 80
            text.value = b"580.65.06"
            return 0

    def missing(name: str) -> None:
        raise OSError(name)

    driver = machine.driver.__wrapped__
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Nvml())
    assert driver() == "580.65.06"
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    Nvml.status = 1
    assert driver() == "for CUDA 13000"
    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    assert driver() == "for CUDA 13000"
    gpu = machine.Gpu.__new__(machine.Gpu)
    gpu.properties = types.SimpleNamespace(name="", major=9, minor=0, multi_processor_count=1, total_memory=1, L2_cache_size=1)
    monkeypatch.setattr(machine, "driver", lambda: "another")
    assert gpu.facts()["driver"] == "another"


def test_a_report_is_written_after_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What stops the process in one part loses that part alone."""

    def stopped(found: list) -> Section:
        raise KeyboardInterrupt

    monkeypatch.setattr(checks, "second_device", stopped)
    monkeypatch.setattr(checks, "SIZES", ("many",))
    with pytest.raises(KeyboardInterrupt):
        cli.main(["verify-gpu", "--dry-run", "--out", str(tmp_path), "--only", "streams", "devices", "bandwidth"])
    sections = json.loads((tmp_path / "dry_run.json").read_text())["sections"]
    assert {s["step"]: s["status"] for s in sections if s["status"] != NOT_RUN} == {"streams: many": report.DRY}
    assert "| two streams, many" in (tmp_path / "dry_run.md").read_text()


def test_a_backend_that_is_missing_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.backend, "why_missing", lambda name: "not built" if name == "cuda" else None)
    section = checks.backends(machine.Dry())
    assert section.status == NOT_RUN and section.why == "cuda: not built"
    assert section.shown() == [{"backend": "cuda", "": "not built"}, {"backend": "triton", "": "available"}]


@pytest.mark.parametrize("status, verdict", [(PASSED, "VERIFIED"), (FAILED, "NOT VERIFIED: tests"), (NOT_RUN, "NOT VERIFIED: tests")])
def test_verdict(tmp_path: Path, status: str, verdict: str) -> None:
    made = Report(False, [{"GPU": "imagined"}], [Section("bits"), Section("tests", status)])
    assert made.verdict == verdict and made.ok() == (verdict == "VERIFIED")
    markdown, record = made.write(tmp_path)
    assert markdown.name == "verify_gpu.md" and f"GPU: {verdict}" in markdown.read_text()
    assert json.loads(record.read_text())["verdict"] == verdict


def test_a_file_of_tests_is_run(tmp_path: Path) -> None:
    folder, file = tmp_path / "tests", tmp_path / "tests" / "test_it.py"
    folder.mkdir()
    (folder / "conftest.py").touch()

    def run(text: str, dry_run: bool = False) -> Section:
        file.write_text(f"import pytest\n{text}\n")
        return programs.tests(file, tmp_path / "out", dry_run, 100)

    good = "def test_good(): pass"
    section = run(f"{good}\n@pytest.mark.skip(reason='there is a GPU here: x')\ndef test_skipped(): pass")
    assert section.status == PASSED and section.rows == [
        {"tests": 2, "failures": 0, "errors": 0, "skipped": 1},
        {"skipped": "there is a GPU here: x", "tests": 1, "allowed": True},
    ]
    assert run(good, dry_run=True).why == "dry run: collected only"
    section = run(f"{good}\n@pytest.mark.skip(reason='no CUDA device')\ndef test_on_a_gpu(): pass")
    assert section.status == NOT_RUN and "should run them: 1" in section.why and section.rows[1]["allowed"] is False
    section = run("pytest.importorskip('no_such_package')")
    assert section.status == NOT_RUN and "should run them: 1" in section.why
    assert run("").status == NOT_RUN
    section = run("@pytest.mark.skip(reason='there is a GPU here: x')\ndef test_skipped(): pass")  # on the list, but then nothing ran
    assert section.status == NOT_RUN and "no test of this file passed" in section.why
    section = run("def test_bad(): assert False")
    assert section.status == FAILED and "test_it.log, which ends: " in section.why and "1 failed" in section.why
    assert section.rows[0]["failures"] == 1


def test_the_tests_get_the_package_that_is_verified(tmp_path: Path) -> None:
    """Whatever lies beside them; and where they import another one all the same, they do not pass."""
    file, other = tmp_path / "tests" / "test_it.py", tmp_path / "cram_kernels" / "__init__.py"
    for path in (file, other):
        path.parent.mkdir()
    other.touch()
    file.write_text(f"import cram_kernels\ndef test_it(): assert cram_kernels.__file__ == {str(programs.PACKAGE / '__init__.py')!r}")
    section = programs.tests(file, tmp_path / "out", False, 100)
    assert section.status == PASSED, section.why
    clear = "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('cram_kernels')]"
    file.write_text(f"import sys\n{clear}\nsys.path.insert(0, {str(tmp_path)!r})\nimport cram_kernels\ndef test_it(): pass")
    section = programs.tests(file, tmp_path / "out", False, 100)
    assert section.status == FAILED and f"is verified, {programs.PACKAGE}" in section.why and f"import {other}" in section.why


def test_what_takes_too_long_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    sleeper = "import subprocess; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    start = time.monotonic()
    assert programs.run([sys.executable, "-c", sleeper], tmp_path / "log", 3.0) == programs.TIMED_OUT
    assert time.monotonic() - start < 30
    state = Path(f"/proc/{int((tmp_path / 'log').read_text())}/stat")
    time.sleep(0.5)
    assert not state.exists() or state.read_text().split()[2] == "Z"


class Imagined(machine.Dry):
    """What `steps` takes for a GPU: it is not dry, but its processes are."""

    dry = False

    def __init__(self) -> None:
        super().__init__()
        self.backends = ["cuda", "triton"]

    def facts(self) -> dict[str, str]:
        return {"GPU": "imagined"}


def test_what_runs_kernels_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def started(name: str, out: Path, dry_run: bool, limit: float) -> list[Section]:
        return [Section(f"{name}, {dry_run}, {limit:g}")]

    monkeypatch.setattr(programs, "part", started)
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    runs = command.steps(parser.parse_args(["--limit", "7"]), [Imagined()], tmp_path)
    own = [name for name in runs if name.split(":")[0] in ("bits", "graphs", "streams", "devices", "bandwidth", "launches")]
    assert own == list(part.parts([Imagined()])) and len(own) == 14
    assert [runs[name]()[0].name for name in own] == [f"{name}, False, 7" for name in own]


def test_a_part_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (section,) = programs.part("devices", tmp_path, True, 100)
    assert section.status == PASSED and {row["what"] for row in section.rows} == {f"{op}, cpu, on cpu" for op in problems.PROBLEMS}
    (section,) = programs.part("no such part", tmp_path, True, 100)
    assert section.status == FAILED and "its process ended with 1" in section.why and "KeyError: 'no such part'" in section.why
    assert not (tmp_path / "no_such_part.json").exists()


def test_a_part_that_hangs_or_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(script: str, limit: float) -> Section:
        (tmp_path / "bits_small.json").write_text("of an earlier run")
        monkeypatch.setattr(programs, "PART", ["sh", "-c", script])
        (section,) = programs.part("bits: small", tmp_path, False, limit)
        return section

    hung = run("echo a kernel; sleep 60", 1)
    assert (hung.name, hung.status) == ("bits: small", NOT_RUN) and "stopped after 1 s (--limit)" in hung.why and "a kernel" in hung.why
    killed = run("kill -9 $$", 100)
    assert killed.status == FAILED and "was killed by SIGKILL, not by --limit" in killed.why


def test_every_file_of_tests_is_a_part(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    parts = {name for name in command.steps(parser.parse_args(["--dry-run"]), [machine.Dry()], tmp_path) if name.startswith("tests: ")}
    own = Path(__file__).parent
    assert parts == {f"tests: {file.name}" for file in own.glob("test_*.py") if file not in own.glob("test_cuda_*.py")}
    assert "tests: test_topk.py" in parts and len(list(own.glob(programs.ELSEWHERE))) > 5
    (section,) = command.steps(parser.parse_args(["--tests", str(tmp_path)]), [machine.Dry()], tmp_path)["tests"]()
    assert section.status == NOT_RUN and f"no tests in {tmp_path}" in section.why


def test_skips_are_allowed_by_name() -> None:
    """Every reason that is allowed is one that some test gives."""
    given = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py") if path.name != Path(__file__).name) + REASON
    assert [reason for reason in programs.ALLOWED_SKIPS if reason not in given] == []
    assert not programs.is_allowed("no CUDA device: run these tests on a machine with an NVIDIA GPU")


ROW = str(programs.selection_row("restore_", "cuda"))
CLEAN = f"========= COMPUTE-SANITIZER\n{ROW}\n========= ERROR SUMMARY: 0 errors"
NO_HAZARDS = f"{ROW}\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"


@pytest.mark.parametrize(
    "tool, says, then, verdict, why",
    [
        ("memcheck", CLEAN, "exit 0", PASSED, ""),
        ("racecheck", NO_HAZARDS, "exit 0", PASSED, ""),
        ("initcheck", CLEAN, f"exit {programs.SANITIZER_ERROR}", FAILED, "ended with 86"),
        ("memcheck", "========= Error: Device not supported", "exit 0", FAILED, "did not say 'ERROR SUMMARY: 0 errors'"),
        ("memcheck", "Error: Device not supported\n========= ERROR SUMMARY: 0 errors", "exit 0", FAILED, f"has no line {ROW}"),
        ("memcheck", CLEAN.replace(": 0}", ": 10}"), "exit 0", FAILED, f"has no line {ROW}"),
        ("memcheck", f"{CLEAN}\n========= ERROR SUMMARY: 1 error", "exit 0", FAILED, "did not say"),
        ("memcheck", ROW, "exit 0", FAILED, "did not say"),
        ("racecheck", NO_HAZARDS.replace(": 0 h", ": 10 h"), "exit 0", FAILED, "did not say 'RACECHECK SUMMARY: 0 hazards'"),
        ("racecheck", CLEAN, "exit 0", FAILED, "did not say 'RACECHECK"),
        ("synccheck", CLEAN, "sleep 60", NOT_RUN, "stopped after 1 s (--limit)"),
        ("synccheck", CLEAN, "kill -9 $$", FAILED, "was killed by SIGKILL, not by --limit"),
    ],
)
def test_sanitizers_are_judged_by_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, says: str, then: str, verdict: str, why: str
) -> None:
    program = tmp_path / "compute-sanitizer"
    (tmp_path / "says").write_text(f"{says}\n")
    program.write_text(f'#!/bin/sh\necho "$@"\ncat {tmp_path / "says"}\n{then}\n')
    program.chmod(0o755)
    monkeypatch.setattr(programs, "find_sanitizer", lambda: str(program))
    limit = 1 if "sleep" in then else 100
    section = programs.sanitizer(tool, ["restore_"], ["cuda"], "other", tmp_path, False, limit)
    assert section.status == verdict and why in section.why, section
    log = (tmp_path / f"{tool}_other.log").read_text()
    assert f"--tool {tool} --error-exitcode 86 --target-processes all" in log and "cram_kernels.verify.selection restore_" in log


def test_a_backend_that_the_sanitizer_did_not_see_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], log: Path, limit: float, **environment: str) -> int:
        log.write_text(CLEAN)
        return 0

    monkeypatch.setattr(programs, "run", run)
    monkeypatch.setattr(programs, "find_sanitizer", lambda: "compute-sanitizer")
    section = programs.sanitizer("memcheck", ["restore_"], ["cuda", "triton"], "other", tmp_path, False, 100)
    assert section.status == FAILED and "no line {'what': 'restore_, triton'" in section.why


def test_without_a_sanitizer_it_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find_sanitizer", lambda: None)
    assert programs.sanitizer("memcheck", ["restore_"], ["cuda"], "other", tmp_path, False, 100).status == NOT_RUN


def test_timing_takes_the_buffers_in_turn() -> None:
    order: list[str] = []
    runs = [lambda name=name: order.append(name) for name in "ab"]
    resets = [lambda name=name: order.append(f"reset {name}") for name in "ab"]
    times = bandwidth.timed(machine.Dry(), runs, resets)
    assert len(times) == bandwidth.ROUNDS and set(times) == {1.0}
    assert order[:4] == ["reset a", "a", "reset b", "b"] and len(order) == 2 * (bandwidth.WARMUP + bandwidth.ROUNDS)


def test_figures_of_a_gpu_are_text() -> None:
    row = bandwidth.cells(False, "restore_", "cuda", torch.float32, 8.0, 8 * 10**9, [5.0, 5.0, 5.0], [4.0, 4.0, 4.0], [3.0, 3.0, 3.0])
    assert row["ms, graph"] == "4.0000" and row["GB/s, graph"] == "2000" and row["share of copy"] == "75.0%" and row[">= 85%"] == "MISSED"


def test_the_names_that_a_gpu_is_asked_for_exist() -> None:
    """What `Gpu` uses of torch.cuda is there, in this torch."""
    for name in ("Event", "Stream", "CUDAGraph", "graph", "device", "stream", "get_sync_debug_mode", "set_sync_debug_mode"):
        assert hasattr(torch.cuda, name), name
    assert hasattr(torch._C, "_cuda_getDriverVersion") or torch.version.cuda is None
    stub = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    for name in ("multi_processor_count", "total_memory", "L2_cache_size"):
        assert f"    {name}: " in stub, name


def test_the_command_of_the_selection_runs(tmp_path: Path) -> None:
    """And prints the rows for which `sanitizer` looks."""
    assert "dry run: " in programs.sanitizer("memcheck", ["perturb_topk_"], ["cpu"], "selecting", tmp_path, True, 100).why
    assert programs.sanitizer("memcheck", ["perturb_topk_"], ["cuda"], "selecting", tmp_path, True, 100).status == FAILED
