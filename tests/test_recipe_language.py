"""examples/language on small texts in the formats of SST-2 and SQuAD, with a BERT of two layers; nothing is downloaded."""

import gzip
import importlib.util
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from optim_cases import assert_same_bits

LANGUAGE = Path(__file__).parent.parent / "examples" / "language"
for package in ("jsonargparse", "transformers", "accelerate", "tensorboard"):
    pytest.importorskip(package, reason=f"{package} is missing; `pip install 'cram_kernels[examples,frameworks]'` brings it")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(LANGUAGE), str(LANGUAGE.parent)]
import answer  # noqa: E402
import bbc_news  # noqa: E402
import characters  # noqa: E402
import classify  # noqa: E402
import classify_study  # noqa: E402
import comparison  # noqa: E402
import fine_foods  # noqa: E402
import image_sets  # noqa: E402
import novels  # noqa: E402
import recipe  # noqa: E402
import squad  # noqa: E402
import text_sets  # noqa: E402
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """The tensors are small: a second thread would only wait."""
    set_threads(1)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """model/, train.tsv, test.tsv, and SQuAD files."""
    folder = tmp_path_factory.mktemp("texts")
    text_sets.write_model(folder / "model")
    text_sets.write_table(folder / "train.tsv", 256, 0)
    text_sets.write_table(folder / "test.tsv", 64, 1)
    for version in ("v1.1", "v2.0"):
        text_sets.write_squad(folder / f"train-{version}.json", 96, 0, version)
        text_sets.write_squad(folder / f"dev-{version}.json", 24, 1, version)
    return folder


def options(given: Path, out: Path, **others) -> list[str]:
    common = {"model": given / "model", "train": given / "train.tsv", "test": given / "test.tsv", "out": out, "device": "cpu"}
    common |= {"batch": 16, "lr": 0.005, "epochs": 4, "length": 16, "patterns": '[0.5,"2:4"]', "reconstruct": 64}
    return [part for name, value in {**common, **others}.items() for part in (f"--{name}", str(value))]


