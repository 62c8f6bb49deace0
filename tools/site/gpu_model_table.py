"""The table of docs/gpu-model.md, between its marks, from docs/data/gpu-model.json: python tools/site/gpu_model_table.py.
A new record is given as argument: build/gpu_model/gpu_model.json, which `make gpu-model` writes."""

import json
import sys
from pathlib import Path
from typing import Any

import marks

ROOT = Path(__file__).parent.parent.parent
RECORD, PAGE = ROOT / "docs" / "data" / "gpu-model.json", ROOT / "docs" / "gpu-model.md"
Record = dict[str, Any]


def table(record: Record) -> str:
    cards = list(dict.fromkeys(row["card"] for row in record["model"]))
    archs = sorted(key for key in record["counted"][0] if key.startswith("instructions "))
    on = " / ".join(key.removeprefix("instructions ") for key in archs)
    head = ["op", "bytes a weight (formula)", f"warp instructions for 32 weights, {on}", "launches", "serial, us", *cards]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in record["counted"]:
        op, dtype = row["name"].split()
        instructions = " / ".join(row[key] for key in archs)
        share = {own["card"]: own["share of copy, at most"] for own in record["model"] if own["name"] == row["name"]}
        cells = [f"`{op}` {dtype}", f"{row['B/weight']} ({row['formula']})", instructions, str(row["launches"]), row["serial us"]]
        lines.append(f"| {' | '.join([*cells, *(share[card] for card in cards)])} |")
    counted_on = "a quarter of ResNet-50's weights" if record["quarter"] else "ResNet-50's weights"
    caption = f"*Commit {record['commit']}, counted on {counted_on}. A model, not a measurement: shares of a copy at the most.*"
    missed = ["Bars that are missed:", "", *(f"- {line}" for line in record["missed"])] if record["missed"] else ["No bar is missed."]
    return "\n".join([caption, "", *lines, "", *missed])


def filled(text: str, record: Record) -> str:
    return marks.filled(text, {"gpu-model": lambda _: table(record)})


def main(new: str | None = None) -> None:
    if new:
        RECORD.write_text(json.dumps(json.loads(Path(new).read_text()), separators=(",", ":")) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), json.loads(RECORD.read_text())))


if __name__ == "__main__":
    main(*sys.argv[1:])
