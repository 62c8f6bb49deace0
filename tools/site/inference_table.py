"""The tables of docs/cpu-inference.md, between their marks, from docs/data/cpu-inference.json: python tools/site/inference_table.py.
New records, of one machine, are given as arguments; each is written by `python -m benchmarks.inference --out RECORD`."""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import marks

ROOT = Path(__file__).parent.parent.parent
RECORD, PAGE = ROOT / "docs" / "data" / "cpu-inference.json", ROOT / "docs" / "cpu-inference.md"
SPARSITIES = ("0.7", "0.8", "0.9", "0.95", "2:4")
HEAD = "| | 70 % | 80 % | 90 % | 95 % | 2:4 |\n|---|---|---|---|---|---|"
# What was set beforehand; of convolutions the median and the slowest one.
TARGETS: dict[str, tuple[Any, ...]] = {
    "Linear, 1 row": (1.3, 2.2, 5, 10, 1.25),
    "Linear, 1 row, bfloat16 weights": (None, None, None, None, 2),
    "Linear, 8 rows": (1.5, 2.3, 5, 10, 1),
    "Linear, 32 rows": (1.8, 2.8, 5, 9, 1.3),
    "Linear, 128 rows": (1.7, 2.3, 4, 6, 1.25),
    "22 convolutions of ResNet-50, median": (1.4, 2, 3.2, 5, None),
    "22 convolutions of ResNet-50, slowest": (1, 1.2, 1.6, 2.2, None),
    "all matrices of BERT-base, 128 tokens": (1.5, 2.2, 3, 4, 1.25),
    "all matrices of BERT-base, 32 tokens": (1.6, 2.1, 3.2, 4.5, 1.2),
    "ResNet-50, each layer pruned alike": (None, 1.3, 1.9, 2.4, None),
    "ResNet-50, pruned globally": (None, 1.1, 1.5, 1.9, None),
}


def ratios(run: dict[str, Any], label: str, sparsity: str) -> list[float]:
    """Of the cases of a row of the table."""
    kind = "linear" if "Linear" in label else "bert" if "BERT" in label else "conv" if "convolutions" in label else "resnet50"
    rows = [case for case in run["cases"].get(kind, []) if case["sparsity"] == sparsity]
    rows = [case for case in rows if ("values" in case) == ("bfloat16" in label)]
    if kind in ("linear", "bert"):
        rows = [case for case in rows if case["input"][0] == int(re.findall(r"(\d+) (?:row|token)", label)[0])]
    elif kind == "resnet50":
        rows = [case for case in rows if case["weight"] == ("uniform" if "alike" in label else "global")]
    return [case["ratio"] for case in rows]


def table(run: dict[str, Any]) -> str:
    lines = [HEAD]
    for label, targets in TARGETS.items():
        cells = []
        for sparsity, target in zip(SPARSITIES, targets, strict=True):
            found = ratios(run, label, sparsity)
            value = (min if "slowest" in label else statistics.median)(found) if found else None
            cells.append("" if value is None else f"**{value:.2f}**" if target is not None and round(value, 2) < target else f"{value:.2f}")
        if any(cells):  # a row that the record has no case of is left out
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def captioned(run: dict[str, Any]) -> str:
    loads = [float(load) for kind in run["load"].values() for load in kind]
    threads = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
    caption = f"*{threads}, {run['cpu']}, torch {run['torch']}, load average {min(loads)} to {max(loads)}, itself included*"
    return f"{caption}\n\n{table(run)}"


def filled(text: str, runs: list[dict[str, Any]]) -> str:
    by_threads = {str(run["threads"]): captioned(run) for run in runs}
    return marks.filled(text, {"inference": by_threads.__getitem__})


def main(*new: str) -> None:
    if new:
        runs: dict[int, dict[str, Any]] = {}
        for path in new:  # a later record of the same threads adds its kinds of cases, or replaces them
            run = json.loads(Path(path).read_text())
            first = runs.setdefault(run["threads"], run)
            first["cases"].update(run["cases"])
            first["load"].update(run["load"])
        RECORD.write_text(json.dumps(list(runs.values()), separators=(",", ":")) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main(*sys.argv[1:])
