"""The pictures that tools/site/figures.py draws are up to date, every picture is on a page, and the pages quote what was measured."""

import json
import re
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tools" / "site"), str(ROOT)]

import bench_tables  # noqa: E402
import figures  # noqa: E402
import gpu_model_table  # noqa: E402
import inference_table  # noqa: E402
import pytest  # noqa: E402
import study_tables  # noqa: E402

from benchmarks.measure import ROUNDS  # noqa: E402


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
    report = json.loads((figures.DATA / "mnist.json").read_text())
    methods = report["methods"].values()
    table = (ROOT / "README.md").read_text().replace("**", "")
    of, on = report["versions"], report["machine"]
    measured = f"`cram_kernels` {of['cram_kernels']} and torch {of['torch'].split('+')[0]} on {on['cores']} cores of a CPU with "
    assert measured + on["cpu"].replace("AVX", "AVX-") in table
    for row, first in next(iter(methods))["summary"]["tuned"].items():
        assert first["std"] is not None
        found = [method["summary"]["tuned"][row] for method in methods]
        cells = " | ".join(f"{of['mean']:.1f} ± {of['std']:.1f}" for of in found)
        assert f"| {row} | {cells} |" in table


def test_tables_of_sparse_inference_are_those_of_the_record() -> None:
    runs, text = json.loads(inference_table.RECORD.read_text()), inference_table.PAGE.read_text()
    assert inference_table.filled(text, runs) == text, "run python tools/site/inference_table.py"
    assert len({run["cpu"] for run in runs}) == 1 and [run["threads"] for run in runs] == [1, 2]
    one = [case["ratio"] for case in runs[0]["cases"]["linear"] if case["input"][0] == 128 and case["sparsity"] == "0.9"]  # a cell by hand
    assert len(one) == 3 and re.search(rf"^\| Linear, 128 rows \|[^|]*\|[^|]*\| {sorted(one)[1]:.2f} \|", text, re.M)


def test_the_table_of_the_gpu_model_is_that_of_its_record() -> None:
    record, text = json.loads(gpu_model_table.RECORD.read_text()), gpu_model_table.PAGE.read_text()
    assert gpu_model_table.filled(text, record) == text, "run python tools/site/gpu_model_table.py"
    assert gpu_model_table.table(record) in text


