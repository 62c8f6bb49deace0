"""Hugging Face: a mixin for a Trainer whose optimizer is CrAM; see docs/transformers.md."""

from typing import Any

import torch
from torch import Tensor

from ..batch import SecondPass, check_second_pass, split_batch
from ..optim import CrAM


class TwoPassTrainer:
    """`class CrAMTrainer(TwoPassTrainer, Trainer)`: each optimizer step takes a second gradient, of the same micro-batches.

    The loss that is reported is the clean one, the gradient norm that of the second pass. `args.max_grad_norm` clips each pass. A loss that
    is a mean, whatever `num_items_in_batch` is, stays one with several micro-batches or processes. An optimizer that knows no model is
    attached to the trained one.

    Attributes:
        second_pass: the samples of the second pass, "all", "half" or "split" of each micro-batch, see `cram_kernels.split_batch`: set it
            in the class or before `train()`.

    Example:
        class CrAMTrainer(TwoPassTrainer, Trainer):
            pass
    """

    second_pass: SecondPass = "all"
    _loss_is_known = False

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

        Args:
            model: as Accelerate prepared it.
            inputs: a micro-batch.
            num_items_in_batch: by which the model divides its sum of losses; None: its loss is a mean.

        Returns:
            The loss of the first pass.

        Raises:
            TypeError: the optimizer is not CrAM, or hidden in a wrapper of DeepSpeed or the like.
            ValueError: FSDP1; fp16 and `args.max_grad_norm`, which would unscale the first gradients; a `compute_loss_func` that ignores
                `num_items_in_batch`, with several micro-batches or processes.
        """
        cram = getattr(self.optimizer, "optimizer", self.optimizer)  # Accelerate wraps it
        if not isinstance(cram, CrAM):
            raise TypeError(f"TwoPassTrainer: optimizer must be CrAM, got {type(cram).__name__}")
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        if fsdp is not None and fsdp.fsdp_version != 2:
            raise ValueError(f"TwoPassTrainer: fsdp_version must be 2, got {fsdp.fsdp_version}: FSDP1's flat parameters can't be pruned")
        scaler, max_norm = self.accelerator.scaler, self.args.max_grad_norm
        if scaler is not None and max_norm > 0:
            raise ValueError(
                f"TwoPassTrainer: args.max_grad_norm must be 0 with fp16, got {max_norm}: CrAM(max_grad_norm={max_norm}) clips"
            )
        if cram._hooks is None:  # Trainer made it, of parameters
            cram.attach(model)
        if num_items_in_batch is not None and not self._loss_is_known:
            self._learn_loss(model, inputs, num_items_in_batch)
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

    def _learn_loss(self, model: Any, inputs: dict[str, Any], items: Any) -> None:
        """See whether the loss is divided by `num_items_in_batch`. Trainer (5.24) believes it of any model whose forward takes keyword
        arguments, multiplies by the number of processes, and leaves micro-batches undivided: rho * g would be as many times as long."""
        if self.accelerator.num_processes == self.args.gradient_accumulation_steps == 1 >= self.args.n_gpu:
            return
        loss_of, prepared = self.compute_loss, self._prepare_inputs  # type: ignore[attr-defined]
        model.eval()  # draws no dropout; Trainer's step goes back to train()
        with torch.no_grad():
            losses = [loss_of(model, prepared(inputs), num_items_in_batch=n).mean() for n in (items, 2 * items)]
        found = self.accelerator.gather(torch.stack(losses)[None])  # the ranks must agree
        self._loss_is_known = bool(found.any())  # else look again: no label of this batch counts
        if not self._loss_is_known or not torch.equal(found[:, 0], found[:, 1]):
            return
        if getattr(self, "compute_loss_func", None) is not None:
            raise ValueError("TwoPassTrainer: compute_loss_func must divide by num_items_in_batch, got one that does not depend on it")
        self.model_accepts_loss_kwargs = False  # as Trainer calls it
