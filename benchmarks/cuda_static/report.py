"""Judges kernels and prints them: one table of what was compiled, one of what it should cost."""

from collections.abc import Iterator
from typing import Any

from .cubin import Kernel
from .gpus import ARCHS, CARDS, Card, needed_in_flight, occupancy
from .traffic import OTHER_THREADS, THREADS, VECTOR, Op, Vectors

RESNET50 = 25_557_032  # weights
GOAL = 0.85  # of the bandwidth of a copy
Row = dict[str, Any]


def kernel_rows(kernels: list[Kernel]) -> list[Row]:
    """One row a kernel and arch, the archs of a kernel together."""
    order = list(ARCHS)
    return [kernel_row(k) for k in sorted(kernels, key=lambda k: (k.name, order.index(k.arch)))]


def kernel_row(k: Kernel, threads: int | None = None) -> Row:
    threads = threads or OTHER_THREADS.get(k.name, THREADS)
    row: Row = {"name": k.name, "arch": f"sm_{k.arch}", "registers": k.registers, "stack": k.stack, "local": k.local}
    row |= {"shared": k.shared, "threads": threads, "occupancy": f"{occupancy(k.arch, threads, k.registers, k.shared):.0%}"}
    for kind in ("load", "store"):
        row[f"{kind}s 16 B"], row[f"{kind}s narrow"] = k.vectors(kind), k.narrow(kind)
    row |= {"load to use": k.soonest, "at once": k.at_once}
    return row | {"atomics": k.instructions["global_atomic"]}


def streams(op: Op, kernels: list[Kernel]) -> list[Kernel]:
    """The kernels that see every weight of the op, on every arch."""
    return [k for k in kernels if op.streams_through(k.name)]


def faults(kernels: list[Kernel], vectors: dict[str, Vectors]) -> list[str]:
    """What must not be: local memory, vector accesses lost, a kernel of ours that is not there."""
    found = [
        f"{k.name} on sm_{k.arch}: {k.stack} bytes of local memory a thread, {k.local} loads and stores of it"
        for k in kernels
        if k.stack or k.local
    ]
    for arch in sorted({k.arch for k in kernels}, key=int):
        missing = vectors.keys() - {k.name for k in kernels if k.arch == arch}
        found += [f"no {name} was compiled for sm_{arch}" for name in sorted(missing)]
    return found + [text for has, wanted, text in against(kernels, vectors) if has < wanted]


def surplus(kernels: list[Kernel], vectors: dict[str, Vectors]) -> list[str]:
    """No fault, but one could hide behind it: more vector accesses than traffic.py states. It says what to do."""
    what = "a loss can hide until it is known where they come from (nvcc -lineinfo), and VECTORS in cuda_static/traffic.py states them"
    return [f"{text}; {what}" for has, wanted, text in against(kernels, vectors) if has > wanted]


def serialized(kernels: list[Kernel], ops: tuple[Op, ...]) -> list[str]:
    """No fault yet: a kernel that waits for one load before it sends another one which traffic.py states to be on its way by then."""
    return [
        f"{k.name} on sm_{k.arch}: {op.name} wants {op.together} loads of 16 bytes on their way at once, the machine code has {k.at_once}"
        for op in ops
        for k in streams(op, kernels)
        if k.at_once < op.together
    ]


def against(kernels: list[Kernel], vectors: dict[str, Vectors]) -> Iterator[tuple[int, int, str]]:
    """Loads and stores of 16 bytes of each of our kernels: how many it has, how many it should have, both in words."""
    for k in (k for k in kernels if k.name in vectors):
        for kind in ("load", "store"):
            has, wanted = k.vectors(kind), vectors[k.name].wanted(kind, k.arch)
            yield has, wanted, f"{k.name} on sm_{k.arch}: wants {wanted} {kind}s of 16 bytes, the machine code has {has}"


def op_rows(kernels: list[Kernel], ops: tuple[Op, ...]) -> list[Row]:
    """One row an op that was compiled: bytes a weight, launches, and the time that the bytes alone would take; no GPU measured it."""
    return [op_row(op, own) for op in ops if (own := streams(op, kernels))]


def op_row(op: Op, kernels: list[Kernel]) -> Row:
    row: Row = {"name": op.name, "bytes a weight": op.bytes, "launches": op.launches, "formula": op.formula}
    for name, card in CARDS.items():
        row[f"predicted us, {name}"] = round(predicted_us(op, RESNET50, card.gigabytes), 1)
        row[f"in flight / needed, {name}"] = in_flight(op, [k for k in kernels if k.arch == card.arch], card)
    return row


def in_flight(op: Op, kernels: list[Kernel], card: Card) -> str | None:
    """Bytes that the threads of an SM ask for before they wait, and what the loads' share of GOAL needs; None: not compiled for it."""
    if not kernels:
        return None
    ahead = min(op.together, *(k.at_once for k in kernels))
    resident = min(occupancy(k.arch, THREADS, k.registers, k.shared) for k in kernels) * ARCHS[card.arch].warps * 32
    loads = len(op.loads) / (len(op.loads) + len(op.stores))
    return f"{resident * VECTOR * ahead / 1024:.0f} / {needed_in_flight(card, loads * GOAL) / 1024:.0f} KiB"


def predicted_us(op: Op, weights: int, gigabytes: float) -> float:
    """Bytes over GOAL of the published bandwidth: a prediction, launches and caches left out."""
    return op.bytes * weights / (GOAL * gigabytes * 1e9) * 1e6
