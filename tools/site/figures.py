"""The pictures of README and documentation, drawn from what was measured: python tools/site/figures.py writes docs/images/*.svg.

Plain SVG without a library, so that the same numbers give the same file; tests/test_figures.py compares.
"""

import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import study_tables

ROOT = Path(__file__).parent.parent.parent
DATA, IMAGES = ROOT / "docs" / "data", ROOT / "docs" / "images"
COLOURS = ("#d1495b", "#00798c", "#8d96a3", "#edae49")
LABELS = {"SGD": "SGD", "CrAM+ Multi": "CrAM+, with 50, 70 and 90 %", "CrAM+ N:M": "CrAM+, with 2:4 and 4:8"}
FONT = "font-family='Helvetica,Arial,sans-serif'"


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle", colour: str = "#333333", extra: str = "") -> str:
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return f"<text x='{x:g}' y='{y:g}' font-size='{size}' {FONT} text-anchor='{anchor}' fill='{colour}'{extra}>{escaped}</text>"


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' role='img'>"
    background = f"<rect width='{width}' height='{height}' rx='6' fill='white'/>"
    return "\n".join([head, f"<title>{title}</title>", background, *parts, "</svg>", ""])


Curve = tuple[str, str, bool, dict[int, tuple[float, float]]]  # name, colour, broken; sparsity in % (0: dense) -> mean, spread


def curves(title: str, lines: Sequence[Curve]) -> str:
    """Accuracy over sparsity, with the standard deviation over the seeds."""
    width, height, left, right, top, bottom = 720, 340, 60, 690, 46, 290
    shares = sorted(lines[0][3])

    def x(percent: float) -> float:
        """Each halving of what is left takes as much room."""
        return left + (right - 30 - left) * math.log2(1 - percent / 100) / math.log2(0.05)

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / 100

    parts = [text(width / 2, 24, title, 15)]
    for value in range(0, 101, 20):
        parts.append(f"<line x1='{left}' x2='{right}' y1='{y(value):g}' y2='{y(value):g}' stroke='#e3e3e3'/>")
        parts.append(text(left - 8, y(value) + 4, f"{value} %", 12, "end"))
    for share in shares:
        parts.append(text(x(share), bottom + 18, f"{share} %" if share else "dense", 12))
    parts.append(text(width / 2, height - 10, "share of the weights that are zero", 13))
    for i, (name, colour, broken, found) in enumerate(lines):
        points = [(x(share), y(found[share][0]), found[share][1]) for share in shares]
        line, dash = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points), " stroke-dasharray='6 4'" * broken
        parts.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='2.5'{dash}/>")
        for px, py, std in points:
            reach = (bottom - top) * std / 100
            parts.append(f"<line x1='{px:.1f}' x2='{px:.1f}' y1='{py - reach:.1f}' y2='{py + reach:.1f}' stroke='{colour}'/>")
            parts.append(f"<circle cx='{px:.1f}' cy='{py:.1f}' r='4' fill='{colour}'/>")
        row = y(60) + 24 * i
        parts.append(f"<line x1='{left + 20}' x2='{left + 54}' y1='{row:g}' y2='{row:g}' stroke='{colour}' stroke-width='2.5'{dash}/>")
        parts.append(text(left + 62, row + 4, name, 13, "start"))
    return svg(width, height, "Accuracy over sparsity", parts)


def accuracy(report: dict) -> str:
    """A curve a method; from the report of examples/mnist.py."""
    lines: list[Curve] = []
    for method, colour in zip(report["methods"].values(), COLOURS, strict=False):
        tuned = {row: of for row, of in method["summary"]["tuned"].items() if row == "dense" or re.fullmatch(r"\d+ %", row)}
        found = {0 if row == "dense" else int(row.split()[0]): (of["mean"], of["std"] or 0.0) for row, of in tuned.items()}
        lines.append((f"trained with {LABELS[method['label']]}", colour, False, found))
    return curves(f"MNIST-5k: test accuracy after pruning in one shot, {report['settings']['seeds']} seeds", lines)


def at_equal_work(record: str, title: str, repair: str) -> str:
    """SGD, CrAM+ and its `split`, as many passes over the images: full lines after batch-norm tuning, broken ones after `reconstruct`."""
    known, patterns, _ = study_tables.summary(record)
    shares = [name for name in patterns if name.endswith(" %")]
    lines: list[Curve] = []
    for head, colour in zip(("SGD, as much work", "CrAM+", "split, as much work"), COLOURS[:2] + COLOURS[3:], strict=True):
        of = known[study_tables.COLUMNS[record][head]]
        for what, name in (("batch norm tuned", "batch norms tuned"), (repair, "reconstructed")):
            dense = "dense" if what == "reconstructed" else "dense, batch norm tuned"
            found = {0: of[dense][:2]} | {int(share.split()[0]): of[f"{share}, {what}"][:2] for share in shares}
            lines.append((f"{head.split(',')[0]}, {name}", colour, what == repair, found))
    return curves(f"{title}: test accuracy after pruning in one shot, {of['dense'][2]} seeds", lines)


