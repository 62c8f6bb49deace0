"""Each op's bandwidth beside a measured copy of as many bytes: events, warm-up, buffers rotated past the L2, median and spread."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from . import problems
from .machine import Machine
from .problems import PROBLEMS, Lists, Shapes
from .report import Row, Section

Runs = Sequence[Callable[[], Any]]
GOAL = 0.85  # of the copy's bandwidth
LARGE: Shapes = [(512, 256, 3, 3)] * 18 + [(1024, 512)] * 8 + [(512,)] * 100  # 26 M weights in 126 tensors, about those of ResNet-50
TINY: Shapes = [(64, 32, 3, 3), (128, 64), (64,)]  # of a dry run
WARMUP, ROUNDS = 5, 30
L2_TIMES = 4  # the rotated buffers are at least this many times the L2

# op -> bytes a weight of size `b` (mask bits apart, 1/8): how often each array of T moves
TRAFFIC: dict[str, int] = {
    "perturb_topk_": 4,  # param in and out, grad in, saved out
    "perturb_nm_": 4,
    "perturb_masked_": 4,
    "restore_": 2,
    "restore_combine_": 5,  # saved, grad, first_grad in; param, grad out
    "restore_sgd_": 6,  # saved, grad, first_grad, momentum in; param, momentum out
    "restore_adam_": 8,
    "grad_norm": 1,
}
MASKED = set(TRAFFIC) - {"restore_", "grad_norm"}
MANY: Shapes = [(8, 8)] * 161  # as many tensors as ResNet-50 has


def bandwidth(machine: Machine, name: str) -> Section:
    """Of a backend: a row an op and dtype; launched one by one, and from a captured graph. A missed goal is said, and fails nothing."""
    section = Section(f"bandwidth of {name} on {machine.device}")
    shapes = TINY if machine.dry else LARGE
    for op in TRAFFIC:
        for dtype in problems.DTYPES:
            section.rows.append(row(machine, name, op, dtype, shapes))
    return section


def row(machine: Machine, name: str, op: str, dtype: torch.dtype, shapes: Shapes) -> Row:
    weights = sum(torch.Size(s).numel() for s in shapes)
    moved = weights * TRAFFIC[op] * dtype.itemsize + (weights // 8 if op in MASKED else 0)
    copies = max(1, -(-L2_TIMES * machine.l2_bytes() // moved))
    sets = [PROBLEMS[op](Lists(shapes, dtype, machine.device, seed)) for seed in range(copies)]
    resets = [partial(reset, machine, op, a, name) for a in sets]
    eager, graph = in_both_ways(machine, [partial(problems.call, op, a, name) for a in sets], resets)
    copy = timed(machine, *copying(machine, moved, copies))
    return cells(machine.dry, op, name, dtype, moved / weights, moved, eager, graph, copy)


def launches(machine: Machine, name: str) -> Section:
    """What launches cost where there is next to nothing to move: kernels' starts, gaps between them, and without a graph the host."""
    shapes = MANY[:3] if machine.dry else MANY
    section = Section(f"launches of {name} for {len(shapes)} tensors of 64 weights on {machine.device}")
    for op in TRAFFIC:
        arguments = PROBLEMS[op](Lists(shapes, torch.float32, machine.device))
        times = in_both_ways(machine, [partial(problems.call, op, arguments, name)], [partial(reset, machine, op, arguments, name)])
        shown = ["dry run" if machine.dry else f"{1e3 * statistics.median(t):.1f}" for t in times]
        section.rows.append({"op": op, "backend": name, "us": shown[0], "us, graph": shown[1]})
    return section


def in_both_ways(machine: Machine, runs: Runs, resets: Runs) -> tuple[list[float], list[float]]:
    """Called one after the other, and as replays of captured graphs."""
    eager = timed(machine, runs, resets)
    replays: list[Callable[[], Any]] = []
    for run, again in zip(runs, resets, strict=True):
        again()
        replays.append(machine.capture(run))
    return eager, timed(machine, replays, resets)


def reset(machine: Machine, op: str, arguments: problems.Arguments, name: str) -> None:
    """So that every round does the whole work: what was perturbed is restored, as between two steps, or the flag is raised; an empty L2."""
    if op.startswith("perturb_"):
        problems.call("restore_", {role: arguments[role] for role in ("params", "saved", "perturbed")}, name)
    elif op != "grad_norm":
        arguments["perturbed"].fill_(1)
    machine.flush_l2()


def copying(machine: Machine, moved: int, copies: int) -> tuple[Runs, Runs]:
    """copy_ of half as many bytes: read once, written once."""
    pairs = [torch.zeros(2, moved // 2, dtype=torch.uint8, device=machine.device) for _ in range(copies)]
    return [partial(p[0].copy_, p[1]) for p in pairs], [machine.flush_l2] * copies


def timed(machine: Machine, runs: Runs, resets: Runs) -> list[float]:
    """ms of each round; the rounds take the buffers in turn. Nothing waits before the last round is queued."""
    events = []
    for i in range(WARMUP + ROUNDS):
        resets[i % len(runs)]()
        start, end = machine.event(), machine.event()
        start.record()
        runs[i % len(runs)]()
        end.record()
        events.append((start, end))
    machine.synchronize()
    return [start.elapsed_time(end) for start, end in events[WARMUP:]]


def cells(
    dry: bool,
    op: str,
    name: str,
    dtype: torch.dtype,
    a_weight: float,
    moved: int,
    eager: list[float],
    graph: list[float],
    copy: list[float],
) -> Row:
    """The row as text. What a dry run timed is formatted like everything else and then left out."""
    share = statistics.median(copy) / statistics.median(graph)
    measured = {
        "ms": f"{statistics.median(eager):.4f}",
        "ms, graph": f"{statistics.median(graph):.4f}",
        "spread": f"{spread(graph):.1%}",
        "GB/s, graph": f"{moved / statistics.median(graph) / 1e6:.0f}",
        "copy ms": f"{statistics.median(copy):.4f}",
        "copy GB/s": f"{moved / statistics.median(copy) / 1e6:.0f}",
        "share of copy": f"{share:.1%}",
        f">= {GOAL:.0%}": "yes" if share >= GOAL else "MISSED",
    }
    if dry:
        measured = dict.fromkeys(measured, "dry run")
    return {"op": op, "backend": name, "dtype": str(dtype).removeprefix("torch."), "bytes a weight": f"{a_weight:g}"} | measured


def spread(times: list[float]) -> float:
    """The middle half over the median."""
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    return (third - first) / median
