"""The pictures that tools/site/figures.py draws are up to date, every picture is on a page, and README quotes the same numbers."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools" / "site"))

import figures  # noqa: E402


def test_pictures_are_up_to_date() -> None:
    drawn = figures.pictures()
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert [path.name for path in figures.IMAGES.iterdir() if path.name not in pages] == [], "a picture that no page shows"
    for name, content in drawn.items():
        assert (figures.IMAGES / name).read_text() == content, f"run python tools/site/figures.py: {name}"


def test_pictures_are_well_formed_and_load_nothing() -> None:
    for name, content in figures.pictures().items():
        root = ElementTree.fromstring(content)
        assert root.tag == "{http://www.w3.org/2000/svg}svg", name
        assert "http" not in content.replace("http://www.w3.org/2000/svg", ""), name


def test_the_table_of_the_readme_is_what_was_measured() -> None:
    methods = json.loads((figures.DATA / "mnist.json").read_text())["methods"].values()
    table = (ROOT / "README.md").read_text().replace("**", "")
    for row, first in next(iter(methods))["summary"]["tuned"].items():
        assert first["std"] is not None
        found = [method["summary"]["tuned"][row] for method in methods]
        cells = " | ".join(f"{of['mean']:.1f} ± {of['std']:.1f}" for of in found)
        assert f"| {row} | {cells} |" in table


def test_the_curve_is_at_the_measured_heights() -> None:
    """100 % is 244 units of the picture above 0 %, by the grid lines."""
    report = json.loads((figures.DATA / "mnist.json").read_text())
    picture = figures.accuracy(report)
    grid = {int(m[2]): float(m[1]) for m in re.finditer(r"y2='([\d.]+)' stroke='#e3e3e3'/>\n<text[^>]*>(\d+) %", picture)}
    heights = [float(y) for y in re.findall(r"cy='([\d.]+)'", picture)]
    rows = [row for row in report["methods"]["sgd"]["summary"]["tuned"] if ":" not in row]
    values = [method["summary"]["tuned"][row]["mean"] for method in report["methods"].values() for row in rows]
    assert len(heights) == len(values) == 18
    for height, value in zip(heights, values, strict=True):
        assert abs((grid[0] - height) / (grid[0] - grid[100]) * 100 - value) < 0.05