def test_classification(given, tmp_path):
    """The task is easy: at the end the network is right, dense and at 50 %. The figures are those of a count in plain torch."""
    results = classify.main(options(given, tmp_path, compression='[0.5,"2:4"]', sparsity_warmup=0.25))
    assert results == json.loads((tmp_path / "results.json").read_text())
    assert results["dense"]["accuracy"] > 90 and results["pruned"]["50 %"]["accuracy"] > 80
    assert set(results["reconstructed"]) == {"50 %", "2:4"} and results["training"]["steps"] == 4 * 16
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [line.split("\t") for line in (given / "test.tsv").read_text().splitlines()[1:]]

    def accuracy():
        with torch.no_grad():
            found = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text, _ in rows]
        return 100 * sum(str(label) == wanted for label, (_, wanted) in zip(found, rows, strict=True)) / len(rows)

    assert results["dense"]["accuracy"] == pytest.approx(accuracy())
    encoder = [p for name, p in model.named_parameters() if name.startswith("bert.encoder.") and p.dim() == 2]
    assert len(encoder) == 12 and sorted(recipe.dense_names(model)) == sorted(
        name for name, p in model.named_parameters() if p.dim() == 2 and not any(p is e for e in encoder)
    )
    magnitudes = torch.cat([p.detach().abs().flatten() for p in encoder]).sort().values
    with torch.no_grad():
        for p in encoder:
            p[p.abs() <= magnitudes[len(magnitudes) // 2]] = 0
    assert results["pruned"]["50 %"]["accuracy"] == pytest.approx(accuracy())
    assert results["zeros"]["2:4"] == 0.5


@pytest.mark.parametrize("method", ["adamw", "cram", "split"])
def test_methods_and_resuming(method, given, tmp_path):
    """Two epochs at once, or with a checkpoint after the first from which another process would go on: the same weights."""
    others = {"epochs": 2, "patterns": "[]", "reconstruct": 0, "save_steps": 16, "warmup": 0.1}
    others |= {"method": "cram+", "second_pass": "split"} if method == "split" else {"method": method, "compression": "[0.5]"}
    classify.main(options(given, tmp_path / "whole", **others))
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-16").rename(tmp_path / "parts" / "checkpoint-16")
    (tmp_path / "parts" / "checkpoint-32").mkdir()  # as a run leaves it that is stopped while it writes
    shutil.copy(tmp_path / "parts" / "checkpoint-16" / "model.safetensors", tmp_path / "parts" / "checkpoint-32")
    again = {**others, "out": tmp_path / "parts", "resume": "true"}
    with pytest.raises(FileNotFoundError, match=r"settings.json is missing: there is no run to resume"):
        classify.main(options(given, **again))
    shutil.copy(tmp_path / "whole" / "settings.json", tmp_path / "parts")
    with pytest.raises(ValueError, match=r"lr must be 0.005 as in .*settings.json, got 0.1"):
        classify.main(options(given, **{**again, "lr": 0.1}))
    results = classify.main(options(given, **again))
    assert results["training"]["steps"] == 32
    whole, parts = (AutoModelForSequenceClassification.from_pretrained(tmp_path / n / "model").state_dict() for n in ("whole", "parts"))
    assert_same_bits(list(parts.values()), list(whole.values()))


def test_precision_and_eval_only(given, tmp_path):
    classify.main(options(given, tmp_path / "a", epochs=1, precision="bf16", patterns="[]"))
    again = options(given, tmp_path / "b", eval_only="true", patterns="[0.5]", model=tmp_path / "a" / "model", method="adamw", epochs=9)
    results = classify.main(again)
    assert results["training"] is None
    settings = results["settings"]  # how the model was trained, and what was evaluated
    assert (settings["method"], settings["epochs"], settings["precision"]) == ("cram+", 1.0, "bf16")
    assert settings["patterns"] == [0.5] and settings["model"] == str(tmp_path / "a" / "model")
    alone = recipe.recorded(recipe.Settings(model=str(given / "model"), eval_only=True))
    assert "patterns" in alone and not set(recipe.TRAINING) & set(alone)
    record = (tmp_path / "a" / "results.json").read_text()
    assert results["dense"] == json.loads(record)["dense"]
    with pytest.raises(ValueError, match=r"out must be another folder than that of a training, whose results\.json would be lost, got .*a"):
        classify.main([*again, f"--out={tmp_path / 'a'}"])
    assert (tmp_path / "a" / "results.json").read_text() == record


@pytest.mark.timeout(300)
def test_two_processes_share_the_batch_of_one(given, tmp_path):
    """Two processes and one see the same rows a step. At sparsity 0, for a threshold tells weights apart that differ
    in their last bits; without queries and keys, whose gradients are hardly more than rounding here, which Adam scales up."""
    others = {"epochs": 1, "patterns": "[0.5]", "reconstruct": 0, "lr": 1e-3, "method": "cram+", "compression": "[0.0]"}
    others["model"] = text_sets.write_model(tmp_path / "model", dropout=0.0)  # the processes draw other numbers
    others["train"] = text_sets.write_table(tmp_path / "train.tsv", 64, 0)  # in more steps Adam makes much of the last bits
    classify.main(options(given, tmp_path / "one", **others))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(LANGUAGE / "classify.py")]
    done = subprocess.run(
        [*command, *options(given, tmp_path / "two", **others)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    one, two = (AutoModelForSequenceClassification.from_pretrained(tmp_path / n / "model").state_dict() for n in ("one", "two"))
    start = AutoModelForSequenceClassification.from_pretrained(given / "model").state_dict()
    for name, t in one.items():
        if not any(part in name for part in (".query.", ".key.", "classifier")):
            assert (two[name] - t).norm() <= 0.05 * (t - start[name]).norm() + 1e-6, name
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two")]
    assert results[0]["training"]["steps"] == results[1]["training"]["steps"] == 4


@pytest.mark.parametrize("script, kind", [(classify_study, classify.Classify), (characters, characters.Characters)])
def test_help_of_the_studies_has_all_options(script, kind, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study", "--help"])
    with pytest.raises(SystemExit) as left:
        script.main()
    shown = capsys.readouterr().out
    assert left.value.code == 0 and [name for name in ("seeds", "methods", *kind.__dataclass_fields__) if f"--{name}" not in shown] == []
    assert all(f"  {name} " in shown for name in script.METHODS) and "<class" not in shown


def test_the_study_runs_what_is_missing(given, tmp_path, monkeypatch, capsys):
    """Two methods, two seeds; its table has the means of what each run has written. A second call runs the one that was taken away."""
    small = options(given, tmp_path, epochs=1, patterns="[0.5]", reconstruct=64)
    monkeypatch.setattr(sys, "argv", ["classify_study.py", *small, "--seeds", "2", "--methods", "adamw", "split-twice"])
    classify_study.main()
    runs = [tmp_path / f"{name}-{seed}" for name in ("adamw", "split-twice") for seed in (0, 1)]
    found = [json.loads((folder / "results.json").read_text()) for folder in runs]
    assert [r["training"]["steps"] for r in found] == [16, 16, 32, 32] and [r["settings"]["seed"] for r in found] == [0, 1, 0, 1]
    assert [r["settings"]["second_pass"] for r in found] == ["all", "all", "split", "split"]
    study = json.loads((tmp_path / "study.json").read_text())["runs"]
    assert [r["dense"] for r in study] == [r["dense"]["accuracy"] for r in found]
    assert study[3]["pruned"]["50 %"] == {
        "as pruned": found[3]["pruned"]["50 %"]["accuracy"],
        "reconstructed": found[3]["reconstructed"]["50 %"]["accuracy"],
    }
    mean = (found[2]["dense"]["accuracy"] + found[3]["dense"]["accuracy"]) / 2
    table = (tmp_path / "table.md").read_text()
    assert f"| CrAM+ {{50 %, 60 %, 70 %}}, second pass split, 2 epochs | 2 | {mean:.1f} ± " in table and "| AdamW, 1 epoch | 2 |" in table
    shutil.rmtree(runs[1])
    times = [(folder / "results.json").stat().st_mtime_ns for folder in runs if folder != runs[1]]
    classify_study.main()
    assert times == [(folder / "results.json").stat().st_mtime_ns for folder in runs if folder != runs[1]]
    assert (tmp_path / "table.md").read_text() == table
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match=r"lr must be 0\.005 as in .*adamw-0.*, got 0\.1: another run"),
    ):
        patch.setattr(sys, "argv", [*sys.argv, "--lr", "0.1"])
        classify_study.main()
    with pytest.raises(ValueError, match=r"out must be a folder without another run, got .*results\.json"):
        classify.main(options(given, runs[0]))
    (runs[3] / "results.json").rename(tmp_path / "kept.json")  # as if it had been stopped
    (runs[3] / "checkpoint-16").mkdir()
    (runs[3] / "checkpoint-16" / "trainer_state.json").touch()
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match=r"weight_decay must be 0\.0 as in .*split-twice-1, got 0\.1: another run"),
    ):
        patch.setattr(sys, "argv", [*sys.argv, "--weight_decay", "0.1", "--methods", "split-twice"])
        shutil.rmtree(runs[2])
        classify_study.main()
    assert not runs[2].exists()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [*sys.argv, "--method", "adamw"])
        classify_study.main()
    assert "--method is what a study varies: its option is --methods" in capsys.readouterr().err
    (runs[0] / "repaired").mkdir()  # as a later run with --eval_only leaves it
    later = found[0] | {"reconstructed": {"50 %": {"accuracy": 12.5}}, "settings": found[0]["settings"] | {"reconstruct": 32}}
    (runs[0] / "repaired" / "results.json").write_text(json.dumps(later))
    repaired = classify_study.row(runs[0])
    foreign = later | {"settings": later["settings"] | {"seed": 1}}
    (runs[0] / "repaired" / "results.json").write_text(json.dumps(foreign))
    with pytest.raises(ValueError, match=r"repaired/results\.json must be of its run, with seed 0, got 1"):
        classify_study.row(runs[0])
    assert repaired["pruned"]["50 %"] == {"as pruned": found[0]["pruned"]["50 %"]["accuracy"], "reconstructed": 12.5}
    assert repaired["settings"]["reconstruct"] == 32


