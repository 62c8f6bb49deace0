"""What torchrun starts in test_framework_ranks.py: every framework beside torch's DDP or FSDP2 and a loop, to the bit, on each rank.

Arguments: a folder; every check that passed leaves a file there with its name and rank.
"""

import copy
import sys
import warnings
from pathlib import Path

import test_lightning
import test_transformers
import torch
import torch.distributed as dist
from optim_cases import assert_same_bits, backward, batches, network, weights
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
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
    return trainer(folder, test_transformers.bert(), DistributedDataParallel)


def check_trainer_of_a_mean(folder: Path) -> list[torch.Tensor]:
    """Trainer multiplies the loss by the number of processes, because it takes this model for one that divides by the number of items."""
    return trainer(folder, test_transformers.bert(), DistributedDataParallel, accepts=True)


class PerItem(test_transformers.transformers.BertForSequenceClassification):
    """Divides by the number of items of all ranks, as language models do. Half of the labels of rank 0 do not count."""

    def forward(self, input_ids, labels, num_items_in_batch=1):
        logits = super().forward(input_ids).logits
        if dist.get_rank() == 0:
            labels = labels.clone()
            labels[::2] = -100
        return {"loss": nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch}


def check_trainer_of_a_loss_per_item(folder: Path) -> list[torch.Tensor]:
    """8 rows a step, as Trainer counts them: DDP's mean of twice the loss is the sum over both ranks, divided by 8."""
    model = PerItem(test_transformers.bert().config)
    model.load_state_dict(test_transformers.bert().state_dict())
    return trainer(folder, model, DistributedDataParallel, accepts=True, scale=2, num_items_in_batch=8)


def trainer(folder, model, spread, accepts=False, kind=test_transformers.CrAMTrainer, scale=1, **others) -> list[torch.Tensor]:
    """Trainer deals out batches of 4 rows: to rank r those at 2 * step + r.

    Args:
        spread: what makes the judge's model one of several processes.
        accepts: what Trainer believes of the model.
        scale, others: of the judge's loss, and what its model is called with.
    """
    test_transformers.accelerate.state.AcceleratorState._reset_state()
    judge = copy.deepcopy(model)
    options = {"base_optimizer": torch.optim.AdamW, "weight_decay": 0.0, **test_transformers.OPTIONS}
    trained = test_transformers.trainer_of(folder, model, kind=kind, made_with=(CrAM, options), ddp_backend="gloo")
    trained.train_dataset = data = test_transformers.rows(2 * 4 * STEPS)
    trained.model_accepts_loss_kwargs = accepts
    trained.train()
    assert trained.accelerator.num_processes == 2 and trained.state.global_step == STEPS
    called = spread(judge)
    optimizer = CrAM(judge, **options, prune_embeddings=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / STEPS)
    for step in range(STEPS):
        micro = data[4 * (2 * step + dist.get_rank()) :][:4]
        batch = {key: torch.stack([row[key] for row in micro]) for key in micro[0]}
        for end in (optimizer.perturb, optimizer.step):
            (scale * called(**batch, **others)["loss"]).backward()
            end()
        schedule.step()
    assert_same_bits(whole(model), whole(judge))
    return whole(model)


# FSDP2. Accelerate shards on GPUs and the like, and on a CPU takes DDP without a word: here it is told by hand.


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in weights(model)]


def shard_with_accelerate(state) -> None:
    state.distributed_type = test_transformers.accelerate.DistributedType.FSDP
    state.fsdp_plugin = test_transformers.accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)


def check_accelerate_fsdp2(folder: Path) -> list[torch.Tensor]:
    """The optimizer is made before prepare(), which shards the model and gives the optimizer the shards."""
    test_transformers.accelerate.state.AcceleratorState._reset_state()
    accelerator = test_transformers.accelerate.Accelerator(cpu=True)
    shard_with_accelerate(accelerator.state)
    model, judge = network(), network()
    optimizer = CrAM(model, **OPTIONS)
    fsdp, prepared = accelerator.prepare(model, optimizer)
    assert isinstance(fsdp, FSDPModule) and all(hasattr(p, "full_tensor") for p in model.parameters())
    by_hand = CrAM(fully_shard(judge), **OPTIONS)
    for x, y in own_batches():
        for end, judge_end in ((lambda: optimizer.perturb(accelerator.scaler), by_hand.perturb), (prepared.step, by_hand.step)):
            loss = nn.functional.cross_entropy(fsdp(x), y)
            accelerator.backward(loss)
            end()
            judged = nn.functional.cross_entropy(judge(x), y)
            judged.backward()
            judge_end()
            assert loss.item() == judged.item()
    assert_same_bits(whole(model), whole(judge))
    return whole(model)


class Sharded(test_transformers.CrAMTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        shard_with_accelerate(self.accelerator.state)
        self.is_fsdp_enabled = True


def check_trainer_fsdp2(folder: Path) -> list[torch.Tensor]:
    """Accelerate makes a unit of the embedding table."""

    def spread(model: nn.Module) -> nn.Module:
        fully_shard(model.get_input_embeddings())
        return fully_shard(model)

    return trainer(folder, test_transformers.bert(), spread, kind=Sharded)


def check_lightning_fsdp2(folder: Path) -> list[torch.Tensor]:
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Net(test_lightning.TwoPassNet):
        def configure_model(self):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def configure_optimizers(self):
            return CrAM(self.net, **OPTIONS).attach(self)

    net, judge = Net(), network()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    options = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "use_distributed_sampler": False, "max_steps": STEPS}
    trainer = test_lightning.trainer_of(folder, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(net, torch.utils.data.DataLoader(own_batches(), batch_size=None))
    assert trainer.world_size == 2 and trainer.global_step == STEPS
    by_hand = CrAM(fully_shard(judge), **OPTIONS)
    for batch in own_batches():
        for end in (by_hand.perturb, by_hand.step):
            backward(judge, batch)
            end()
    assert_same_bits(whole(net.net), whole(judge))
    return whole(net.net)


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
