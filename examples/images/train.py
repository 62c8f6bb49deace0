"""Train an image classifier with SGD, SAM or CrAM, on one process or under torchrun.

    python examples/images/train.py --config examples/images/configs/cifar10_resnet20_multi.yaml --data_path DATA --out runs/0 --seed 0
    torchrun --nproc-per-node 4 examples/images/train.py --config examples/images/configs/imagenet_resnet50_multi.yaml --data_path IMAGENET
    python examples/images/train.py --published PUBLISHED.yaml --rho 0.2 --data cifar10 --model resnet20 --data_path DATA

Needs `pip install 'cram_kernels[examples]'`. evaluate.py prunes what this has trained.
"""

import math
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from checkpoints import Checkpoints, rank, ranks, read
from config import Config, parse, pattern
from data import Batches, Images, calibration, held_back, load, some
from models import head, make
from one_pass import one_pass_step
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from tqdm.auto import tqdm

import cram_kernels
from cram_kernels import CrAM, hold_zeros, prune, train_step, tune_batchnorm

sys.path.append(str(Path(__file__).parent.parent))
from comparison import check_same, check_unused, plain, told, write_json

PLACES = {"out", "resume", "eval_only", "device", "workers", "tensorboard", "data_path"}  # options that do not change the run


def device_of(name: str) -> torch.device:
    """ValueError for a device that is not here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that this torch has here, got {name!r}: {why}") from error


def start_processes(config: Config) -> torch.device:
    """The device of this process; under torchrun the process group is made."""
    kind = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = device_of(f"cuda:{local}" if kind == "cuda" else kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if config.parallel == "fsdp2" and ranks() == 1:
        raise ValueError("parallel fsdp2 must have several processes, started by torchrun, got 1")
    if config.batch < ranks():
        raise ValueError(f"batch must have an image for each process, got {config.batch} for {ranks()} processes")
    return device


def network(config: Config, classes: int, channels: int) -> nn.Module:
    """The network to begin with: a new one, or that of `start`, pruned where `start_pattern` says so."""
    torch.manual_seed(config.seed)
    model = make(config.model, classes, channels)
    if config.start is not None and not config.resume and not config.eval_only:  # else the weights are those of `out`, zeros included
        given = read(config.start)
        given, own = given.get("model", given), model.state_dict()
        fitting = {name: t for name, t in given.items() if name in own and own[name].shape == getattr(t, "shape", None)}
        missing = [name for name in own if name not in fitting and not name.startswith(head(model)[0] + ".")]
        if missing:
            raise ValueError(f"start must be a checkpoint of {config.model}, got {config.start} without a fitting {missing[0]!r}")
        model.load_state_dict(own | fitting)
        if config.start_pattern is not None:
            prune(model, pattern(config.start_pattern), exclude=[head(model)[0] + ".*"])
    if config.train_only == "head":
        model.requires_grad_(False)
        head(model)[1].requires_grad_(True)
    return model


def wrapped(model: nn.Module, config: Config) -> tuple[nn.Module, nn.Module]:
    """(model whose parameters are trained, module to call)."""
    if ranks() == 1:
        return model, model
    if config.parallel == "ddp":
        return model, DistributedDataParallel(model)
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks(),))
    for module in reversed(list(model.modules())[1:]):  # those within others first
        if isinstance(module, nn.Sequential) and any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, model


def optimizer_of(model: nn.Module, config: Config) -> Optimizer:
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "SGD":
        options["momentum"] = config.momentum
    base = getattr(torch.optim, config.optimizer)
    if config.method == "sgd":
        return base(model.parameters(), **options)
    names = [name for name, _ in model.named_parameters()]
    return CrAM(
        model,
        base,
        compression=config.patterns(),
        rho=config.rho,
        plus=config.method == "cram+" and config.second_pass != "drawn",
        sparse_grad=config.sparse_grad,
        normalize_grad=config.normalize_grad,
        mask_period=config.mask_period,
        seed=config.seed,
        exclude=[names[0], *names[-2:]] if config.uniform else (),
        **options,
    )


def rate(config: Config, epoch: int) -> float:
    """Of the learning rate in this epoch: a linear rise, then a cosine."""
    if epoch < config.warmup_epochs:
        return (epoch + 1) / config.warmup_epochs
    return 0.5 + 0.5 * math.cos(math.pi * (epoch - config.warmup_epochs) / max(1, config.epochs - config.warmup_epochs))


@torch.no_grad()
def accuracy(module: nn.Module, batches: Batches, device: torch.device, workers: int = 0) -> float:
    """In percent, over all processes."""
    module.eval()
    right, count = torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int64, device=device)
    for x, y in batches.loader(workers):
        right += (module(x.to(device)).argmax(1) == y.to(device)).sum()
        count += len(y)
    if ranks() > 1:
        dist.all_reduce(right)
        dist.all_reduce(count)
    return 100 * int(right) / int(count)


def versions() -> dict[str, str]:
    return {"cram_kernels": cram_kernels.__version__, "torch": torch.__version__, "python": platform.python_version()}


def data_of(config: Config) -> tuple[Images, Images | None, Images, int]:
    """(training images, images held back for validation or None, test images, classes)."""
    train, test, classes = load(config.data, config.data_path)
    if config.train_images > len(train):
        raise ValueError(f"train_images must be at most the {len(train)} of {config.data}, got {config.train_images}")
    train = some(train, config.train_images)
    rest, held = held_back(train, config.validation) if config.validation else (train, None)
    if held is not None and not len(held):
        raise ValueError(f"validation must hold back an image or more, got {config.validation} of {len(train)}")
    if not len(Batches(rest, config.batch, True, ranks=ranks())):
        raise ValueError(f"train_images and validation must leave two images or more to each process, got {len(rest)}")
    return rest, held, test, classes


def one_epoch(
    config: Config,
    module: nn.Module,
    optimizer: Optimizer,
    batches: Batches,
    device: torch.device,
    scaler: torch.amp.GradScaler | None,
    coins: torch.Generator,
    after_step: Callable[[Tensor], None],
) -> float:
    """The mean loss of the first passes; `coins`, the same on all processes, say which steps of one pass are dense."""
    kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    order = torch.channels_last if config.channels_last else torch.preserve_format
    module.train(config.train_only == "all")

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        with nullcontext() if kind is None else torch.autocast(device.type, kind):
            return F.cross_entropy(module(batch[0]), batch[1])

    total = torch.zeros((), device=device)
    for x, y in tqdm(batches.loader(config.workers), total=len(batches), leave=False, disable=None if rank() == 0 else True):
        batch = x.to(device, memory_format=order), y.to(device)
        if config.second_pass == "drawn" and isinstance(optimizer, CrAM):
            value = one_pass_step(optimizer, loss, batch, dense=bool(torch.rand((), generator=coins) < 0.5))
        else:
            value = train_step(optimizer, loss, batch, config.second_pass, scaler)
        total += value
        after_step(value)
    if ranks() > 1:
        dist.all_reduce(total)
    return float(total) / len(batches) / ranks()


def train(config: Config) -> dict[str, Any]:
    """Train, or with `eval_only` just test; returns what results.json holds."""
    device, again = start_processes(config), config.resume or config.eval_only
    if not again:
        check_unused(config.out, "last.pt", "best.pt", "results.json")
    path = config.out / ("best.pt" if config.eval_only else "last.pt")
    saved = read(path, "config", "model") if again else {}
    if config.resume and not config.eval_only:
        check_same(config, saved["config"], PLACES, path)
    training, held, test, classes = data_of(config)
    model = network(config, classes, training.take(torch.tensor([0]), None).shape[1]).to(device)
    if config.start_pattern is not None and not again:
        tune_batchnorm(model, images := calibration(training), len(images))
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    model, module = wrapped(model, config)
    optimizer = optimizer_of(model, config)
    checkpoints = Checkpoints(config.out, model, optimizer)
    if again:
        checkpoints.load(saved, path)
    judged = [Batches(images, config.batch, False, 0, rank(), ranks()) for images in (held if held is not None else test, test)]
    if config.eval_only:
        results = {"test": accuracy(module, judged[1], device, config.workers), "config": plain(config), "versions": versions()}
        if rank() == 0:
            print(f"test accuracy {results['test']:.2f} %")
        return results
    if rank() == 0 and config.resume and len(saved["history"]) == config.epochs:
        print(f"{config.out} has all of its {config.epochs} epochs")
    if rank() == 0 and config.epochs <= config.warmup_epochs:
        print(
            f"note: {config.epochs} epochs end within the warm-up of {config.warmup_epochs}, so the rate stays below lr or just comes to it"
        )
    held_zeros = hold_zeros(model) if config.hold_zeros else nullcontext()
    config.out.mkdir(parents=True, exist_ok=True)
    batches = Batches(training, config.batch, True, config.seed, rank(), ranks())
    scaler = torch.amp.GradScaler(device.type) if config.precision == "fp16" else None
    history: list[dict[str, Any]] = []
    best = {"epoch": 0, "accuracy": -1.0, "test": -1.0}
    if config.resume:
        history, best = saved["history"], saved["best"]
        if scaler is not None:
            scaler.load_state_dict(saved["scaler"])
        if best["epoch"] == len(history):  # the run may have been stopped before it wrote the better one
            checkpoints.save("best.pt", {key: saved[key] for key in ("config", "history", "best", "classes")}, with_optimizer=False)
    writer = None
    if config.tensorboard and rank() == 0:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(config.out), purge_step=len(history) * len(batches))
    steps = len(history) * len(batches)

    def after_step(loss: Tensor) -> None:
        nonlocal steps
        steps += 1
        if writer is not None and steps % 50 == 0:
            writer.add_scalar("train/loss", float(loss), steps)
            if isinstance(optimizer, CrAM) and optimizer.last is not None:
                optimizer.last.log(writer, steps)

    with held_zeros:
        for epoch in range(len(history), config.epochs):
            start = time.perf_counter()
            torch.manual_seed((config.seed * 1_000_003 + epoch) * 1_000_003 + rank())  # of dropout: a resumed run needs no other state
            batches.start_epoch(epoch)
            for group in optimizer.param_groups:
                group["lr"] = config.lr * rate(config, epoch)
            coins = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            loss = one_epoch(config, module, optimizer, batches, device, scaler, coins, after_step)
            if not math.isfinite(loss):
                kept = f"; {config.out}/last.pt has the epoch before" if history else ""
                raise ValueError(f"the loss must be finite, got {loss} in epoch {epoch + 1}{kept}")
            if ranks() > 1:
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)  # each process has batch norms of its own
            now = accuracy(module, judged[0], device, config.workers)
            seconds = time.perf_counter() - start
            history.append({"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], "loss": loss, "accuracy": now, "seconds": seconds})
            better = now > best["accuracy"]
            if better:
                best = {"epoch": epoch + 1, "accuracy": now}
                best["test"] = now if held is None else accuracy(module, judged[1], device, config.workers)
            content = {"config": plain(config), "history": history, "best": best, "classes": classes}
            checkpoints.save("last.pt", content | {"scaler": None if scaler is None else scaler.state_dict()}, with_optimizer=True)
            if better:
                checkpoints.save("best.pt", content, with_optimizer=False)
            if writer is not None:
                for name in ("lr", "loss", "accuracy"):
                    writer.add_scalar(f"epoch/{name}", history[-1][name], steps)
                writer.flush()
            if rank() == 0:
                print(f"epoch {epoch + 1}/{config.epochs}: loss {loss:.4f}, accuracy {now:.2f} %, {seconds:.1f} s", flush=True)
    results = {
        "config": plain(config),
        "versions": versions(),
        "processes": ranks(),
        "selected_on": "test" if held is None else "validation",
        "best": best,
        "last_test": accuracy(module, judged[1], device, config.workers),
        "history": history,
    }
    if rank() == 0:
        write_json(config.out / "results.json", results)
    if writer is not None:
        writer.close()
    return results


def main() -> None:
    try:
        train(parse())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    told(main)
