"""Every benchmark runs (`--quick`), writes finite numbers, and writes and prints none where a check is red or the backend cannot run."""

import importlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cram_kernels import ops
from cram_kernels.backend import chosen, why_missing
from cram_kernels.patterns import Pattern

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import gate, host, inputs, memory, run, shapes, step  # noqa: E402
from benchmarks.measure import Contest, Contestant, Setup, ratio  # noqa: E402

OTHERS = ("instructions", "suite")  # which tests of their own run
NAMES = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if "run.main(" in p.read_text() and p.stem not in OTHERS)
# A column that every row must have; else x_copy.
NUMBERS = {"adversarial": "x_ours", "end_to_end": "optimizer_ms", "growth": "median_ms", "host": "calls", "memory": "held"}

pytestmark = pytest.mark.skipif(why_missing("cpu") is not None, reason=f"the cpu backend cannot run here: {why_missing('cpu')}")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def main(name: str, folder: Path, *options: str) -> int:
    module = importlib.import_module(f"benchmarks.{name}")
    arguments = ["--quick", "--threads", "1", "--out", str(folder), *options]
    return module.main(arguments) if hasattr(module, "main") else run.main(name, module.cases(), arguments)


def numbers(x: object) -> Iterator[float]:
    if isinstance(x, dict | list):
        for value in x.values() if isinstance(x, dict) else x:
            yield from numbers(value)
    elif isinstance(x, int | float):
        yield x


def test_every_op_has_a_benchmark() -> None:
    assert {"adversarial", "growth", "host", "memory", "step"} < set(NAMES)
    assert {name for name in NAMES if name.startswith("bench_")} == {
        "bench_" + path.stem.removeprefix("test_")
        for path in (ROOT / "tests").glob("test_*.py")
        if path.stem.removeprefix("test_") in ("topk", "nm", "perturb", "restore", "sgd", "adam", "norm")
    }


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(name, tmp_path) == run.OK, capsys.readouterr().out
    record = json.loads((tmp_path / f"{name}.json").read_text())
    cases = list(importlib.import_module(f"benchmarks.{name}").cases())
    assert [result["case"] for result in record["results"]] == [case.name for case in cases]
    assert record["quick"] is True and record["red"] == []
    assert {"torch", "numpy", "compiler", "SIMD level", "CPU", "threads"} <= record["environment"].keys()
    for result in record["results"]:
        assert result["rows"], result["case"]
        for row in result["rows"]:
            assert NUMBERS.get(name, "x_copy") in row, (result["case"], row)
    found = list(numbers(record))
    assert found and all(math.isfinite(x) for x in found)
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in cases)