def test_ablations_run_where_they_are_named(monkeypatch):
    for command, wanted in (([], classify_study.METHODS.keys() - {"no-rise", "up-to-70"}), (["--methods", "no-rise"], {"no-rise"})):
        monkeypatch.setattr(sys, "argv", ["classify_study.py", *command])
        assert set(comparison.arguments("", classify_study.METHODS, classify_study.ABLATIONS)[0].methods) == wanted


def test_the_table_of_the_results_is_that_of_the_data():
    docs = LANGUAGE.parent.parent / "docs"
    runs = json.loads((docs / "data" / "bbc-study.json").read_text())["runs"]
    assert len(runs) == 6 and {r["steps"] for r in runs} == {300, 600}
    text = comparison.table(comparison.summarise(runs), ["50 %", "60 %", "70 %", "80 %", "2:4"], ["as pruned", "reconstructed"])
    assert text in (docs / "results.md").read_text()


@pytest.mark.parametrize("name", classify_study.METHODS)
def test_methods_of_the_study(name):
    s = classify.Classify(epochs=3, out=Path("study"))
    one = comparison.changed(s, name, classify_study.METHODS[name], 2)
    assert (one.seed, one.out) == (2, Path("study") / f"{name}-2")
    assert one.epochs == (6 if name.endswith("twice") else 3) and one.method == ("adamw" if name.startswith("adamw") else "cram+")
    assert (
        classify_study.label(recipe.plain(one))
        == {
            "adamw": "AdamW, 3 epochs",
            "adamw-twice": "AdamW, 6 epochs",
            "cram": "CrAM+ {50 %, 60 %, 70 %}, 3 epochs",
            "warmup": "CrAM+ {50 %, 60 %, 70 %}, sparsities rise over 50 %, 3 epochs",
            "no-rise": "CrAM+ {50 %, 60 %, 70 %}, 3 epochs",
            "up-to-70": "CrAM+ {50 %, 60 %, 70 %}, 3 epochs",
            "split": "CrAM+ {50 %, 60 %, 70 %}, second pass split, 3 epochs",
            "split-twice": "CrAM+ {50 %, 60 %, 70 %}, second pass split, 6 epochs",
        }[name]
    )


