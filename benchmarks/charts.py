"""Charts of a record of `make bench`, as SVG: share of the copy's bandwidth, a training step by its parts, time over size."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .measure import Row

BLUE, ORANGE, GREY, GREEN = "#0072b2", "#e69f00", "#999999", "#009e73"  # Okabe and Ito's, which the colour-blind tell apart
LABELS = {
    "cram_kernels": "CrAM, cram_kernels",
    "half": "the same, second pass half",
    "split": "the same, second pass split",
    "published": "CrAM, published algorithm",
    "SGD": "SGD",
}


def draw(record: Row, folder: Path) -> str:
    """Write the charts for which the record has cases. Returns what was written, or why there are none."""
    try:
        import matplotlib
    except ImportError:
        return "no charts: matplotlib is not installed (`pip install cram_kernels[demo]`)"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    facts = record["environment"]
    note = f"{facts['CPU'] if 'GPU' not in facts else facts['GPU']}, {facts['threads']} threads, torch {facts['torch']}"
    with plt.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "cram_kernels", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        for name, chart in CHARTS.items():
            figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
            if chart(figure, axes, record["results"]):
                figure.supxlabel(note + (", quick: not a measurement" if record["quick"] else ""), fontsize=7, color="#666666")
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                written.append(f"{folder / name}.svg")
            plt.close(figure)
    return "\n".join(written)


def ours(results: list[Row]) -> list[tuple[str, Row]]:
    return [
        (result["case"] if row["name"] == "cram_kernels" else f"{result['case']}: {row['name']}", row)
        for result in results
        for row in result["rows"]
        if row["ours"]
    ]


def roofline(figure: Any, axes: Any, results: list[Row]) -> bool:
    """Each op and step of ours, by its share of the bandwidth of a copy in the same run: what bounds it if memory does."""
    bars = [(name, row) for name, row in ours(results) if "share_of_copy" in row and "by weights" not in name]
    if not bars:
        return False
    figure.set_size_inches(8, 1 + 0.22 * len(bars))
    places = range(len(bars), 0, -1)
    colours = [GREEN if name.startswith("step") else BLUE for name, _ in bars]
    axes.barh(places, [100 * row["share_of_copy"] for _, row in bars], color=colours)
    for place, (_, row) in zip(places, bars, strict=True):
        axes.text(100 * row["share_of_copy"] + 1, place, f"{row['gb_per_s']:.0f} GB/s, {row['median_ms']:.3g} ms", va="center", fontsize=7)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlim(0, 125 * max(row["share_of_copy"] for _, row in bars))  # room for the figures
    axes.set_yticks(places, [name for name, _ in bars], fontsize=7)
    axes.set_xlabel("% of the bandwidth of the fastest copy of as many bytes")
    axes.set_title("Ops (blue) and whole steps (green)")
    return True


def parts(figure: Any, axes: Any, results: list[Row]) -> bool:
    """Training steps, stacked by part."""
    training = [result for result in results if result["case"].startswith("training step")]
    if not training:
        return False
    bars = [
        (f"{LABELS[row['name']]}\n{result['case'].removeprefix('training step ')}", row)
        for result in training
        for row in reversed(result["rows"])
    ]
    figure.set_size_inches(8, 1 + 0.42 * len(bars))
    places = range(len(bars), 0, -1)
    start = [0.0] * len(bars)
    for part, colour in (("forward", GREY), ("backward", ORANGE), ("optimizer", BLUE)):
        values = [row[f"{part}_ms"] / 1e3 for _, row in bars]
        axes.barh(places, values, left=start, color=colour, label=part)
        start = [a + b for a, b in zip(start, values, strict=True)]
    for place, end, (_, row) in zip(places, start, bars, strict=True):
        axes.text(end, place, f" {end:.2f} s, optimizer {row['optimizer_ms']:.0f} ms", va="center", fontsize=7)
    axes.set_xlim(0, 1.3 * max(start))
    axes.set_yticks(places, [name for name, _ in bars], fontsize=7)
    axes.set_xlabel("seconds a training step (median)")
    axes.set_title("A training step by its parts: CrAM takes two passes")
    axes.legend(frameon=False, loc="lower right")
    return True


def growth(figure: Any, axes: Any, results: list[Row]) -> bool:
    """Time a weight over the number of weights."""
    lines = [result for result in results if result["case"].endswith("by weights")]
    if not lines:
        return False
    for result, colour in zip(lines, (BLUE, ORANGE), strict=False):
        points = sorted((int(row["name"].split()[0]), row) for row in result["rows"] if row["ours"])
        size = [row["median_ms"] for _, row in points]
        axes.plot(
            [n for n, _ in points],
            [1e6 * ms / (n * 2**20) for ms, (n, _) in zip(size, points, strict=True)],
            "o-",
            color=colour,
            label=result["case"].removesuffix(" by weights"),
        )
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("millions of weights (2^20), in tensors of one million")
    axes.set_ylabel("nanoseconds a weight (median)")
    axes.set_title("Growth: a flat line is linear time")
    axes.legend(frameon=False)
    return True


CHARTS: dict[str, Callable[[Any, Any, list[Row]], bool]] = {"roofline": roofline, "parts": parts, "growth": growth}
