"""`make bench` and `bench compare`: what a quick run writes, the statistics against scipy, and the clock of a simulated GPU."""

import itertools
import json
import math
import random
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cram_kernels import cli, ops
from cram_kernels.backend import why_missing

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import bench_topk, compare, end_to_end, measure, report, run, shapes, suite  # noqa: E402
from benchmarks.measure import Contestant, Setup  # noqa: E402

pytestmark = pytest.mark.skipif(why_missing("cpu") is not None, reason=f"the cpu backend cannot run here: {why_missing('cpu')}")


def bench(folder: Path, *options: str) -> int:
    return cli.main(["bench", "--quick", "--threads", str(torch.get_num_threads()), "--out", str(folder), *options])


def test_two_generations_of_a_processor_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(family: int, model: int) -> str:
        core = f"vendor_id\t: AuthenticAMD\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\nflags\t\t: fpu\n\n"
        monkeypatch.setattr(report.Path, "read_text", lambda path: core * 2)
        return report.processor()

    assert (told(25, 17), told(26, 2)) == ("AMD EPYC (family 25, model 17)", "AMD EPYC (family 26, model 2)")


def test_cases_cover_what_they_should() -> None:
    names = [case.name for case in suite.cases()]
    assert len(set(names)) == len(names)
    for model in ("ResNet-50", "BERT-base", "ViT-B"):
        assert f"training step {model}" in names
        for op in ("perturb_topk_ {} 50 %", "perturb_topk_ {} 90 %", "perturb_nm_ {} 2:4", "restore_sgd_ {}", "restore_adam_ {}"):
            assert op.format(model) in names
    assert {"step BERT-base AdamW 90 % fp32", "step ViT-B AdamW 90 % fp32"} <= set(names)
    assert {f"host time {base}, {count} tensors" for base in ("SGD", "AdamW") for count in (4, 161)} <= set(names)
    assert any("bf16" in name for name in names) and any(shapes.BILLION in name for name in names)


def test_quick_run_writes_record_table_and_charts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for chosen in ("90 % by weights", "training step ResNet-50", "step BERT-base AdamW 90 % fp32", "host time AdamW, 4 tensors"):
        assert bench(tmp_path, "--only", chosen) == run.OK, capsys.readouterr().out
        record = json.loads((tmp_path / "suite.json").read_text())
        (result,) = [result for result in record["results"] if result["case"].endswith(chosen)]
        assert {"CPU", "threads", "torch", "caches", "free memory", "load average", "commit", "date"} <= record["environment"].keys()
        assert all(len(row["rounds_ms"]) == 2 and min(row["rounds_ms"]) == pytest.approx(row["min_ms"], rel=1e-4) for row in result["rows"])
        assert (
            0 < record["seconds"] < 600 and f"cram_kernels {record['environment']['cram_kernels']}," in (tmp_path / "suite.txt").read_text()
        )
        assert result["case"] in (tmp_path / "suite.txt").read_text() and result["case"] in capsys.readouterr().out
    for chart in ("parts", "growth", "roofline"):
        assert ElementTree.parse(tmp_path / f"{chart}.svg").getroot().tag.endswith("svg")
    assert "cram_kernels" in (tmp_path / "parts.svg").read_text()  # text is text, that a reader can select


