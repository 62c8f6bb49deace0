"""Tables of README.md, docs/results.md and docs/when-it-pays.md from the records of studies in docs/data/.

python tools/site/study_tables.py writes them between their marks. A record is study.json of examples/language/classify_study.py, or
evaluation.json of examples/images.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import marks

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "examples"))

from comparison import Summary, cell, summarise, table  # noqa: E402

DATA, PAGES = ROOT / "docs" / "data", (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "when-it-pays.md")
RISE = "sparsities rise over 50 %"
TEN_EPOCHS = {  # of emoji and MNIST-5k
    "CrAM+": "CrAM+ {50 %, 70 %, 90 %}, 10 epochs",
    "SGD, as much work": "SGD, 20 epochs",
    "half": "CrAM+ {50 %, 70 %, 90 %}, second pass half, 10 epochs",
    "split": "CrAM+ {50 %, 70 %, 90 %}, second pass split, 10 epochs",
    "drawn": "CrAM+ {50 %, 70 %, 90 %}, one pass, drawn, 10 epochs",
    "SGD, at the price of split": "SGD, 10 epochs",
    "split, as much work": "CrAM+ {50 %, 70 %, 90 %}, second pass split, 20 epochs",
}
COLUMNS = {  # of the pages' advice: record -> head of a column -> label of the runs
    "bbc-64-study": {
        "CrAM+": f"CrAM+ {{50 %, 60 %, 70 %, 80 %}}, {RISE}, 2 epochs",
        "AdamW, as much work": "AdamW, 4 epochs",
        "split": f"CrAM+ {{50 %, 60 %, 70 %, 80 %}}, second pass split, {RISE}, 2 epochs",
        "AdamW, at the price of split": "AdamW, 2 epochs",
    },
    "reviews-study": {
        "CrAM+": f"CrAM+ {{50 %, 60 %, 70 %, 80 %}}, {RISE}, 0.8 epochs",
        "AdamW, as much work": "AdamW, 1.6 epochs",
        "split": f"CrAM+ {{50 %, 60 %, 70 %, 80 %}}, second pass split, {RISE}, 0.8 epochs",
        "AdamW, at the price of split": "AdamW, 0.8 epochs",
    },
    "novels-study": {
        "CrAM+": "CrAM+ {50 %, 70 %, 90 %}, sparsities rise over 50 %, 1,000 steps",
        "AdamW, as much work": "AdamW, 2,000 steps",
        "split": "CrAM+ {50 %, 70 %, 90 %}, second pass split, sparsities rise over 50 %, 1,000 steps",
        "AdamW, at the price of split": "AdamW, 1,000 steps",
    },
    "fashion-study": {
        "CrAM+": "CrAM+ {50 %, 70 %, 90 %}, 3 epochs",
        "SGD, as much work": "SGD, 6 epochs",
        "half": "CrAM+ {50 %, 70 %, 90 %}, second pass half, 3 epochs",
        "split": "CrAM+ {50 %, 70 %, 90 %}, second pass split, 3 epochs",
        "drawn": "CrAM+ {50 %, 70 %, 90 %}, one pass, drawn, 3 epochs",
        "SGD, at the price of split": "SGD, 3 epochs",
        "split, as much work": "CrAM+ {50 %, 70 %, 90 %}, second pass split, 6 epochs",
    },
    "emoji-study": TEN_EPOCHS,
    "emoji-shift-study": TEN_EPOCHS,
    "mnist5k-study": TEN_EPOCHS,
}
# Patterns and repairs that the table of the advice leaves out: results.md has them.
RESULTS_ONLY = {"mnist5k-study": {"50 %", "70 %", "as pruned", "dense tuned, reconstructed"}}
DIGITS = {"novels-study": 3, "novels-ablation": 3, "novels-rho0": 3}  # of bits per character; accuracies have one
REPAIRS = {
    "as pruned": "nothing",
    "batch norm tuned": "batch-norm tuning",
    "reconstructed": "`reconstruct`",
    "dense tuned, reconstructed": "`reconstruct`, the dense one tuned before",
}
CORRUPTIONS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}


def summary(record: str) -> tuple[Summary, list[str], list[str]]:
    """(mean, spread and number of runs by label and column; patterns; repairs)."""
    runs = json.loads((DATA / f"{record}.json").read_text())["runs"]
    patterns = list(runs[0]["pruned"])
    found = {what for run in runs for states in run["pruned"].values() for what in states}
    return summarise(runs), patterns, [what for what in REPAIRS if what in found]


def results(record: str) -> str:
    return table(*summary(record), digits=DIGITS.get(record, 1)).rstrip()


def advice(record: str) -> str:
    """A row for each pattern and repair, a column for each way of training."""
    known, *both = summary(record)
    patterns, repairs = ([name for name in names if name not in RESULTS_ONLY.get(record, ())] for names in both)
    columns = {head: known[label] for head, label in COLUMNS[record].items() if label in known}
    lines = [f"| pruned to | repaired by | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    rows = [("not pruned", "", "dense"), ("not pruned", REPAIRS["batch norm tuned"], "dense, batch norm tuned")]
    rows += [(p, REPAIRS[what], f"{p}, {what}") for what in repairs for p in patterns]
    for pattern, repair, column in rows:
        if any(column in found for found in columns.values()):
            cells = [cell(found, column, DIGITS.get(record, 1)) for found in columns.values()]
            lines.append(f"| {pattern} | {repair} | {' | '.join(cells)} |")
    return "\n".join(lines)


def under_corruptions(run: dict[str, Any], state: str) -> dict[str, float]:
    """Mean accuracies of a network on images as they are, under all 15 corruptions, and under each kind of them.

    Args:
        state: "dense", "dense, batch norm tuned" or "PATTERN, REPAIR".
    """
    pattern, _, repair = state.partition(", ")
    dense = run["dense_tuned"] if repair else run["dense"]
    means = {name: statistics.fmean(values.values()) for name, values in run["corrupted"][state].items()}
    kinds = {kind: statistics.fmean(means[name] for name in names) for kind, names in CORRUPTIONS.items()}
    clean = dense if pattern == "dense" else run["pruned"][pattern][repair]
    return {"as they are": clean, "all corruptions": statistics.fmean(means.values()), **kinds}


def corrupted(record: str) -> str:
    """A row for each way of training and each state of the network."""
    runs = json.loads((DATA / f"{record}.json").read_text())["runs"]
    columns = under_corruptions(runs[0], "dense")
    lines = ["| trained with | network | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for label in dict.fromkeys(run["label"] for run in runs):
        own, first = [run for run in runs if run["label"] == label], label
        for state in own[0]["corrupted"]:
            found = [under_corruptions(run, state) for run in own]
            values = [[values[column] for values in found] for column in columns]
            cells = [f"{statistics.fmean(of):.1f} ± {statistics.stdev(of):.1f}" for of in values]
            lines.append("| " + " | ".join([first, state, *cells]) + " |")
            first = ""
    return "\n".join(lines)


def filled(text: str) -> str:
    return marks.filled(text, {"results": results, "advice": advice, "corrupted": corrupted})


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