def test_tables_of_bench_are_those_of_the_record() -> None:
    record = json.loads(bench_tables.RECORD.read_text())
    assert record["quick"] is False and record["red"] == []
    for page in bench_tables.PAGES:
        text = page.read_text()
        assert bench_tables.filled(text, record) == text, f"run python tools/site/bench_tables.py: {page.name}"
        assert bench_tables.machine(record) in text and re.findall(r"bench: (\w+) -->\n(?=<!-- end)", text) == []
    charts = [(figures.IMAGES / f"bench-{name}.svg").read_text() for name in ("parts", "growth", "roofline")]
    assert all(record["environment"]["CPU"] in chart and "quick" not in chart for chart in charts)
    (step,) = (result for result in record["results"] if result["case"] == "step ResNet-50 SGD 90 % fp32")  # one cell by hand
    ours, other = (next(row["rounds_ms"] for row in step["rows"] if row["name"] == name) for name in ("cram_kernels", "published"))
    times = statistics.median(b / a for a, b in zip(ours, other, strict=True))
    (cells,) = re.findall(r"^\| the published algorithm, over `cram_kernels` \|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    assert cells.split("|")[1].strip() == f"{times:.0f} x"


def test_the_record_is_of_a_whole_run_of_a_commit() -> None:
    """Rounds enough to tell two runs apart, a known duration, and no change that is in no commit."""
    record = json.loads(bench_tables.RECORD.read_text())
    own = [(result["case"], row) for result in record["results"] for row in result["rows"] if row["ours"]]
    assert len(own) > 30 and [(case, row["name"]) for case, row in own if len(row["rounds_ms"]) < ROUNDS] == []
    assert re.fullmatch(r"[0-9a-f]{7,40}", record["environment"]["commit"]) and record["not_measured"] == [] and record["seconds"] > 60


def study(name: str) -> dict[tuple[str, ...], str]:
    """(method, "not pruned" or pattern, repair, if any) -> mean and sample standard deviation, as pages write them."""
    values: dict[tuple[str, ...], list[float]] = {}
    for run in json.loads((figures.DATA / f"{name}.json").read_text())["runs"]:
        values.setdefault((run["label"], "not pruned"), []).append(run["dense"])
        if "dense_tuned" in run:
            values.setdefault((run["label"], "not pruned", "batch norm tuned"), []).append(run["dense_tuned"])
        for pattern, states in run["pruned"].items():
            for state, value in states.items():
                values.setdefault((run["label"], pattern, state), []).append(value)
    assert {len(of) for of in values.values()} <= {2, 3, 5}
    digits = study_tables.DIGITS.get(name, 1)
    return {key: f"{statistics.fmean(of):.{digits}f} ± {statistics.stdev(of):.{digits}f}" for key, of in values.items()}


def corrupted_cells() -> dict[tuple[str, str], list[str]]:
    """(method, state of the network) -> cells of the table of corruptions, as counted here."""
    cells: dict[tuple[str, str], list[list[float]]] = {}
    kinds = list(study_tables.CORRUPTIONS.values())
    for run in json.loads((figures.DATA / "emoji-corrupted.json").read_text())["runs"]:
        for state, found in run["corrupted"].items():
            assert found.keys() == {name for names in kinds for name in names} and len(found) == 15
            assert {severity for of in found.values() for severity in of} == {"3"}
            parts = [[found[name]["3"] for name in names] for names in (found, *kinds)]
            first = run["pruned"][state[:4]][state[6:]] if state[:5] == "90 %," else run["dense" if state == "dense" else "dense_tuned"]
            cells.setdefault((run["label"], state), []).append([first, *(sum(values) / len(values) for values in parts)])
    spread = {key: [(statistics.fmean(of), statistics.stdev(of)) for of in zip(*runs, strict=True)] for key, runs in cells.items()}
    assert {len(runs) for runs in cells.values()} == {3}
    return {key: [f"{mean:.1f} ± {std:.1f}" for mean, std in of] for key, of in spread.items()}


def measured_accuracies() -> set[str]:
    """Of every method, pattern and repair."""
    methods = json.loads((figures.DATA / "mnist.json").read_text())["methods"].values()
    cells = (of for method in methods for rows in method["summary"].values() for of in rows.values() if of["std"] is not None)
    studies = ("bbc-study", *re.findall(r"<!-- results: (\S+) -->", (ROOT / "docs" / "results.md").read_text()))
    known = [*(study(name).values() for name in studies), *corrupted_cells().values()]
    return {f"{of['mean']:.1f} ± {of['std']:.1f}" for of in cells}.union(*known)


def table_of(page: str, first: str, which: int = 1) -> list[list[str]]:
    """The cells of the first or another table whose head begins with `first`, head included."""
    lines = (ROOT / "docs" / page).read_text().split(f"\n| {first} |")[which].split("\n\n")[0]
    rows = f"| {first} |{lines}".splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in (rows[0], *rows[2:])]


def test_the_table_of_corruptions_is_that_of_the_record() -> None:
    known, label = corrupted_cells(), ""
    head, *rows = table_of("results.md", "trained with | network")
    assert head[2:] == ["as they are", "all corruptions", *study_tables.CORRUPTIONS] and len(rows) == len(known)
    for trained, state, *cells in rows:
        label = trained or label
        assert cells == known[label, state], (label, state)


