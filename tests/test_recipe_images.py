"""The parts of examples/images: readers, augmentation, networks, configuration, corruptions."""

import pickle
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

IMAGES = Path(__file__).parent.parent / "examples" / "images"
for package in ("jsonargparse", "mlxtend", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is missing; `pip install 'cram_kernels[examples]'` brings it")
sys.path[:0] = [str(IMAGES), str(IMAGES.parent)]
import config as recipe  # noqa: E402
import corruptions  # noqa: E402
import data  # noqa: E402
import debian  # noqa: E402
import evaluate  # noqa: E402
import fashion_mnist  # noqa: E402
import image_sets  # noqa: E402
import models  # noqa: E402
import train as train_script  # noqa: E402

from cram_kernels import NM, TopK  # noqa: E402


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read_as_written(classes, tmp_path):
    name = f"cifar{classes}"
    train, test, found = data.load(name, image_sets.write_cifar(tmp_path, classes))
    parts = [image_sets.images(24, classes, seed) for seed in range(5 if classes == 10 else 1)]
    assert found == classes and len(test) == 40
    assert np.array_equal(train.x.numpy(), np.concatenate([x for x, _ in parts]))
    assert train.y.tolist() == [label for _, labels in parts for label in labels]
    inner = tmp_path / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    assert torch.equal(data.load(name, inner)[0].x, train.x)


class Runs:
    def __reduce__(self):
        return print, ("code that a pickle runs",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    image_sets.write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({b"data": Runs()}, protocol=2))
    with pytest.raises(ValueError, match=r"a CIFAR file must hold arrays and plain values, got .*print"):
        data.load("cifar10", tmp_path)
    assert "code that" not in capsys.readouterr().out


def test_fashion_is_read_as_written_gzipped_or_not(tmp_path):
    train, test, classes = data.load("fashion_mnist", image_sets.write_fashion(tmp_path / "gz"))
    x, labels = image_sets.images(64, 10, 0, channels=1, size=28)
    assert classes == 10 and len(test) == 32 and np.array_equal(train.x.numpy(), x) and train.y.tolist() == labels
    path = tmp_path / "plain"
    image_sets.write_idx(path, x[:, 0])
    assert torch.equal(data._idx(path, 3), train.x[:, 0])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="must be an idx file of bytes"):
        data._idx(path, 3)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is missing: Debian's packages are unpacked by it")
def test_fashion_comes_from_the_package_of_debian(tmp_path, monkeypatch, capsys):
    """A package of the same layout, as `apt-get download` leaves it."""
    image_sets.write_fashion(tmp_path / "package" / fashion_mnist.FOLDER)
    deb = image_sets.write_deb(tmp_path / "package", fashion_mnist.PACKAGE)
    run = debian.called

    def called(*command, folder):
        if command[0] == "apt-get":
            shutil.copy(deb, folder)
        else:
            run(*command, folder=folder)

    monkeypatch.setattr(debian, "called", called)
    for name, options in (("fetched", []), ("given", ["--deb", str(deb)])):
        monkeypatch.setattr(sys, "argv", ["fashion_mnist.py", "--out", str(tmp_path / name), *options])
        fashion_mnist.main()
        assert len(data.load("fashion_mnist", tmp_path / name)[0]) == 64
        assert len(capsys.readouterr().out.splitlines()) == 4
    with pytest.raises(SystemExit, match=r"fashion_mnist.py: dpkg-deb -x none .* failed: "):
        run("dpkg-deb", "-x", "none", str(tmp_path), folder=tmp_path)
    with pytest.raises(SystemExit, match="no-such-command is missing"):
        run("no-such-command", folder=tmp_path)


