"""The cases of bench_*.py for pytest-benchmark (extra: dev), without peers: `pytest benchmarks/test_ops.py -k "restore_sgd_ and BERT"`."""

import pytest

from benchmarks import bench_adam, bench_nm, bench_norm, bench_perturb, bench_restore, bench_sgd, bench_topk
from benchmarks.measure import Contest, Setup
from benchmarks.run import Case

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install 'cram_kernels[dev]'")
CASES = [
    case for bench in (bench_topk, bench_nm, bench_perturb, bench_restore, bench_sgd, bench_adam, bench_norm) for case in bench.cases()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_op(benchmark, case: Case) -> None:
    contest = case.build(Setup())
    assert isinstance(contest, Contest)
    contest.check()
    ours = contest.contestants[0]

    def setup() -> None:
        ours.reset()

    benchmark.extra_info |= contest.describe()
    benchmark.pedantic(ours.run, setup=setup, rounds=contest.rounds, warmup_rounds=1)
