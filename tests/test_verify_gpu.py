"""`python -m cram_kernels verify-gpu`, as far as it goes without a GPU: every line of it but those that talk to CUDA."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from cram_kernels import cli
from cram_kernels.verify import bandwidth, checks, command, machine, problems, programs, report
from cram_kernels.verify.report import FAILED, NOT_RUN, PASSED, Report, Section

ALL_BUT_TESTS = ["--only", *(step for step in command.STEPS if step != "tests")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: verify-gpu verifies it")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["verify-gpu"]) == command.CANNOT_RUN
    assert "finds no CUDA device; `--dry-run` executes what needs none" in capsys.readouterr().out


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["verify-gpu", "--dry-run", *ALL_BUT_TESTS, "--out", str(tmp_path)]) == command.OK, capsys.readouterr().out
    assert "DRY RUN: no GPU was used" in capsys.readouterr().out
    record = json.loads((tmp_path / "dry_run.json").read_text())
    assert record["dry_run"] and len(record["sections"]) == 14
    assert not [s for s in record["sections"] if s["status"] in (PASSED, FAILED)]  # nothing passed on a GPU, nothing broke
    commands = [s["why"] for s in record["sections"] if s["name"].startswith("compute-sanitizer")]
    assert [tool in line for tool, line in zip(programs.TOOLS, commands, strict=True)] == [True] * 4
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
    for check, names in ((checks.bits, 6), (checks.graphs, 2), (checks.streams, 1), (checks.selection, 1)):
        section = check(dry)
        bad = [row["what"] for row in section.rows if row["elements that differ"]]
        assert section.status == FAILED and len(bad) == names and all("restore_sgd_" in what for what in bad), section
    assert checks.second_device([dry, machine.Dry(1)]).status == FAILED
    assert checks.second_device([dry]).status == report.ABSENT


def test_a_section_that_raises_fails_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks, "bits", lambda machine: 1 / 0)
    monkeypatch.setattr(programs, "sanitizers", lambda out, dry_run: [])
    monkeypatch.setattr(command, "bandwidth", lambda machine: Section("bandwidth"))
    monkeypatch.setattr(command, "launches", lambda machine: Section("launches"))
    assert cli.main(["verify-gpu", "--dry-run", *ALL_BUT_TESTS, "--out", str(tmp_path)]) == command.NOT_VERIFIED
    sections = json.loads((tmp_path / "dry_run.json").read_text())["sections"]
    (first,) = [s for s in sections if s["step"] == "bits"]
    others = [s for s in sections if s["step"] != "bits"]
    assert first["status"] == FAILED and "ZeroDivisionError" in first["why"] and FAILED not in [s["status"] for s in others]


def test_steps_of_several_runs_make_one_report(tmp_path: Path) -> None:
    """For a machine that stops a command after some minutes. What never ran is no success."""

    def run(*steps: str) -> dict[str, str]:
        cli.main(["verify-gpu", "--dry-run", "--out", str(tmp_path), "--only", *steps])
        return {s["step"]: s["status"] for s in json.loads((tmp_path / "dry_run.json").read_text())["sections"]}

    assert run("devices")["devices"] == report.DRY
    both = run("streams")
    assert set(both) == set(command.STEPS) and [step for step, status in both.items() if status == NOT_RUN] == [
        step for step in command.STEPS if step not in ("devices", "streams")
    ]
    made = Report(False, [{"GPU": "another"}])
    made.put("bits", [Section("bits")])
    made.write(tmp_path)
    other = Report(False, [{"GPU": "imagined"}])
    other.take_over(tmp_path)  # of another machine
    assert other.sections == []
    made.take_over(tmp_path)
    assert [s.step for s in made.sections] == ["bits"]


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


def test_the_tests_are_run(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    assert "no tests in" in programs.tests(folder, tmp_path, False).why and programs.tests(folder, tmp_path, False).status == NOT_RUN
    folder.mkdir()
    (folder / "conftest.py").touch()
    (folder / "test_it.py").write_text("import pytest\ndef test_good(): pass\n@pytest.mark.skip(reason='no')\ndef test_skipped(): pass\n")
    section = programs.tests(folder, tmp_path / "out", False)
    assert section.status == PASSED and section.rows == [
        {"tests": 2, "failures": 0, "errors": 0, "skipped": 1},
        {"skipped": "no", "tests": 1},
    ]
    assert programs.tests(folder, tmp_path / "out", True).why == "dry run: collected only"
    (folder / "test_it.py").write_text("import pytest\n@pytest.mark.skip(reason='no')\ndef test_on_a_gpu(): pass\n")
    section = programs.tests(folder, tmp_path / "out", False)
    assert section.status == NOT_RUN and "on_a_gpu was skipped" in section.why
    (folder / "test_it.py").write_text("def test_bad(): assert False\n")
    section = programs.tests(folder, tmp_path / "out", False)
    assert (
        section.status == FAILED
        and "tests.log, which ends: " in section.why
        and "1 failed" in section.why
        and section.rows[0]["failures"] == 1
    )


def test_sanitizers_are_judged_by_their_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find_sanitizer", lambda: None)
    assert {s.status for s in programs.sanitizers(tmp_path, False)} == {NOT_RUN}
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$@"\n[ "$2" != racecheck ] || exit {programs.SANITIZER_ERROR}\n')
    program.chmod(0o755)
    monkeypatch.setattr(programs, "find_sanitizer", lambda: str(program))
    assert [s.status for s in programs.sanitizers(tmp_path, False)] == [PASSED, FAILED, PASSED, PASSED]
    assert "--tool initcheck --error-exitcode 86 --target-processes all" in (tmp_path / "initcheck.log").read_text()


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
    stub = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    for name in ("multi_processor_count", "total_memory", "L2_cache_size"):
        assert f"    {name}: " in stub, name


def test_the_command_of_the_selection_runs(tmp_path: Path) -> None:
    result = subprocess.run([*programs.SELECTION, "--dry-run"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "perturb_topk_" in result.stdout, result.stderr
