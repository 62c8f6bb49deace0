"""Fine-tune a BERT to classify texts with AdamW or CrAM, and prune it in one shot.

    python examples/language/bbc_news.py --out bbc
    python examples/language/classify.py --config examples/language/configs/bbc_minilm.yaml --train bbc/train.tsv --test bbc/test.tsv

Files are TSV or CSV with a header, such as SST-2's `sentence<TAB>label`. Needs `pip install 'cram_kernels[examples,frameworks]'`.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipe
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

sys.path.append(str(Path(__file__).parent.parent))
from comparison import told


@dataclass
class Classify(recipe.Settings):
    """Text classification.

    Args:
        train: the file to train on, .tsv or .csv.
        test: the file to test on; its labels must occur in `train`.
        text_column: the name in the header of the column of texts.
        label_column: that of the labels.
        length: tokens of a text; the rest is cut off.
    """

    train: Path = Path("train.tsv")
    test: Path = Path("test.tsv")
    text_column: str = "sentence"
    label_column: str = "label"
    length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 3:
            raise ValueError(f"length must be at least 3, [CLS], a token and [SEP], got {self.length}")


def read(path: Path, text_column: str, label_column: str) -> list[tuple[str, str]]:
    """(text, label) of each row. A .tsv has no quotes, as GLUE's files; a .csv has them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a file with a header and a text and a label a line")
    with open(path, newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if path.suffix == ".tsv" else csv.DictReader(stream)
        columns = reader.fieldnames or []
        if missing := [name for name in (text_column, label_column) if name not in columns]:
            raise ValueError(f"{path} must have a column {missing[0]!r}, got {list(columns)}")
        rows = [(row[text_column], row[label_column]) for row in reader]
    if not rows or any(text is None or label is None for text, label in rows):
        raise ValueError(f"{path} must have rows with a text and a label each, got {'none' if not rows else 'a shorter row'}")
    return rows


def classify(s: Classify) -> dict[str, Any]:
    """Train, prune and judge; returns what results.json holds."""
    if s.threads:
        torch.set_num_threads(s.threads)
    training, test = (read(path, s.text_column, s.label_column) for path in (s.train, s.test))
    labels = sorted({label for _, label in training})
    if unknown := {label for _, label in test} - set(labels):
        raise ValueError(f"{s.test} must have labels of {s.train}, got {min(unknown)!r}")
    folder = recipe.model_folder(s.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(s.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(labels), label2id={label: i for i, label in enumerate(labels)}, id2label=dict(enumerate(labels))
    )

    def encode(rows: list[tuple[str, str]]) -> recipe.Rows:
        ids = tokenizer([text for text, _ in rows], truncation=True, max_length=s.length)["input_ids"]
        return [{"input_ids": i, "labels": labels.index(label)} for i, (_, label) in zip(ids, rows, strict=True)]

    def collate(rows: recipe.Rows) -> dict[str, torch.Tensor]:
        batch = tokenizer.pad([{"input_ids": row["input_ids"]} for row in rows], return_tensors="pt")
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    train_rows, test_rows = encode(training), encode(test)

    @torch.no_grad()
    def judge(model: nn.Module) -> dict[str, float]:
        model.eval()
        right = 0
        for i in range(0, len(test_rows), 64):
            batch = {key: t.to(s.device) for key, t in collate(test_rows[i : i + 64]).items()}
            wanted = batch.pop("labels")
            right += int((model(**batch).logits.argmax(1) == wanted).sum())
        return {"accuracy": 100 * right / len(test_rows)}

    inputs = [collate(train_rows[i : i + 32]) for i in range(0, min(len(train_rows), s.reconstruct), 32)]
    for batch in inputs:
        batch.pop("labels")
    return recipe.run(model, tokenizer, train_rows, collate, judge, inputs, s)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    return classify(recipe.parse(Classify, "Classify texts, and prune in one shot.", arguments))


if __name__ == "__main__":
    told(main)
