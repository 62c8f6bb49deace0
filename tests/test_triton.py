"""The Triton backend without a GPU: its kernels under Triton's interpreter, and what the compiler makes of them executed on the CPU.

Each in a process of its own: whether kernels are interpreted is settled when they are defined, and the executor becomes Triton's device.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from compare import map_tensors, named_tensors
from test_schema import SAMPLES

from cram_kernels import _registration, _triton, backend, ops
from cram_kernels.backend import BackendUnavailable, use_backend

HERE = Path(__file__).parent
OPS = [HERE / f"test_{op}.py" for op in ("topk", "nm", "perturb", "restore", "sgd", "adam", "norm", "histogram")]
# Of the op tests, what takes the interpreter two minutes: `make test-triton` runs all of them.
SOME = (
    "(test_perturb_topk_variants and bits-shapes) or (test_prune_topk and groups and (nan-shapes or ties-shapes or bits-orders)) or "
    "test_ordinary_weights or (test_a_threshold and fp32) or (test_heavy_ties and fp32-last-0) or (test_a_pruned_model and bf16) or "
    "(test_perturb_nm and bits and 4-8) or (test_prune_nm and ties and 7-16) or "
    "(test_perturb_masked and bits-shapes) or (test_restore_combine and bits-shapes) or (test_restore and bits-orders) or "
    "(test_a_combination_a_tensor and (bits-shapes or denormal-scales)) or test_the_opposite or (test_bias_correction and 12345) or "
    "test_the_order_of_additions or (test_grad_norm and bits-shapes) or (test_first_digit and bits-shapes)"
)
missing = None if importlib.util.find_spec("triton") else "the package triton is not installed: `pip install 'cram_kernels[triton]'`"
PTXEMU = os.environ.get("CRAM_KERNELS_PTXEMU", "")
needs_triton = pytest.mark.skipif(missing is not None, reason=str(missing))
needs_executor = pytest.mark.skipif(
    not (Path(PTXEMU or "/nowhere") / "tritonemu.py").exists() or shutil.which("g++") is None,
    reason="CRAM_KERNELS_PTXEMU names no folder with an executor of compiled Triton kernels (tritonemu.py), or there is no g++",
)
ALL = os.environ.get("CRAM_KERNELS_ALL_TRITON_TESTS") == "1"  # `make test-triton`


def run(*arguments: object, **environment: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", *map(str, arguments)]
    result = subprocess.run(command, cwd=HERE.parent, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout


@needs_triton
def test_interpreted() -> None:
    """The contract's adversarial cases, to the bit."""
    chosen = ("triton", "-n", "logical", "--maxprocesses", "8", "--dist", "load") if ALL else (f"triton and ({SOME})",)
    assert " passed" in run(*OPS, "-k", *chosen, TRITON_INTERPRET="1")


@needs_triton
def test_interpreted_as_torch_ops() -> None:
    """torch.compile, version counters, refusals: through the dispatcher, as every user calls them."""
    assert " passed" in run(HERE / "triton_ops.py", TRITON_INTERPRET="1")


@needs_triton
@needs_executor
def test_compiled_code_executed() -> None:
    """What the compiler emits, bfloat16 too, to the bit; with race detection, weak memory and other orders."""
    assert " passed" in run(HERE / "triton_compiled.py")


@needs_triton
@needs_executor
@pytest.mark.skipif(not ALL, reason="takes many minutes: `make test-triton` runs it")
@pytest.mark.parametrize("file", OPS, ids=lambda file: file.stem)
def test_all_compiled_code_executed(file: Path) -> None:
    """The contract's adversarial cases, to the bit."""
    assert " passed" in run(file, "-k", "triton_executed", CRAM_KERNELS_TRITON_EXECUTED="1")


