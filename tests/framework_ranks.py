"""What torchrun starts in test_framework_ranks.py: every framework beside torch's DDP with the loop written out, to the bit, on each rank.

Arguments: a folder; every check that passed leaves a file there with its name and rank.
"""

import sys
import warnings
from pathlib import Path

import test_lightning
import test_transformers
import torch
import torch.distributed as dist
from optim_cases import assert_same_bits, backward, batches, network, weights
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cram_kernels import CrAM, TopK

STEPS = 4
OPTIONS = {"compression": [TopK(0.5), TopK(0.9)], "lr": 0.1, "momentum": 0.9}


def own_batches() -> list:
    """Other images on each rank."""
    return list(batches(STEPS, seed=1 + dist.get_rank()))


def by_hand(first: slice = slice(8), second: slice = slice(8)) -> nn.Module:
    """The judge; other slices are other samples of a batch."""
    model = network()
    ddp, optimizer = DistributedDataParallel(model), CrAM(model, **OPTIONS)
    for x, y in own_batches():
        for part, end in ((first, optimizer.perturb), (second, optimizer.step)):
            backward(ddp, (x[part], y[part]))
            end()
    return model


def check_accelerate(folder: Path) -> list[torch.Tensor]:
    accelerator = test_transformers.accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = network()
    optimizer = CrAM(model, **OPTIONS)
    ddp, prepared = accelerator.prepare(model, optimizer)
    assert isinstance(ddp, DistributedDataParallel)
    for x, y in own_batches():
        for end in (lambda: optimizer.perturb(accelerator.scaler), prepared.step):
            accelerator.backward(nn.functional.cross_entropy(ddp(x), y))
            end()
    assert_same_bits(weights(model), weights(by_hand()))
    return weights(model)


def check_lightning(folder: Path) -> list[torch.Tensor]:
    return lightning(folder, "all", slice(8), slice(8))


def check_lightning_split(folder: Path) -> list[torch.Tensor]:
    return lightning(folder, "split", slice(4), slice(4, 8))


def lightning(folder: Path, second_pass: str, first: slice, second: slice) -> list[torch.Tensor]:
    class Net(test_lightning.TwoPassNet):
        def configure_optimizers(self):
            return CrAM(self.net, **OPTIONS).attach(self)

    net = Net()
    net.second_pass = second_pass
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "max_steps": STEPS}
    trainer = test_lightning.trainer_of(folder, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(net, torch.utils.data.DataLoader(own_batches(), batch_size=None))
    assert trainer.world_size == 2 and trainer.global_step == STEPS
    assert_same_bits(weights(net.net), weights(by_hand(first, second)))
    return weights(net.net)


def check_trainer(folder: Path) -> list[torch.Tensor]:
    """Trainer deals out batches of 4 rows: to rank r those at 2 * step + r."""
    test_transformers.accelerate.state.AcceleratorState._reset_state()
    model, judge = test_transformers.bert(), test_transformers.bert()
    trainer = test_transformers.trainer_of(folder, model, ddp_backend="gloo")
    trainer.train_dataset = data = test_transformers.rows(2 * 4 * STEPS)
    trainer.train()
    assert trainer.accelerator.num_processes == 2 and trainer.state.global_step == STEPS
    ddp = DistributedDataParallel(judge)
    optimizer = CrAM(judge.parameters(), torch.optim.AdamW, **test_transformers.OPTIONS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / STEPS)
    for step in range(STEPS):
        micro = data[4 * (2 * step + dist.get_rank()) :][:4]
        batch = {key: torch.stack([row[key] for row in micro]) for key in micro[0]}
        for end in (optimizer.perturb, optimizer.step):
            ddp(**batch).loss.backward()
            end()
        schedule.step()
    assert_same_bits(weights(model), weights(judge))
    return weights(model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, check in [(name, f) for name, f in list(globals().items()) if name.startswith("check_")]:
        found = check(Path(sys.argv[1]))
        for t in found:
            first = t.clone()
            dist.broadcast(first, 0)
            assert torch.equal(first.view(torch.int32), t.contiguous().view(torch.int32)), f"{name}: the ranks differ"
        (Path(sys.argv[1]) / f"{name}.{dist.get_rank()}").touch()
    dist.destroy_process_group()
