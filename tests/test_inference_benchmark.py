"""The benchmark of sparse inference runs, and checks its contestants against each other."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime")
from benchmarks import inference
from benchmarks.resnet import CONVOLUTIONS, resnet50
from cram_kernels.inference import sparsify


def test_quick(tmp_path: Path) -> None:
    out = tmp_path / "inference.json"
    threads = torch.get_num_threads()
    assert inference.main(["--quick", "--sparsity", "0.9", "2:4", "--rounds", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert torch.get_num_threads() == threads and result["cpu"] and set(result["cases"]) == {"linear", "conv", "bert"}
    for row in (row for rows in result["cases"].values() for row in rows):
        assert row["ratio"] > 0 and row["sparsity"] in ("0.9", "2:4")


def test_resnet50() -> None:
    """The counts of the paper, and a sparse network that agrees with the dense one."""
    model = resnet50()
    assert len(CONVOLUTIONS) == 22 and sum(p.numel() for p in model.parameters() if p.dim() > 1) == 25_502_912
    inference.pruned(model, "0.95")
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        report = sparsify(model, (x,))
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert len(report.rows) == 54 and next(row for row in report.rows if row.name == "stem").why_dense