def box(x: float, y: float, width: float, height: float, fill: str, title: str, lines: Sequence[str]) -> list[str]:
    parts = [f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='6' fill='{fill}' stroke='#555555'/>"]
    parts.append(text(x + width / 2, y + 24, title, 14, extra=" font-weight='bold'"))
    return parts + [text(x + width / 2, y + 48 + 18 * i, line, 12) for i, line in enumerate(lines)]


def arrow(x1: float, y1: float, x2: float, y2: float, dashed: bool = False) -> str:
    """A horizontal or vertical line with a head."""
    dx, dy = (x2 > x1) - (x2 < x1), (y2 > y1) - (y2 < y1)
    head = f"{x2:g},{y2:g} {x2 - 9 * dx - 5 * dy:g},{y2 - 9 * dy - 5 * dx:g} {x2 - 9 * dx + 5 * dy:g},{y2 - 9 * dy + 5 * dx:g}"
    dash = " stroke-dasharray='5 4'" if dashed else ""
    return f"<line x1='{x1:g}' y1='{y1:g}' x2='{x2:g}' y2='{y2:g}' stroke='#333333'{dash}/><polygon points='{head}' fill='#333333'/>"


def bracket() -> str:
    """How many weights have which magnitude (a normal distribution), and what one pass does with them at 70 %."""
    width, height, left, right, top, bottom = 720, 300, 40, 690, 60, 230
    low, high, end = 0.94, 1.14, 3.2  # the 70 % quantile of |N(0, 1)| is 1.036; the bracket is drawn wider than it is

    def x(magnitude: float) -> float:
        return left + (right - left) * magnitude / end

    def y(magnitude: float) -> float:
        return bottom - (bottom - top) * math.exp(-(magnitude**2) / 2)

    def area(start: float, stop: float, colour: str) -> str:
        points = [(x(start), bottom)] + [(x(m), y(m)) for m in (start + (stop - start) * i / 40 for i in range(41))] + [(x(stop), bottom)]
        return f"<polygon points='{' '.join(f'{px:.1f},{py:.1f}' for px, py in points)}' fill='{colour}'/>"

    parts = [text(width / 2, 26, "One pass: most weights are settled by a bracket that a sample has guessed", 15)]
    parts += [area(0, low, "#d9dde2"), area(low, high, COLOURS[3]), area(high, end, COLOURS[1])]
    parts.append(f"<line x1='{left}' x2='{right}' y1='{bottom}' y2='{bottom}' stroke='#333333'/>")
    parts += [text(x(0.45), bottom - 40, "below: zero", 14), text(x(1.55), bottom - 16, "above: kept", 14, colour="white")]
    parts += [text(x(1.3), top + 30, "inside: candidates,", 13, "start"), text(x(1.3), top + 48, "1 to 2 % of a large model", 13, "start")]
    parts += [text(x(low), bottom + 18, "low", 12, "end"), text(x(high), bottom + 18, "high", 12, "start")]
    parts.append(text(width / 2, bottom + 44, "magnitude of the perturbed weight", 13))
    parts.append(text(width / 2, bottom + 62, "the bracket is drawn wider than it is", 11, colour="#777777"))
    return svg(width, height, "The bracket around the threshold", parts)


def selection() -> str:
    """The four stages."""
    boxes = [
        ("1. Sample", "#f4f6f8", ("read some ten thousand", "weights; guess where the", "threshold lies: a bracket")),
        ("2. One pass", "#d5ecef", ("over all weights: perturb,", "save, prune, write masks;", "list the candidates")),
        ("3. Finish", "#f4f6f8", ("find the exact threshold", "among the candidates;", "set the wrong ones right")),
    ]
    parts = [text(360, 28, "Guess, verify, finish", 16)]
    for i, (title, fill, lines) in enumerate(boxes):
        parts += box(20 + 240 * i, 50, 200, 110, fill, title, lines)
    parts += [arrow(220, 105, 260, 105), arrow(460, 105, 500, 105), arrow(600, 160, 600, 200, dashed=True)]
    parts += box(
        380,
        200,
        320,
        92,
        "#fbe9eb",
        "4. Fallback, seldom",
        ("the threshold was outside of the bracket:", "count digits of all keys (radix select), rewrite"),
    )
    parts.append(text(360, 250, "exact in every case; only time differs", 13, "end"))
    return svg(720, 310, "The stages of the selection", parts)


def traffic() -> str:
    """Bytes of memory traffic for a float32 weight, by count."""
    bars = [("one pass (here)", 16.125), ("two passes: select, then prune", 24.125), ("radix select, then prune", 40.125)]
    parts = [text(360, 26, "Perturb and prune: bytes moved for a float32 weight, by count", 15)]
    for i, (label, value) in enumerate(bars):
        y = 50 + 44 * i
        parts.append(text(250, y + 20, label, 13, "end"))
        parts.append(f"<rect x='262' y='{y}' width='{value * 8.5:g}' height='28' fill='{COLOURS[1] if i == 0 else COLOURS[2]}'/>")
        parts.append(text(270 + value * 8.5, y + 20, f"{value:g}" if i == 0 else f"{value:g} or more", 13, "start"))
    parts.append(text(360, 196, "read weight and gradient, write saved weight and pruned weight: 16; mask: 1/8", 12, colour="#777777"))
    return svg(720, 212, "Memory traffic", parts)


def robustness(record: dict) -> str:
    """Accuracy by kind of corruption: full lines for dense networks, broken ones for pruned ones; means over the runs."""
    width, height, left, right, top, bottom = 720, 340, 60, 470, 46, 290
    runs = record["runs"]
    states = [state for state in runs[0]["corrupted"] if state != "dense"]
    kinds = [kind for kind in study_tables.under_corruptions(runs[0], "dense") if kind != "all corruptions"]
    x = {kind: left + 30 + (right - left - 60) * i / (len(kinds) - 1) for i, kind in enumerate(kinds)}
    lines = {}
    for label in dict.fromkeys(run["label"] for run in runs):
        for state in states:
            found = [study_tables.under_corruptions(run, state) for run in runs if run["label"] == label]
            lines[label, state] = [statistics.fmean(values[kind] for values in found) for kind in kinds]
    low = 10 * math.floor(min(map(min, lines.values())) / 10)
    high = 10 * math.ceil(max(map(max, lines.values())) / 10)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = [text(width / 2, 24, f"Emoji drawings: accuracy under corruptions, {len(found)} seeds", 15)]
    for value in range(low, high + 1, 10):
        parts.append(f"<line x1='{left}' x2='{right}' y1='{y(value):g}' y2='{y(value):g}' stroke='#e3e3e3'/>")
        parts.append(text(left - 8, y(value) + 4, f"{value} %", 12, "end"))
    parts += [text(px, bottom + 18, kind, 12) for kind, px in x.items()]
    colours = dict(zip(dict.fromkeys(label for label, _ in lines), COLOURS, strict=False))
    for i, ((label, state), values) in enumerate(lines.items()):
        line = f"stroke='{colours[label]}' stroke-width='2.5'" + ("" if state.startswith("dense") else " stroke-dasharray='6 4'")
        points = " ".join(f"{px:.1f},{y(value):.1f}" for px, value in zip(x.values(), values, strict=True))
        parts.append(f"<polyline points='{points}' fill='none' {line}/>")
        row = top + 30 + 26 * i
        parts.append(f"<line x1='{right + 20}' x2='{right + 54}' y1='{row}' y2='{row}' {line}/>")
        parts.append(text(right + 62, row + 4, f"{label.split(' {')[0].split(',')[0]}, {state.split(',')[0]}", 13, "start"))
    return svg(width, height, "Accuracy under corruptions", parts)


def badge(label: str, value: str) -> str:
    """A badge that needs no server."""
    one, two = 7 * len(label) + 16, 7 * len(value) + 16
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{one + two}' height='20' role='img'>",
        f"<title>{label}: {value}</title>",
        f"<rect width='{one + two}' height='20' rx='3' fill='#555555'/>",
        f"<rect x='{one}' width='{two}' height='20' rx='3' fill='#00798c'/>",
        text(one / 2, 14, label, 11, colour="white"),
        text(one + two / 2, 14, value, 11, colour="white"),
        "</svg>",
        "",
    ]
    return "\n".join(parts)