@pytest.mark.parametrize("version", ["v1.1", "v2.0"])
def test_answers(version, given, tmp_path):
    files = {"train": given / f"train-{version}.json", "test": given / f"dev-{version}.json"}
    results = answer.main(options(given, tmp_path, length=32, stride=8, epochs=2, **files))
    parts = ("", "HasAns_", "NoAns_") if version == "v2.0" else ("",)
    assert set(results["dense"]) == {part + kind for part in parts for kind in ("exact", "f1")}
    assert 0 <= results["dense"]["exact"] <= results["dense"]["f1"] <= 100
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "model")
    assert torch.isfinite(model.qa_outputs.weight).all() and set(results["pruned"]) == {"50 %", "2:4"}


# SQuAD


@pytest.fixture(scope="module")
def tokenizer(given):
    return AutoTokenizer.from_pretrained(given / "model")


@pytest.mark.parametrize("version", ["v1.1", "v2.0"])
def test_pieces_hold_the_answers(version, given, tokenizer):
    """Every piece that has the answer marks just its tokens; each answer is in some piece, none where there is none."""
    questions = squad.read(given / f"train-{version}.json")
    rows = squad.pieces(questions, tokenizer, 24, 8)
    assert len(rows) > len(questions) and all(len(row["input_ids"]) == 24 for row in rows)
    marked = set()
    for row in rows:
        q = questions[row["question"]]
        first, last = row["start_positions"], row["end_positions"]
        visible = [o for o in row["offsets"] if o is not None]
        if not q.answers:
            assert first == last == 0
            continue
        begin, end = q.starts[0], q.starts[0] + len(q.answers[0])
        assert (first > 0) == (visible[0][0] <= begin and visible[-1][1] >= end)
        if first > 0:
            assert q.context[row["offsets"][first][0] : row["offsets"][last][1]] == q.answers[0]
            assert tokenizer.decode(row["input_ids"][first : last + 1]) == q.answers[0]
            marked.add(row["question"])
    assert marked == {i for i, q in enumerate(questions) if q.answers}
    covered = {i: set() for i in range(len(questions))}
    for row in rows:
        covered[row["question"]] |= {c for o in row["offsets"] if o is not None for c in range(*o)}
    for i, q in enumerate(questions):
        assert covered[i] == {c for c, letter in enumerate(q.context) if letter != " "}