def test_emoji_are_read_on_white_and_split_by_emoji(tmp_path):
    """Green tells the emoji, blue its skin tone; the other style has the same emoji in its test."""
    seen = []
    for style in ("google", "twitter"):
        train, test, classes = data.load("emoji", image_sets.write_emoji(tmp_path / style, style))
        assert classes == 2 and len(train) + len(test) == 50
        for part in (train, test):
            assert (part.x[:, :, :16] == 255).all() and torch.equal(part.x[:, 0, 32, 32].long(), 200 * part.y)
        found = [{(int(x[1, 32, 32]), int(x[2, 32, 32])) for x in part.x} for part in (train, test)]
        emoji = [{which for which, _ in part} for part in found]
        assert not emoji[0] & emoji[1] and emoji[0] | emoji[1] == set(range(40)) and 7 <= len(emoji[1]) <= 8
        assert {which for part in found for which, tone in part if tone} == set(range(0, 40, 4))
        seen.append(found)
    assert seen[0] == seen[1] and len(data.load("emoji", tmp_path / "google" / "package")[0]) == len(train)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "imagefolder", "emoji"])
def test_missing_files_are_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        data.load(name, tmp_path)


def test_mnist5k_has_500_of_each_digit():
    train, test, classes = data.load("mnist5k", Path())
    assert (len(train), len(test), classes) == (4000, 1000, 10)
    assert (train.y.bincount() + test.y.bincount()).tolist() == [500] * 10


def test_crops_of_small_images_are_all_crops_and_nothing_else():
    """Every image that comes out is one of the 25 crops of the padded image, mirrored or not; all 50 occur."""
    x = torch.arange(3 * 5 * 6, dtype=torch.uint8).reshape(1, 3, 5, 6)
    small = data.Memory(x, torch.tensor([0]), (0.0,) * 3, (1.0,) * 3, pad=2, mirror=True)
    padded = torch.nn.functional.pad(x[0], (2,) * 4).float() / 255
    wanted = {}
    for dy in range(5):
        for dx in range(5):
            crop = padded[:, dy : dy + 5, dx : dx + 6]
            wanted |= {tuple(crop.flatten().tolist()): (dy, dx, 0), tuple(crop.flip(2).flatten().tolist()): (dy, dx, 1)}
    seeds = torch.randint(2**62, (2000,), generator=torch.Generator().manual_seed(0))
    found = [wanted[tuple(image.flatten().tolist())] for image in small.take(torch.zeros(2000, dtype=torch.long), seeds)]
    assert len(set(found)) == len(wanted) == 50
    assert 0.45 < sum(mirrored for _, _, mirrored in found) / 2000 < 0.55
    assert torch.equal(small.take(torch.tensor([0]), None)[0], x[0].float() / 255)


def test_parts_of_large_images():
    """A picture whose pixels are their own coordinates shows which part was taken."""
    height, width = 250, 200
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width)[None, :], np.arange(height)[:, None]
    image, shares, mirrored = Image.fromarray(pixels), [], 0
    for seed in range(300):
        part = np.array(data._random_part(image, 224, random.Random(seed))).astype(int)
        assert part.shape == (224, 224, 3)
        columns, rows = part[112, :, 0], part[:, 112, 1]
        mirrored += bool(columns[0] > columns[-1])
        w, h = abs(columns[-1] - columns[0]) + 1, rows[-1] - rows[0] + 1
        shares.append(w * h / (height * width))
        assert 0.7 < w / h < 1.42
    assert 0.05 < min(shares) < 0.2 and 0.75 < max(shares) <= 1 and 0.35 < np.mean(shares) < 0.55
    assert 110 < mirrored < 190
    middle = np.array(data._middle(image, 200, 100)).astype(int)
    assert middle[..., 0].min() == 50 and middle[..., 0].max() == 149 and middle[..., 1].min() == 75 and middle[..., 1].max() == 174


def test_batches_follow_from_seed_and_epoch_and_processes_share_them(tmp_path):
    train, _, _ = data.load("cifar10", image_sets.write_cifar(tmp_path))
    one = data.Batches(train, 32, True, seed=3)
    one.start_epoch(7)
    again = data.Batches(train, 32, True, seed=3)
    first = [x for x, _ in again]
    again.start_epoch(7)
    assert len(one) == 4 and all(torch.equal(a, b) for (a, _), (b, _) in zip(one, again, strict=True))
    assert not torch.equal(first[0], one[0][0])
    parts = [data.Batches(train, 32, True, seed=3, rank=rank, ranks=2) for rank in (0, 1)]
    for part in parts:
        part.start_epoch(7)
    for i, (x, y) in enumerate(one):
        for rank, part in enumerate(parts):
            assert torch.equal(part[i][0], x[rank::2]) and torch.equal(part[i][1], y[rank::2])
    workers = list(one.loader(workers=2))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, workers, strict=True))


