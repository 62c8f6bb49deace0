"""The Triton backend without a GPU: its kernels under Triton's interpreter, and what the compiler makes of them executed on the CPU.

Each in a process of its own: whether kernels are interpreted is settled when they are defined, and the executor becomes Triton's device.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cram_kernels import _triton
from cram_kernels.backend import BackendUnavailable, use_backend

HERE = Path(__file__).parent
OPS = [HERE / f"test_{op}.py" for op in ("topk", "nm", "perturb", "restore", "sgd", "adam", "norm", "histogram", "pack")]
# Of the op tests, what takes the interpreter two minutes: `make test-triton` runs all of them.
SOME = (
    "(test_perturb_topk_variants and bits-shapes) or (test_prune_topk and groups and (nan-shapes or ties-shapes or bits-orders)) or "
    "test_ordinary_weights or (test_a_threshold and fp32) or (test_perturb_nm and bits and 4-8) or (test_prune_nm and ties and 7-16) or "
    "(test_perturb_masked and bits-shapes) or (test_restore_combine and bits-shapes) or (test_restore and bits-orders) or "
    "(test_a_combination_a_tensor and (bits-shapes or denormal-scales)) or (test_bias_correction and 12345) or "
    "test_the_order_of_additions or (test_grad_norm and bits-shapes) or (test_first_digit and bits-shapes) or test_bytes or "
    "test_pack_and_unpack or (test_any_numbers and bits) or (test_nm_violations and bits and 7-16)"
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
    assert " passed" in run(*OPS, "-k", "triton" if ALL else f"triton and ({SOME})", TRITON_INTERPRET="1")


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
        assert (found[name]["loads 16 B"] > 0, found[name]["stores 16 B"] > 0, found[name]["spill bytes"]) == (wide, wide, 0)
    monkeypatch.setitem(triton_static.STREAMS, "restore_kernel", (1, 9))
    assert triton_static.main(arguments) == 1
    assert "FAULT: restore_kernel<bf16> on sm_90: wants 18 stores of 16 bytes, the machine code has 2" in capsys.readouterr().out


def test_without_a_gpu_it_explains_itself() -> None:
    if (reason := _triton.why_missing()) is None:
        pytest.skip("the Triton backend runs here; a machine without a GPU would run this")
    with pytest.raises(BackendUnavailable, match=r"backend 'triton' cannot run here: .*(TRITON_INTERPRET=1|pip install)") as error:
        use_backend("triton")
    assert reason in str(error.value)