def test_a_length_that_has_no_room_for_the_text_is_told(given, tokenizer):
    question = squad.read(given / "train-v1.1.json")[:1]
    least = len(tokenizer(question[0].question)["input_ids"]) + 4 + 2
    assert squad.pieces(question, tokenizer, least, 4)
    with pytest.raises(ValueError, match=f"length must be at least {least} for question .* and stride 4, got {least - 1}"):
        squad.pieces(question, tokenizer, least - 1, 4)


def test_answers_are_the_best_parts(given, tokenizer):
    """Against all pairs of tokens, on random scores."""
    questions = squad.read(given / "dev-v2.0.json")
    rows = squad.pieces(questions, tokenizer, 24, 8)
    generator = torch.Generator().manual_seed(0)
    scores = [(torch.randn(24, generator=generator), torch.randn(24, generator=generator)) for _ in rows]
    found = squad.answers(questions, rows, scores, best=24, length=5)
    for i, q in enumerate(questions):
        best, text = float("-inf"), ""
        empty = min(float(s[0] + e[0]) for row, (s, e) in zip(rows, scores, strict=True) if row["question"] == i)
        for row, (s, e) in zip(rows, scores, strict=True):
            for first in range(24):
                for last in range(first, min(first + 5, 24)):
                    part = row["offsets"][first], row["offsets"][last]
                    if row["question"] == i and None not in part and float(s[first] + e[last]) > best:
                        best, text = float(s[first] + e[last]), q.context[part[0][0] : part[1][1]]
        assert found[q.id] == ("" if empty > best else text)
    assert "" in found.values() and len(set(found.values())) > 2
    answered = [q for q in questions if q.answers]
    only = {q.id: i for i, q in enumerate(questions)}
    some = [(row, s) for row, s in zip(rows, scores, strict=True) if questions[row["question"]].answers]
    renumbered = [{**row, "question": answered.index(questions[row["question"]])} for row, _ in some]
    assert all(squad.answers(answered, renumbered, [s for _, s in some]).values()) and len(only) == len(questions)


@pytest.mark.skipif(importlib.util.find_spec("torchmetrics") is None, reason="torchmetrics is missing; lightning brings it")
def test_scores_are_those_of_torchmetrics():
    from torchmetrics.text import SQuAD

    cases = [
        ("The Red House!", ("red house", "a house")),
        ("in the river of  stone", ("river",)),
        ("blue", ("red",)),
        ("an apple, a day", ("apple day.", "day")),
        ("cold cold sky", ("cold sky sky",)),
    ]
    questions = [squad.Question(str(i), "", " ".join(a), a, (0,) * len(a)) for i, (_, a) in enumerate(cases)]
    found = {str(i): text for i, (text, _) in enumerate(cases)}
    metric = SQuAD()
    metric.update(
        [{"id": q.id, "prediction_text": found[q.id]} for q in questions],
        [{"id": q.id, "answers": {"text": list(q.answers), "answer_start": list(q.starts)}} for q in questions],
    )
    judged = metric.compute()
    assert squad.score(questions, found) == pytest.approx({"exact": float(judged["exact_match"]), "f1": float(judged["f1"])}, abs=1e-4)
    empty = [squad.Question("a", "", "text", (), ()), squad.Question("b", "", "text", (), ())]
    assert squad.score(empty, {"a": "", "b": "text"}) == dict.fromkeys(("exact", "f1", "NoAns_exact", "NoAns_f1"), 50.0)


