"""Two processes under Accelerate, Lightning and Trainer, with DDP and with FSDP2: the weights of a loop, the same on both ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("lightning", "transformers", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is missing; `pip install 'cram_kernels[frameworks]'` brings it")
import framework_ranks  # noqa: E402


@pytest.mark.timeout(900)  # seconds of work, and minutes where others use the machine
def test_two_processes(tmp_path):
    script = Path(__file__).parent / "framework_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=870, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    passed = {path.name for path in tmp_path.glob("check_*")}
    checks = [name for name in vars(framework_ranks) if name.startswith("check_")]
    assert len(checks) == 9 and passed == {f"{name}.{rank}" for name in checks for rank in (0, 1)}
