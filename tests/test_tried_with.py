"""Libraries and settings that work as they are, without code of ours: each against a loop by hand, or against what it must leave alone."""

import copy
import glob
import pickle

import pytest
import torch
from optim_cases import assert_same_bits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cram_kernels import CrAM, TopK

SETTINGS = {"lr": 0.1, "momentum": 0.9, "compression": [TopK(sparsity=0.5), TopK(sparsity=0.9)]}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def data() -> TensorDataset:
    x = torch.randn(128, 20, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x[:, 0] > 0).long())


def by_hand(loader, epochs: int) -> tuple[nn.Module, CrAM]:
    model = network()
    optimizer = CrAM(model, torch.optim.SGD, **SETTINGS)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.step(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y).backward())
    return model, optimizer


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers_of_a_loader(context):
    alone, _ = by_hand(DataLoader(data(), 32), epochs=1)
    helped, _ = by_hand(DataLoader(data(), 32, num_workers=1, multiprocessing_context=context), epochs=1)
    assert_same_bits(list(alone.state_dict().values()), list(helped.state_dict().values()))


@pytest.mark.frameworks
def test_skorch():
    skorch = pytest.importorskip("skorch", reason="skorch is not installed: pip install skorch")
    options = {f"optimizer__{key}": value for key, value in SETTINGS.items()}
    net = skorch.NeuralNetClassifier(
        network,
        optimizer=CrAM,
        optimizer__base_optimizer=torch.optim.SGD,
        criterion=nn.CrossEntropyLoss,
        max_epochs=2,
        batch_size=32,
        train_split=None,
        verbose=0,
        **options,
    )
    x, y = data().tensors
    net.fit(x.numpy(), y.numpy())
    expected, _ = by_hand(DataLoader(data(), 32), epochs=2)
    assert_same_bits(list(net.module_.parameters()), list(expected.parameters()))
    copied = pickle.loads(pickle.dumps(net))
    net.partial_fit(x.numpy(), y.numpy())
    copied.partial_fit(x.numpy(), y.numpy())
    assert_same_bits(list(net.module_.parameters()), list(copied.module_.parameters()))
    assert copied.optimizer_.param_groups[0]["cram_step"] == net.optimizer_.param_groups[0]["cram_step"] == 16


@pytest.mark.frameworks
def test_lora_adapters_of_peft(tmp_path):
    """Frozen weights are neither pruned nor moved in between: what is perturbed are the adapters and the head."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'cram_kernels[frameworks]'")
    from cram_kernels.integrations.transformers import TwoPassTrainer

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, num_labels=2, **sizes))
    model = peft.get_peft_model(bert, peft.LoraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"]))
    optimizer = CrAM(model, torch.optim.AdamW, lr=1e-3, compression=[TopK(sparsity=0.5)])
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before = copy.deepcopy({name: p.detach() for name, p in model.named_parameters()})
    seen = []

    class Trainer(TwoPassTrainer, transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            if optimizer.open_step is not None:
                seen.append(all(torch.equal(p, before[name]) for name, p in frozen.items()))
            return super().compute_loss(*args, **kwargs)

    rows = [{"input_ids": torch.arange(16) + i, "labels": torch.tensor(i % 2)} for i in range(16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, num_train_epochs=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert seen == [True, True] and optimizer.param_groups[0]["cram_step"] == 2
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and not moved & set(frozen)


@pytest.mark.frameworks
@pytest.mark.parametrize("fail", [7, 8])
def test_a_checkpoint_that_lightning_makes_of_an_exception_has_clean_weights(tmp_path, fail):
    """In the first pass of the fourth step, and in the second: three steps are saved, as a loop by hand takes them. (Lightning goes on from
    the first batch of the epoch where the loader cannot say where it was, with every optimizer.)"""
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: pip install 'cram_kernels[frameworks]'")
    from cram_kernels.integrations.lightning import TwoPassModule

    class Module(TwoPassModule, pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.calls = network(), 0

        def configure_optimizers(self):
            return CrAM(self.net, torch.optim.SGD, **SETTINGS)

        def training_step(self, batch, _):
            self.calls += 1
            if self.calls == fail:
                raise ValueError("a bad batch")
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}
    saver = pl.callbacks.OnExceptionCheckpoint(tmp_path)
    with pytest.raises(ValueError, match="a bad batch"):
        pl.Trainer(callbacks=[saver], default_root_dir=tmp_path, **quiet).fit(Module(), DataLoader(data(), 32))
    [path] = glob.glob(str(tmp_path / "*.ckpt"))
    saved = torch.load(path, weights_only=False)
    expected, optimizer = by_hand([batch for i, batch in enumerate(DataLoader(data(), 32)) if i < 3], epochs=1)
    assert_same_bits([saved["state_dict"][f"net.{name}"] for name, _ in expected.named_parameters()], list(expected.parameters()))
    momentum = [state["momentum_buffer"] for state in saved["optimizer_states"][0]["state"].values()]
    assert_same_bits(momentum, [state["momentum_buffer"] for state in optimizer.state.values()])
    assert saved["optimizer_states"][0]["param_groups"][0]["cram_step"] == 3
