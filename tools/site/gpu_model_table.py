"""The tables of docs/gpu-model.md, between its marks, from docs/data/gpu-model.json: python tools/site/gpu_model_table.py.
New records are given as arguments, for instance build/gpu_model/gpu_model.json, which `make gpu-model` writes; several become one."""

import json
import sys
from pathlib import Path
from typing import Any

import marks

ROOT = Path(__file__).parent.parent.parent
RECORD, PAGE = ROOT / "docs" / "data" / "gpu-model.json", ROOT / "docs" / "gpu-model.md"
OF_SEVERAL_LAUNCHES = "perturb_topk_"  # the one op whose bars are a matter of microseconds
Record = dict[str, Any]


def lines_of(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def table(record: Record) -> str:
    cards = list(dict.fromkeys(row["card"] for row in record["model"]))
    archs = sorted(key for key in record["counted"][0] if key.startswith("instructions "))
    on = " / ".join(key.removeprefix("instructions ") for key in archs)
    head = ["op", "counted on", "bytes a weight (formula)", f"warp instructions for 32 weights, {on}", "launches", "serial, us", *cards]
    rows = []
    for row in record["counted"]:
        op, dtype = row["name"].split()
        moved, instructions = f"{row['B/weight']} ({row['formula']})", " / ".join(row[key] for key in archs)
        share = {own["card"]: own["share of copy, at most"] for own in record["model"] if own["name"] == row["name"]}
        cells = [f"`{op}` {dtype}", row["on"], moved, instructions, str(row["launches"]), row["serial us"]]
        rows.append([*cells, *(share[card] for card in cards)])
    caption = f"*Commit {record['commit']}. A model, not a measurement: shares of a copy at the most.*"
    missed = ["Bars that are missed:", "", *(f"- {line}" for line in record["missed"])] if record["missed"] else ["No bar is missed."]
    return "\n".join([caption, "", *lines_of(head, rows), "", *missed])


def microseconds(record: Record) -> str:
    """What global top-k spends beside the copy of the formula's bytes, and how much of it the bar allows."""
    head = ["us", "copy", "the bar leaves", "bytes beyond the formula", "launches", "serial", "of it beside loads", "sum", "share (bar)"]
    rows = []
    for own in record["model"]:
        if not own["name"].startswith(OF_SEVERAL_LAUNCHES):
            continue
        names = ("copy us", "memory us", "launches us", "serial us", "beside loads us", "bound us")
        copy, memory, launches, serial, beside, bound = (float(own[name]) for name in names)
        left = copy * 100 / int(own["bar"].rstrip("%")) - copy
        parts = [copy, left, memory + beside - copy, launches, serial, -beside, bound - copy]
        share = f"{own['share of copy, at most']} ({own['bar']})"
        rows.append([f"{own['name'].split()[1]}, {own['card']}", *(f"{part:.1f}" for part in parts), share])
    return "\n".join(lines_of(head, rows))


def joined(records: list[Record]) -> Record:
    commits = list(dict.fromkeys(record["commit"] for record in records))
    lists = {key: [row for record in records for row in record[key]] for key in ("counted", "model", "missed")}
    return records[0] | {"commit": ", ".join(commits)} | lists


def filled(text: str, record: Record) -> str:
    return marks.filled(text, {"gpu-model": lambda _: table(record), "gpu-model-us": lambda _: microseconds(record)})


def main(*new: str) -> None:
    if new:
        RECORD.write_text(json.dumps(joined([json.loads(Path(path).read_text()) for path in new]), separators=(",", ":")) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main(*sys.argv[1:])
