"""What is printed and written: the environment, a table a case, JSON."""

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from cram_kernels import _native
from cram_kernels.report import table as aligned
from cram_kernels.version import __version__

from .measure import Row
from .shapes import free_memory

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
    """The CPU by name, family and model: virtual machines call several generations by one name."""
    try:
        fields = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
        first = {name.strip(): value.strip() for name, value in reversed(fields)}
        return f"{first['model name']} (family {first['cpu family']}, model {first['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def caches() -> str:
    """Of the first core, as Linux tells them."""
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    found = [[(folder / name).read_text().strip() for name in ("level", "type", "size")] for folder in folders]
    return ", ".join(f"L{level} {kind.lower()} {size}" for level, kind, size in found) or "unknown"


def commit() -> str:
    """Of the checkout, with a + where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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
        "caches": caches(),
        "free memory": f"{free_memory('cpu') / 2**30:.1f} GiB",
        "system": platform.platform(),
        "load average": load_average(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    facts |= {name: value for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "KMP_", "MKL_", "CRAM_KERNELS_"))}
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


HIDDEN = ("ours", "rounds_ms", "optimizer_rounds_ms")  # for programs


def table(rows: list[Row]) -> str:
    """Columns in the order of HEADS, then those that it does not know."""
    present = {column: None for row in rows for column in row if column not in HIDDEN}
    columns = [c for c in HEADS if c in present] + [c for c in present if c not in HEADS]
    heads = [HEADS.get(c, (c.replace("_", " "),))[0] for c in columns]
    return aligned(heads, [[text(c, row.get(c)) for c in columns] for row in rows], "<" + ">" * (len(columns) - 1))


def described(facts: Row) -> str:
    return ", ".join(f"{name} {text(name, value)}" for name, value in facts.items())


def write_json(path: Path, record: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