@needs_triton
def test_static_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """For NVIDIA and AMD; a kernel without the 16-byte accesses that it should have is a fault."""
    from benchmarks import triton_static

    arguments = [
        "--dtypes",
        "bf16",
        "--archs",
        "90",
        "--amd",
        "gfx942",
        "--only",
        "restore_kernel<bf16",
        "--jobs",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert triton_static.main(arguments) == 0
    record = json.loads((tmp_path / "triton_static.json").read_text())
    assert [len(record[maker]) for maker in ("nvidia", "amd", "faults")] == [4, 4, 0]
    found = {row["name"]: row for row in record["nvidia"]}
    for name, wide in (("restore_kernel<bf16>", True), ("restore_kernel<bf16 unaligned>", False)):
        assert (found[name]["loads 16 B"] > 0, found[name]["stores 16 B"] > 0, found[name]["local"]) == (wide, wide, 0)


@needs_triton
def test_static_report_of_nothing(capsys: pytest.CaptureFixture) -> None:
    from benchmarks import triton_static

    with pytest.raises(SystemExit) as error:
        triton_static.main(["--dtypes", "bf16", "--archs", "90", "--amd", "--only", "nosuch"])
    assert error.value.code == 2 and "--only: no kernel of 90 has 'nosuch' in its name" in capsys.readouterr().err


@needs_triton
@pytest.mark.parametrize(
    "op, file, access, fault",
    [
        ("restore_", "restore", "tl.store(column(row, PARAM, start, T, ALIGNED)", "restore_kernel<bf16> on sm_90: wants 1 stores"),
        ("restore_adam_", "adam", "tl.load(largest", "restore_adam_kernel<bf16 masters> on sm_90: wants 10 loads"),
        ("restore_adam_", "adam", "tl.store(second", "restore_adam_kernel<bf16 masters> on sm_90: wants 9 stores"),
    ],
)
def test_static_report_sees_a_narrow_access(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, op: str, file: str, access: str, fault: str
) -> None:
    """One access of a kernel as it is, made without what the compiler has to know for 16 bytes."""
    from benchmarks import triton_static

    text = Path(triton_static.kernels.__file__).with_name(f"{file}.py").read_text()
    narrow = access.replace("ALIGNED", "False") if "ALIGNED" in access else f"{access} + (options >> 62)"
    assert access in text
    (tmp_path / f"{file}.py").write_text(text.replace(access, narrow, 1))
    spec = importlib.util.spec_from_file_location(f"cram_kernels.triton.narrow_{file}", tmp_path / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(triton_static.kernels, op, getattr(module, op))
    name = fault[: fault.index(" on")]
    arguments = ["--dtypes", "bf16", "--archs", "90", "--amd", "--only", name, "--jobs", "1", "--out", str(tmp_path)]
    assert triton_static.main(arguments) == 1
    assert f"FAULT: {fault} of 16 bytes, the machine code has" in capsys.readouterr().out


@needs_triton
@pytest.mark.parametrize(
    "version, refused", [("3.5.1", True), ("2.12.0", True), ("3.6.0", False), ("3.10.0+git1234", False), ("4.0", False)]
)
def test_the_version_of_triton(monkeypatch: pytest.MonkeyPatch, version: str, refused: bool) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    reason = f"the kernels need triton 3.6 or later, got {version}: `pip install 'triton>=3.6'`"
    assert _triton._too_old() == (reason if refused else None)
    monkeypatch.setattr(_triton, "INTERPRETED", True)
    if refused:
        assert _triton._load() == reason
    elif version == "3.6.0":
        monkeypatch.setattr(numpy, "__version__", "2.4.0")
        reason = "triton 3.6's interpreter needs numpy before 2.4, got 2.4.0: `pip install 'numpy<2.4'` or a later triton"
        assert _triton._load() == reason


@pytest.fixture(scope="module")
def registered() -> SimpleNamespace:
    """The Triton ops, known to torch though they may not be able to run."""
    if _triton.why_missing() is not None:
        from cram_kernels import triton as kernels

        _triton._register(kernels)
    return _registration.direct(_triton.NAMESPACE)


@needs_triton
@pytest.mark.skipif(_triton.INTERPRETED, reason="TRITON_INTERPRET is set: triton_ops.py runs these")
@pytest.mark.parametrize("op", SAMPLES)
def test_traced_for_a_gpu(registered: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """torch.compile on fake tensors of a GPU: no break, one node, and results as on the CPU."""
    monkeypatch.setattr(backend, "_triton_ops", registered)
    monkeypatch.setattr(_triton, "why_missing", lambda: None)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def on_a_gpu(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    with torch._subclasses.FakeTensorMode(), use_backend("triton"):
        arguments = map_tensors(SAMPLES[op](), on_a_gpu)
        results = torch.compile(getattr(ops, op), fullgraph=True, backend=keep)(**arguments)
    expected = getattr(ops, op)(**SAMPLES[op]())
    for (_, fake), (_, real) in zip(named_tensors(results, "result"), named_tensors(expected, "result"), strict=True):
        assert (fake.shape, fake.dtype, fake.device.type) == (real.shape, real.dtype, "cuda")
    (graph,) = graphs
    assert [node.target.name() for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)] == [
        f"{_triton.NAMESPACE}::{op}"
    ]


class Gpu:
    """What `table.constant` asks of a GPU, without one."""

    type = "cuda"

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from cram_kernels.triton import table

        self.stream, self.capturing = 1, False
        self.pinned: list[int] = []
        self.sent: list[torch.Tensor] = []
        self.table = table
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=self.stream))
        patch.setattr(torch.Tensor, "pin_memory", lambda t: self.pin(t.numel()) is None or t)
        patch.setattr(table, "pin", self.pin)
        patch.setattr(table, "send", lambda pinned, device: self.sent.append(pinned) or pinned.clone())
        for name, empty in (("_constants", {}), ("_captured", []), ("_reserve", table.Reserve())):
            patch.setattr(table, name, empty)

    def pin(self, size: int) -> torch.Tensor:
        assert not self.capturing, "pinned memory is allocated while a stream is captured"
        self.pinned.append(size)
        return torch.zeros(size, dtype=torch.uint8)

    def rows(self, first: int) -> torch.Tensor:
        numbers = list(range(first, first + 2 * self.table.WIDTH.value))
        found = self.table.constant(self.table.upload_rows, self, array("q", numbers).tobytes())
        assert found.flatten().tolist() == numbers
        return found

    def chunks(self) -> torch.Tensor:
        return self.table.constant(self.table.upload_chunks, self, (3000, 40), (0, 1), (True, True), (1024, 1024), 8)


@needs_triton
def test_a_capture_allocates_no_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of sizes come from the calls before it, on whatever stream; those of new addresses from memory set aside."""
    gpu = Gpu(monkeypatch)
    known, chunks = gpu.rows(0), gpu.chunks()
    sent = len(gpu.sent)
    assert gpu.rows(0) is known and gpu.chunks() is chunks and len(gpu.sent) == sent  # nothing is sent twice
    gpu.capturing, gpu.stream = True, 2
    assert gpu.rows(0) is known and gpu.chunks() is chunks and len(gpu.sent) == sent
    new = [gpu.rows(first) for first in range(1, 1 + gpu.table.ROWS_IN_RESERVE)]
    assert len(gpu.sent) == sent + len(new)
    for first, pinned in enumerate(gpu.sent[sent:], 1):  # a replay copies again: each has bytes of its own
        assert int(pinned[0, 0]) == first
    with pytest.raises(
        RuntimeError, match=r"a table of 256 bytes .* stream is captured.* 0 bytes are left: run the same calls once outside"
    ):
        gpu.rows(-1)
    gpu.capturing = False
    gpu.rows(0)
    gpu.capturing = True
    gpu.rows(-1)


@needs_triton
def test_a_capture_without_a_call_before_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="run the same calls once outside of a capture first"):
        gpu.rows(0)


def test_without_a_gpu_it_explains_itself() -> None:
    if (reason := _triton.why_missing()) is None:
        pytest.skip("the Triton backend runs here; a machine without a GPU would run this")
    with pytest.raises(BackendUnavailable, match=r"backend 'triton' cannot run here: .*(TRITON_INTERPRET=1|pip install)") as error:
        use_backend("triton")
    assert reason in str(error.value)