@pytest.mark.parametrize("record", study_tables.COLUMNS)
def test_tables_of_the_studies_are_those_of_the_records(record: str) -> None:
    """As the script makes them, and each cell as counted here."""
    for page in study_tables.PAGES:
        text = page.read_text()
        assert study_tables.filled(text) == text, f"run python tools/site/study_tables.py: {page.name}"
    known, labels = study(record), study_tables.COLUMNS[record]
    text = (ROOT / "docs" / "when-it-pays.md").read_text().split(f"<!-- advice: {record} -->\n\n")[1].split("\n\n<!-- end -->")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert head == ["pruned to", "repaired by", *labels] and {key[0] for key in known} == set(labels.values())
    states, seen = {repair: state for state, repair in study_tables.REPAIRS.items()}, 0
    for pattern, repair, *cells in rows:
        key = (pattern, states[repair]) if repair else (pattern,)
        wanted = [known.get((label, *key), "") for label in labels.values()]
        assert cells == wanted, (pattern, repair)
        seen += len([cell for cell in wanted if cell])
    assert seen == len([key for key in known if not study_tables.RESULTS_ONLY.get(record, set()) & set(key)])


def test_the_table_of_transfer_is_that_of_the_record() -> None:
    text = (ROOT / "docs" / "results.md").read_text()
    assert study_tables.filled(text) == text, "run python tools/site/study_tables.py"
    known = {label: value for (label, state, *repair), value in study("transfer").items() if state == "not pruned" and not repair}
    _, *rows = table_of("results.md", "trained with | runs | as trained")
    assert len(rows) == 6 and {label: value for label, runs, value in rows if runs == "5"} == known


def test_accuracies_have_a_spread_and_were_measured() -> None:
    """On the pages that give advice no mean stands alone, and the number of seeds is said; what they quote is in docs/data/."""
    known = measured_accuracies()
    for name in ("README.md", "CHANGELOG.md", "docs/when-it-pays.md", "docs/results.md", "docs/pruning.md"):
        text = re.sub(r"<!-- bench: .*?<!-- end -->", "", (ROOT / name).read_text().replace("**", ""), flags=re.DOTALL)  # times
        quoted = re.findall(r"\d+\.\d+ ± \d+\.\d+", text)
        assert quoted and [value for value in quoted if value not in known] == [], name
        alone = re.findall(r"\b[1-9]\d\.\d\b", re.sub(r"\d+\.\d+ ± \d+\.\d+", "", text))
        assert name in ("README.md", "docs/results.md") or alone == [], (name, alone)
        assert re.search(r"[35] seeds|(three|five) seeds", text, re.I), name


def heights_of(picture: str) -> list[float]:
    """The values of a picture's points, by its grid lines."""
    grid = {int(m[2]): float(m[1]) for m in re.finditer(r"y2='([\d.]+)' stroke='#e3e3e3'/>\n<text[^>]*>(\d+) %", picture)}
    return [(grid[0] - float(y)) / (grid[0] - grid[100]) * 100 for y in re.findall(r"cy='([\d.]+)'", picture)]


def test_the_curve_is_at_the_measured_heights() -> None:
    report = json.loads((figures.DATA / "mnist.json").read_text())
    heights = heights_of(figures.accuracy(report))
    rows = [row for row in report["methods"]["sgd"]["summary"]["tuned"] if ":" not in row]
    values = [method["summary"]["tuned"][row]["mean"] for method in report["methods"].values() for row in rows]
    assert len(heights) == len(values) == 18
    assert heights == pytest.approx(values, abs=0.05)


def test_the_curves_of_the_studies_are_at_the_measured_heights() -> None:
    """Of Fashion-MNIST: dense, 80, 90 and 95 %, each method with batch norms tuned and reconstructed."""
    runs = json.loads((figures.DATA / "fashion-study.json").read_text())["runs"]
    wanted = []
    for method in ("sgd-twice", "cram", "split-twice"):
        own = [run for run in runs if run["run"].rsplit("-", 1)[0] == method]
        assert len(own) == 5
        for repair in ("batch norm tuned", "dense tuned, reconstructed"):
            wanted.append(statistics.fmean(run["dense_tuned"] for run in own))
            wanted += [statistics.fmean(run["pruned"][share][repair] for run in own) for share in ("80 %", "90 %", "95 %")]
    assert heights_of(figures.pictures()["fashion.svg"]) == pytest.approx(wanted, abs=0.05)