def test_scores_of_questions_with_and_without_answers():
    """As evaluate-v2.0.py defines them: an answer to a question that has none is wrong, and so is none where there is one."""
    questions = [
        squad.Question(name, "", "", answers, (0,) * len(answers))
        for name, answers in zip("abcd", [("red",), ("old sky",), (), ()], strict=True)
    ]
    judged = squad.score(questions, {"a": "red", "b": "sky", "c": "", "d": "red"})
    assert judged == pytest.approx(
        {
            "exact": 50,
            "f1": 100 * (1 + 2 / 3 + 1) / 4,
            "HasAns_exact": 50,
            "HasAns_f1": 100 * (1 + 2 / 3) / 2,
            "NoAns_exact": 50,
            "NoAns_f1": 50,
        }
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "must be JSON of SQuAD's form, got JSONDecodeError"),
        ('{"data": [{"paragraphs": [{"context": "red"}]}]}', "must be JSON of SQuAD's form, got KeyError: 'qas'"),
        ('{"data": []}', "must have questions, got none"),
        (
            '{"data": [{"paragraphs": [{"context": "red", "qas": [{"id": 1, "question": "?", '
            '"answers": [{"text": "e", "answer_start": 0}]}]}]}]}',
            "the answer of question '1' must be at its answer_start, got 'e' at 0",
        ),
    ],
)
def test_other_files_are_refused(content, message, tmp_path):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        squad.read(tmp_path / "file.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json is missing"):
        squad.read(tmp_path / "none.json")


# Tables of texts, and options


def test_tables(tmp_path):
    (tmp_path / "a.tsv").write_text('label\tsentence\n1\the said "no\n')
    (tmp_path / "a.csv").write_text('text,class\n"red, ""blue""",x\n')
    assert classify.read(tmp_path / "a.tsv", "sentence", "label") == [('he said "no', "1")]
    assert classify.read(tmp_path / "a.csv", "text", "class") == [('red, "blue"', "x")]
    with pytest.raises(ValueError, match=r"must have a column 'text', got \['label', 'sentence'\]"):
        classify.read(tmp_path / "a.tsv", "text", "label")
    (tmp_path / "b.tsv").write_text("sentence\tlabel\nred\n")
    with pytest.raises(ValueError, match="must have rows with a text and a label each, got a shorter row"):
        classify.read(tmp_path / "b.tsv", "sentence", "label")


def test_labels_of_the_test_that_training_lacks_are_refused(given, tmp_path):
    (tmp_path / "test.tsv").write_text("sentence\tlabel\nred\t7\n")
    with pytest.raises(ValueError, match=r"must have labels of .*, got '7'"):
        classify.main(options(given, tmp_path, test=tmp_path / "test.tsv"))


def test_bbc_news_is_written_as_tables(tmp_path, monkeypatch):
    """From CLASS/NUMBER.txt; every text once, on one line."""
    texts = {}
    for label in ("sport", "tech"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(6):
            (tmp_path / "data" / label / f"{i:03d}.txt").write_bytes(f"Title {label} {i}\n\nwith\ta tab and \xa3{i}\n".encode())
            texts[f"Title {label} {i} with a tab and \xa3{i}"] = label
    (tmp_path / "data" / "sport" / "007.txt").write_bytes(b"not \xff utf-8")
    texts["not � utf-8"] = "sport"
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["bbc_news.py", "--folder", str(tmp_path / "data"), "--out", str(out), "--train", "8"])
    bbc_news.main()
    parts = [classify.read(out / f"{name}.tsv", "sentence", "label") for name in ("train", "test")]
    assert [len(part) for part in parts] == [8, 5] and dict(parts[0] + parts[1]) == texts


def write_r_data(folder: Path, objects: dict, xz: bool = True) -> None:
    """The data of an R package: Rdata.rdb has each object, Rdata.rdx where it is, as R's makeLazyLoadDB writes them with xz or gzip."""
    rdata = pytest.importorskip("rdata", reason="rdata is missing; `pip install 'cram_kernels[examples]'` brings it")

    def serialized(value) -> bytes:
        return rdata.unparser.unparse_data(rdata.conversion.convert_python_to_r_data(value), file_type="rds")

    folder.mkdir(parents=True)
    content, variables = b"what another object has here", {}
    for name, value in objects.items():
        plain = serialized(value)
        lzma2 = [{"id": lzma.FILTER_LZMA2, "preset": 9}]
        packed = b"Z" + lzma.compress(plain, lzma.FORMAT_RAW, filters=lzma2) if xz else zlib.compress(plain)
        chunk = len(plain).to_bytes(4, "big") + packed
        variables[name] = np.array([len(content), len(chunk)], np.int32)
        content += chunk
    (folder / "Rdata.rdb").write_bytes(content)
    index = {"variables": variables, "references": {}, "compressed": np.array([3 if xz else 1], np.int32)}
    (folder / "Rdata.rdx").write_bytes(gzip.compress(serialized(index)))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is missing: Debian's packages are unpacked by it")
