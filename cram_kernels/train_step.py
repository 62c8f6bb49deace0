"""One step of training, with both passes of CrAM, for loops that are written out."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from .batch import SecondPass, check_second_pass, split_batch
from .optim import CrAM


def train_step(
    optimizer: Optimizer, loss: Callable[[Any], Tensor], batch: Any, second_pass: SecondPass = "all", scaler: GradScaler | None = None
) -> Tensor:
    """Take one optimizer step on a batch: both passes of CrAM, or the one pass of any other optimizer, in the same loop.

    Gradients that are there are dropped first. Under DDP and FSDP2 every rank cuts its own batch, so the ranks stay together.

    Args:
        optimizer: CrAM, or any torch optimizer, which takes a plain step on the whole batch.
        loss: gives the loss, a tensor of one number, of a batch such as it is handed: the whole one or a part. It may use autocast.
        batch: see `split_batch`.
        second_pass: the samples of the second pass: "all", "half" of the batch, or "split", where each pass has a half of its own, at the
            price of one pass; or a function; see `split_batch`. The two gradients are means over their own samples.
        scaler: for fp16. It scales both passes; a step whose gradients overflow is skipped.

    Returns:
        The loss of the first pass, detached.

    Raises:
        TypeError: an argument of another kind; nothing was changed. Or the loss is no tensor.
        ValueError: `second_pass` is another value, or the batch cannot be cut. Nothing was changed. Whatever else is raised within the
            step, the weights are the clean ones and the gradients are released.

    Example:
        for images, labels in loader:
            train_step(optimizer, lambda b: criterion(model(b[0]), b[1]), (images, labels), second_pass="split")

    Source: "CrAM: A Compression-Aware Minimizer", arXiv 2207.14200, Algorithm 1, for "all". A second pass on fewer samples is not in the
    paper; docs/when-it-pays.md has what was measured.
    """
    check_second_pass("train_step", second_pass)
    if not (hasattr(optimizer, "step") and hasattr(optimizer, "zero_grad")):
        raise TypeError(f"train_step: optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    if not callable(loss):
        raise TypeError(f"train_step: loss must be a function that gives the loss of a batch, got {type(loss).__name__}")
    if scaler is not None and not hasattr(scaler, "scale"):
        raise TypeError(f"train_step: scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    cram = optimizer if isinstance(optimizer, CrAM) else None
    first, second = (batch, None) if cram is None else split_batch(batch, second_pass)
    optimizer.zero_grad()
    try:
        value = loss(first)
        if not isinstance(value, Tensor):
            raise TypeError(f"train_step: loss must return a tensor, without calling backward on it, got {type(value).__name__}")
        if value.numel() != 1:
            raise TypeError(f"train_step: loss must return a tensor of one number, got shape {tuple(value.shape)}")
        (value if scaler is None else scaler.scale(value)).backward()
        if cram is not None:
            cram.perturb(scaler)
            again = loss(second)
            (again if scaler is None else scaler.scale(again)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    except BaseException:
        if cram is not None:
            cram.restore()
        optimizer.zero_grad()
        raise
    optimizer.zero_grad()
    return value.detach()
