"""What README, docs/performance.md and docs/when-it-pays.md show of docs/data/bench.json, a record of `make bench`:
python tools/site/bench_tables.py writes the tables, between their marks, and the charts. All figures of a table are of one run on one
machine, which a line of its own names.
A new record comes from build/benchmarks/suite.json: python tools/site/bench_tables.py build/benchmarks/suite.json.
What README says of memory is of docs/data/memory.json, memory.json of python -m benchmarks.memory."""

import json
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import marks

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "docs" / "data" / "bench.json"
MEMORY = RECORD.with_name("memory.json")
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "when-it-pays.md")
METHODS = {
    "SGD": "SGD",
    "published": "CrAM, published algorithm",
    "cram_kernels": "CrAM, cram_kernels",
    "half": "the same, second pass half",
    "split": "the same, second pass split",
}
Row = dict[str, Any]


def machine(record: Row) -> str:
    of, loads = record["environment"], [result["load_average"] for result in record["results"]]
    facts = (
        of["CPU"],
        of["SIMD level"],
        f"{of['threads']} threads",
        f"torch {of['torch']}",
        f"cram_kernels {of['cram_kernels']} (commit {of['commit']})",
        of["date"],
    )
    took = f" It took {record['seconds'] / 60:.0f} minutes." if "seconds" in record else ""
    load = f"{of['load average']:.1f} at the start, {min(loads):.1f} to {max(loads):.1f} before the cases"
    return f"*{', '.join(facts[:4])},\n{', '.join(facts[4:])}.\nLoad average {load}; the run itself is part of it.{took}*"


def rows(record: Row, case: str) -> dict[str, Row]:
    (found,) = (result["rows"] for result in record["results"] if result["case"] == case)
    return {row["name"]: row for row in found}


def cost(record: Row) -> str:
    """The optimizer's part of a step of ResNet-50."""
    found = [rows(record, f"step ResNet-50 SGD {sparsity} fp32") for sparsity in ("50 %", "90 %")]
    ours, fused, published = ([step[name] for step in found] for name in ("cram_kernels", "torch.optim.SGD(fused=True)", "published"))
    lines = {
        "`cram_kernels` (spread)": [f"{row['median_ms']:.0f} ms ({row['spread']:.0%})" for row in ours],
        "`cram_kernels`, over torch's fused SGD (a plain step)": [f"{1 / row['x_ours']:.1f} x" for row in fused],
        "the published algorithm, over `cram_kernels`": [f"{row['x_ours']:.0f} x" for row in published],
    }
    head = "| the optimizer's part of a step | at 50 % | at 90 % |\n|---|---|---|"
    return "\n".join([head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in lines.items())])


def memory(_: Row) -> str:
    """In a sentence, from a record of its own."""
    record = json.loads(MEMORY.read_text())
    ours, published = (rows(record, "ResNet-50 SGD 90 %")[name]["held"] for name in ("cram_kernels", "published"))
    return (
        f"While a step is open, the optimizer holds {ours:.1f} bytes a weight more than its base does, and the published\n"
        f"algorithm {published:.1f}: ResNet-50 in float32 at 90 %, commit {record['environment']['commit']}, `python -m benchmarks.memory`."
    )


def training(record: Row) -> str:
    head = "| a training step, base SGD, 90 % | forward, s | backward, s | optimizer, s | whole, s (spread) | over SGD |"
    lines = [head, "|" + "---|" * 6]
    rounds: dict[str, int] = {}
    for result in record["results"]:
        if not result["case"].startswith("training step "):
            continue
        found = {row["name"]: row for row in result["rows"]}
        for name, label in METHODS.items():
            if name not in found:  # a record from before half and split were timed
                continue
            row = found[name]
            within = [a / b for a, b in zip(row["rounds_ms"], found["SGD"]["rounds_ms"], strict=False)]
            parts = " | ".join(f"{row[f'{part}_ms'] / 1e3:.2f}" for part in ("forward", "backward", "optimizer", "median"))
            network, batch = result["case"].removeprefix("training step "), result["batch"].split("x")[0]
            over, rounds[label] = f"{statistics.median(within):.2f}", len(within)
            lines.append(f"| {network}, batch {batch}: {label} | {parts} ({row['spread']:.0%}) | {over} |")
    return "\n".join([*lines, "", f"Rounds: {'; '.join(f'{label} {n}' for label, n in rounds.items())}."])


def ops(record: Row) -> str:
    lines = ["| | ms | spread | of a copy | rivals, in times of ours |", "|---|---|---|---|---|"]
    for result in record["results"]:
        case = result["case"].replace(", dtypes", "").replace("1 B list", f"list of {result.get('weights', 0) / 1e6:.0f} M")
        if case.startswith(("training", "host")) or "by weights" in case:
            continue
        peers = [row for row in result["rows"] if not row["ours"] and "copy" not in row["name"]]
        told = ", ".join(f"{peer['name'].removeprefix('torch.optim.')} {peer['x_ours']:.3g}" for peer in peers)
        for row in (row for row in result["rows"] if row["ours"]):
            name = re.sub(r"^(\w+_|topk_threshold) ", r"`\1` ", case if row["name"] == "cram_kernels" else f"{case}, {row['name']}")
            lines.append(f"| {name} | {row['median_ms']:.3g} | {row['spread']:.0%} | {row['share_of_copy']:.0%} | {told} |")
    return "\n".join(lines)


def host(record: Row) -> str:
    """What Python and torch do for a step; nothing where the record has no such cases."""
    intro = "The time of the host, over tensors so small that there is nothing to compute, and the functions of Python and C that it calls:"
    lines = [intro, "", "| base, tensors | ms | spread | over torch's fused base | calls | calls of torch's |", "|" + "---|" * 6]
    for result in record["results"]:
        if result["case"].startswith("host time "):
            (ours, fused), name = result["rows"], result["case"].removeprefix("host time ")
            over = f"{1 / fused['x_ours']:.1f}"
            cells = (name, f"{ours['median_ms']:.3f}", f"{ours['spread']:.0%}", over, str(ours["calls"]), str(fused["calls"]))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def missed(record: Row) -> str:
    """What was set beforehand and not reached, of time over ours or per byte."""
    lines = ["| missed target | of | wanted | measured |", "|---|---|---|---|"]
    judged = [(result["case"].replace(", dtypes", ""), row) for result in record["results"] for row in result["rows"] if "met" in row]
    lines += [f"| {case} | {row['name']} | {row['target']} | {row['x_ours']:.3g} |" for case, row in judged if not row["met"]]
    return "\n".join(
        [
            *lines,
            "",
            f"{sum(row['met'] for _, row in judged)} of {len(judged)} targets are met. All are of time over ours; of dtypes, per byte.",
        ]
    )


MADE = {"machine": machine, "cost": cost, "training": training, "ops": ops, "missed": missed, "host": host, "memory": memory}


def filled(text: str, record: Row) -> str:
    return marks.filled(text, {"bench": lambda name: MADE[name](record)})


def main(new: str | None = None) -> None:
    record = json.loads(Path(new or RECORD).read_text())
    if new:
        RECORD.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    for page in PAGES:
        page.write_text(filled(page.read_text(), record))
    sys.path.insert(0, str(ROOT))
    from benchmarks import charts

    with tempfile.TemporaryDirectory() as folder:
        charts.draw(record, Path(folder))
        for chart in Path(folder).glob("*.svg"):
            (ROOT / "docs" / "images" / f"bench-{chart.name}").write_text(chart.read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
