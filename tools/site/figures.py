"""The pictures of README and documentation, drawn from what was measured: python tools/site/figures.py writes docs/images/*.svg.

Plain SVG without a library, so that the same numbers give the same file; tests/test_figures.py compares.
"""

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DATA, IMAGES = ROOT / "docs" / "data", ROOT / "docs" / "images"
COLOURS = ("#d1495b", "#00798c", "#8d96a3", "#edae49")
FONT = "font-family='Helvetica,Arial,sans-serif'"


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle", colour: str = "#333333", extra: str = "") -> str:
    escaped = words.replace("&", "&amp;").replace("<", "&lt;")
    return f"<text x='{x:g}' y='{y:g}' font-size='{size}' {FONT} text-anchor='{anchor}' fill='{colour}'{extra}>{escaped}</text>"


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' role='img'>"
    background = f"<rect width='{width}' height='{height}' rx='6' fill='white'/>"
    return "\n".join([head, f"<title>{title}</title>", background, *parts, "</svg>", ""])


def accuracy(report: dict) -> str:
    """Accuracy over sparsity, a curve a method, with the standard deviation over the seeds. `report`: the report.json of examples/mnist.py."""
    width, height, left, right, top, bottom = 720, 340, 60, 690, 46, 290
    methods = list(report["methods"].values())
    rows = ["dense", *(row for row in methods[0]["summary"]["tuned"] if re.fullmatch(r"\d+ %", row))]
    share = {row: 0 if row == "dense" else int(row.split()[0]) for row in rows}

    def x(percent: float) -> float:
        return left + (right - left) * percent / 100

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / 100

    parts = [text(width / 2, 24, f"MNIST-5k: test accuracy after pruning in one shot, {report['settings']['seeds']} seeds", 15)]
    for value in range(0, 101, 20):
        parts.append(f"<line x1='{left}' x2='{right}' y1='{y(value):g}' y2='{y(value):g}' stroke='#e3e3e3'/>")
        parts.append(text(left - 8, y(value) + 4, f"{value} %", 12, "end"))
    for row in rows:
        parts.append(text(x(share[row]), bottom + 18, row, 12))
    parts.append(text(width / 2, height - 10, "share of the weights that are zero", 13))
    for i, (method, colour) in enumerate(zip(methods, COLOURS, strict=False)):
        found = method["summary"]["tuned"]
        points = [(x(share[row]), y(found[row]["mean"]), found[row]["std"] or 0.0) for row in rows]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in points)
        parts.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='2.5'/>")
        for px, py, std in points:
            reach = (bottom - top) * std / 100
            parts.append(f"<line x1='{px:.1f}' x2='{px:.1f}' y1='{py - reach:.1f}' y2='{py + reach:.1f}' stroke='{colour}'/>")
            parts.append(f"<circle cx='{px:.1f}' cy='{py:.1f}' r='4' fill='{colour}'/>")
        parts.append(f"<rect x='{left + 20}' y='{y(60) + 24 * i:g}' width='14' height='4' fill='{colour}'/>")
        parts.append(text(left + 42, y(60) + 24 * i + 6, f"trained with {method['label']}", 13, "start"))
    return svg(width, height, "Accuracy over sparsity", parts)


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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch = next(need for need in project["dependencies"] if need.startswith("torch"))
    return {
        "accuracy.svg": accuracy(json.loads((DATA / "mnist.json").read_text())),
        "python.svg": badge("Python", project["requires-python"].replace(">=", "") + " or later"),
        "torch.svg": badge("torch", torch.removeprefix("torch>=") + " or later"),
        "licence.svg": badge("licence", project["license"]),
    }


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, content in pictures().items():
        (IMAGES / name).write_text(content)
        print(f"docs/images/{name}")
