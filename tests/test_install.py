"""What a user meets before the first step: the import, `info`, the choice of a backend, and what is said where something is missing."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import BACKENDS
from executor import why_missing as why_not_executed

from cram_kernels import BackendUnavailable, cli, ops, use_backend
from cram_kernels.backend import available

ROOT = Path(__file__).parent.parent
ADD = "import torch, cram_kernels.ops as o; w = [torch.ones(4, 4)]; o.prune_topk_(w, [], [0], torch.tensor([3])); print(int(w[0].sum()))"


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run([*forked.python(), "-c", code], environment)


def new_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Which has imported nothing."""
    return run([sys.executable, "-c", code], environment)


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_runs_here(name: str) -> None:
    """One skip that stands for every op test of a backend that cannot run on this machine."""
    if (reason := available()[name]) is not None:
        assert name != "cpu" and os.environ.get("CRAM_KERNELS_GPU") != "1", reason  # `make verify-gpu` wants all of them
        pytest.skip(f"no op test was run on backend {name}: {reason}")
    weights = torch.arange(1.0, 9.0, device=BACKENDS[name])
    with use_backend(name):
        ops.prune_topk_([weights], [], [0], torch.tensor([5], device=weights.device))  # the fifth goes, too
    assert weights.tolist() == [0, 0, 0, 0, 5, 6, 7, 8]


def test_device_code_is_executed_here() -> None:
    """One skip that stands for tests/test_cuda_*.py."""
    if (reason := why_not_executed()) is not None:
        pytest.skip(f"device code was not executed: {reason}; nvcc and CRAM_KERNELS_PTXEMU, the folder of an executor, run it")


def test_info_names_every_fact(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    facts = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert facts["torch"].strip().startswith(torch.__version__)
    assert facts["backend cpu"].strip() == "available"
    assert facts["backend chosen"].strip().startswith("by device")
    for name in ("cuda", "triton"):
        assert (facts[f"backend {name}"].strip() == "available") == (available()[name] is None)
    assert any(name in facts["compiler"] for name in ("g++", "clang", "GCC", "gcc"))
    assert facts["SIMD level"].split()[0] in ("portable", "avx2", "avx512")


def test_the_import_survives_a_missing_library_and_use_says_why(tmp_path: Path) -> None:
    result = python("import cram_kernels; print('imported'); " + ADD, CRAM_KERNELS_LIBRARIES=str(tmp_path))
    assert result.stdout == "imported\n"
    assert "BackendUnavailable: backend 'cpu' cannot run here: the native library" in result.stderr
    assert "was not built: run `pip install .`" in result.stderr


def test_a_broken_library_is_a_reason_too(tmp_path: Path) -> None:
    (tmp_path / "libcram_kernels_cpu.so").write_bytes(b"not a library")
    result = python("import cram_kernels; print('imported'); " + ADD, CRAM_KERNELS_LIBRARIES=str(tmp_path))
    assert result.stdout == "imported\n"
    assert "does not load" in result.stderr


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_environment_chooses_a_backend(name: str) -> None:
    result = python("from cram_kernels import backend; print(backend.name_for('cpu')); " + ADD, CRAM_KERNELS_BACKEND=name)
    assert result.stdout.split() == [name, "0"], result.stderr  # all equal: the k-th and its ties go


def test_a_missing_backend_is_refused_with_its_reason() -> None:
    missing = {name: reason for name, reason in available().items() if reason is not None}
    if not missing:
        pytest.skip("every backend runs here; a machine without a GPU would run this")
    for name, reason in missing.items():
        with pytest.raises(BackendUnavailable, match=f"backend '{name}' cannot run here") as error:
            use_backend(name)
        assert reason in str(error.value)
        used = python(ADD, CRAM_KERNELS_BACKEND=name, TRITON_INTERPRET="")
        assert f"backend '{name}' cannot run here: {reason}" in used.stderr.splitlines()[-1]
    with pytest.raises(ValueError, match=r"name .* must be one of cpu, cuda, triton, reference, got 'gpu'"):
        use_backend("gpu")


def test_use_backend_ends_with_its_block() -> None:
    def kept() -> int:
        _, stats = ops.prune_topk_([torch.arange(1.0, 5001.0)], [], [0], torch.tensor([2000]))
        return int(stats[0, 1])

    with use_backend("reference"):
        assert kept() == 0  # the reference has no candidates
    assert kept() > 0


def test_simd_level_by_environment() -> None:
    code = "from cram_kernels._native import host; print(host.simd_level())"
    assert python(code, CRAM_KERNELS_SIMD="portable").stdout == "portable\n"
    wrong = python(ADD, CRAM_KERNELS_SIMD="avx1024")
    assert wrong.returncode != 0 and "must be one that this CPU has (portable" in wrong.stderr


def test_no_compiler_is_one_sentence() -> None:
    if not (ROOT / "native_build.py").exists():
        pytest.skip("not run from a source checkout")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import native_build; native_build.compiler()"
    result = new_python(code, PATH="/nowhere", CXX="")
    assert "needs a C++17 compiler: install g++" in result.stderr.splitlines()[-1]


def test_info_survives_bad_settings() -> None:
    code = "from cram_kernels import cli; cli.main(['info'])"
    result = python(code, CRAM_KERNELS_SIMD="avx1024", CRAM_KERNELS_BACKEND="gpu")
    assert result.returncode == 0, result.stderr
    assert "none: backend: the name (CRAM_KERNELS_BACKEND or use_backend()) must be one of cpu" in result.stdout
    assert "must be one that this CPU has (portable" in result.stdout
    used = python(ADD, CRAM_KERNELS_BACKEND="gpu")
    assert "must be one of cpu, cuda, triton, reference, got 'gpu'" in used.stderr.splitlines()[-1]


def in_checkout(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs with native_build imported as `n`, and `torch` the folder of one that says it is of CUDA 12.8."""
    if not (ROOT / "native_build.py").exists():
        pytest.skip("not run from a source checkout")
    return new_python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import native_build as n\n{code}", **environment)


@pytest.fixture
def nvcc(tmp_path: Path) -> Callable[[int, str], dict[str, str]]:
    """(CUDA version, archs) -> an environment in which nvcc says that it is of it and knows them; torch's folder is in it too."""

    def make(release: int, archs: str) -> dict[str, str]:
        (tmp_path / "torch").mkdir(exist_ok=True)
        (tmp_path / "torch" / "version.py").write_text("__version__ = '2.11.0'\ncuda = '12.8'\n")
        listed = "\\n".join(f"compute_{arch}" for arch in archs.split())
        (tmp_path / "nvcc").write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo "Cuda compilation tools, release {release}.1, V{release}.1.88"; '
            f"else printf '{listed}\\n'; fi\n"
        )
        (tmp_path / "nvcc").chmod(0o755)
        return {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "FOLDER": str(tmp_path / "torch"), "CRAM_KERNELS_GPU_ARCHS": ""}

    return make


ARCHS = "import os, pathlib; print(n.gpu_archs(pathlib.Path(os.environ['FOLDER'])))"


@pytest.mark.parametrize(
    "release, known, chosen, expected",
    [
        (12, "75 80 86 89 90", "", "['80', '86', '89', '90']"),  # CUDA 12.6 knows neither 100 nor 120
        (12, "80 86 89 90 100 103 120", "", "['80', '86', '89', '90', '100', '120']"),
        (12, "75 80 90", "75 90", "['75', '90']"),
        (12, "75 80 90", "75 91", "CRAM_KERNELS_GPU_ARCHS must name archs that nvcc knows (75 80 90), got 91"),
        (13, "80 90", "", "nvcc on PATH is of CUDA 13, and this torch of CUDA 12.8"),
        (13, "80 90", "none", "[]"),
    ],
)
def test_archs_are_those_that_nvcc_knows(nvcc: Any, release: int, known: str, chosen: str, expected: str) -> None:
    result = in_checkout(ARCHS, **nvcc(release, known) | {"CRAM_KERNELS_GPU_ARCHS": chosen})
    assert (result.stdout.strip() == expected) if expected.startswith("[") else expected in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "cxx, expected", [("clang++ -pipe", "nvcc -ccbin=clang++ "), ("ccache /usr/bin/g++-12", "ccache nvcc -ccbin=/usr/bin/g++-12 ")]
)
def test_nvcc_gets_the_compiler_of_the_rest(cxx: str, expected: str) -> None:
    result = in_checkout(f"print(*n.Ninja({cxx!r}).lines, sep='\\n')")
    assert f"command = {expected}" in result.stdout and f"command = {cxx} -MMD" in result.stdout, result.stderr