def test_some_images_are_of_all_classes(tmp_path):
    """Files that are sorted by class: the first would all be of one."""
    train, test, classes = data.load("imagefolder", image_sets.write_folder(tmp_path, train=20, val=2))
    given = recipe.Config(data="imagefolder", data_path=tmp_path, train_images=20)
    found, again = train_script.data_of(given)[0], train_script.data_of(given)[0]
    assert found.paths == again.paths == tuple(sorted(found.paths, key=train.paths.index)) and len(set(found.paths)) == 20
    assert min(found.y.bincount(minlength=classes)) > 5
    assert all(label == train.y[train.paths.index(path)] for path, label in zip(found.paths, found.y, strict=True))
    assert data.some(test, 0) is test and data.some(test, 100) is test and len(data.some(test, 3)) == 3


def test_images_held_back_are_neither_lost_nor_shared(tmp_path):
    train, _, _ = data.load("cifar10", image_sets.write_cifar(tmp_path))
    rest, held = data.held_back(train, 0.1)
    assert len(held) == 12 and len(rest) == 108
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1234))  # as runs of earlier versions were split
    assert torch.equal(held.x, train.x[order[:12].sort().values])
    rows = [tuple(x.flatten().tolist()) for part in (rest, held) for x in part.x]
    assert sorted(rows) == sorted(tuple(x.flatten().tolist()) for x in train.x)


def test_an_emoji_is_held_back_in_all_its_skin_tones(tmp_path):
    """Green tells the emoji, see `write_emoji`."""
    train, _, _ = data.load("emoji", image_sets.write_emoji(tmp_path, "google"))
    for share in (0.2, 0.5):
        rest, held = data.held_back(data.some(train, 36), share)
        sides = [{int(x[1, 32, 32]) for x in part.x} for part in (rest, held)]
        assert not sides[0] & sides[1] and len(rest) + len(held) == 36 and len(sides[1]) == round(share * len(sides[0] | sides[1]))


@pytest.mark.parametrize(
    "name, classes, parameters",
    [  # of the 1x1 shortcuts: 272,474 = 464 + 16 * 2 + 13,952 + 51,072 + ...; the last two are those of widely used CIFAR networks
        ("resnet20", 10, 272_474),
        ("resnet32", 10, 466_906),
        ("resnet18_cifar", 10, 11_173_962),
        ("vgg16_cifar", 10, 14_728_266),
        ("efficientnet_lite0", 1000, 4_652_008),  # of the package's own network
    ],
)
def test_networks(name, classes, parameters):
    model = models.make(name, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, classes)
    assert models.head(model)[1].out_features == classes


def test_published_checkpoints_have_our_names():
    """As the published code names the layers of its ResNet-20."""
    names = set(models.make("resnet20", 10).state_dict())
    assert {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.2.conv2.weight",
        "layer2.0.downsample.0.weight",
        "layer3.0.downsample.1.bias",
    } < names
    assert {"layer3.2.bn2.weight", "fc.weight", "fc.bias"} < names


def test_a_process_may_have_no_image_of_the_last_batch(tmp_path):
    """Five images in batches of four for two processes: the second one has none of the last batch."""
    images = data.load("imagefolder", image_sets.write_folder(tmp_path))[1].subset(torch.arange(5) % 2)
    shares = [data.Batches(images, 4, False, 0, rank, 2) for rank in (0, 1)]
    assert [[len(y) for _, y in of] for of in shares] == [[2, 1], [2, 0]]
    x, y = shares[1][1]
    assert x.shape == (0, 3, 224, 224) and models.make("resnet8", 2).eval()(x).shape == (0, 2) and y.shape == (0,)


def test_other_networks_are_refused_or_need_torchvision():
    with pytest.raises(ValueError, match=r"model must be one of resnet8, .*, got 'resnet1'"):
        models.make("resnet1", 10)
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        with pytest.raises(ValueError, match="pip install torchvision, of the release and build that belong to this torch"):
            models.make("resnet50", 10)
    else:
        assert models.make("resnet50", 10).fc.out_features == 10


