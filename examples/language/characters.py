r"""Train a small transformer from scratch to predict the next character of a text, with every method and seed; prune them in one shot.

    python examples/language/novels.py --out novels
    python examples/language/characters.py --config examples/language/configs/novels.yaml --train novels/train.txt --test novels/test.txt \
        --out study

Writes study.json and table.md: bits per character of the test text, of which fewer are better. Runs that are finished (results.json is
there) are not run again. Needs `pip install 'cram_kernels[examples,frameworks]'`.
"""

import copy
import json
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import recipe
import torch
import torch.nn.functional as F
from classify_study import PLACES, label
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent))
from comparison import arguments, runs_of, summarise, table, told

from cram_kernels import CrAM, SparsityWarmup, prune, reconstruct, train_step

METHODS = {  # name: what it changes in the settings; work in passes over a character, AdamW's being 1
    "adamw": {"method": "adamw"},  # 1
    "adamw-twice": {"method": "adamw", "steps": 2},  # 2
    "cram": {"method": "cram+"},  # 2
    "split": {"method": "cram+", "second_pass": "split"},  # 1
}


@dataclass
class Characters:
    """A transformer that reads characters.

    Args:
        train: the text to train on, in UTF-8.
        test: the text to test on.
        test_characters: judge on the first so many characters of the test; 0: on all.
        length: characters that the model sees at once.
        width: numbers that stand for a character within the model; a multiple of `heads`.
        layers: blocks of attention and two linear layers.
        heads: of the attention.
        method: adamw trains plainly; cram and cram+ take two passes a step. A study sets it, see --methods.
        compression: the patterns of cram and cram+, one of which each step draws: shares of zeros (0.7) and N:M ("2:4"). Embeddings and
            head stay dense.
        rho: how far uphill.
        sparsity_warmup: let the sparsities rise from 0 over this share of all steps.
        second_pass: the samples of the second pass: all of a batch, half of it, or split, where each pass has its own half.
        lr: the highest learning rate of AdamW. The rate rises over `warmup`, then falls linearly; it would be 0 in the step after the last.
        batch: pieces of text a step.
        steps: of training.
        warmup: the share of all steps over which the rate rises.
        precision: of training: fp32, or autocast to bf16. Networks are judged in fp32.
        patterns: to prune to afterwards, in one shot.
        reconstruct: how many pieces of the training text `reconstruct` may see; 0 leaves it out.
        seed: of the first weights, of the pieces of text, and of the patterns that are drawn. A study sets it, see --seeds.
        out: the folder for all runs and for their table.
        device: cpu, or cuda where there is one.
        threads: of torch on a CPU; 0 leaves its choice.
    """

    train: Path = Path("train.txt")
    test: Path = Path("test.txt")
    test_characters: int = 0
    length: int = 128
    width: int = 128
    layers: int = 4
    heads: int = 4
    method: Literal["adamw", "cram", "cram+"] = "cram+"
    compression: list[str | float] = field(default_factory=lambda: [0.5, 0.7, 0.9])
    rho: float = 0.05
    sparsity_warmup: float = 0.5
    second_pass: Literal["all", "half", "split"] = "all"
    lr: float = 1e-3
    batch: int = 16
    steps: int = 1000
    warmup: float = 0.1
    precision: Literal["fp32", "bf16"] = "fp32"
    patterns: list[str | float] = field(default_factory=lambda: [0.5, 0.7, 0.8, 0.9, "2:4"])
    reconstruct: int = 128
    seed: int = 0
    out: Path = Path("study")
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        for text in (*self.compression, *self.patterns):
            recipe.pattern(text)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")


class Block(nn.Module):
    """Attention to the characters so far, then two layers; each adds to its input, which is normed first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.attend(self.norm1(x)).chunk(3, -1))
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """[texts, characters] as numbers of symbols -> [texts, characters, symbols], the scores of the next character."""

    def __init__(self, symbols: int, s: Characters) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(symbols, s.width), nn.Embedding(s.length, s.width)
        self.blocks = nn.Sequential(*(Block(s.width, s.heads) for _ in range(s.layers)), nn.LayerNorm(s.width))
        self.head = nn.Linear(s.width, symbols)
        for layer in (self.embedding, self.places):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(text) + self.places.weight[: text.shape[1]]))


def read(s: Characters) -> tuple[Tensor, Tensor, list[str]]:
    """(training text, test text, both as numbers of symbols; the symbols)."""
    texts = []
    for path in (s.train, s.test):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: a text, such as those of novels.py")
        texts.append(path.read_text(encoding="utf-8"))
    texts[1] = texts[1][: s.test_characters or None]
    if min(map(len, texts)) <= s.length + 1:
        raise ValueError(f"texts must have more than length + 1 = {s.length + 1} characters, got {min(map(len, texts))}")
    symbols = sorted(set(texts[0] + texts[1]))
    numbers = {symbol: i for i, symbol in enumerate(symbols)}
    training, test = (torch.tensor([numbers[symbol] for symbol in text]) for text in texts)
    return training, test, symbols


def drawn(text: Tensor, s: Characters, seed: int) -> Iterator[Tensor]:
    """Batches of pieces from anywhere in the text, each a character longer than what the model sees."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(len(text) - s.length, (s.batch, 1), generator=generator)
        yield text[start + torch.arange(s.length + 1)].to(s.device)


