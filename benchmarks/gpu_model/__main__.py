"""`make gpu-model`: execute on the CPU, count, model, print. No GPU is used, and no figure here was measured on one."""

import argparse
import subprocess
import sys
from pathlib import Path

from .. import report as text
from ..cuda_static.cubin import ToolMissing
from ..cuda_static.gpus import CARDS
from ..cuda_static.report import RESNET50
from ..inputs import DTYPES
from . import counting, model
from .counting import Counts
from .machine import Library
from .model import Bound

OK, MISSED, CANNOT_RUN = 0, 1, 2


def per_32(number: float, counts: Counts) -> float:
    return number / counts.weights * 32


def op_row(counts: Counts, instructions: dict[str, float]) -> text.Row:
    wanted = model.formula(counts)
    on = "a quarter" if counts.weights < counts.stands_for else "all"
    row: text.Row = {"name": f"{counts.op} {counts.dtype}", "on": on, "B/weight": f"{counts.bytes:.3f}", "formula": f"{wanted:.3f}"}
    row["over"] = f"{counts.bytes / wanted - 1:+.1%}"
    row |= {f"instructions sm_{arch}": f"{own:.0f}" for arch, own in instructions.items()}
    row["of PTX"] = f"{per_32(counts.total('warp_instructions', 'all'), counts):.0f}"
    row["global requests"] = f"{per_32(counts.accesses('global', 'requests'), counts):.2f}"
    row["shared wavefronts"] = f"{per_32(counts.accesses('shared', 'wavefronts'), counts):.2f}"
    row["conflicts"] = f"{counts.conflicts:.1%}"
    row |= {"barriers": counts.total("barriers"), "global atomics": counts.total("atomics", "global"), "launches": len(counts.launches)}
    return row | {"serial us": f"{1e6 * model.serial(counts.op, counts.dtype):.1f}"}


def bound_rows(counts: Counts, bounds: dict[str, Bound]) -> list[text.Row]:
    rows = []
    for card, own in bounds.items():
        row: text.Row = {"name": f"{counts.op} {counts.dtype}", "card": card}
        row |= {f"{part} us": f"{1e6 * seconds:.1f}" for part, seconds in own.parts.items()}
        row |= {"launches us": f"{1e6 * own.launches:.1f}", "serial us": f"{1e6 * own.serial:.1f}"}
        row |= {"beside loads us": f"{1e6 * model.filling(counts.op, CARDS[card]):.1f}", "bound us": f"{1e6 * own.seconds:.1f}"}
        row |= {"copy us": f"{1e6 * own.copy:.1f}", "share of copy, at most": f"{own.share:.0%}"}
        rows.append(row | {"bar": f"{model.Bars.share(counts.dtype, card):.0%}", "by": own.by})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 with --check where a bar is missed; 2 where a tool is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=model.BARS, default=list(model.BARS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--quarter", action="store_true", help="count on a quarter of the weights and of the SMs: four times as fast")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a bar of docs/gpu-model.md is missed")
    parser.add_argument("--out", type=Path, default=Path("build/gpu_model"), help="folder of the counters and of gpu_model.json")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        call = counting.executor()
        library = Library(call.library)
        rows, costs, missed = [], [], []
        for op in options.ops:
            for dtype in options.dtypes:
                processors = counting.PROCESSORS // (4 if options.quarter else 1)
                target = options.out / f"{op}{dtype}.jsonl"
                counts = counting.count(call, op, dtype, counting.resnet50(options.quarter), target, processors)
                pipes = {card.arch: library.pipes(counts.launches, card.arch) for card in CARDS.values()}
                instructions = {arch: per_32(sum(own.values()), counts) for arch, own in pipes.items()}
                bounds = {name: model.bound(counts, pipes[card.arch], card, RESNET50) for name, card in CARDS.items()}
                rows.append(op_row(counts, instructions))
                costs += bound_rows(counts, bounds)
                missed += model.missed(counts, instructions, bounds)
                print(f"counted: {op} {dtype}", file=sys.stderr, flush=True)
    except (RuntimeError, ToolMissing, subprocess.CalledProcessError) as error:
        print(f"gpu-model: {error}")
        return CANNOT_RUN
    print(f"COUNTED on a CPU that executed the PTX, on {'a quarter of ' if options.quarter else ''}ResNet-50's weights; for 32 weights:")
    print(text.table(rows))
    print(f"\nMODEL, not a measurement: a bound for {RESNET50:,} weights (docs/gpu-model.md has every assumption):")
    print(text.table(costs))
    for line in missed:
        print(f"MISSED: {line}")
    record = {"commit": text.commit(), "weights": RESNET50, "counted": rows, "model": costs, "missed": missed}
    text.write_json(options.out / "gpu_model.json", record)
    print(f"{len(rows)} ops, {len(missed)} bars missed; {options.out / 'gpu_model.json'}")
    return MISSED if missed and options.check else OK


if __name__ == "__main__":
    sys.exit(main())
