"""save(): the old checkpoint or the new one, whatever happens while it is written."""

import os
import signal
import subprocess
import time
from pathlib import Path

import forked
import pytest
import torch

from cram_kernels import CrAM, TopK, save

WRITER = """
import os, sys, torch
from cram_kernels import CrAM, TopK, save
for i in range(1000000):
    save({"step": i, "weights": torch.full((1 << 20,), float(i))}, sys.argv[1])
    print(os.getpid(), flush=True)
"""


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """SIGKILL while it writes, at a moment of its own each time; the file is always one that was written to the end."""
    path = tmp_path / "checkpoint.pt"
    caught, deadline = 0, time.monotonic() + 60
    while caught < 3 and time.monotonic() < deadline:
        writer = subprocess.Popen([*forked.python(), "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        process = int(writer.stdout.readline())  # the first one is there
        while not list(tmp_path.glob(".checkpoint.pt.*.partial")) and time.monotonic() < deadline:
            pass
        time.sleep(0.0005 * caught)
        os.kill(process, signal.SIGKILL)
        writer.wait()
        found = torch.load(path, weights_only=True)
        assert torch.equal(found["weights"], torch.full((1 << 20,), float(found["step"])))
        caught += bool(list(tmp_path.glob(".checkpoint.pt.*.partial")))
        for partial in tmp_path.glob(".checkpoint.pt.*.partial"):
            partial.unlink()
    assert caught > 0, "no kill fell into a write: the test showed nothing"


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_checkpoint_is_as_large_as_that_of_the_base(tmp_path: Path, base: type) -> None:
    sizes = []
    for ours in (True, False):
        params = [torch.nn.Parameter(torch.randn(256, 256)), torch.nn.Parameter(torch.randn(256))]
        options = {"lr": 0.1} | ({"momentum": 0.9} if base is torch.optim.SGD else {})
        optimizer = CrAM(params, base, compression=[TopK(0.9)], **options) if ours else base(params, **options)
        for half in ("perturb", "step") if ours else ("step",):
            for p in params:
                p.grad = torch.randn_like(p)
            getattr(optimizer, half)()
        save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        sizes.append((tmp_path / "optimizer.pt").stat().st_size)
    assert sizes[0] <= 1.05 * sizes[1], sizes


def test_an_exception_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save({"step": 1}, path)
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save({"step": 2, "cannot be pickled": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "latest.pt").symlink_to(tmp_path / "run.pt")
    save({"step": 1}, tmp_path / "latest.pt")
    assert (tmp_path / "latest.pt").is_symlink() and torch.load(tmp_path / "run.pt", weights_only=True) == {"step": 1}
