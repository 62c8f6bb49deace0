"""csrc/*.h serve the CPU and CUDA: what nvcc makes of them fuses nothing, approximates nothing, and where an executor of PTX is at hand
(CRAM_KERNELS_PTXEMU names its folder) computes the bits of the reference."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cram_kernels import reference

SOURCE = Path(__file__).parent / "native" / "arithmetic.cu"
EXECUTOR = os.environ.get("CRAM_KERNELS_PTXEMU")


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH; a machine with the CUDA toolkit runs this, no GPU needed")
    out = tmp_path_factory.mktemp("ptx") / "arithmetic.ptx"
    subprocess.run(["nvcc", "-std=c++17", "-O3", "-arch=sm_80", "-ptx", str(SOURCE), "-o", str(out)], check=True, timeout=300)
    return out


def test_nothing_is_fused_or_approximated(ptx: Path) -> None:
    code = "\n".join(line for line in ptx.read_text().splitlines() if not line.strip().startswith("//"))
    assert {"mul.rn.f32", "add.rn.f32", "sqrt.rn.f32", "div.rn.f32"} <= set(re.findall(r"\b[a-z]+\.rn\.f32\b", code))
    assert not re.findall(r"\b(?:fma|mad)[.\w]*\.f(?:32|64)\b|\.ftz|\.approx", code)


def test_the_bits_are_those_of_the_reference(ptx: Path) -> None:
    if EXECUTOR is None:
        pytest.skip("device code was not executed: CRAM_KERNELS_PTXEMU does not name a PTX executor")
    result = subprocess.run([sys.executable, __file__, str(ptx)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.strip() == "same bits", result.stdout + result.stderr


def execute(ptx: Path) -> None:
    """In a process of its own: the executor compiles and loads code."""
    sys.path.insert(0, EXECUTOR or "")
    import ptxemu

    module = ptxemu.Module(ptx.read_text())
    n, step = 4096, 7
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-40, 65519.0, 65520.0, 6e-8, 3e38])
    w, g = (
        torch.cat([torch.randn(n - 2 * len(special)) * 2.0 ** torch.randint(-40, 40, (n - 2 * len(special),)), special, special.flip(0)])
        for _ in range(2)
    )
    same = True

    def compare(found: torch.Tensor, expected: torch.Tensor) -> None:
        nonlocal same
        same &= torch.equal(reference.canonical(found).view(torch.int32), expected.view(torch.int32))

    out, key = [torch.full((n,), 7.0) for _ in range(3)], torch.zeros(n, dtype=torch.int32)
    module.launch("perturb", n // 128, 128, [w, g, 0.05, *out, key, n])
    for found, dtype in zip(out, (torch.float32, torch.bfloat16, torch.float16), strict=True):
        u = reference.canonical((w + torch.tensor(0.05) * g).to(dtype)).float()
        compare(found, u)
    same &= torch.equal(key, reference.magnitude_key(w + torch.tensor(0.05) * g))

    flag, lists = torch.zeros((), dtype=torch.int32), ([], [g], [], [])
    ours, b = w.clone(), g.flip(0).clone()
    expected, expected_b = [w.clone()], [b.clone()]
    module.launch("sgd", n // 128, 128, [ours, g, b, n])
    reference.restore_sgd_(
        expected, *lists, flag, expected_b, [0], torch.tensor(0.1), momentum=[0.9], dampening=[0.5], weight_decay=[0.01], nesterov=[1]
    )
    compare(ours, expected[0])
    compare(b, expected_b[0])

    ours, state = w.clone(), [torch.rand(n), torch.rand(n), torch.rand(n)]
    expected, expected_state = [w.clone()], [[s.clone()] for s in state]
    module.launch("adam", n // 128, 128, [ours, g, *state, step, n])
    options = {"weight_decay": [float(torch.tensor(0.01))], "decoupled": True, "amsgrad": [1]}
    reference.restore_adam_(expected, *lists, flag, *expected_state, [torch.tensor(step - 1.0)], torch.tensor(0.001), **options)
    compare(ours, expected[0])
    for found, want in zip(state, expected_state, strict=True):
        compare(found, want[0])

    print("same bits" if same else "other bits")


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
