"""A BERT of two layers with a tokenizer, and small texts in the on-disk formats of SST-2 and SQuAD."""

import json
import random
from pathlib import Path

WORDS = ["red", "blue", "cold", "warm", "stone", "river", "tree", "house", "sky", "road", "the", "a", "in", "of", "what", "is", "where"]


def write_model(folder: Path, dropout: float = 0.1) -> Path:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, ".", "?"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes, **rates)).save_pretrained(folder)
    return folder


def write_table(path: Path, rows: int, seed: int) -> Path:
    """Texts of six words; the label says whether "red" is among them."""
    rng = random.Random(seed)
    lines = ["sentence\tlabel"]
    for i in range(rows):
        words = rng.sample(WORDS[1:10], 6)
        if i % 2:
            words[rng.randrange(6)] = "red"
        lines.append(" ".join(words) + f"\t{i % 2}")
    path.write_text("\n".join(lines) + "\n")
    return path


def write_squad(path: Path, count: int, seed: int, version: str = "v2.0") -> Path:
    """Questions for the word after "the" in texts of 12 to 40 words; in version 2.0 every fourth cannot be answered."""
    rng = random.Random(seed)
    paragraphs = []
    for i in range(count):
        words = [rng.choice(WORDS[:10]) for _ in range(rng.randrange(12, 40))]
        place = rng.randrange(len(words) - 1)
        words[place] = "the"
        context = " ".join(words) + "."
        start = len(" ".join(words[: place + 1])) + 1
        qa = {"id": f"q{seed}-{i}", "question": "what is the?", "answers": [{"text": words[place + 1], "answer_start": start}]}
        if version == "v2.0":
            qa["is_impossible"] = i % 4 == 3
            if qa["is_impossible"]:
                qa |= {"answers": [], "plausible_answers": [{"text": words[0], "answer_start": 0}]}
        paragraphs.append({"context": context, "qas": [qa]})
    path.write_text(json.dumps({"version": version, "data": [{"title": "words", "paragraphs": paragraphs}]}))
    return path