def pictures() -> dict[str, str]:
    """Name of the file -> what it holds."""
    project = (ROOT / "pyproject.toml").read_text()
    python, torch, licence = (
        re.search(pattern, project, re.MULTILINE)[1]  # type: ignore[index]
        for pattern in (r'^requires-python = ">=([\d.]+)"', r'^dependencies = \["torch>=([\d.]+)', r'^license = "(.*)"')
    )
    return {
        "accuracy.svg": accuracy(json.loads((DATA / "mnist.json").read_text())),
        "mnist5k.svg": at_equal_work("mnist5k-study", "MNIST-5k, equal work", "reconstructed"),
        "fashion.svg": at_equal_work("fashion-study", "Fashion-MNIST, equal work", "dense tuned, reconstructed"),
        "emoji.svg": at_equal_work("emoji-study", "Emoji drawings, equal work", "dense tuned, reconstructed"),
        "corruptions.svg": robustness(json.loads((DATA / "emoji-corrupted.json").read_text())),
        "bracket.svg": bracket(),
        "selection.svg": selection(),
        "traffic.svg": traffic(),
        "python.svg": badge("Python", f"{python} or later"),
        "torch.svg": badge("torch", f"{torch} or later"),
        "licence.svg": badge("licence", licence),
    }


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, content in pictures().items():
        (IMAGES / name).write_text(content)
        print(f"docs/images/{name}")