def test_reviews_come_from_a_package_of_r(tmp_path, monkeypatch):
    import pandas

    def frame(texts, scores):
        return pandas.DataFrame({"product": ["B0"] * len(texts), "review": texts, "score": pandas.Categorical(scores)})

    folder = tmp_path / "package" / fine_foods.FOLDER
    given = {
        "training_data": frame(["good\tand\nnew", "bad", "caf\xe9"], ["great", "other", "great"]),
        "testing_data": frame(["so so"], ["other"]),
    }
    write_r_data(folder, {"before": [1, 2], **given})
    deb = image_sets.write_deb(tmp_path / "package", fine_foods.PACKAGE)
    monkeypatch.setattr(sys, "argv", ["fine_foods.py", "--deb", str(deb), "--out", str(tmp_path / "out")])
    fine_foods.main()
    assert classify.read(tmp_path / "out" / "train.tsv", "sentence", "label") == [
        ("good and new", "great"),
        ("bad", "other"),
        ("caf\xe9", "great"),
    ]
    assert classify.read(tmp_path / "out" / "test.tsv", "sentence", "label") == [("so so", "other")]
    content = (folder / "Rdata.rdb").read_bytes()
    (folder / "Rdata.rdb").write_bytes(content.replace(b"Z", b"2"))
    with pytest.raises(ValueError, match=r"before must be packed by gzip, or by xz \(Z\), got b'2'"):
        fine_foods.objects(folder, ["before"])


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is missing: Debian's packages are unpacked by it")
def test_novels_come_from_a_package_of_r(tmp_path, monkeypatch):
    """All but the one that is held out are in the training text, each line on one of its own."""
    lines = {name: [name.upper(), "", f"caf\xe9 {i}"] for i, name in enumerate((*novels.TRAIN, *novels.TEST))}
    write_r_data(tmp_path / "package" / novels.FOLDER, {name: np.array(of) for name, of in lines.items()}, xz=False)
    deb = image_sets.write_deb(tmp_path / "package", novels.PACKAGE)
    monkeypatch.setattr(sys, "argv", ["novels.py", "--deb", str(deb), "--out", str(tmp_path / "out")])
    novels.main()
    texts = {name: "\n".join(of) + "\n" for name, of in lines.items()}
    assert (tmp_path / "out" / "test.txt").read_text(encoding="utf-8") == texts.pop("persuasion")
    assert (tmp_path / "out" / "train.txt").read_text(encoding="utf-8") == "".join(texts.values()) and len(texts) == 5


