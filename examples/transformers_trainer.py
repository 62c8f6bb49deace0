"""CrAM under Hugging Face's Trainer: a small BERT, built from a configuration, tells prose from code by 48 characters.

The text is real and comes with Python: its language reference (pydoc_data) and the source of three modules. Nothing is downloaded.

Run: pip install 'cram_kernels[frameworks]' and python examples/transformers_trainer.py [--quick]
"""

import argparse
import copy
import inspect
import tarfile
import tempfile
import typing
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from cram_kernels import CrAM, TopK, prune
from cram_kernels.integrations.transformers import TwoPassTrainer

LENGTH = 48
Rows = list[dict[str, Tensor]]


class CrAMTrainer(TwoPassTrainer, Trainer):  # the mixin comes first
    pass


def load() -> tuple[Rows, Rows]:
    """Shuffled rows to train and to test on: input_ids [48] int64, one a byte, and labels [], 0 for prose and 1 for code."""
    prose = " ".join(line for text in topics.values() for line in text.splitlines() if line[:1].isalpha())
    sources = [inspect.getsource(module) for module in (argparse, tarfile, typing)]
    code = " ".join(line.strip() for text in sources for line in text.splitlines() if line.strip() and line.strip()[0] != "#")
    rows = []
    for label, text in enumerate((prose, code)):
        data = torch.tensor(list(text.encode()[: 4000 * LENGTH])).reshape(4000, LENGTH)
        rows += [{"input_ids": row, "labels": torch.tensor(label)} for row in data]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[i] for i in order[:7000]], [rows[i] for i in order[7000:]]


def network() -> BertForSequenceClassification:
    """About 110,000 weights."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(vocab_size=256, max_position_embeddings=LENGTH, num_labels=2, **sizes)
    return BertForSequenceClassification(config)


@torch.no_grad()
def accuracy(model: BertForSequenceClassification, rows: Rows) -> float:
    """In percent."""
    model.eval()
    predicted = model(input_ids=torch.stack([row["input_ids"] for row in rows])).logits.argmax(1)
    return 100 * float((predicted == torch.stack([row["labels"] for row in rows])).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small BERT with AdamW and CrAM under Trainer, prune in one shot, compare.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches a step (default: 1)")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--quick", action="store_true", help="10 steps: shows that everything runs, too short for an effect")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a network this small is all overhead on more
    train, test = load()
    for name in ("AdamW", "CrAM+"):
        torch.manual_seed(0)
        model = network()
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        kind: type[Trainer] = Trainer
        if name == "CrAM+":
            optimizer = CrAM(optimizer, compression=[TopK(sparsity=0.5), TopK(sparsity=0.7)], rho=0.05).attach(model)
            kind = CrAMTrainer
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                use_cpu=not torch.cuda.is_available(),  # else bf16 is refused there
                max_steps=10 if given.quick else given.steps,
                per_device_train_batch_size=32,
                gradient_accumulation_steps=given.accumulate,
                max_grad_norm=1.0,  # of each pass
                bf16=given.bf16,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            result = kind(model, arguments, train_dataset=train, optimizers=(optimizer, None)).train()
        model.cpu()
        pruned = copy.deepcopy(model)
        prune(pruned, TopK(sparsity=0.7))
        dense, sparse = accuracy(model, test), accuracy(pruned, test)
        loss = result.training_loss
        print(f"{name:6} loss {loss:.3f}; test accuracy {dense:.1f} % dense, {sparse:.1f} % without 70 % of its weights", flush=True)


if __name__ == "__main__":
    main()