def test_red_check_prints_no_number(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.grad_norm
    monkeypatch.setattr(ops, "grad_norm", lambda grads: right(grads).nextafter(torch.tensor(math.inf)))
    assert main("bench_norm", tmp_path) == run.RED
    record = json.loads((tmp_path / "bench_norm.json").read_text())
    assert record["results"] == [] and len(record["red"]) == 4
    assert "1 of 1 elements differ" in record["red"][0]["why"]
    printed = capsys.readouterr().out
    assert printed.count("RED, not measured") == 4
    assert "median" not in printed and "GB/s" not in printed


def test_red_check_of_one_case_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right on the small input and wrong on the one that is timed: one mask bit too many."""
    right = ops.prune_topk_

    def wrong(weights, masks, sets, k):
        result = right(weights, masks, sets, k)
        if sum(w.numel() for w in weights) > 10_000:
            masks[-1][0] ^= 1
        return result

    monkeypatch.setattr(ops, "prune_topk_", wrong)
    assert main("bench_topk", tmp_path, "--only", "BERT-base 90 %") == run.RED
    record = json.loads((tmp_path / "bench_topk.json").read_text())
    assert [result["case"] for result in record["results"]] == ["perturb_topk_ BERT-base 90 %"]
    assert [red["case"] for red in record["red"]] == ["prune_topk_ BERT-base 90 %"]
    assert "masks[" in record["red"][0]["why"]


@pytest.mark.parametrize("what", ["red", "none chosen", "op refuses"])
def test_nothing_of_an_earlier_run_stays(what: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that raises makes its case red, like one that is wrong; the cases behind it take their turn."""
    earlier = tmp_path / "bench_norm.json"
    earlier.write_text("of an earlier run")
    right = ops.grad_norm

    def refuse(grads):
        raise RuntimeError("grad_norm: no memory")

    if what != "none chosen":
        monkeypatch.setattr(ops, "grad_norm", refuse if what == "op refuses" else lambda grads: right(grads) * 2)
    ended = main("bench_norm", tmp_path, *(["--only", "no such case"] if what == "none chosen" else []))
    assert ended == (run.CANNOT_RUN if what == "none chosen" else run.RED)
    printed = capsys.readouterr().out
    assert "median" not in printed and "GB/s" not in printed
    if what == "none chosen":
        assert list(tmp_path.iterdir()) == []
        return
    record = json.loads(earlier.read_text())
    assert list(tmp_path.iterdir()) == [earlier]
    assert record["results"] == [] and len(record["red"]) == 4
    assert what == "red" or {red["why"] for red in record["red"]} == {"grad_norm: no memory"}


def fill_nan(op):
    """The op, and then NaN in all parameters."""

    def wrong(params, *args, **kwargs):
        op(params, *args, **kwargs)
        for p in params:
            p.data.fill_(math.nan)

    return wrong


@pytest.mark.parametrize("name, case", [("step", "ResNet-50 SGD 90 %"), ("memory", "ResNet-50 SGD 90 %")])
def test_nan_after_a_step_is_red(name: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "restore_sgd_", fill_nan(ops.restore_sgd_))
    assert main(name, tmp_path, "--only", case) == run.RED
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["results"] == []
    assert all("after a step" in red["why"] for red in record["red"])


@pytest.mark.parametrize("name", memory.KINDS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_checks_every_contestant(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in turn takes a step that is off by one weight."""
    kind = memory.KINDS[name]

    class Wrong(kind):
        def update(self) -> None:
            super().update()
            if chosen() != "reference":
                self.params[0].data.view(-1)[0] += 0.5

    monkeypatch.setitem(memory.KINDS, name, Wrong)
    contest = memory.Memory("90 %", dtype, Setup(quick=True))
    if name in contest.names():
        with pytest.raises(AssertionError, match="params\\[0\\]"):
            contest.check()
    else:
        contest.check()


@pytest.mark.parametrize("pattern", step.PATTERNS, ids=str)
def test_compiled_update_is_the_eager_one(pattern: Pattern) -> None:
    """Restore, masked sum and SGD in one function: the weights and buffers of several steps, the gradients as they were."""
    lists = [
        inputs.tensors(Setup(quick=True).shapes("ResNet-50"), role, torch.float32, "cpu") for role in ("params", "first_grads", "grads")
    ]
    eager, compiled = step.EagerStep(pattern, "SGD", *lists), step.CompiledStep(pattern, lambda f: f, *lists)
    for _ in range(3):
        eager.refresh()
        eager()
        compiled()
    for i, (a, b) in enumerate(zip(eager.params, compiled.params, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=f"params[{i}]")
        torch.testing.assert_close(eager.optimizer.state[a]["momentum_buffer"], compiled.buffers[i], rtol=1e-5, atol=1e-5)
        assert torch.equal(compiled.grads[i], lists[2][i])


def test_a_backend_that_cannot_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    missing = [name for name in ("cuda", "triton") if why_missing(name) is not None]
    if not missing:
        pytest.skip("every backend runs here: run on a machine without a GPU")
    for name in missing:
        assert main("bench_norm", tmp_path, "--backend", name) == run.CANNOT_RUN
        assert capsys.readouterr().err == f"bench_norm: backend {name} cannot run here: {why_missing(name)}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "model, tensors, weights, prunable",
    [("ResNet-50", 161, 25_557_032, 54), ("BERT-base", 199, 109_482_240, 76), ("ViT-B", 152, 86_567_656, 52)],
)
def test_shapes(model: str, tensors: int, weights: int, prunable: int) -> None:
    found = shapes.MODELS[model]()
    assert len(found) == tensors
    assert sum(math.prod(shape) for shape in found) == weights
    assert sum(len(shape) > 1 for shape in found) == prunable


def test_ranks_refuse_a_threshold_that_is_not_the_kth() -> None:
    u = torch.tensor([3.0, -2.0, 2.0, 1.0])  # keys in descending order: 3, 2, 2, 1
    key = int(torch.tensor(2.0).view(torch.int32))
    for threshold, k, right in [(key, 1, False), (key, 2, True), (key, 3, True), (key, 4, False), (key - 1, 3, False), (key + 1, 2, False)]:
        ranks = gate.Ranks(threshold)
        ranks.keep(u)
        if right:
            ranks.check(k, "test")
        else:
            with pytest.raises(AssertionError, match="is not the"):
                ranks.check(k, "test")


def test_ratios_are_within_rounds() -> None:
    """A machine that is ten times slower in one round slows both; the targets are bounds on the time over ours, per byte."""
    assert ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0]) == 2.0
    contest = Contest([Contestant("ours", int), Contestant("half", int, bound=(1.5, math.inf), bytes=50)], 100, "bytes", 10)
    times = {"ours": [1.0, 10.0], "half": [1.0, 10.0], "copy_": [0.5, 5.0]}
    row = contest._row(contest.contestants[1], times, "copy_")
    assert (row["x_ours"], row["x_copy"], row["met"], row["target"]) == (2.0, 4.0, True, ">= 1.5")


def test_streaming_copy() -> None:
    """Every alignment and split: the bytes arrive, and nothing beside them changes."""
    from cram_kernels import _native

    for size in (0, 1, 63, 64, 65, 1000, 4099):
        for shift in (0, 1, 17):
            for threads in (1, 2, 3):
                source = torch.randint(0, 256, (size + 8,), dtype=torch.uint8)
                target = torch.full((size + 200,), 7, dtype=torch.uint8)
                expected = target.clone()
                expected[50 + shift : 50 + shift + size] = source[3 : 3 + size]
                _native.host.streaming_copy(target.data_ptr() + 50 + shift, source.data_ptr() + 3, size, threads)
                assert torch.equal(target, expected), (size, shift, threads)
    with pytest.raises(RuntimeError, match="threads must be at least 1"):
        _native.host.streaming_copy(target.data_ptr(), source.data_ptr(), 1, 0)


def test_memory_in_a_process_of_its_own() -> None:
    found = memory.Memory("90 %", "fp32", Setup(quick=True)).measure("cram_kernels")
    assert found.keys() == {"between", "held", "peak"}
    # Resident pages: at the quick shapes about 20 of them, of which the allocator reuses some, so that their order means nothing yet.
    assert found["held"] > 0 and found["between"] > 0


def test_setup_names_the_device() -> None:
    assert [Setup(backend).device for backend in ("cpu", "cuda", "triton")] == ["cpu", "cuda", "cuda"]


VALGRIND = """#!/bin/sh
for option; do case $option in --callgrind-out-file=*) out=${option#*=};; --*) ;; *) break;; esac; shift; done
printed=$("$@") || exit
echo "$printed"
for pid in $(echo "$printed" | tail -n 1 | grep -o ': [0-9]*' | cut -c3-); do echo "totals: COUNTED" > $(dirname $out)/$pid; done
"""


@pytest.mark.parametrize("counted", [6912, 0])
def test_instructions(counted: int, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for valgrind, under which torch's import takes a minute: runs what it is given, leaves profiles."""
    from benchmarks import instructions

    program = tmp_path / "valgrind"
    program.write_text(VALGRIND.replace("COUNTED", str(counted)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(instructions, "CONVOLUTION", [(16, 16, 3, 3)] * 3)
    monkeypatch.setitem(instructions.CASES, "3 x 3 convolutions, fp32", instructions.convolutions())
    status = main("instructions", tmp_path, "--only", "3 x 3")
    record = json.loads((tmp_path / "instructions.json").read_text())
    if counted == 0:
        assert status == run.RED and "must have counted some of perturb_nm_ 2:4, got none" in record["red"][0]["why"]
        return
    assert status == run.OK, capsys.readouterr().out
    rows = record["results"][0]["rows"]
    assert [row["name"] for row in rows] == list(instructions.CASES["3 x 3 convolutions, fp32"])
    assert all(row["instructions_a_weight"] == 1 for row in rows)


def test_instructions_without_valgrind(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main("instructions", tmp_path) == run.CANNOT_RUN
    assert capsys.readouterr().out == "instructions: needs valgrind, which is not on PATH\n"


def test_a_step_of_many_parameters_makes_few_calls() -> None:
    """Calls do not depend on the machine; the time that they take is measured, not asserted."""
    calls = host.Host("SGD", 161)
    calls.step()
    found = calls.calls()
    assert 0 < found["perturb()"] + found["step()"] <= host.MOST_CALLS
    assert found["fused"] > 161
