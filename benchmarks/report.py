"""What is printed and written: the environment, a table a case, JSON, a picture."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from cram_kernels import _native
from cram_kernels.version import __version__

from .measure import Row

HEADS = {  # column -> head, format
    "name": ("", "{}"),
    "median_ms": ("median ms", "{:.3f}"),
    "spread": ("spread", "{:.0%}"),
    "min_ms": ("min ms", "{:.3f}"),
    "gb_per_s": ("GB/s", "{:.2f}"),
    "x_copy": ("x copy", "{:.2f}"),
    "share_of_copy": ("share of copy", "{:.0%}"),
    "x_ours": ("x ours", "{:.2f}"),
    "x_fused": ("x fused", "{:.2f}"),
    "calls": ("calls", "{:,}"),
    "target": ("target", "{}"),
    "met": ("met", "{}"),
    "candidates": ("candidates", "{:.2%}"),
}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def load_average() -> float:
    """Of the last minute: what else the machine was busy with; -1 where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0


def environment(backend: str) -> Row:
    """Everything that a time depends on and that a program can know."""
    import numpy

    host = _native.host
    facts = {
        "cram_kernels": __version__,
        "backend": backend,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "compiler": host.compiler,
        "SIMD level": host.simd_level(),
        "CPU": f"{processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
    }
    if backend != "cpu":
        facts |= {"GPU": torch.cuda.get_device_name(), "CUDA": torch.version.cuda}
    return facts


def text(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "MISSED"
    default = "{:.4g}" if isinstance(value, float) else "{}"
    return HEADS.get(column, ("", default))[1].format(value)


def table(rows: list[Row]) -> str:
    """Columns in the order of HEADS, then those that it does not know."""
    present = {column: None for row in rows for column in row}
    columns = [c for c in HEADS if c in present] + [c for c in present if c not in HEADS]
    lines = [[HEADS.get(c, (c.replace("_", " "),))[0] for c in columns]]
    lines += [[text(c, row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  " + "  ".join(f"{cell:{'<' if i == 0 else '>'}{w}}" for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def described(facts: Row) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {text(name, value)}" for name, value in facts.items())


def write_json(path: Path, record: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_picture(path: Path, title: str, results: list[Row], column: str, label: str) -> str | None:
    """One column as dots, case by case: ours blue, copies grey, peers orange. Returns why there is no picture, or None."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed (`pip install cram_kernels[demo]`)"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = sum(1 + len(result["rows"]) for result in results)
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.2 * lines), layout="constrained")
    names: list[str] = []  # top down, a line each
    values: list[float] = []
    for result in results:
        axes.text(0, len(names), f" {result['case']}", transform=axes.get_yaxis_transform(), va="center", fontsize=8, fontweight="bold")
        names.append("")
        for i, row in enumerate(row for row in result["rows"] if column in row):
            axes.plot(row[column], len(names), "o", color="#1b6ca8" if i == 0 else "#999999" if "copy" in row["name"] else "#e08214")
            axes.annotate(f"{row[column]:.3g}", (row[column], len(names)), (6, 0), textcoords="offset points", va="center", fontsize=7)
            names.append(row["name"])
            values.append(row[column])
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names), -1)
    axes.grid(axis="y", linewidth=0.3)
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_xscale("log")
    if column.startswith("x_"):
        axes.axvline(1, color="black", linewidth=0.6)
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return None