def test_a_compiler_that_is_not_there_is_no_other(tmp_path: Path) -> None:
    if not (ROOT / "native_build.py").exists():
        pytest.skip("not run from a source checkout")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import native_build; native_build.compiler()"
    assert "CXX names no compiler that is installed: '/nowhere/g++'" in new_python(code, CXX="/nowhere/g++").stderr.splitlines()[-1]


def test_builds_in_a_folder_with_spaces(tmp_path: Path) -> None:
    """The kernels at the portable level, without torch, in a checkout whose path has what ninja and the shell take apart."""
    if not (ROOT / "native_build.py").exists():
        pytest.skip("not run from a source checkout")
    checkout = tmp_path / "a $b: c'd"
    shutil.copytree(ROOT / "csrc", checkout / "csrc")
    (checkout / "tests" / "native").mkdir(parents=True)
    (checkout / "tests" / "native" / "harness.cpp").write_text('#include "../../csrc/cpu/simd.h"\nint main() { return 0; }\n')
    (checkout / "tests" / "native" / "sparse.cpp").write_text("")
    shutil.copy(ROOT / "native_build.py", checkout)
    code = (
        f"import sys; sys.path.insert(0, {str(checkout)!r}); import native_build as n; from pathlib import Path; n.TORCH_FREE = (); "
        f"n.build_harness(Path({str(checkout / 'out')!r}))"
    )
    result = new_python(code)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (checkout / "out" / "harness").exists()


def test_run_time_needs_only_torch() -> None:
    heavy = ("matplotlib", "rich", "safetensors", "mlxtend", "onnx", "pandas")
    result = new_python(f"import sys, cram_kernels; print([m for m in {heavy!r} if m in sys.modules])")
    assert result.stdout == "[]\n", result.stderr