def test_the_page_shows_host_time_once_the_record_has_it(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools" / "site"))
    import bench_tables

    page = "before\n<!-- bench: host -->\n\n\n\n<!-- end -->\nafter\n"
    assert bench_tables.filled(page, {"results": []}) == page
    assert bench(tmp_path, "--only", "host time SGD, 4 tensors") == run.OK
    record = json.loads((tmp_path / "suite.json").read_text())
    ours, fused = record["results"][0]["rows"]
    filled = bench_tables.filled(page, record)
    assert f"| SGD, 4 tensors | {ours['median_ms']:.3f} |" in filled and f"| {ours['calls']} | {fused['calls']} |" in filled
    assert bench_tables.filled(filled, record) == filled and bench_tables.filled(filled, {"results": []}) == page
    (case,) = {case for case, _ in compare.samples(record, all_rows=False)}  # in times of torch's fused step
    (values,) = compare.samples(record, all_rows=False).values()
    assert case == "host time SGD, 4 tensors" and values == [a / b for a, b in zip(ours["rounds_ms"], fused["rounds_ms"], strict=True)]


def test_a_slow_peer_may_stop_earlier() -> None:
    runs: Counter[str] = Counter()
    contestants = [Contestant(name, lambda name=name: runs.update([name]), rounds=rounds) for name, rounds in (("a", None), ("b", 2))]
    times = measure.interleave(contestants, 5, "cpu")
    assert runs == {"a": 6, "b": 3} and {name: len(own) for name, own in times.items()} == {"a": 5, "b": 2}
    assert measure.ratio([3.0, 8.0], [1.0, 2.0, 100.0]) == 3.5


def test_parts_of_a_training_step_are_the_whole() -> None:
    made = end_to_end.EndToEnd("BERT-base", Setup(quick=True))
    made.check()
    for training in made.trainings.values():
        spent = training.step()
        assert spent.keys() == {"forward", "backward", "optimizer"} and min(spent.values()) > 0
    assert {kind: len(training.halves) for kind, training in made.trainings.items() if len(training.halves) != 2} == {"SGD": 1}
    seen = {kind: [len(training.batch[share]) for share in training.shares] for kind, training in made.trainings.items()}
    assert seen.pop("half") == [2, 1] and seen.pop("split") == [1, 1] and set(map(tuple, seen.values())) == {(2, 2)}


def test_other_weights_after_a_training_step_are_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.restore_sgd_

    def wrong(params, *args, **kwargs):
        right(params, *args, **kwargs)
        params[0].data.add_(1)

    monkeypatch.setattr(ops, "restore_sgd_", wrong)
    assert bench(tmp_path, "--only", "training step ViT-B") == run.RED
    assert "are not ours after a step" in json.loads((tmp_path / "suite.json").read_text())["red"][0]["why"]


def test_prune_of_torch_is_a_peer_that_prunes_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench(tmp_path, "--only", "prune_topk_ ResNet-50", "--json") == run.OK
    record = json.loads(capsys.readouterr().out)  # nothing else is printed
    assert "torch.nn.utils.prune" in [row["name"] for row in record["results"][0]["rows"]]
    right = bench_topk.GlobalUnstructured
    monkeypatch.setattr(bench_topk, "GlobalUnstructured", lambda weights, amount: right(weights, amount - 0.01))
    assert bench(tmp_path, "--only", "prune_topk_ ResNet-50") == run.RED
    assert "are pruned by one of both only" in capsys.readouterr().out


def test_what_does_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = run.Case("large", lambda setup: pytest.fail("was built"), memory=10**12)
    monkeypatch.setattr(run, "free_memory", lambda device: 10**9)
    assert run.main("test", [case], ["--out", str(tmp_path)]) == run.OK
    found = json.loads((tmp_path / "test.json").read_text())["not_measured"]
    assert found == [{"case": "large", "why": "it needs 1000 GB of memory, and 1 are free"}]


def test_the_list_of_a_billion_fits_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "free_memory", lambda device: 10**13)
    whole = shapes.billion("cpu")
    assert 1.0e9 < shapes.numel(whole) < 1.2e9 and len(whole) == 3 + 22 * 9
    for gigabytes in (30, 60):
        monkeypatch.setattr(shapes, "free_memory", lambda device, bytes=gigabytes * 10**9: bytes)
        fitting = shapes.billion("cpu")
        assert len(fitting) < len(whole) and shapes.numel(fitting) * shapes.PEAK <= gigabytes * 10**9 // 2
    assert shapes.free_memory("cpu") > 10**6


@pytest.mark.parametrize("sizes", [(5, 7), (15, 15), (2, 2)])
def test_p_values_are_those_of_scipy(sizes: tuple[int, int]) -> None:
    from scipy.stats import mannwhitneyu

    draw = random.Random(0)
    for shift in (0, 0.5, 3):
        a, b = ([draw.gauss(mean, 1) for _ in range(n)] for mean, n in zip((0, shift), sizes, strict=True))
        assert compare.p_value(a, b) == pytest.approx(mannwhitneyu(a, b, method="exact").pvalue, rel=1e-9)


