"""`make bench`: ops, whole steps and training steps beside their peers in one run; one JSON, one table, charts. `bench compare` judges two.

The cases are those of the other programs of this folder, as many as ten minutes on two cores allow.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cram_kernels.patterns import NM, TopK
from cram_kernels.report import table as aligned
from cram_kernels.terminal import Help

from . import bench_adam, bench_nm, bench_sgd, bench_topk, charts, compare, end_to_end, growth, host, report, run
from .measure import ROUNDS, Row, Setup
from .run import Case
from .shapes import BILLION, MODELS
from .step import GIB, MEMORY, step

EPILOG = """Examples:
  cram-kernels bench --quick
  cram-kernels bench compare before/suite.json after/suite.json

Exit status: 0; 1, a result is wrong; 2, it cannot run here, or no case has the text of --only in its name. For those of compare see
`bench compare --help`.
"""


def plain_topk(setup: Setup):
    """Without a peer, which would need more memory than the list."""
    return bench_topk.perturb_run(setup.shapes(BILLION), TopK(0.9), "fp32", setup).contest(rounds=ROUNDS)


def plain_sgd(setup: Setup):
    return bench_sgd.sgd_run(setup.shapes(BILLION), "fp32", setup).contest(rounds=ROUNDS)


def cases() -> Iterator[Case]:
    # First those that take most memory: the process gives not all of it back. benchmarks.step has the other patterns.
    for model in ("BERT-base", "ViT-B"):
        yield Case(f"step {model} AdamW 90 % fp32", partial(step, model, TopK(0.9), "AdamW"), MEMORY[model])
    yield from end_to_end.cases()
    for pattern, base, dtype in (
        (TopK(0.9), "SGD", "fp32"),
        (TopK(0.5), "SGD", "fp32"),
        (NM(2, 4), "SGD", "fp32"),
        (TopK(0.9), "AdamW", "fp32"),
        (TopK(0.9), "AdamW", "bf16"),
    ):
        compiled = (pattern, base) == (TopK(0.9), "SGD")  # compiling takes a minute
        build = partial(step, "ResNet-50", pattern, base, dtype=dtype, compiled=compiled)
        yield Case(f"step ResNet-50 {base} {pattern} {dtype}", lambda setup, build=build: build(setup=setup), MEMORY["ResNet-50"])
    for model in MODELS:
        large = (0 if model == "ResNet-50" else 5) * GIB
        for sparsity in (0.5, 0.9):
            yield Case(f"perturb_topk_ {model} {TopK(sparsity)}", partial(bench_topk.perturb, model, sparsity), large)
        yield Case(f"perturb_nm_ {model} 2:4", partial(bench_nm.perturb, model, NM(2, 4)), large)
        yield Case(f"restore_sgd_ {model}", partial(bench_sgd.sgd, model), large)
        yield Case(f"restore_adam_ {model}", partial(bench_adam.adamw, model), large)
    yield Case("perturb_topk_ ResNet-50 90 %, dtypes", bench_topk.dtypes)
    yield Case("perturb_nm_ ResNet-50 2:4, dtypes", bench_nm.dtypes)
    yield Case("restore_sgd_ ResNet-50, dtypes", bench_sgd.dtypes)
    yield Case(f"perturb_topk_ {BILLION} 90 %", plain_topk, 12 * GIB)
    yield Case(f"restore_sgd_ {BILLION}", plain_sgd, 12 * GIB)
    yield Case("topk_threshold ResNet-50 90 %", partial(bench_topk.threshold, "ResNet-50", 0.9))
    yield Case("prune_topk_ ResNet-50 90 %", partial(bench_topk.prune, "ResNet-50"))
    for op in growth.MAKE:
        yield Case(f"{op} by weights", partial(growth.by_weights, op, millions=(16, 1, 4, 64)), 4 * GIB)
    for case in host.cases():
        yield Case(f"host time {case.name}", case.build)


class Summary:
    """One line for each thing of ours that was measured, with the peers beside it in multiples of its time; and where the charts are."""

    def __init__(self, results: list[Row], charts: str = "") -> None:
        self.results, self.charts = results, charts

    def __str__(self) -> str:
        rows = []
        for result in self.results:
            copies = [row for row in result["rows"] if "copy" in row["name"]]
            peers = [row for row in result["rows"] if not row["ours"] and row not in copies]
            for row in (row for row in result["rows"] if row["ours"]):
                name = result["case"] if row["name"] == "cram_kernels" else f"{result['case']}: {row['name']}"
                told = ", ".join(f"{peer['name'].removeprefix('torch.optim.')} {peer['x_ours']:.3g}" for peer in peers)
                share = f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else ""
                rate = f"{row['gb_per_s']:.1f}" if "gb_per_s" in row else ""
                rows.append((name, f"{row['median_ms']:.4g}", f"{row['spread']:.0%}", rate, share, told))
        table = aligned(("case", "ms", "spread", "GB/s", "of copy", "peers, times of ours"), rows, "<>>>><")
        return f"{table}\n\n{self.charts}".rstrip()


def finish(record: Row, folder: Path) -> Summary:
    (folder / "suite.txt").write_text(f"{report.described(record['environment'])}\n\n{Summary(record['results'])}\n")
    return Summary(record["results"], charts.draw(record, folder))


def main(argv: list[str] | None = None, prog: str = "python -m benchmarks.suite") -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:], prog=f"{prog} compare")
    about = "Measure ops, whole steps and training steps beside their peers: ten minutes on two cores, one with --quick."
    usage = f"{prog} [option ...]\n       {prog} compare A.json B.json [option ...]"
    return run.main("suite", cases(), argv, prog, finish, usage=usage, description=about, epilog=EPILOG, formatter_class=Help)


if __name__ == "__main__":
    sys.exit(main())
