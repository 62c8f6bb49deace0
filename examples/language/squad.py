"""SQuAD: its files, texts cut into pieces that a BERT can read, answers from start and end scores, exact match and F1."""

import collections
import json
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Question:
    """A question on a text. `starts` and `answers` are empty where the text does not answer it (SQuAD 2.0)."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


def read(path: Path) -> list[Question]:
    """The questions of a SQuAD file, version 1.1 or 2.0.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another form, or an answer that is not in its text where the file says.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a SQuAD file, such as train-v1.1.json")
    found = []
    try:
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    given = [] if qa.get("is_impossible", False) else qa["answers"]
                    answers, starts = tuple(a["text"] for a in given), tuple(int(a["answer_start"]) for a in given)
                    found.append(Question(str(qa["id"]), qa["question"], paragraph["context"], answers, starts))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be JSON of SQuAD's form, got {type(error).__name__}: {error}") from error
    for q in found:
        for answer, start in zip(q.answers, q.starts, strict=True):
            if q.context[start : start + len(answer)] != answer:
                raise ValueError(f"{path}: the answer of question {q.id!r} must be at its answer_start, got {answer!r} at {start}")
    if not found:
        raise ValueError(f"{path} must have questions, got none")
    return found


def pieces(questions: list[Question], tokenizer: Any, length: int, stride: int) -> list[dict[str, Any]]:
    """Each question with each piece of its text, as rows of numbers.

    Besides what the model reads, a row has: question (index), offsets (for each token of the text its first and last character, else None),
    start_positions and end_positions: the tokens of the first answer, or 0, the first token, where the piece does not have all of it.
    """
    found: list[dict[str, Any]] = []
    for i, q in enumerate(questions):
        needed = len(tokenizer(q.question.lstrip())["input_ids"]) + stride + 2  # a token of the text that is new in each piece, and [SEP]
        if length < needed:
            raise ValueError(f"length must be at least {needed} for question {q.id!r} and stride {stride}, got {length}")
        encoded = tokenizer(
            q.question.lstrip(),
            q.context,
            truncation="only_second",
            max_length=length,
            stride=stride,
            padding="max_length",
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for piece in range(len(encoded["input_ids"])):
            own = encoded.sequence_ids(piece)
            offsets = [o if s == 1 else None for o, s in zip(encoded["offset_mapping"][piece], own, strict=True)]
            row = {kind: encoded[kind][piece] for kind in ("input_ids", "attention_mask")}
            row["token_type_ids"] = encoded["token_type_ids"][piece] if "token_type_ids" in encoded else [0] * length
            first, last = _tokens_of(q, offsets)
            found.append({**row, "question": i, "offsets": offsets, "start_positions": first, "end_positions": last})
    return found


def _tokens_of(q: Question, offsets: list[tuple[int, int] | None]) -> tuple[int, int]:
    if not q.answers:
        return 0, 0
    begin, end = q.starts[0], q.starts[0] + len(q.answers[0])
    inside = [i for i, o in enumerate(offsets) if o is not None and o[0] < end and o[1] > begin]
    if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < end:  # type: ignore[index]
        return 0, 0
    return inside[0], inside[-1]


def answers(
    questions: list[Question], rows: list[dict[str, Any]], scores: list[tuple[Tensor, Tensor]], best: int = 20, length: int = 30
) -> dict[str, str]:
    """The answer to each question, by id: the part of the text with the largest start score + end score over all its pieces.

    Of each piece the `best` starts and ends are combined. "" where that sum is larger at the first token of every piece, which stands for
    "no answer", in files that have such questions.
    """
    can_be_empty = any(not q.answers for q in questions)
    parts: dict[int, list[tuple[float, str]]] = collections.defaultdict(list)
    empty: dict[int, float] = {}
    for row, (start, end) in zip(rows, scores, strict=True):
        i, offsets = row["question"], row["offsets"]
        empty[i] = min(empty.get(i, float("inf")), float(start[0] + end[0]))
        starts, ends = ([j for j in t.argsort(descending=True)[:best].tolist() if offsets[j] is not None] for t in (start, end))
        for first in starts:
            for last in ends:
                if first <= last < first + length:
                    text = questions[i].context[offsets[first][0] : offsets[last][1]]
                    parts[i].append((float(start[first] + end[last]), text))
    found = {}
    for i, q in enumerate(questions):
        score, text = max(parts[i], key=lambda part: part[0], default=(float("-inf"), ""))
        found[q.id] = "" if can_be_empty and empty[i] > score else text
    return found


def score(questions: list[Question], found: dict[str, str]) -> dict[str, float]:
    """Exact match and F1 in percent, as the official script computes them: the best over all given answers of a question.

    Where there are questions without an answer, as in version 2.0, also over those that have one (HasAns) and over the others (NoAns).
    """
    exact, f1 = {}, {}
    for q in questions:
        wanted = [answer for answer in q.answers if normalised(answer)] or [""]
        exact[q.id] = max(float(normalised(found[q.id]) == normalised(answer)) for answer in wanted)
        f1[q.id] = max(_f1(found[q.id], answer) for answer in wanted)
    parts = {"": list(exact)}
    if not all(q.answers for q in questions):
        parts |= {"HasAns_": [q.id for q in questions if q.answers], "NoAns_": [q.id for q in questions if not q.answers]}
    kinds = {"exact": exact, "f1": f1}
    return {part + kind: 100 * sum(map(of.get, ids)) / len(ids) for part, ids in parts.items() if ids for kind, of in kinds.items()}


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and doubled spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(found: str, wanted: str) -> float:
    ours, theirs = normalised(found).split(), normalised(wanted).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 0.0 if same == 0 else 2 * same / (len(ours) + len(theirs))