def train(text: Tensor, symbols: int, s: Characters) -> nn.Module:
    torch.manual_seed(s.seed)
    model = Transformer(symbols, s).to(s.device)
    if s.method == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=0.0)
    else:
        patterns = [recipe.pattern(pattern) for pattern in s.compression]
        compression = SparsityWarmup(patterns, steps=max(1, round(s.sparsity_warmup * s.steps))) if s.sparsity_warmup else patterns
        options = {"compression": compression, "rho": s.rho, "plus": s.method == "cram+", "seed": s.seed, "exclude": ["head.*"]}
        optimizer = CrAM(model, torch.optim.AdamW, lr=s.lr, weight_decay=0.0, **options)
    rise = max(1, round(s.warmup * s.steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / rise, (s.steps - step) / max(1, s.steps - rise)))

    def loss(pieces: Tensor) -> Tensor:
        with torch.autocast(s.device, torch.bfloat16) if s.precision == "bf16" else nullcontext():
            return F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())

    batches, total = drawn(text, s, s.seed), 0.0
    for step in range(1, s.steps + 1):
        total += float(train_step(optimizer, loss, next(batches), s.second_pass))
        scheduler.step()
        if step % 100 == 0:
            print(f"step {step}: {total / 100 / math.log(2):.3f} bits per character", flush=True)
            total = 0.0
    return model


@torch.no_grad()
def bits(model: nn.Module, text: Tensor, s: Characters) -> float:
    """Per character of the text, in pieces that are read on their own: the first character of a piece is guessed from one before it."""
    model.eval()
    total, pieces = 0.0, text.unfold(0, s.length + 1, s.length)
    for part in pieces.to(s.device).split(64):
        total += float(F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / pieces[:, 1:].numel() / math.log(2)


def run(s: Characters) -> dict[str, Any]:
    """Train, prune and judge; returns what results.json holds."""
    if s.threads:
        torch.set_num_threads(s.threads)
    text, test, symbols = read(s)
    model = train(text, len(symbols), s)
    settings = {name: value for name, value in recipe.plain(s).items() if name not in PLACES}
    results: dict[str, Any] = {"label": label(settings), "dense": bits(model, test, s), "pruned": {}, "settings": settings, "zeros": {}}
    calibration = drawn(text, s, s.seed + 1)
    inputs = [next(calibration)[:, :-1] for _ in range(-(-s.reconstruct // s.batch))]
    for pattern in map(recipe.pattern, s.patterns):
        pruned = copy.deepcopy(model)
        results["zeros"][str(pattern)] = prune(pruned, pattern, exclude=["head.*"]).to_dict()["pruned"]["sparsity"]
        found = results["pruned"][str(pattern)] = {"as pruned": bits(pruned, test, s)}
        if s.reconstruct:
            reconstruct(pruned, model, inputs, samples=s.reconstruct)
            found["reconstructed"] = bits(pruned, test, s)
    results["versions"] = {name: version for name, version in recipe.versions().items() if name != "transformers"}
    s.out.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "symbols": symbols}, s.out / "model.pt")
    recipe.write_json(s.out / "results.json", results)
    print(table(summarise([results]), list(results["pruned"]), ["as pruned", "reconstructed"], digits=3))
    return results


def main() -> None:
    given, options = arguments("Predict characters with every method and every seed, and prune in one shot.", METHODS)
    s: Characters = recipe.parse(Characters, "Predict characters, and prune in one shot.", options)
    runs = runs_of(s, METHODS, given, None, run, PLACES)
    results = [json.loads((one.out / "results.json").read_text()) for one in runs]
    text = table(summarise(results), list(results[0]["pruned"]), ["as pruned", "reconstructed"], digits=3)
    recipe.write_json(s.out / "study.json", {"runs": results})
    (s.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    told(main)
