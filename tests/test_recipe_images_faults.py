"""examples/images with files, folders and options that are wrong: a message says what was wanted and found, before anything is done."""

import dataclasses
import gzip
import json
import pickle
import shutil
import sys
from pathlib import Path

import image_sets
import numpy as np
import pytest
import torch
from optim_cases import assert_same_bits
from PIL import Image

IMAGES = Path(__file__).parent.parent / "examples" / "images"
for package in ("jsonargparse", "mlxtend", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is missing; `pip install 'cram_kernels[examples]'` brings it")
sys.path[:0] = [str(IMAGES), str(IMAGES.parent)]
import comparison  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import study  # noqa: E402
import train  # noqa: E402
from config import Config  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    set_threads(1)


@pytest.fixture(scope="module")
def run(cifar, tmp_path_factory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    train.train(config(cifar, out))
    return out


def config(cifar: Path, out: Path, **options) -> Config:
    small = {"batch": 64, "epochs": 1, "warmup_epochs": 0, "compression": [0.5], "tensorboard": False, **options}
    return Config(data="cifar10", data_path=cifar, out=out, **small)


def saved(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def same_seed(run: Path, out: Path, **changes) -> Path:
    """A copy of a run, whose record says other things."""
    shutil.copytree(run, out)
    for path in out.glob("*.pt"):
        content = saved(path)
        torch.save(content | {"config": content["config"] | changes}, path)
    return out


def said(main, arguments: list[str], monkeypatch, capsys) -> str:
    """The last line on standard error of a script that ends with status 2."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["script.py", *arguments])
        comparison.told(main)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# A run and its folder


def test_a_resumed_run_has_the_zeros_of_its_own_checkpoint(cifar, tmp_path, monkeypatch):
    """Its start file is written anew, and at last removed: all is as of an uninterrupted run, to the bit."""
    first = tmp_path / "first.pt"
    train.train(config(cifar, tmp_path / "first"))
    shutil.copy(tmp_path / "first" / "last.pt", first)
    given = config(cifar, tmp_path / "whole", start=first, start_pattern=0.7, hold_zeros=True, method="sgd", epochs=2)
    train.train(given)
    one_epoch, left = train.one_epoch, [1]

    def interrupted(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return one_epoch(*args)

    parts = dataclasses.replace(given, out=tmp_path / "parts")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "one_epoch", interrupted)
        train.train(parts)
    train.train(config(cifar, tmp_path / "other", seed=3))
    shutil.copy(tmp_path / "other" / "last.pt", first)
    train.train(dataclasses.replace(parts, resume=True))
    whole, found = (saved(tmp_path / name / "last.pt")["model"] for name in ("whole", "parts"))
    assert_same_bits(list(found.values()), list(whole.values()))
    assert sum(int((t == 0).sum()) for t in found.values() if t.dim() > 1) > 10_000
    first.unlink()
    assert train.train(dataclasses.replace(parts, eval_only=True))["test"] == saved(tmp_path / "parts" / "best.pt")["best"]["accuracy"]
    train.train(dataclasses.replace(parts, resume=True))


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "results.json"])
def test_a_new_run_does_not_start_in_the_folder_of_another(name, cifar, run, tmp_path):
    """Or, where it stops early, files of both were there. The folder is as it was."""
    shutil.copy(run / name, tmp_path / name)
    with pytest.raises(ValueError, match=f"out must be a folder without another run, got .*{name}: resume that run, remove it, or"):
        train.train(config(cifar, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_study_does_not_take_finished_runs_for_others(cifar, tmp_path, monkeypatch, capsys):
    """Before it trains. Records that were made before an option was there are those of its default."""
    small = ["--data", "cifar10", "--data_path", str(cifar), "--epochs", "1", "--warmup_epochs", "0", "--tensorboard", "false"]
    small += ["--methods", "cram", "sgd", "--seeds", "1", "--patterns", "0.5", "--repairs", "as pruned", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["study.py", *small])
    study.main()
    capsys.readouterr()
    shutil.rmtree(tmp_path / "sgd-0")
    for options, message in {
        ("--rho", "0.5"): f"rho must be 0.05 as in {tmp_path / 'cram-0' / 'results.json'}, got 0.5: another run needs another --out",
        ("--data_path", "elsewhere"): f"data_path must be '{cifar}' as in",
        ("--seeds", "0"): "--seeds must be at least 1, got 0",
        ("--patterns", "1.5"): "a pattern must be a share of zeros",
        ("--method", "sgd"): "--method is what a study varies: its option is --methods",
        ("--method=sgd",): "--method is what a study varies",
    }.items():
        assert message in said(study.main, [*small, *options], monkeypatch, capsys)
    assert not (tmp_path / "sgd-0").exists()
    record = tmp_path / "cram-0" / "results.json"
    content = json.loads(record.read_text())
    del content["config"]["train_only"]
    record.write_text(json.dumps(content))
    before = (tmp_path / "cram-0" / "last.pt").read_bytes()
    study.main()
    assert (tmp_path / "sgd-0" / "last.pt").is_file() and before == (tmp_path / "cram-0" / "last.pt").read_bytes()
    (tmp_path / "sgd-0" / "results.json").unlink()  # as if it had been stopped in its last epoch, of others than are asked for now
    shutil.rmtree(tmp_path / "cram-0")
    message = f"lr must be 0.1 as in {tmp_path / 'sgd-0'}, got 0.2: another run needs another --out"
    assert message in said(study.main, [*small, "--lr", "0.2"], monkeypatch, capsys)
    assert not (tmp_path / "cram-0").exists()


def test_a_run_that_was_stopped_between_its_checkpoints_goes_on(cifar, tmp_path, monkeypatch):
    """last.pt is written first, so that the first epoch, too, leaves something to go on from. A resumed run makes up for best.pt."""
    given = config(cifar, tmp_path, epochs=2, lr=0.01)
    save = train.Checkpoints.save

    def stopped(self, name, *args, **kwargs):
        if name == "best.pt":
            raise KeyboardInterrupt
        save(self, name, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Checkpoints, "save", stopped)
        train.train(given)
    assert (tmp_path / "last.pt").is_file() and not (tmp_path / "best.pt").exists()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "one_epoch", lambda *_: stopped(None, "best.pt"))
        train.train(dataclasses.replace(given, resume=True))
    assert_same_bits(list(saved(tmp_path / "best.pt")["model"].values()), list(saved(tmp_path / "last.pt")["model"].values()))
    assert saved(tmp_path / "best.pt").keys() == {"config", "history", "best", "classes", "model"}
    assert len(train.train(dataclasses.replace(given, resume=True))["history"]) == 2


def test_only_messages_for_users_are_a_line(monkeypatch, capsys):
    """Where another library raises a ValueError, nobody could tell from its text what it is about."""
    assert said(lambda: Config("cifar10", batch=0), [], monkeypatch, capsys).startswith("script.py: error: batch must")
    assert "none.json" in said(lambda: Path("none.json").read_text(), [], monkeypatch, capsys)
    with pytest.raises(ValueError, match="cannot reshape"):
        comparison.told(lambda: np.ma.masked_array(np.ones(3)).reshape(2).sum())


def test_runs_may_start_from_networks_of_their_seed(cifar, tmp_path):
    """A file for each seed is one experiment; files of networks that were trained in two ways are two."""
    for name, seed in (("sgd", 0), ("sgd", 1), ("cram", 0)):
        method = {"sgd": "sgd", "cram": "cram+"}[name]
        train.train(config(cifar, tmp_path / f"{name}-{seed}", method=method, seed=seed))
        start = tmp_path / f"{name}-{seed}" / "last.pt"
        train.train(config(cifar, tmp_path / f"from-{name}-{seed}", method="sgd", seed=seed, start=start, start_pattern=0.5))
    runs = [tmp_path / f"from-{name}" for name in ("sgd-0", "sgd-1", "cram-0")]
    found = evaluate.evaluate(evaluate.Evaluation(runs, tmp_path / "out", patterns=[], repairs=[], checkpoint="last.pt"))
    assert {label: row["dense"][2] for label, row in found["summary"].items()} == {
        "SGD, from sgd at 50 %, 1 epoch": 2,
        "SGD, from cram at 50 %, 1 epoch": 1,
    }


# Evaluation


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"rho": 0.5, "seed": 1},
            r"runs of one label must differ by their seed alone, got rho 0\.05 and 0\.5 for 'CrAM\+ \{50 %\}, 1 epoch'",
        ),
        ({"data_path": "/elsewhere", "seed": 1}, "got data_path '.*' and '/elsewhere'"),
        ({"precision": "bf16", "seed": 1}, "got precision 'fp32' and 'bf16'"),
        ({}, "runs of one label must have seeds of their own, got seed 0 twice for 'CrAM"),
    ],
)
def test_other_experiments_are_no_seeds(changes, message, run, tmp_path):
    runs = [run, same_seed(run, tmp_path / "other", **changes)]
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate(evaluate.Evaluation(runs, out=tmp_path / "out", patterns=[], repairs=[]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["config", "settings"])
def test_means_are_of_runs_that_differ_by_their_seed(kind):
    """The records of images have their settings as config. What `reconstruct` has not seen yet has no figures to be averaged."""
    settings = [
        {"lr": 0.1, "seed": 0, "reconstruct": 0, "start": "a/cram-0/last.pt", "compression": [0.5]},
        {"lr": 0.1, "seed": 1, "reconstruct": 128, "start": "a/cram-1/last.pt", "compression": ["0.5"]},
    ]
    runs = [{"label": "a", "dense": 1.0, "pruned": {}, kind: of} for of in settings]
    assert comparison.summarise(runs)["a"]["dense"][2] == 2
    for name, value, message in (
        ("lr", 0.2, r"got lr 0\.1 and 0\.2 for 'a'"),
        ("start", "b/cram-2/last.pt", "got start 'a/cram/last.pt' and 'b/cram/last.pt'"),
        ("start", "a/cram-1/last.pt", "got start 'a/cram/last.pt' and 'a/cram-1/last.pt'"),  # not of this seed, 2
        ("compression", [0.5, 0.6], r"got compression \[0\.5\] and \[0\.5, 0\.6\]"),
        ("reconstruct", 64, "got reconstruct 128 and 64"),
        ("seed", 0, "got seed 0 twice"),
    ):
        other = runs[1] | {kind: settings[1] | {"seed": 2, "start": "a/cram-2/last.pt", name: value}}
        with pytest.raises(ValueError, match=message):
            comparison.summarise([*runs, other])


def test_all_runs_are_read_before_one_is_evaluated(run, tmp_path, monkeypatch, capsys):
    foreign = {"none": None, "empty": b"", "junk": b"junk", "list": [1], "other": {"hello": 1}}
    foreign["options"] = {"config": {"hello": 1}, "model": {}}
    wanted = dict.fromkeys(foreign, "must be a checkpoint of") | {"none": "none/best.pt is missing: it must be a checkpoint"}
    wanted |= {"other": "got one without 'config'", "options": "got options that are not its own"}
    for name, content in foreign.items():
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "best.pt").write_bytes(content if isinstance(content, bytes) else b"")
        if content is not None and not isinstance(content, bytes):
            torch.save(content, tmp_path / name / "best.pt")
        arguments = [str(run), str(tmp_path / name), "--out", str(tmp_path / "out")]
        text = said(lambda: evaluate.evaluate(evaluate.parse()), arguments, monkeypatch, capsys)
        assert wanted[name] in text and f"{tmp_path / name / 'best.pt'}" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"calibration": 1}, "calibration must be at least 2 images and corrupted_images at least 0, got 1 and 0"),
        ({"calibration": -5}, "got -5 and 0"),
        ({"corrupted_images": -1}, "got 1000 and -1"),
        ({"corruptions": ["fog"], "severities": []}, r"severities must be some of 1 to 5, got \[\]"),
        ({"corruptions": "all", "severities": [1, 6]}, r"severities must be some of 1 to 5, got \[1, 6\]"),
        ({"corruptions": "all", "severities": [0]}, r"severities must be some of 1 to 5, got \[0\]"),
        ({"corruptions": "gausian"}, "corruptions must be all or some of .*, got 'gausian'"),
        ({"patterns": [0.5, 1.5]}, "a pattern must be a share of zeros"),
    ],
)
def test_bad_evaluations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.Evaluation([Path("run")], **options)


def test_an_evaluation_on_a_device_that_is_not_here(run, tmp_path):
    with pytest.raises(ValueError, match="device must be one that this torch has here, got 'tpu'"):
        evaluate.evaluate(evaluate.Evaluation([run], out=tmp_path / "out", device="tpu"))
    with pytest.raises(ValueError, match=r"runs must be folders that train\.py has written, got none"):
        evaluate.evaluate(evaluate.Evaluation([], out=tmp_path / "out"))


# Options of a run


@pytest.mark.parametrize(
    "options, message",
    [
        (["--device", "tpu"], "device must be one that this torch has here, got 'tpu'"),
        (["--model", "resnet1"], "model must be one of"),
        (["--start", "results.json"], "results.json must be a checkpoint of torch"),
        (["--start", "list.pt"], "list.pt must be a checkpoint of train.py"),
        (["--start", "missing.pt"], "missing.pt is missing"),
        (["--start_pattern", "0.5"], "start must name a checkpoint with start_pattern 0.5, got none"),
        (["--start", "best.pt", "--start_pattern", "1.5"], "a pattern must be a share of zeros"),
        (["--train_images", "1"], "train_images and validation must leave two images or more to each process, got 1"),
        (["--train_images", "-1"], "train_images must be at least 0, got -1"),
        (["--train_images", "99999"], "train_images must be at most the 120 of cifar10, got 99999"),
        (["--validation", "0.999"], "train_images and validation must leave two images or more to each process, got 0"),
        (["--validation", "0.001"], "validation must hold back an image or more, got 0.001 of 120"),
        (["--workers", "-1"], "workers must be at least 0, got -1"),
        (["--seed", "9999999999999"], "seed must be below 2**23"),
        (["--method", "sgd", "--second_pass", "drawn"], "method must be cram or cram+ with second_pass drawn"),
        (["--parallel", "fsdp2"], "parallel fsdp2 must have several processes, started by torchrun, got 1"),
        (["--parallel", "fsdp2", "--channels_last", "true"], "channels_last must be false with parallel fsdp2"),
        (["--hold_zeros", "true"], "model must have zeros"),
        (["--lr", "1e30", "--method", "sgd"], "the loss must be finite, got nan in epoch 1"),
    ],
)
def test_a_run_that_cannot_be_is_a_line(options, message, cifar, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(run / "results.json", "results.json")
    shutil.copy(run / "best.pt", "best.pt")
    torch.save([1], "list.pt")
    small = ["--data", "cifar10", "--data_path", str(cifar), "--batch", "64", "--epochs", "1", "--warmup_epochs", "0", "--out", "o"]
    text = said(train.main, [*small, "--tensorboard", "false", *options], monkeypatch, capsys)
    assert text.startswith("script.py: error: ") and message in text
    assert not list(Path("o").glob("*"))


def test_a_gpu_that_is_not_here_is_named(cifar, tmp_path, monkeypatch):
    def empty(*shape, device):
        raise AssertionError(f"no {device}\nand more")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ValueError, match=r"device must be one that this torch has here, got 'cuda:0': no cuda:0$"):
        train.train(config(cifar, tmp_path, device="cuda"))


def test_a_checkpoint_of_another_network_is_named(run, cifar):
    given = config(cifar, run, model="resnet8_wide", eval_only=True)
    with pytest.raises(
        ValueError, match=r"best\.pt must be of the network .*, with conv1.weight of shape \(16, 3, 3, 3\), got .*\(8, 3, 3, 3\)"
    ):
        train.train(given)


# Data


def cifar_file(content):
    """What writes a part of CIFAR-10 anew: keys changed, other content, or a function of its bytes."""

    def write(folder: Path) -> Path:
        path = folder / "cifar-10-batches-py" / "data_batch_3"
        whole = pickle.loads(path.read_bytes(), encoding="bytes")
        new = content(path.read_bytes()) if callable(content) else pickle.dumps(whole | content if isinstance(content, dict) else content)
        path.write_bytes(new)
        return path

    return write


@pytest.mark.parametrize(
    "write, message",
    [
        (cifar_file(lambda b: b[:500]), "must be a pickle of CIFAR, got"),
        (cifar_file(lambda b: b""), "must be a pickle of CIFAR, got"),
        (cifar_file(lambda b: b"<html>404</html>"), "must be a pickle of CIFAR, got"),
        (cifar_file([1]), "must be a pickle of CIFAR, got"),
        (cifar_file({b"labels": None}), "must be a pickle of CIFAR, got"),
        (cifar_file({b"labels": [1.5] * 24}), "must be a pickle of CIFAR, got"),
        (cifar_file({b"labels": [1] * 23}), "must have images and as many labels, got 24 and 23"),
        (cifar_file({b"labels": [77] * 24}), "must have labels from 0 to 9, got 77"),
        (cifar_file({b"data": np.full((24, 3072), 0.5)}), "data must be rows of 3072 bytes, got float64"),
        (cifar_file({b"data": np.zeros((24, 1024), np.uint8)}), r"data must be rows of 3072 bytes, got uint8 of shape \(24, 1024\)"),
    ],
)
def test_broken_files_of_cifar_are_named(write, message, tmp_path):
    path = write(image_sets.write_cifar(tmp_path))
    with pytest.raises(ValueError, match=f"{path} .*{message}|{path} {message}"):
        data.load("cifar10", tmp_path)


def test_broken_files_of_fashion_are_named(tmp_path):
    tmp_path = image_sets.write_fashion(tmp_path / "data")
    images, labels = (tmp_path / f"t10k-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1"))
    whole = {path: path.read_bytes() for path in (images, labels)}
    inner = gzip.decompress(whole[images])
    for path, content, message in (
        (images, whole[images][:100], "must be an idx file, got EOFError"),
        (images, b"", "must be an idx file"),
        (images, b"<html>404</html>", "must be an idx file"),
        (images, gzip.compress(b""), "must be an idx file of bytes with 3 dims"),
        (images, gzip.compress(inner[:-1]), "must be an idx file of bytes with 3 dims"),
        (images, whole[labels], "must be an idx file of bytes with 3 dims"),
        (labels, gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 1, 1])), "must have images and as many labels, got 32 and 2"),
        (labels, gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 32, *[10] * 32])), "must have labels from 0 to 9, got 10"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{str(path).removesuffix('.gz')}.*{message}"):
            data.load("fashion_mnist", tmp_path)
        path.write_bytes(whole[path])
    assert len(data.load("fashion_mnist", tmp_path)[1]) == 32


@pytest.mark.parametrize("name", ["half.jpg", "half.png", "empty.jpg", "readme.txt", "404.jpg"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_files_that_are_no_images_are_named(name, part, tmp_path):
    path = image_sets.write_folder(tmp_path, train=2, val=2) / part / "n00000001" / name
    content = {"readme.txt": b"Images", "empty.jpg": b"", "404.jpg": b"<html>"}
    if name.startswith("half"):
        pixels = np.random.default_rng(0).integers(255, size=(90, 80, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"whole{path.suffix}")
        whole = (tmp_path / f"whole{path.suffix}").read_bytes()
        content[name] = whole[: len(whole) // 2]
    path.write_bytes(content[name])
    with pytest.raises(ValueError, match=f"{path} must be an image, got"):
        data.load("imagefolder", tmp_path)


def test_hidden_files_and_folders_are_not_of_the_data(tmp_path):
    """Which a file manager or a notebook leaves behind."""
    image_sets.write_folder(tmp_path, train=2, val=2)
    known = [len(part) for part in data.load("imagefolder", tmp_path)[:2]]
    for part in ("train", "val"):
        (tmp_path / part / "n00000001" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
    train, val, classes = data.load("imagefolder", tmp_path)
    assert [len(train), len(val)] == known and classes == len({path.parent.name for path in train.paths})


def test_images_that_break_within_are_named_when_they_are_read(tmp_path):
    """Which the header and the end do not show."""
    image_sets.write_folder(tmp_path, train=2, val=2)
    path = tmp_path / "train" / "n00000001" / "0.JPEG"
    whole = path.read_bytes()
    images = data.load("imagefolder", tmp_path)[0]
    path.write_bytes(whole[:3000])
    for seeds in (None, torch.zeros(1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=f"{path} must be an image, got OSError"):
            images.take(torch.tensor([images.paths.index(path)]), seeds)


def test_a_whole_image_may_have_more_behind_its_end(tmp_path):
    """It is decoded to find out."""
    path = image_sets.write_folder(tmp_path, train=2, val=2) / "train" / "n00000001" / "0.JPEG"
    path.write_bytes(path.read_bytes() + bytes(5000))
    assert len(data.load("imagefolder", tmp_path)[0]) == 4


def test_folders_that_are_no_classes_are_named(tmp_path):
    image_sets.write_folder(tmp_path / "a", train=2, val=2)
    (tmp_path / "a" / "val" / "other").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/a/val/other must be of a class in {tmp_path}/a/train"):
        data.load("imagefolder", tmp_path / "a")
    (tmp_path / "a" / "val" / "other").rmdir()
    (tmp_path / "a" / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/a/train/empty must have images, got none"):
        data.load("imagefolder", tmp_path / "a")
    image_sets.write_folder(tmp_path / "b", train=2, val=2)
    for path in list((tmp_path / "b" / "val").glob("*/*")):
        path.rename(tmp_path / "b" / "val" / f"{path.parent.name}_{path.name}")  # as ImageNet's archive of the validation images
    with pytest.raises(ValueError, match=f"{tmp_path}/b/val/n00000000 must have images, got none"):
        data.load("imagefolder", tmp_path / "b")


def test_broken_emoji_are_named(tmp_path):
    folder = image_sets.write_emoji(tmp_path, "google") / "package"
    listed, drawing = folder / "emoji.json", next((folder / "img" / "google" / "64").glob("*.png"))
    whole = listed.read_bytes(), drawing.read_bytes()
    for content in (b"", b"{broken", b'[{"a": 1}]', b'{"a": 1}', b'[{"unified": "1", "category": "c"}]', b"\xff\xfe"):
        listed.write_bytes(content)
        with pytest.raises(ValueError, match=f"{listed} must be a list of emoji with the keys unified, category and image, got"):
            data.load("emoji", tmp_path)
    listed.write_bytes(json.dumps([{"unified": "1", "category": "c", "image": "no.png"}] * 10).encode())
    with pytest.raises(ValueError, match=f"{drawing.parent} must have drawings of emoji.json, .* got none"):
        data.load("emoji", tmp_path)
    listed.write_bytes(whole[0])
    drawing.write_bytes(whole[1][: len(whole[1]) // 2])
    with pytest.raises(ValueError, match=f"{drawing} must be a drawing of 64 x 64, got"):
        data.load("emoji", tmp_path)
    Image.new("RGBA", (32, 32)).save(drawing)
    with pytest.raises(ValueError, match=rf"{drawing} must be a drawing of 64 x 64, got .*\(32, 32\)"):
        data.load("emoji", tmp_path)