# Configuration

PAPER = {  # file: (levels, rho, lr, weight decay, epochs, warm-up, batch), as published
    "imagenet_resnet50_multi": ([0.5, 0.7, 0.9], 0.05, 0.2, 1e-4, 100, 5, 512),
    "imagenet_resnet50_nm": (["2:4", "4:8"], 0.05, 0.2, 1e-4, 100, 5, 512),
    "cifar10_resnet20_multi": ([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 0.2, 0.1, 5e-4, 200, 5, 128),
    "cifar10_resnet20_high": ([0.5, 0.7, 0.8, 0.9, 0.95], 0.15, 0.1, 5e-4, 200, 5, 128),
    "cifar10_resnet18_k95": ([0.95], 0.2, 0.1, 5e-4, 180, 0, 128),
    "cifar10_vgg16_k95": ([0.95], 0.2, 0.1, 5e-4, 180, 0, 128),
}


@pytest.mark.parametrize("name", PAPER)
def test_settings_of_the_paper(name):
    c = recipe.parse(["--config", str(IMAGES / "configs" / f"{name}.yaml")])
    assert (c.compression, c.rho, c.lr, c.weight_decay, c.epochs, c.warmup_epochs, c.batch) == PAPER[name]
    assert (c.method, c.momentum, c.sparse_grad, c.normalize_grad, c.precision, c.second_pass) == ("cram+", 0.9, True, False, "fp32", "all")


@pytest.mark.parametrize("path", sorted((IMAGES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_of_settings_is_read(path):
    """Each of its keys arrives in the configuration, and the command line wins."""
    c = recipe.parse(["--config", str(path), "--seed", "7", "--epochs", "3"])
    given = yaml.safe_load(path.read_text()) | {"seed": 7, "epochs": 3}
    assert {key: str(getattr(c, key)) for key in given} == {key: str(value) for key, value in given.items()}


@pytest.mark.parametrize("kind", [recipe.Config, evaluate.Evaluation])
def test_every_option_is_explained(kind):
    explained = set(re.findall(r"^        (\w+): .", kind.__doc__, re.MULTILINE))
    assert explained == set(kind.__dataclass_fields__)


PUBLISHED = """training:
  optimizer:
    class: SGD
    lr: 0.2
    momentum: 0.9
    weight_decay: 0.0001

  SAM:
    class: {kind}
{options}
  lr_scheduler:
    class: CosineLR
    warmup_length: 5
    end_epoch: 100"""


@pytest.mark.parametrize(
    "kind, options, method, patterns, others",
    [
        ("TopkCrAM", {"sparsities": [0.5, 0.9], "plus_version": True, "sparse_grad": True}, "cram+", [TopK(0.5), TopK(0.9)], {}),
        ("TopkCrAM", {"sparsities": [0.5], "plus_version": False, "sparse_grad": False}, "cram", [TopK(0.5)], {"sparse_grad": False}),
        ("TopkCrAM", {"sparsities": [0.5], "unif_prune": True}, "cram+", [TopK(0.5, "tensor")], {"uniform": True}),
        ("NMTopkCrAM", {"plus_version": True, "grad_norm": True}, "cram+", [NM(2, 4), NM(4, 8)], {"normalize_grad": True}),
        ("TopkCrAMPeriod", {"sparsities": [0.7], "mask_freq": 20}, "cram+", [TopK(0.7)], {"mask_period": 20}),
        ("SAM", {}, "sam", [], {"normalize_grad": True}),
    ],
)
def test_published_files_are_read_unchanged(kind, options, method, patterns, others, tmp_path):
    path = tmp_path / "published.yaml"
    path.write_text(PUBLISHED.format(kind=kind, options="".join(f"    {key}: {value}\n" for key, value in options.items())))
    c = recipe.parse(["--published", str(path), "--rho", "0.15", "--data", "cifar10", "--model", "resnet20"])
    assert (c.method, c.patterns(), c.rho, c.lr, c.momentum, c.weight_decay) == (method, patterns, 0.15, 0.2, 0.9, 1e-4)
    assert (c.epochs, c.warmup_epochs, c.optimizer) == (100, 5, "SGD")
    for key, value in {"sparse_grad": True, "normalize_grad": False, "uniform": False, "mask_period": 1, **others}.items():
        assert getattr(c, key) == value


def test_a_published_file_without_sam_is_sgd(tmp_path):
    path = tmp_path / "published.yaml"
    content = yaml.safe_load(PUBLISHED.format(kind="SAM", options=""))
    del content["training"]["SAM"]
    path.write_text(yaml.safe_dump(content))
    assert recipe.parse(["--published", str(path)]).method == "sgd"
    content["training"]["lr_scheduler"]["class"] = "StepLR"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"class must be CosineLR .*, got 'StepLR'"):
        recipe.published(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"compression": ["2:5:6"]}, "a pattern must be a share of zeros"),
        ({"compression": [1.0]}, "a pattern must be a share of zeros"),
        ({"compression": []}, "compression must have a pattern"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"second_pass": "drawn", "precision": "fp16"}, "precision must be fp32 or bf16 with second_pass drawn"),
        ({"second_pass": "split", "method": "sgd"}, "second_pass must be all with method sgd, which takes one pass a step, got split"),
        ({"validation": 1.0}, r"validation must be a share in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        recipe.Config(**options)


# Evaluation


def test_means_and_spreads():
    runs = [{"label": "a", "dense": d, "pruned": {"90 %": {"as pruned": p}}} for d, p in ((90.0, 10.0), (92.0, 20.0))]
    summary = evaluate.summarise([*runs, {"label": "b", "dense": 50.0, "pruned": {"90 %": {"as pruned": 40.0}}}])
    assert summary["a"]["dense"] == (91.0, pytest.approx(2**0.5), 2)
    assert summary["a"]["90 %, as pruned"] == (15.0, pytest.approx(50**0.5), 2)
    assert evaluate.table(summary, ["90 %"], ["as pruned"]).splitlines()[2:] == [
        "| a | 2 | 91.0 ± 1.4 | as pruned | 15.0 ± 7.1 |",
        "| b | 1 | 50.0 | as pruned | 40.0 |",
    ]


def test_corruptions_are_15_and_repeat():
    pytest.importorskip("corrupt_tta", reason="corrupt-tta is missing; `pip install 'cram_kernels[examples]'` brings it")
    image = image_sets.images(1, 2, 0)[0][0].transpose(1, 2, 0)
    names = corruptions.names(["all"])
    assert len(set(names)) == 15
    for name in names:
        mild, same, strong = (corruptions.corrupt(image, name, s, 5) for s in (1, 1, 5))
        assert mild.dtype == np.uint8 and mild.shape == image.shape
        assert np.array_equal(mild, same) and not np.array_equal(mild, strong) and not np.array_equal(mild, image), name
    state = np.random.get_state()[1]
    corruptions.corrupt(image, "gaussian_noise", 3, 1)
    assert np.array_equal(state, np.random.get_state()[1])
    with pytest.raises(ValueError, match=r"corruptions must be all or some of .*, got 'rain'"):
        corruptions.names(["fog", "rain"])


def test_a_corrupted_share_counts_images():
    """A network that always says 1, on images of which a known number are of class 1."""
    pytest.importorskip("corrupt_tta", reason="corrupt-tta is missing; `pip install 'cram_kernels[examples]'` brings it")
    x, labels = image_sets.images(20, 3, 1)
    small = data.Memory(torch.from_numpy(x), torch.tensor(labels), (0.5,) * 3, (0.5,) * 3)

    class One(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 1.0, 0.0]).expand(len(x), 3)

    class Bright(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)

    seen, kept = [], {}
    for _ in range(2):
        one, other = corruptions.shares_right([One(), Bright()], small, "fog", 2, torch.device("cpu"), batch=8, kept=kept)
        fog = torch.stack([small.from_raw(corruptions.corrupt(small.raw(i), "fog", 2, i)) for i in range(20)])
        assert one == labels.count(1) / 20 and torch.equal(torch.cat(seen), fog)
        assert other == float(((fog.mean((1, 2, 3)) < 0) == small.y).double().mean())
        seen.clear()
    assert len(kept) == 3
