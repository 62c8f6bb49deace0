"""Is one run of a benchmark slower than another, or is it noise? `python -m benchmarks.compare A.json B.json`.

What is compared is a contestant's time over that of the copy in the same round (where there is one), so that a machine that is slower as a
whole in one run is not taken for slower code. A difference counts where the exact two-sided Mann-Whitney test of the rounds, corrected for
the number of comparisons (Holm), rejects chance at 5 %, and the medians differ by more than --least.
"""

import argparse
import json
import random
import statistics
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

from cram_kernels.report import table
from cram_kernels.terminal import show

LEVEL, RESAMPLES = 0.05, 2000
OK, SLOWER, CANNOT = 0, 1, 2
Samples = dict[tuple[str, str], list[float]]


def samples(record: dict[str, Any], all_rows: bool) -> Samples:
    """(case, contestant) -> of each round the time over the copy's, or in ms."""
    found: Samples = {}
    for result in record["results"]:
        timed = [row for row in result["rows"] if len(row.get("rounds_ms", ())) > 1]
        copy = min((row for row in timed if row["name"] in ("copy_", "streaming copy")), key=lambda row: row["median_ms"], default=None)
        for row in timed:
            if (row["ours"] or all_rows) and row is not copy:
                units = copy["rounds_ms"] if copy else [1.0] * len(row["rounds_ms"])
                case = f"{result['case']}, {result['weights']:,} weights" if "weights" in result else result["case"]
                found[case, row["name"]] = [t / unit for t, unit in zip(row["rounds_ms"], units, strict=True)]
    return found


def p_value(a: list[float], b: list[float]) -> float:
    """Two-sided, exact, with midranks for ties: the share of all ways to choose len(a) of the ranks whose sum is as far from its mean."""
    counts, ranks, below = Counter(a + b), {}, 0
    for value in sorted(counts):
        ranks[value] = 2 * below + counts[value] + 1  # twice the midrank, an integer
        below += counts[value]
    ways: list[Counter[int]] = [Counter({0: 1}), *(Counter() for _ in a)]
    for value in a + b:
        for chosen in range(len(a), 0, -1):
            for total, number in ways[chosen - 1].items():
                ways[chosen][total + ranks[value]] += number
    middle = len(a) * (below + 1)
    far = abs(sum(ranks[value] for value in a) - middle)
    return sum(number for total, number in ways[-1].items() if abs(total - middle) >= far) / ways[-1].total()


def holm(p: list[float]) -> list[float]:
    """Corrected for the number of comparisons."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def interval(a: list[float], b: list[float]) -> tuple[float, float]:
    """95 % of the ratio of the medians, b over a, by the bootstrap."""
    draw = random.Random(0).choices
    ratios = sorted(statistics.median(draw(b, k=len(b))) / statistics.median(draw(a, k=len(a))) for _ in range(RESAMPLES))
    return ratios[round(0.025 * RESAMPLES)], ratios[round(0.975 * RESAMPLES) - 1]


def compared(a: Samples, b: Samples, least: float) -> list[dict[str, Any]]:
    common = [key for key in a if key in b]
    adjusted = holm([p_value(a[key], b[key]) for key in common])
    rows = []
    for key, p in zip(common, adjusted, strict=True):
        ratio = statistics.median(b[key]) / statistics.median(a[key])
        real = p < LEVEL and abs(ratio - 1) > least
        low, high = interval(a[key], b[key])
        verdict = ("slower" if ratio > 1 else "faster") if real else "noise"
        rows.append({"case": key[0], "name": key[1], "ratio": ratio, "low": low, "high": high, "p": p, "verdict": verdict})
    return rows


def main(argv: list[str] | None = None, prog: str = "python -m benchmarks.compare") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Tell what is slower or faster in B than in A from noise. Exit status: 0; "
        "1, something of ours is slower; 2, a file cannot be read, or nothing is in both.",
    )
    parser.add_argument("a", type=Path, metavar="A.json")
    parser.add_argument("b", type=Path, metavar="B.json")
    parser.add_argument("--least", type=float, default=0.03, metavar="0.03", help="differences of the medians that are too small to matter")
    parser.add_argument("--all", action="store_true", help="peers too")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(argv)
    try:
        before, after = (json.loads(path.read_text()) for path in (options.a, options.b))
        found = compared(samples(before, options.all), samples(after, options.all), options.least)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"compare: both files must be records of a benchmark, got {type(error).__name__}: {error}", file=sys.stderr)
        return CANNOT
    if not found:
        print("compare: both files must have a case in common, with the rounds of its times, got none", file=sys.stderr)
        return CANNOT
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(Comparison(before["environment"], after["environment"], found))
    return SLOWER if any(row["verdict"] == "slower" for row in found) else OK


class Comparison:
    def __init__(self, before: dict[str, Any], after: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.before, self.after, self.rows = before, after, rows

    def __str__(self) -> str:
        names = dict.fromkeys(chain(self.before, self.after))
        changed = [f"{n}: {self.before.get(n)} -> {self.after.get(n)}" for n in names if self.before.get(n) != self.after.get(n)]
        cells = [
            (row["case"], row["name"], f"{row['ratio']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", f"{row['p']:.2g}", row["verdict"])
            for row in self.rows
        ]
        counts = Counter(row["verdict"] for row in self.rows)
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("slower", "faster", "noise"))
        return "\n".join([*changed, table(("case", "", "B / A", "95 %", "p", "verdict"), cells, "<<>>><"), told])


if __name__ == "__main__":
    sys.exit(main())
