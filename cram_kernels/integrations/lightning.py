"""Lightning: a mixin for a LightningModule whose optimizer is CrAM; see docs/lightning.md."""

from collections.abc import Callable
from inspect import signature
from typing import Any

from ..batch import SecondPass, check_second_pass, split_batch
from ..optim import CrAM


class TwoPassModule:
    """`class Net(TwoPassModule, LightningModule)`: each step runs `training_step` and backward twice, in every precision.

    With another optimizer than CrAM nothing changes. What the second pass logs is dropped: it is measured at other weights. Made over the
    module, the optimizer keeps batch norms still in the second pass, and checkpoints clean at any time:

        def configure_optimizers(self):
            return CrAM(self, lr=0.1)

    Attributes:
        second_pass: the samples of the second pass, "all", "half" or "split", see `cram_kernels.split_batch`: set it in the class or in
            `__init__`. In automatic optimization `training_step` is handed the samples of its pass; in manual optimization it cuts the
            batch itself.
        in_second_pass: whether the weights are perturbed now.

    Example:
        class Net(TwoPassModule, LightningModule):
            def configure_optimizers(self):
                return CrAM(self, lr=0.1)
    """

    second_pass: SecondPass = "all"
    in_second_pass = False
    trainer: Any

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None) -> None:
        """Lightning's hook of automatic optimization.

        Args:
            epoch: of the training, from 0; not used.
            batch_idx: of the batch in the epoch, from 0; not used.
            optimizer: as Lightning hands it out, around CrAM. Any other takes its ordinary step.
            optimizer_closure: Lightning's forward and backward pass.

        Raises:
            RuntimeError: `accumulate_grad_batches` is not 1: Lightning has dropped the earlier batches, which the second pass needs. Or
                `training_step` takes `dataloader_iter`.
        """
        if getattr(self.trainer.fit_loop, "_skip_backward", False):  # the last epoch of StochasticWeightAveraging only measures batch norms
            if optimizer_closure is not None:
                optimizer_closure()
            return
        accumulated = self.trainer.accumulate_grad_batches
        if accumulated != 1 and isinstance(optimizer.optimizer, CrAM):
            wanted = "be 1 (accumulate in manual optimization, with a closure over all micro-batches)"
            raise RuntimeError(f"TwoPassModule: accumulate_grad_batches must {wanted}, got {accumulated}")
        whole: Any = self.training_step  # type: ignore[has-type]
        if "dataloader_iter" in signature(whole).parameters and isinstance(optimizer.optimizer, CrAM):
            raise RuntimeError("TwoPassModule: training_step must take a batch, got dataloader_iter, which gives each pass another batch")
        check_second_pass("TwoPassModule", self.second_pass)
        if self.second_pass == "all" or not isinstance(optimizer.optimizer, CrAM):
            self.two_passes(optimizer, optimizer_closure)
            return

        def part(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return whole(split_batch(batch, self.second_pass)[self.in_second_pass], *args, **kwargs)

        self.training_step = part  # for this step alone: Lightning's closure looks it up in each pass
        try:
            self.two_passes(optimizer, optimizer_closure)
        finally:
            del self.training_step

    def two_passes(self, optimizer: Any, closure: Callable[[], Any] | None) -> None:
        """A step of one of `self.optimizers()`, for manual optimization. The gradients are zeroed here.

        Args:
            optimizer: as Lightning hands it out, around CrAM.
            closure: computes the loss and calls `self.manual_backward(loss)`, for one batch or for several; run twice.
        """
        cram, scaler = optimizer.optimizer, self.trainer.scaler
        if not isinstance(cram, CrAM) or closure is None:
            optimizer.step(closure=closure)
            return

        def run() -> Any:
            try:
                return closure()
            finally:
                self.in_second_pass = True  # from here on, if there is another one

        cram.zero_grad()
        try:
            if scaler is not None:  # Lightning runs a closure once then, and calls step() without it
                run()
                cram.perturb(scaler)
            optimizer.step(closure=run)
        except BaseException:
            cram.restore()
            cram.zero_grad()
            raise
        finally:
            self.in_second_pass = False

    def log(self, *args: Any, **kwargs: Any) -> None:
        """As of Lightning, in the first pass."""
        if not self.in_second_pass:
            super().log(*args, **kwargs)  # type: ignore[misc]
