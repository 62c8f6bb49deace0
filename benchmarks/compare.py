"""Is one run of a benchmark slower than another, or is it noise? `python -m benchmarks.compare A.json B.json`.

What is compared is a contestant's time over that of the copy in the same round, or of plain SGD where a training step is timed, or of
torch's fused optimizer where the time of the host is. So a machine that is slower as a whole in one run is not taken for slower code. The
optimizer's part of a training step, over plain SGD's whole one, is judged by itself: what it adds is small beside the passes. What A
measured and B did not is as bad as slower. A difference counts where the exact two-sided Mann-Whitney test of the rounds, corrected for
the number of comparisons (Holm), rejects chance at 5 %, and the medians differ by more than --least. A case of so few rounds that no times
whatever could pass that test is left out of it (Tarone, Biometrics 46, 1990); its verdict is "cannot tell".
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

from cram_kernels.report import table
from cram_kernels.terminal import Help, Parser, say, show

LEVEL, RESAMPLES = 0.05, 2000
OK, SLOWER, CANNOT = 0, 1, 2
UNITS = ("copy_", "streaming copy", "SGD", "torch.optim.SGD(fused=True).step()", "torch.optim.AdamW(fused=True).step()")
VERDICTS = ("slower", "faster", "within noise", "cannot tell", "gone", "red")
Samples = dict[tuple[str, str], list[float]]


def samples(record: dict[str, Any], all_rows: bool) -> Samples:
    """(case, contestant) -> of each round the time over the unit's (the faster copy), or in ms."""
    found: Samples = {}
    for result in record["results"]:
        timed = [row for row in result["rows"] if len(row.get("rounds_ms", ())) > 1]
        unit = min((row for row in timed if row["name"] in UNITS), key=lambda row: row["median_ms"], default=None)
        for row in timed:
            if (row["ours"] or all_rows) and row is not unit:
                units = unit["rounds_ms"] if unit else [1.0] * len(row["rounds_ms"])
                case = f"{result['case']}, {result['weights']:,} weights" if "weights" in result else result["case"]
                for name, key in ((row["name"], "rounds_ms"), (f"{row['name']}, optimizer", "optimizer_rounds_ms")):
                    if key in row:
                        found[case, name] = [t / u for t, u in zip(row[key], units, strict=False)]  # peers may stop earlier
    if any(not (0 < value < math.inf) for values in found.values() for value in values):
        raise ValueError("times that are not above 0")
    return found


def loaded(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text())
    kinds = {"environment": dict, "results": list}
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path} without `environment` or `results`")
    return record


