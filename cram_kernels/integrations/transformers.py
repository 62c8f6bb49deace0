"""Hugging Face: a mixin for a Trainer whose optimizer is CrAM; see docs/transformers.md."""

from typing import Any

from torch import Tensor

from ..batch import check_second_pass, split_batch
from ..optim import CrAM


class TwoPassTrainer:
    """`class CrAMTrainer(TwoPassTrainer, Trainer)`: each optimizer step takes a second gradient, of the same micro-batches.

    The loss that is reported is the clean one, the gradient norm that of the second pass. `args.max_grad_norm` clips each pass.

    Attributes:
        second_pass: the samples of the second pass, "all", "half" or "split" of each micro-batch, see `cram_kernels.split_batch`: set it
            in the class or before `train()`.

    Example:
        class CrAMTrainer(TwoPassTrainer, Trainer):
            pass
    """

    second_pass = "all"

    accelerator: Any
    args: Any
    optimizer: Any

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's: the micro-batches of one optimizer step, and the number of items in them. Those of the second pass are kept."""
        check_second_pass("TwoPassTrainer", self.second_pass)
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if self.second_pass == "all":
            self._micro_batches, self._items = batches, items
            return batches, items
        first: list[Any] = []
        second: list[Any] = []
        for batch in batches:
            for half, part in zip((first, second), split_batch(batch, self.second_pass), strict=True):
                half.append(part)
        device = args[2] if len(args) > 2 else kwargs["device"]
        count = self._get_num_items_in_batch  # type: ignore[attr-defined]
        self._micro_batches, self._items = second, count(second, device)  # a mean is over the items of its own pass
        return first, items if self.second_pass == "half" else count(first, device)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Trainer's forward and backward pass; after the last micro-batch of a step also `perturb()` and the second pass.

        Raises:
            TypeError: the optimizer is not CrAM, or hidden in a wrapper of DeepSpeed or the like.
            ValueError: fp16 and `args.max_grad_norm`, which would unscale the first gradients.
        """
        cram = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
        if not isinstance(cram, CrAM):
            raise TypeError(f"TwoPassTrainer: optimizer must be CrAM, got {type(cram).__name__}")
        scaler, max_norm = self.accelerator.scaler, self.args.max_grad_norm
        if scaler is not None and max_norm > 0:
            raise ValueError(
                f"TwoPassTrainer: args.max_grad_norm must be 0 with fp16, got {max_norm}: CrAM(max_grad_norm={max_norm}) clips"
            )
        step = super().training_step  # type: ignore[misc]
        loss = step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            return loss
        *others, last = self._micro_batches
        try:
            if max_norm > 0:
                self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
            cram.perturb(scaler)
            with self.accelerator.no_sync(model):
                for micro_batch in others:
                    step(model, micro_batch, self._items)
            step(model, last, self._items)
        except BaseException:
            cram.restore()
            cram.zero_grad()
            raise
        return loss