def test_characters(tmp_path, monkeypatch):
    """A text that repeats itself is learned. Bits are those of a count with one character at a time, which sees only those before it."""
    sentence = "the cat sat on the mat; "
    (tmp_path / "train.txt").write_text(sentence * 100)
    (tmp_path / "test.txt").write_text(sentence * 6 + "a dog?")
    command = ["characters.py", "--config", str(LANGUAGE / "configs" / "novels.yaml"), "--device", "cpu", "--precision", "fp32"]
    sizes = {"length": 16, "width": 32, "layers": 2, "heads": 2, "batch": 8, "steps": 80, "test_characters": 146, "reconstruct": 16}
    given = {"train": tmp_path / "train.txt", "test": tmp_path / "test.txt", "out": tmp_path, "patterns": ["0.5", "2:4"], **sizes}
    command += [part for name, value in given.items() for part in (f"--{name}", *(value if name == "patterns" else [str(value)]))]
    monkeypatch.setattr(sys, "argv", [*command, "--seeds", "1", "--methods", "adamw-twice", "cram", "split"])
    characters.main()
    runs = json.loads((tmp_path / "study.json").read_text())["runs"]
    assert [run["label"].split(", ")[-1] for run in runs] == ["160 steps", "80 steps", "80 steps"]
    assert [run["settings"]["second_pass"] for run in runs] == ["all", "all", "split"]
    assert all(run["dense"] < 1.5 and set(run["pruned"]["2:4"]) == {"as pruned", "reconstructed"} for run in runs)
    assert f"| {runs[1]['dense']:.3f} |" in (tmp_path / "table.md").read_text()

    saved = torch.load(tmp_path / "cram-0" / "model.pt", weights_only=True)
    s = characters.Characters(**{name: sizes[name] for name in ("length", "width", "layers", "heads")})
    model = characters.Transformer(len(saved["symbols"]), s)
    model.load_state_dict(saved["model"])
    text = [saved["symbols"].index(c) for c in (sentence * 6 + "a dog?")[:146]]

    def bits() -> float:
        found = []
        with torch.no_grad():
            for i in range(1, 145):  # 9 pieces of 16; the last character but one ends the last of them
                seen = text[(i - 1) // 16 * 16 : i]
                found.append(float(model(torch.tensor([seen]))[0, -1].log_softmax(0)[text[i]]))
        return -sum(found) / len(found) / np.log(2)

    assert runs[1]["dense"] == pytest.approx(bits(), rel=1e-4)
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
    magnitudes = torch.cat([p.detach().abs().flatten() for p in matrices]).sort().values
    with torch.no_grad():
        for p in matrices:
            p[p.abs() <= magnitudes[len(magnitudes) // 2]] = 0  # the k-th largest, which goes too
    assert len(matrices) == 8 and runs[1]["pruned"]["50 %"]["as pruned"] == pytest.approx(bits(), rel=1e-4)


def test_texts_that_are_missing_or_too_short_are_refused(tmp_path):
    s = characters.Characters(train=tmp_path / "a.txt", test=tmp_path / "a.txt", length=8)
    with pytest.raises(FileNotFoundError, match=r"a\.txt is missing: a text"):
        characters.read(s)
    (tmp_path / "a.txt").write_text("a" * 9)
    with pytest.raises(ValueError, match=r"texts must have more than length \+ 1 = 9 characters, got 9"):
        characters.read(s)
    with pytest.raises(ValueError, match="width must be a multiple of heads, got 30 and 4"):
        characters.Characters(width=30)


@pytest.mark.parametrize("kind", [classify.Classify, answer.Answer, characters.Characters])
def test_every_option_is_explained(kind):
    explained = {name for one in kind.__mro__ for name in re.findall(r"^        (\w+): .", one.__doc__ or "", re.MULTILINE)}
    assert explained == set(kind.__dataclass_fields__)


def test_a_batch_that_the_processes_cannot_share_is_refused(given, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch must be a multiple of the 3 processes, which share it, got 16"):
        classify.main(options(given, tmp_path))


@pytest.mark.parametrize("name, kind", [("bbc_minilm", classify.Classify), ("squad_bert_base", answer.Answer)])
def test_settings_are_read(name, kind):
    s = recipe.parse(kind, "", ["--config", str(LANGUAGE / "configs" / f"{name}.yaml"), "--epochs", "5"])
    assert s.epochs == 5 and [str(recipe.pattern(p)) for p in s.patterns] == ["50 %", "60 %", "70 %", "80 %", "2:4"]
    if name == "squad_bert_base":
        assert (s.lr, s.batch, s.length, s.stride) == (3e-5, 12, 384, 128)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"compression": [1.5]}, "a pattern must be a share"),
        ({"reconstruct": -1}, "reconstruct must be at least 0, got -1"),
        ({"precision": "fp16", "device": "cpu"}, "precision must be fp32 or bf16 on a CPU, got fp16"),
        ({"precision": "fp16", "device": "cuda"}, "max_grad_norm must be 0 with precision fp16"),
        ({"batch": 1, "second_pass": "split"}, "batch must be at least 2 with second_pass split"),
    ],
)
def test_bad_options_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        recipe.Settings(**bad)
    with pytest.raises(ValueError, match="length must be at least 3"):
        classify.Classify(length=2)
    with pytest.raises(FileNotFoundError, match="model must be a folder"):
        recipe.model_folder("bert-base-uncased")
