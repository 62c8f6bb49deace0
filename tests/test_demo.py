"""examples/mnist.py, as a user runs it (--quick), interrupted, and its verdict."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cram_kernels.report import Report

for package in ("matplotlib", "mlxtend", "rich", "safetensors"):
    pytest.importorskip(package, reason=f"{package} is missing; `pip install .[demo]` brings it")

EXAMPLES = Path(__file__).parent.parent / "examples"
COMMAND = [sys.executable, str(EXAMPLES / "mnist.py")]
ROWS = ["dense", "50 %", "70 %", "80 %", "90 %", "95 %", "2:4", "4:8"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder that the demo wrote into, and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    done = subprocess.run([*COMMAND, "--quick", "--out", str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_prints_a_table_the_pruned_layers_and_the_checks(demo):
    _, printed = demo
    lines = printed.splitlines()
    for row in ROWS:
        assert sum(line.startswith(f"│ {row} ") for line in lines) == 1, row
    assert any(line.startswith("0.weight ") and "1 input channels are not a multiple of 4" in line for line in lines)
    assert sum(line.startswith("PASS mnist_2of4.safetensors") for line in lines) == 3
    assert "FAIL" not in printed


def test_report_has_every_number_of_every_seed(demo):
    report = json.loads((demo[0] / "report.json").read_text())
    assert report["settings"] | {"seeds": 1, "epochs": 2, "rho": 0.1} == report["settings"]
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["machine"]["backend"] == "cpu"
    assert all(report["checks"].values())
    assert list(report["methods"]) == ["sgd", "multi", "nm"]
    for method in report["methods"].values():
        (seed,) = method["seeds"]
        assert list(seed["tuned"]) == ROWS and list(seed["untuned"]) == ROWS[1:]
        assert all(0 <= value <= 100 for value in [*seed["tuned"].values(), *seed["untuned"].values()])
        assert method["summary"]["tuned"]["90 %"] == {"mean": seed["tuned"]["90 %"], "std": None}
        assert method["report_2of4"]["pruned"] == {"layers": 9, "numel": 19392, "zeros": 9696, "sparsity": 0.5}


def test_tuned_networks_have_learned_something(demo):
    report = json.loads((demo[0] / "report.json").read_text())
    assert report["methods"]["nm"]["seeds"][0]["tuned"]["2:4"] > 50  # chance: 10


def test_picture_opens(demo):
    import matplotlib.image

    height, width, channels = matplotlib.image.imread(demo[0] / "accuracy.png").shape
    assert height > 300 and width > 600 and channels == 4


def test_weights_are_two_of_four(demo):
    from safetensors import safe_open

    with safe_open(demo[0] / "mnist_2of4.safetensors", "pt") as file:
        layers = json.loads(file.metadata()["layers"])
        assert len(layers) == 9 and "0.weight" not in layers
        for name in layers:
            groups = file.get_tensor(name).movedim(1, -1).reshape(-1, 4)
            assert (groups.count_nonzero(1) <= 2).all(), name
            assert groups.count_nonzero() > 0.49 * groups.numel(), name  # nothing else was lost
        assert file.get_tensor("0.weight").count_nonzero() == 72


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX; Linux or macOS runs this test")
@pytest.mark.parametrize("after", [0.0, 6.0], ids=["workers starting", "workers training"])
def test_interrupted(tmp_path, after):
    process = subprocess.Popen(
        [*COMMAND, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts in the background ignores it
    )
    try:
        first = process.stdout.readline()
        assert first.startswith("training 9 networks"), first + "".join(process.communicate(timeout=30))
        time.sleep(after)
        os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert errors == "interrupted: nothing was written\n"
        assert list(tmp_path.iterdir()) == []
        assert gone(process.pid)
    finally:
        if not gone(process.pid, patience=0):
            os.killpg(process.pid, signal.SIGKILL)


def gone(group: int, patience: float = 10) -> bool:
    """Whether no process of the group is left, at the latest after some seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("sgd_at_90", "multi_dense", "nm_dense", "file", "code"),
    [
        (87.0, 97.3, 97.3, True, 0),
        (87.1, 98.0, 98.0, True, 1),
        (50.0, 97.2, 98.0, True, 1),
        (50.0, 98.0, 97.2, True, 1),
        (50.0, 98.0, 98.0, False, 1),
    ],
    ids=["good", "gain below 10", "multi dense too low", "nm dense too low", "file spoiled"],
)
def test_verdict(monkeypatch, tmp_path, capsys, sgd_at_90, multi_dense, nm_dense, file, code):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    mnist = importlib.import_module("mnist")

    def runs(dense: float, at_90: float) -> list[dict]:
        tuned = dict.fromkeys(ROWS, 97.0) | {"dense": dense, "90 %": at_90}
        return [{"seed": i, "tuned": tuned, "untuned": tuned, "weights": ({}, Report(()))} for i in range(3)]

    results = {"sgd": runs(98.0, sgd_at_90), "multi": runs(multi_dense, 97.0), "nm": runs(nm_dense, 91.0)}
    monkeypatch.setattr(mnist, "run_all", lambda settings: results)
    monkeypatch.setattr(mnist, "save_weights", lambda result, path: {"bits equal": file})
    monkeypatch.setattr(sys, "argv", ["mnist.py", "--out", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        assert mnist.main() == code
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("FAIL") == code
