"""A training step of real networks, split into forward, backward and optimizer: SGD, CrAM by the published algorithm, CrAM by us.

The networks are those of transformers, with random weights (extra: frameworks). Both CrAMs take two passes a step and draw the same levels.
The published algorithm is our own port of it (tests/published.py), not the authors' file. Ours is timed in its cheaper forms as well: half,
whose second pass sees half of the batch, and split, whose passes see a half each.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import published
import torch
from torch import Tensor, nn

from cram_kernels import CrAM, TopK

from . import gate, run
from .measure import PUBLISHED_ROUNDS, ROUNDS, Row, Setup, timing

OPTIONS = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
RHO, SPARSITY = 0.05, 0.9
PARTS = ("forward", "backward", "optimizer")


def resnet50(quick: bool) -> tuple[nn.Module, Tensor]:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 10} if quick else {"num_labels": 1000}
    return ResNetForImageClassification(ResNetConfig(**sizes)), torch.randn(2 if quick else 8, 3, *(2 * [32 if quick else 224]))


def vit_base(quick: bool) -> tuple[nn.Module, Tensor]:
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
    config = ViTConfig(num_labels=10 if quick else 1000, **(small if quick else {}))
    return ViTForImageClassification(config), torch.randn(2, 3, config.image_size, config.image_size)


def bert_base(quick: bool) -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertForSequenceClassification

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}
    config = BertConfig(hidden_dropout_prob=0, attention_probs_dropout_prob=0, **(small if quick else {}))
    return BertForSequenceClassification(config), torch.randint(config.vocab_size, (2, 16) if quick else (2, 128))


NETWORKS: dict[str, Callable[[bool], tuple[nn.Module, Tensor]]] = {"ResNet-50": resnet50, "ViT-B": vit_base, "BERT-base": bert_base}


class Training:
    """A copy of the network with an optimizer, which takes steps on one batch and notes the seconds of each part."""

    def __init__(self, kind: str, model: nn.Module, batch: Tensor) -> None:
        self.model, self.batch = copy.deepcopy(model).train(), batch
        self.target = torch.arange(len(batch), device=batch.device) % 2
        self.spent = dict.fromkeys(PARTS, 0.0)
        params = list(self.model.parameters())
        whole, half = slice(None), len(batch) // 2
        self.shares = {"half": [whole, slice(half)], "split": [slice(half), slice(half, None)]}.get(kind, [whole, whole])  # of each pass
        if kind == "SGD":
            self.optimizer: Any = torch.optim.SGD(params, fused=True, **OPTIONS)
            self.halves = [lambda: (self.optimizer.step(), self.optimizer.zero_grad())]
        elif kind in OURS:
            self.optimizer = CrAM(params, torch.optim.SGD, compression=[TopK(sparsity=SPARSITY)], rho=RHO, **OPTIONS)
            self.halves = [self.optimizer.perturb, self.optimizer.step]
        else:
            self.optimizer = published.TopkCrAM(params, torch.optim.SGD, rho=RHO, sparsities=(SPARSITY,), **OPTIONS)
            self.halves = [lambda: self.optimizer.first_step(zero_grad=True), lambda: self.optimizer.second_step(zero_grad=True)]

    def timed(self, part: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        if self.batch.device.type != "cpu":
            torch.cuda.synchronize()
        self.spent[part] += time.perf_counter() - begin
        return result

    def loss(self, batch: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch).logits, target)

    def step(self) -> dict[str, float]:
        self.spent = dict.fromkeys(PARTS, 0.0)
        for half, share in zip(self.halves, self.shares, strict=False):
            loss = self.timed("forward", partial(self.loss, self.batch[share], self.target[share]))
            self.timed("backward", loss.backward)
            self.timed("optimizer", half)
        return self.spent


OURS = ("cram_kernels", "half", "split")
KINDS = (OURS[0], "published", "SGD", *OURS[1:])


@dataclass
class EndToEnd:
    """One network. In each round every method takes one step, the published algorithm in the first few."""

    network: str
    setup: Setup
    trainings: dict[str, Training] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.trainings = self.make(self.setup.quick)

    def make(self, quick: bool) -> dict[str, Training]:
        model, batch = NETWORKS[self.network](quick)
        return {kind: Training(kind, model.to(self.setup.device), batch.to(self.setup.device)) for kind in KINDS}

    def check(self) -> None:
        """On a small network of this kind: after one step our weights are those of the published algorithm, but for roundings."""
        small = self.make(quick=True)
        for training in small.values():
            training.step()
        pairs = zip(*(small[kind].model.named_parameters() for kind in KINDS[:2]), strict=True)
        for (name, a), (_, b) in pairs:
            gate.require(torch.allclose(a, b, rtol=1e-4, atol=1e-6), f"published: weights of {name} are not ours after a step")

    def rows(self, setup: Setup) -> list[Row]:
        spent: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for turn in range(1 + setup.how_often(ROUNDS)):
            for kind in KINDS[turn % len(KINDS) :] + KINDS[: turn % len(KINDS)]:
                if kind == "published" and turn > PUBLISHED_ROUNDS:
                    continue
                found = self.trainings[kind].step()
                if turn > 0:  # the first makes buffers
                    spent[kind].append(found)
        totals = {kind: [sum(found.values()) for found in all_found] for kind, all_found in spent.items()}
        rows = []
        for kind, own in totals.items():
            row = timing(kind, own) | {"ours": kind in OURS}
            row |= {f"{part}_ms": 1e3 * statistics.median(found[part] for found in spent[kind]) for part in PARTS}
            row["x_ours"] = statistics.median(a / b for a, b in zip(own, totals[KINDS[0]], strict=False))
            parts = [1e3 * found["optimizer"] for found in spent[kind]]
            rows.append(row | {"rounds_ms": [1e3 * t for t in own], "optimizer_rounds_ms": parts})
        return rows

    def describe(self) -> Row:
        training = self.trainings[KINDS[0]]
        return {"weights": sum(p.numel() for p in training.model.parameters()), "batch": "x".join(map(str, training.batch.shape))}


def cases() -> Iterator[run.Case]:
    for network in NETWORKS:
        yield run.Case(f"training step {network}", partial(EndToEnd, network), memory=10 * 2**30)


if __name__ == "__main__":
    raise SystemExit(run.main("end_to_end", cases()))
