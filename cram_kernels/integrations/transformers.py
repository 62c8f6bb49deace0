"""Hugging Face: a mixin for a Trainer whose optimizer is CrAM; see docs/frameworks.md."""

from typing import Any

from torch import Tensor

from ..optim import CrAM


class TwoPassTrainer:
    """`class CrAMTrainer(TwoPassTrainer, Trainer)`: each optimizer step takes a second gradient, of the same micro-batches.

    The loss that is reported is the clean one, the gradient norm that of the second pass. `args.max_grad_norm` clips each pass.
    """

    accelerator: Any
    args: Any
    optimizer: Any

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's: the micro-batches of one optimizer step, and the number of items in them. Kept for the second pass."""
        self._micro_batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        return self._micro_batches, items

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
                    step(model, micro_batch, num_items_in_batch)
            step(model, last, num_items_in_batch)
        except BaseException:
            cram.restore()
            cram.zero_grad()
            raise
        return loss