def test_p_value_with_ties_by_brute_force() -> None:
    """Every way to choose the first sample's places; the statistic counts pairs, half for a tie."""
    a, b = [1.0, 2.0, 2.0, 3.0], [2.0, 3.0, 4.0, 4.0, 5.0]

    def wins(x: list[float], y: list[float]) -> float:
        return abs(sum((p > q) + (p == q) / 2 for p in x for q in y) - len(x) * len(y) / 2)

    pooled = a + b
    ways = [
        wins([pooled[i] for i in chosen], [pooled[i] for i in range(9) if i not in chosen])
        for chosen in itertools.combinations(range(9), 4)
    ]
    assert compare.p_value(a, b) == pytest.approx(sum(w >= wins(a, b) for w in ways) / len(ways))
    assert compare.p_value([1.0] * 5, [1.0] * 5) == 1


def test_holm_is_the_textbook() -> None:
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_cases_of_too_few_rounds_are_left_out_as_tarone_does() -> None:
    """The textbook by brute force: K is the smallest number for which at most K comparisons have a least p-value under 5 % / K."""
    draw = random.Random(0)
    assert compare.least_p(3, 3) == compare.p_value([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == pytest.approx(0.1)
    for _ in range(50):
        sizes = [(draw.randint(2, 9), draw.randint(2, 9)) for _ in range(draw.randint(1, 30))]
        least = [compare.p_value([float(i) for i in range(a)], [float(i) for i in range(a, a + b)]) for a, b in sizes]
        numbers = [k for k in range(1, len(sizes) + 1) if sum(p < 0.05 / k for p in least) <= k]
        assert compare.able(sizes) == [p < 0.05 / numbers[0] for p in least]
    assert compare.able([(3, 3)] * 5) == [False] * 5 and compare.able([]) == []


def test_every_case_of_the_suite_has_rounds_enough() -> None:
    """Two whole runs can tell in every case: no verdict is "cannot tell"."""
    comparisons = len(list(suite.cases())) + 4 * len([case for case in suite.cases() if "dtypes" in case.name or "weights" in case.name])
    assert compare.rounds_for(comparisons) <= measure.ROUNDS
    texts = {path.name: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    fixed = [(name, int(n)) for name, text in texts.items() for n in re.findall(r"(?:rounds(?:: int)? ?= ?|how_often\()(\d+)", text)]
    assert len(fixed) > 4 and [(name, n) for name, n in fixed if n < measure.ROUNDS] == []


def test_a_planted_slow_down_of_two_is_found_where_there_are_rounds_enough(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Times as they are on a busy machine: spread of 15 %, now and then a time of twice as much. What has 3 or 5 rounds cannot be told, and
    is said to be so; it is neither slower nor as fast as before."""
    draw = random.Random(2)
    sizes = {f"{kind} {rounds}": rounds for rounds in (3, 5, 7, 15) for kind in ("slow", *(f"same{i}" for i in range(9)))}

    def run_of(factor: float) -> dict[str, Any]:
        found: dict[str, Any] = {"environment": {"CPU": "x"}, "results": []}
        for case, rounds in sizes.items():
            copy = [draw.uniform(1, 1.3) for _ in range(rounds)]
            times = [2 * c * draw.gauss(1, 0.15) * (1 + (draw.random() < 0.03)) for c in copy]
            own = [t * (factor if case.startswith("slow") else 1) for t in times]
            found["results"] += record({case: own}, copy)["results"]
        return found

    verdicts: dict[str, Counter[str]] = {name: Counter() for name in ("slow 3", "slow 5", "slow 7", "slow 15")}
    others: Counter[str] = Counter()
    for _ in range(40):
        for path, factor in zip((tmp_path / "a.json", tmp_path / "b.json"), (1, 2), strict=True):
            path.write_text(json.dumps(run_of(factor)))
        cli.main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json"])
        for row in json.loads(capsys.readouterr().out):
            name = row["case"].partition(",")[0]
            assert (row["verdict"] == "cannot tell") == (row["p"] is None) == (row["rounds"][0] < 7)
            (verdicts[name] if name in verdicts else others)[row["verdict"]] += 1
    assert verdicts["slow 3"] == verdicts["slow 5"] == {"cannot tell": 40}
    assert verdicts["slow 15"] == {"slower": 40} and verdicts["slow 7"]["slower"] >= 20, verdicts
    assert others["slower"] + others["faster"] <= 6, others  # 5 % of 40 runs, and three standard deviations more
    assert cli.main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == compare.SLOWER
    assert "20 cannot tell. To tell all of them, measure both with --rounds 7." in capsys.readouterr().out


def test_pure_noise_is_noise() -> None:
    """Of 300 pairs of runs without any difference, at most 5 % have a verdict of slower or faster in any of their cases."""
    draw = random.Random(3)
    wrong = 0
    for _ in range(300):
        a, b = ({(f"case {i}", ""): [draw.lognormvariate(0, 0.2) for _ in range((3, 7, 15)[i % 3])] for i in range(12)} for _ in range(2))
        wrong += any(row["verdict"] in ("slower", "faster") for row in compare.compared(a, b, least=0))
    assert wrong <= 0.05 * 300 + 3 * math.sqrt(0.05 * 0.95 * 300)


def test_training_steps_are_judged_over_plain_sgd(tmp_path: Path) -> None:
    """A machine that is twice as slow is no regression; nor is the published algorithm judged, which has fewer rounds."""
    rows = [
        {"name": "cram_kernels", "ours": True, "median_ms": 2.0, "rounds_ms": [2.0, 2.2, 2.1]},
        {"name": "published", "ours": False, "median_ms": 9.0, "rounds_ms": [9.0, 9.9]},
        {"name": "SGD", "ours": False, "median_ms": 1.0, "rounds_ms": [1.0, 1.1, 1.0]},
    ]
    found = {"results": [{"case": "training step X", "rows": rows}]}
    assert compare.samples(found, all_rows=False) == {("training step X", "cram_kernels"): pytest.approx([2.0, 2.0, 2.1])}
    assert compare.samples(found, all_rows=True)["training step X", "published"] == pytest.approx([9.0, 9.0])


def test_the_optimizer_of_a_training_step_is_judged_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Ten times as slow an optimizer is lost in the noise of the passes, and found beside them."""
    draw = random.Random(4)
    for name, factor in (("a", 1), ("b", 10)):
        sgd, ours, part = ([scale * draw.uniform(1, 1.2) for _ in range(7)] for scale in (100, 200, 0.1 * factor))
        rows = [
            {"name": "SGD", "ours": False, "median_ms": 110.0, "rounds_ms": sgd, "optimizer_rounds_ms": sgd},
            {"name": "cram_kernels", "ours": True, "median_ms": 220.0, "rounds_ms": ours, "optimizer_rounds_ms": part},
        ]
        (tmp_path / name).write_text(json.dumps({"environment": {}, "results": [{"case": "training step X", "rows": rows}]}))
    assert cli.main(["bench", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == compare.SLOWER
    verdicts = {row["name"]: row["verdict"] for row in json.loads(capsys.readouterr().out)}
    assert verdicts == {"cram_kernels": "within noise", "cram_kernels, optimizer": "slower"}


def test_what_is_gone_or_red_is_as_bad_as_slower(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    times = [1.0 + i / 100 for i in range(7)]
    whole, less = (record(dict.fromkeys(names, times), times) for names in (("kept", "lost", "wrong"), ("kept",)))
    for name, found in (("a", whole), ("b", less | {"red": [{"case": "wrong", "why": "one bit differs"}]})):
        (tmp_path / name).write_text(json.dumps(found))
    files = [str(tmp_path / name) for name in ("a", "b")]
    assert cli.main(["bench", "compare", *files]) == compare.SLOWER
    told = capsys.readouterr().out
    assert re.search(r"lost, 10 weights\s+cram_kernels\s.*gone", told) and re.search(r"wrong\s+one bit differs\s.*red", told)
    assert "0 slower, 0 faster, 1 within noise, 0 cannot tell, 1 gone, 1 red." in told
    assert cli.main(["bench", "compare", *files, "--json"]) == compare.SLOWER
    assert [row["verdict"] for row in json.loads(capsys.readouterr().out)] == ["within noise", "gone", "red"]
    assert cli.main(["bench", "compare", *reversed(files)]) == compare.OK  # what A did not measure is no loss
    (tmp_path / "b").write_text(json.dumps(less | {"results": [], "red": [{"case": "kept", "why": "one bit differs"}]}))
    assert cli.main(["bench", "compare", *files]) == compare.SLOWER


ROW = {"name": "copy_", "ours": True, "median_ms": 1.0, "rounds_ms": [1.0, 2.0]}


@pytest.mark.parametrize(
    "content",
    [
        "nonsense",
        "[]",
        "3",
        "{}",
        json.dumps({"results": []}),
        json.dumps({"environment": {}, "results": {}}),
        json.dumps({"environment": {}, "results": [3]}),
        json.dumps({"environment": {}, "results": [{"case": "x", "rows": 3}]}),
        json.dumps({"environment": {}, "results": [{"case": "x", "rows": [{"name": "x"}, ROW, ROW]}]}),
        json.dumps({"environment": {}, "results": [{"case": "x", "rows": [ROW, ROW | {"name": "x", "rounds_ms": ["1", "2"]}]}]}),
        json.dumps({"environment": {}, "results": [{"case": "x", "rows": [ROW, ROW | {"name": "x", "rounds_ms": [0, math.nan]}]}]}),
        json.dumps({"environment": {}, "results": [], "red": [3]}),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, content: str) -> None:
    (tmp_path / "a").write_text(json.dumps(record({"x": [1.0] * 7}, [1.0] * 7)))
    (tmp_path / "b").write_text(content)
    for files in (("a", "b"), ("b", "a")):
        assert cli.main(["bench", "compare", *(str(tmp_path / name) for name in files)]) == compare.CANNOT
        assert re.match(r"compare: both files must (be records of a benchmark|have a case in common).*, got .", capsys.readouterr().err)


@pytest.mark.parametrize("least", ["nan", "-1", "inf", "x"])
def test_a_share_that_is_none_is_refused(least: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", "compare", "a", "b", f"--least={least}"])
    assert left.value.code == compare.CANNOT and f"must be a share of 0 or more, 0.03 for 3 %, got '{least}'" in capsys.readouterr().err


def test_a_planted_slow_down_is_found_in_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that sleeps for twice its time besides is slower; and records of --quick, of two rounds each, tell nothing."""
    case = ("--only", "restore_sgd_ ViT-B")
    assert bench(tmp_path / "a", *case, "--rounds", "9") == run.OK
    (result,) = json.loads((tmp_path / "a" / "suite.json").read_text())["results"]
    right, pause = ops.restore_sgd_, 2e-3 * result["rows"][0]["median_ms"]

    def slow(*args: Any, **kwargs: Any) -> None:
        right(*args, **kwargs)
        time.sleep(pause)

    monkeypatch.setattr(ops, "restore_sgd_", slow)
    assert bench(tmp_path / "b", *case, "--rounds", "9") == run.OK
    capsys.readouterr()
    files = [str(tmp_path / name / "suite.json") for name in ("a", "b")]
    assert cli.main(["bench", "compare", *files]) == compare.SLOWER
    assert "B compared with A: 1 slower, 0 faster, 0 within noise, 0 cannot tell." in capsys.readouterr().out
    for name in ("a", "b"):
        assert bench(tmp_path / name, *case) == run.OK
    assert cli.main(["bench", "compare", *files]) == compare.CANNOT
    assert "a case must have 4 rounds in both files to be told from noise, got fewer" in capsys.readouterr().err


def record(times: dict[str, list[float]], copy: list[float]) -> dict[str, Any]:
    rows = [{"name": "cram_kernels", "ours": True}, {"name": "copy_", "ours": False}]
    results = [
        {
            "case": case,
            "weights": 10,
            "rows": [row | {"rounds_ms": t, "median_ms": sorted(t)[len(t) // 2]} for row, t in zip(rows, (own, copy), strict=True)],
        }
        for case, own in times.items()
    ]
    return {"environment": {"CPU": "x", "load average": copy[0]}, "results": results}


def test_regressions_are_told_from_noise(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The second run's machine is twice as slow, copies too; one case is 10 % slower besides, one 20 % faster, 18 are as before."""
    draw = random.Random(1)

    def rounds(factor: float) -> tuple[list[float], list[float]]:
        copy = [factor * draw.uniform(1, 1.2) for _ in range(15)]
        return copy, copy

    def run_of(machine: float, change: dict[str, float]) -> dict[str, Any]:
        copy, _ = rounds(machine)
        names = ["slow", "fast", *(f"same {i}" for i in range(18))]
        return record({n: [3 * c * change.get(n, 1) * draw.gauss(1, 0.02) for c in copy] for n in names}, copy)

    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, content in zip(files, (run_of(1, {}), run_of(2, {"slow": 1.1, "fast": 0.8})), strict=True):
        path.write_text(json.dumps(content))
    assert cli.main(["bench", "compare", *map(str, files), "--json"]) == compare.SLOWER
    found = {row["case"].partition(",")[0]: row for row in json.loads(capsys.readouterr().out)}
    assert {name for name, row in found.items() if row["verdict"] != "within noise"} == {"slow", "fast"}
    assert found["slow"]["verdict"] == "slower" and found["slow"]["low"] < 1.1 < found["slow"]["high"]
    assert found["fast"]["verdict"] == "faster" and math.isclose(found["fast"]["ratio"], 0.8, rel_tol=0.05)
    assert cli.main(["bench", "compare", str(files[0]), str(files[0])]) == compare.OK
    assert "0 slower, 0 faster, 20 within noise, 0 cannot tell." in capsys.readouterr().out
    assert cli.main(["bench", "compare", str(files[0]), str(tmp_path / "none.json")]) == compare.CANNOT
    files[1].write_text(json.dumps(record({"another": [1.0] * 15}, [1.0] * 15)))
    assert cli.main(["bench", "compare", *map(str, files)]) == compare.CANNOT
    assert "got none" in capsys.readouterr().err


class Gpu:
    """A GPU with one queue, and a host whose calls take their time: what torch.cuda's functions do to two clocks, in clock cycles."""

    def __init__(self, host: int, device: int, waits: bool = False) -> None:
        self.now, self.free, self.host, self.device, self.waits = 0, 0, host, device, waits

    def queue(self, cycles: int) -> int:
        self.free = max(self.free, self.now) + cycles
        return self.free

    def run(self) -> None:
        """Three kernels; the host needs a third of its time before each."""
        for _ in range(3):
            self.now += self.host // 3
            done = self.queue(self.device // 3)
        if self.waits:
            self.now = max(self.now, done)

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)

    def event(self, enable_timing: bool) -> Any:
        made = SimpleNamespace(at=0)
        made.record = lambda: setattr(made, "at", self.queue(0))
        made.query = lambda: self.now >= made.at
        made.elapsed_time = lambda last: 1e3 * (last.at - made.at)
        return made


@pytest.mark.parametrize("host", [3_000, 3_000_000, 90_000_000])
def test_the_host_is_no_part_of_a_time_on_a_gpu(host: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 300,000 cycles on the GPU takes them, however long the host needs to queue it; one that waits for the GPU is marked."""
    for waits in (False, True):
        gpu = Gpu(host, 300_000, waits)
        fake = SimpleNamespace(
            Event=gpu.event,
            synchronize=gpu.synchronize,
            _sleep=gpu.queue,
            get_device_properties=lambda d: SimpleNamespace(L2_cache_size=64),
        )
        monkeypatch.setattr(measure.torch, "cuda", fake)
        monkeypatch.setattr(measure.torch, "empty", lambda size, dtype, device: torch.zeros(size, dtype=dtype))
        resets: list[int] = []
        contestant = Contestant("op", gpu.run, lambda resets=resets: resets.append(1))
        found = measure.seconds(contestant, "cuda")
        if waits:
            assert contestant.busy >= measure.MOST_BUSY and found >= 300_000
        else:
            assert found == 300_000 and contestant.busy < measure.MOST_BUSY
            assert 2 ** len(resets) * 10**6 == contestant.busy  # reset before each repetition
            before = len(resets)
            assert measure.seconds(contestant, "cuda") == 300_000 and len(resets) == before  # what it learned stays
