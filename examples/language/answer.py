"""Fine-tune a BERT for question answering with AdamW or CrAM, and prune it in one shot.

    python examples/language/answer.py --config examples/language/configs/squad_bert_base.yaml --model BERT_BASE \\
        --train train-v1.1.json --test dev-v1.1.json

Files are SQuAD's own JSON (Rajpurkar et al., 2016 and 2018), version 1.1 or 2.0. Needs `pip install 'cram_kernels[examples,frameworks]'`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipe
import squad
import torch
from torch import nn
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

sys.path.append(str(Path(__file__).parent.parent))
from comparison import told


@dataclass
class Answer(recipe.Settings):
    """Question answering.

    Args:
        train: the SQuAD file to train on; version 2.0 has questions without an answer.
        test: the SQuAD file to test on.
        length: tokens of a question with a piece of its text; a longer text is cut into pieces.
        stride: tokens that neighbouring pieces share.
        best: how many starts and ends are combined to find the answer.
        answer_length: the most tokens of an answer.
    """

    train: Path = Path("train-v1.1.json")
    test: Path = Path("dev-v1.1.json")
    length: int = 384
    stride: int = 128
    best: int = 20
    answer_length: int = 30


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    s: Answer = recipe.parse(Answer, "Answer questions, and prune in one shot.", arguments)
    if s.threads:
        torch.set_num_threads(s.threads)
    training, test = squad.read(s.train), squad.read(s.test)
    folder = recipe.model_folder(s.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(s.seed)
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    rows, test_rows = (squad.pieces(questions, tokenizer, s.length, s.stride) for questions in (training, test))

    def collate(rows: recipe.Rows) -> dict[str, torch.Tensor]:
        kinds = ("input_ids", "token_type_ids", "attention_mask", "start_positions", "end_positions")
        return {kind: torch.tensor([row[kind] for row in rows]) for kind in kinds}

    @torch.no_grad()
    def judge(model: nn.Module) -> dict[str, float]:
        model.eval()
        scores = []
        for i in range(0, len(test_rows), 32):
            batch = {key: t.to(s.device) for key, t in collate(test_rows[i : i + 32]).items() if not key.endswith("_positions")}
            found = model(**batch)
            scores += list(zip(found.start_logits.float().cpu(), found.end_logits.float().cpu(), strict=True))
        return squad.score(test, squad.answers(test, test_rows, scores, s.best, s.answer_length))

    inputs = [
        {key: t for key, t in collate(rows[i : i + 16]).items() if not key.endswith("_positions")}
        for i in range(0, min(len(rows), s.reconstruct), 16)
    ]
    return recipe.run(model, tokenizer, rows, collate, judge, inputs, s)


if __name__ == "__main__":
    told(main)
