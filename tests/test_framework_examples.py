"""The examples for frameworks, as a user runs them (--quick), and timm's loop: the weights of the plain loop, to the bit."""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optim_cases import assert_same_bits, batches, network, weights
from torch import nn

from cram_kernels import CrAM, TopK

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "lightning_mnist.py": ("lightning", "matplotlib", "mlxtend", "rich"),
    "transformers_trainer.py": ("transformers", "accelerate"),
    "timm_train.py": ("timm", "matplotlib", "mlxtend", "rich"),
}
OPTIONS = {"compression": [TopK(0.5), TopK(0.9)], "lr": 0.1, "momentum": 0.9, "max_grad_norm": 0.5}


def why_no_timm() -> str | None:
    """timm imports torchvision, which raises where it was built for another torch."""
    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        return f"timm does not import ({error}): `pip install timm`, beside a torchvision of the same release and build as torch, runs this"
    return None


WITH_TIMM = pytest.mark.skipif(why_no_timm() is not None, reason=str(why_no_timm()))


@pytest.mark.parametrize(
    ("example", "options", "shown"),
    [
        ("lightning_mnist.py", [], ["SGD ", "CrAM+ "]),
        ("transformers_trainer.py", ["--accumulate", "2", "--bf16"], ["AdamW ", "CrAM+ "]),
        pytest.param("timm_train.py", ["--accumulate", "2", "--amp", "float16"], ["model ", "average "], marks=WITH_TIMM),
    ],
)
def test_example_runs(example, options, shown):
    for package in NEEDS[example]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is missing; `pip install 'cram_kernels[demo,frameworks]'` brings it")
    command = [sys.executable, str(EXAMPLES / example), "--quick", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    for name in shown:
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(name))
        assert "% dense" in line


@WITH_TIMM
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("scaled", [False, True], ids=["fp32", "scaler"])
def test_timm_loop_is_the_plain_loop(scaled, accumulate, monkeypatch, set_threads):
    """With clipping of each pass; the scaler's scale is a power of two, so that without autocast it changes no bit."""
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3, NativeScaler

    monkeypatch.syspath_prepend(str(EXAMPLES))
    loop = importlib.import_module("timm_train")
    set_threads(1)

    def start():
        net = network()
        optimizer = CrAM(net.parameters(), **OPTIONS).attach(net)
        return net, optimizer, CosineLRScheduler(optimizer, 6, t_in_epochs=False)

    net, optimizer, schedule = start()
    average, scaler = ModelEmaV3(net, decay=0.5), NativeScaler("cpu") if scaled else None
    assert loop.train_one_epoch(net, list(batches(5)), optimizer, schedule, average, 0, scaler, accumulate=accumulate) == 5

    judge, plain, schedule = start()
    mean = None
    for i, (x, y) in enumerate(batches(5)):
        for end in (plain.perturb, plain.step):
            for a, b in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
                (nn.functional.cross_entropy(judge(a), b) / accumulate).backward()
            end()
        schedule.step_update(i + 1)
        now = [p.detach().clone() for p in judge.parameters()]
        mean = now if mean is None else [torch.lerp(m, w, 0.5) for m, w in zip(mean, now, strict=True)]
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] < 0.1
    assert_same_bits(weights(net), weights(judge))
    assert_same_bits(list(net.buffers()), list(judge.buffers()), "batch norm")
    assert_same_bits(weights(average.module), mean, "average")


@WITH_TIMM
def test_timm_average_of_an_attached_model_is_clean_within_a_step():
    """timm's average reads state_dict(), which `attach` keeps clean. (torch's AveragedModel reads parameters().)"""
    from timm.utils import ModelEmaV3

    net = network()
    optimizer = CrAM(net.parameters(), **OPTIONS).attach(net)
    average = ModelEmaV3(net, decay=0.0)
    x, y = next(batches(1))
    nn.functional.cross_entropy(net(x), y).backward()
    with optimizer.perturbed():
        average.update(net)
        assert not torch.equal(net[0].weight, average.module[0].weight)
    assert_same_bits(weights(average.module), weights(net))