def lost(a: Samples, b: Samples, red: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What A measured and B did not, and what was wrong in B."""
    wrong = {case["case"]: case["why"] for case in red}
    nothing = dict.fromkeys(("ratio", "low", "high", "p"))
    gone = [key for key in a if key not in b and not any(key[0] == case or key[0].startswith(f"{case}, ") for case in wrong)]
    return [
        *({"case": case, "name": name, "rounds": [len(a[case, name]), 0], **nothing, "verdict": "gone"} for case, name in gone),
        *({"case": case, "name": why, "rounds": [0, 0], **nothing, "verdict": "red"} for case, why in wrong.items()),
    ]


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


def least_p(rounds: int, others: int) -> float:
    """The p-value where every time of one run is above every time of the other: there is no lower one."""
    return 2 / math.comb(rounds + others, rounds)


def able(sizes: list[tuple[int, int]]) -> list[bool]:
    """Which comparisons of so many rounds can pass the corrected test at all; the correction is for their number alone."""
    for family in range(1, len(sizes) + 1):
        found = [family * least_p(*both) < LEVEL for both in sizes]
        if sum(found) <= family:
            return found
    return []


def rounds_for(comparisons: int) -> int:
    """How many rounds of both runs can tell in so many comparisons."""
    return next(n for n in range(2, 100) if comparisons * least_p(n, n) < LEVEL)


def interval(a: list[float], b: list[float]) -> tuple[float, float]:
    """95 % of the ratio of the medians, b over a, by the bootstrap."""
    draw = random.Random(0).choices
    ratios = sorted(statistics.median(draw(b, k=len(b))) / statistics.median(draw(a, k=len(a))) for _ in range(RESAMPLES))
    return ratios[round(0.025 * RESAMPLES)], ratios[round(0.975 * RESAMPLES) - 1]


def compared(a: Samples, b: Samples, least: float) -> list[dict[str, Any]]:
    common = [key for key in a if key in b]
    told = [key for key, can in zip(common, able([(len(a[key]), len(b[key])) for key in common]), strict=True) if can]
    adjusted = dict(zip(told, holm([p_value(a[key], b[key]) for key in told]), strict=True))
    rows = []
    for key in common:
        ratio, p = statistics.median(b[key]) / statistics.median(a[key]), adjusted.get(key)
        low, high = interval(a[key], b[key])
        slower, faster, noise, cannot, *_ = VERDICTS
        verdict = cannot if p is None else noise if p >= LEVEL or abs(ratio - 1) <= least else slower if ratio > 1 else faster
        rounds = [len(a[key]), len(b[key])]
        rows.append(
            {"case": key[0], "name": key[1], "rounds": rounds, "ratio": ratio, "low": low, "high": high, "p": p, "verdict": verdict}
        )
    return rows


def main(argv: list[str] | None = None, prog: str = "python -m benchmarks.compare") -> int:
    parser = Parser(
        prog=prog,
        description="Tell what became slower or faster from A to B from noise. What has too few rounds for that is said to be so.\n\n"
        "Exit status: 0, nothing is slower, as far as it can be told; 1, something is slower, was not measured in B (gone), or had a "
        "wrong result there (red); 2, a file cannot be read, nothing is in both, or nothing can be told.",
        epilog=f"Example:\n  {prog} before/suite.json after/suite.json --least 0.05",
        formatter_class=Help,
    )
    parser.add_argument("a", type=Path, metavar="A.json", help="the record before the change, suite.json of `bench`")
    parser.add_argument("b", type=Path, metavar="B.json", help="the record after it")
    parser.add_argument(
        "--least",
        type=_least,
        default=0.03,
        metavar="0.03",
        help="share by which medians must differ to matter; 0.03 if absent",
    )
    parser.add_argument("--all", action="store_true", help="judge the peers too, not our code alone")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(argv)
    try:
        before, after = (loaded(path) for path in (options.a, options.b))
        a, b = (samples(record, options.all) for record in (before, after))
        found, missing = compared(a, b, options.least), lost(a, b, after.get("red", []))
    except OSError as error:
        say(f"compare: must be able to read both files, got {error.strerror} for {error.filename}")
        return CANNOT
    except (ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
        say(f"compare: both files must be records of a benchmark, got {type(error).__name__}: {error}")
        return CANNOT
    if not found and all(row["verdict"] == "gone" for row in missing):
        say("compare: both files must have a case in common, with the rounds of its times, got none")
        return CANNOT
    verdicts = Counter(row["verdict"] for row in found)
    if options.json:
        print(json.dumps(found + missing, indent=1))
    else:
        show(Comparison(before["environment"], after["environment"], found + missing))
    if missing:
        return SLOWER
    if verdicts["cannot tell"] == len(found):
        say(f"compare: a case must have {rounds_for(len(found))} rounds in both files to be told from noise, got fewer")
        return CANNOT
    return SLOWER if verdicts["slower"] else OK


def _least(text: str) -> float:
    try:
        if 0 <= float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a share of 0 or more, 0.03 for 3 %, got {text!r}")


class Comparison:
    def __init__(self, before: dict[str, Any], after: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.before, self.after, self.rows = before, after, rows

    def __str__(self) -> str:
        names = dict.fromkeys(chain(self.before, self.after))
        changed = [f"differs: {n}: {self.before.get(n)} -> {self.after.get(n)}" for n in names if self.before.get(n) != self.after.get(n)]
        if self.before.get("CPU") != self.after.get("CPU"):
            changed.append("The CPUs differ, so this compares machines rather than code.")
        cells = [
            (
                row["case"],
                row["name"],
                "{} and {}".format(*row["rounds"]),
                "" if row["ratio"] is None else f"{row['ratio']:.3f}",
                "" if row["ratio"] is None else f"{row['low']:.3f} to {row['high']:.3f}",
                "" if row["p"] is None else f"{row['p']:.2g}",
                row["verdict"],
            )
            for row in self.rows
        ]
        counts = Counter(row["verdict"] for row in self.rows)
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in VERDICTS[:4] or counts[verdict])
        judged = len(self.rows) - counts["gone"] - counts["red"]
        few = f". To tell all of them, measure both with --rounds {rounds_for(judged)}" if counts["cannot tell"] else ""
        head = ("case", "contestant", "rounds", "time, B over A", "95 % of it", "p, corrected", "verdict")
        return "\n".join([*changed, table(head, cells, "<<>>>><"), f"B compared with A: {told}{few}."])


if __name__ == "__main__":
    sys.exit(main())
