"""Small data sets in the on-disk formats of the large ones."""

import gzip
import json
import pickle
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image


def images(count: int, classes: int, seed: int, channels: int = 3, size: int = 32) -> tuple[np.ndarray, list[int]]:
    """uint8 [count, channels, size, size], whose brightness tells the class, with noise."""
    rng = np.random.default_rng(seed)
    labels = [int(label) for label in rng.integers(classes, size=count)]
    level = (np.array(labels) * 200 // classes)[:, None, None, None]
    return (level + rng.integers(56, size=(count, channels, size, size))).astype(np.uint8), labels


def write_cifar(folder: Path, classes: int = 10, per_file: int = 24, test: int = 40) -> Path:
    """CIFAR-10 or CIFAR-100, "python version": pickles of protocol 2 with bytes as keys, rows of 3,072 bytes."""
    inner = folder / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    inner.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if classes == 10 else ["train", "test"]
    for seed, name in enumerate(names):
        x, labels = images(test if name.startswith("test") else per_file, classes, seed)
        content = {b"data": x.reshape(len(x), -1), b"filenames": [b"image.png"] * len(x), b"batch_label": b"of the test"}
        content |= {b"labels": labels} if classes == 10 else {b"fine_labels": labels, b"coarse_labels": [0] * len(x)}
        (inner / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def write_idx(path: Path, values: np.ndarray) -> None:
    """An idx file of bytes, gzipped where the name ends in .gz."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder: Path, train: int = 64, test: int = 32) -> Path:
    folder.mkdir(parents=True)
    for seed, (part, count) in enumerate((("train", train), ("t10k", test))):
        x, labels = images(count, 10, seed, channels=1, size=28)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", x[:, 0])
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", np.array(labels))
    return folder


def write_folder(folder: Path, train: int = 8, val: int = 4, classes: int = 2) -> Path:
    """train/CLASS/ and val/CLASS/ with JPEGs of several shapes, as ImageNet."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            (folder / part / f"n{label:08d}").mkdir(parents=True)
            for i in range(count):
                height, width = 260 + 10 * i, 300 - 5 * i
                pixels = rng.integers(60, size=(height, width, 3)) + 150 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / f"n{label:08d}" / f"{i}.JPEG")
    return folder


def write_emoji(folder: Path, style: str, count: int = 40) -> Path:
    """emoji.json and img/STYLE/64/ in package/, as an archive of emoji-datasource has them: two categories, a skin tone in four."""
    images, entries = folder / "package" / "img" / style / "64", []
    images.mkdir(parents=True)
    for i in range(count):
        names = [f"1f{i:03x}.png", *([f"1f{i:03x}-1f3fb.png"] if i % 4 == 0 else [])]
        for j, name in enumerate(names):
            pixels = np.zeros((64, 64, 4), np.uint8)
            pixels[16:48, 16:48] = (200 * (i % 2), i, j, 255)
            Image.fromarray(pixels, "RGBA").save(images / name)
        tones = {"1F3FB": {"unified": "", "image": names[1]}} if len(names) > 1 else {}
        entry = {"unified": f"1F{i:03X}", "image": names[0], "category": ["Flags", "Symbols"][i % 2]}
        entries.append(entry | ({"skin_variations": tones} if tones else {}))
    entries.append({"unified": "1FFFF", "image": "not-drawn.png", "category": "Flags"})  # in this style
    (folder / "package" / "emoji.json").write_text(json.dumps(entries[::-1]))
    return folder


def write_deb(folder: Path, package: str) -> Path:
    """A Debian package of the files in `folder`, as `apt-get download` leaves it, beside the folder."""
    (folder / "DEBIAN").mkdir()
    control = f"Package: {package}\nVersion: 0\nArchitecture: all\nMaintainer: a <a@b.example>\nDescription: test\n"
    (folder / "DEBIAN" / "control").write_text(control)
    deb = folder.parent / f"{package}_0_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(folder), str(deb)], check=True, capture_output=True)
    return deb
