"""Tables of README.md, docs/results.md and docs/when-it-pays.md from the records of studies in docs/data/.

python tools/site/study_tables.py writes them between their marks. A record is study.json of examples/language/classify_study.py, or
evaluation.json of examples/images.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT / "examples"))

from comparison import Summary, cell, summarise, table  # noqa: E402

DATA, PAGES = ROOT / "docs" / "data", (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "when-it-pays.md")
RISE = "sparsities rise over 50 %, 2 epochs"
COLUMNS = {  # of the pages' advice: record -> head of a column -> label of the runs
    "bbc-64-study": {
        "CrAM+": f"CrAM+ {{50 %, 60 %, 70 %, 80 %}}, {RISE}",
        "AdamW, as much work": "AdamW, 4 epochs",
        "split": f"CrAM+ {{50 %, 60 %, 70 %, 80 %}}, second pass split, {RISE}",
        "AdamW, at the price of split": "AdamW, 2 epochs",
    },
    "novels-study": {
        "CrAM+": "CrAM+ {50 %, 70 %, 90 %}, sparsities rise over 50 %, 1,000 steps",
        "AdamW, as much work": "AdamW, 2,000 steps",
    },
    "fashion-study": {
        "CrAM+": "CrAM+ {50 %, 70 %, 90 %}, 3 epochs",
        "SGD, as much work": "SGD, 6 epochs",
        "split": "CrAM+ {50 %, 70 %, 90 %}, second pass split, 3 epochs",
        "drawn": "CrAM+ {50 %, 70 %, 90 %}, one pass, drawn, 3 epochs",
        "SGD, at the price of split": "SGD, 3 epochs",
    },
}
DIGITS = {"novels-study": 3}  # of bits per character; accuracies have one
REPAIRS = {
    "as pruned": "nothing",
    "batch norm tuned": "batch-norm tuning",
    "reconstructed": "`reconstruct`",
    "dense tuned, reconstructed": "`reconstruct`, the dense one tuned before",
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
    known, patterns, repairs = summary(record)
    columns = {head: known[label] for head, label in COLUMNS[record].items() if label in known}
    lines = [f"| pruned to | repaired by | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    rows = [("not pruned", "", "dense"), ("not pruned", REPAIRS["batch norm tuned"], "dense, batch norm tuned")]
    rows += [(p, REPAIRS[what], f"{p}, {what}") for what in repairs for p in patterns]
    for pattern, repair, column in rows:
        if any(column in found for found in columns.values()):
            cells = [cell(found, column, DIGITS.get(record, 1)) for found in columns.values()]
            lines.append(f"| {pattern} | {repair} | {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """With what stands between `<!-- results: RECORD -->` or `<!-- advice: RECORD -->` and `<!-- end -->` made anew."""
    made = {"results": results, "advice": advice}
    return re.sub(
        r"(<!-- (results|advice): (\S+) -->\n)(?:.*?\n)??(?=<!-- end -->)",
        lambda found: f"{found[1]}\n{made[found[2]](found[3])}\n\n",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
