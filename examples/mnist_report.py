"""The results of mnist.py as a table, a picture, a JSON file and a verdict. "tuned" and "untuned": batch norm measured anew or not."""

import json
import os
import platform
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cram_kernels import __version__, backend

Spread = dict[str, Any]  # mean; std, None for a single seed
Summary = dict[str, dict[str, dict[str, Spread]]]  # method -> tuned | untuned -> pattern -> spread


def summarise(results: dict[str, list[dict[str, Any]]]) -> Summary:
    """Mean and sample standard deviation over the seeds."""
    return {
        method: {kind: {row: _spread([run[kind][row] for run in runs]) for row in runs[0][kind]} for kind in ("tuned", "untuned")}
        for method, runs in results.items()
    }


def _spread(values: list[float]) -> Spread:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def print_table(labels: dict[str, str], summary: Summary) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Test accuracy in % (before batch-norm tuning), mean ± std over seeds", title_justify="left")
    table.add_column("pruned to")
    for label in labels.values():
        table.add_column(label, justify="right")
    for row in next(iter(summary.values()))["tuned"]:
        table.add_row(row, *(_cell(summary[method], row) for method in labels))
    Console().print(table)


def _cell(method: dict[str, dict[str, Spread]], row: str) -> str:
    tuned, untuned = method["tuned"][row], method["untuned"].get(row)
    before = f"({untuned['mean']:.0f})" if untuned else ""
    spread = "" if tuned["std"] is None else f" ± {tuned['std']:.2f}"
    return f"{tuned['mean']:.2f}{spread} {before:>5}"


def effect(labels: dict[str, str], summary: Summary) -> dict[str, bool]:
    """What CrAM promises, and whether it holds."""

    def mean(method: str, row: str) -> float:
        return float(summary[method]["tuned"][row]["mean"])

    gain = round(mean("multi", "90 %") - mean("sgd", "90 %"), 6)  # of 0.1 = one image; only float error is rounded away
    checks = {f"at 90 % {labels['multi']} is at least 10 points over SGD: {gain:+.2f}": gain >= 10}
    for method in ("multi", "nm"):
        loss = round(mean("sgd", "dense") - mean(method, "dense"), 6)
        checks[f"dense {labels[method]} is at most 0.7 points under SGD: {-loss:+.2f}"] = loss <= 0.7
    return checks


def draw(labels: dict[str, str], summary: Summary, sparsities: dict[str, float], path: Path) -> None:
    """Left: accuracy over sparsity (row -> percent), a curve a method. Right: the N:M rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curve = {"dense": 0.0} | sparsities
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.5), width_ratios=(3, 1), layout="constrained")
    for i, (method, label) in enumerate(labels.items()):
        tuned = summary[method]["tuned"]
        others = [row for row in tuned if row not in curve]
        style: dict[str, Any] = {"marker": "o", "capsize": 3, "label": label, "color": f"C{i}"}
        left.errorbar(list(curve.values()), *_points(tuned, list(curve)), **style)
        right.errorbar([j + 0.15 * (i - 1) for j in range(len(others))], *_points(tuned, others), linestyle="none", **style)
        right.set_xticks(range(len(others)), others)
    left.set(
        xlabel="sparsity, %", ylabel="test accuracy, %", title="MNIST-5k, pruned in one shot", xticks=list(curve.values()), ylim=(None, 100)
    )
    right.set(title="N:M (own scale)", xlim=(-0.5, 1.5))
    left.legend(loc="lower left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _points(tuned: dict[str, Spread], rows: list[str]) -> tuple[list[float], list[float]]:
    return [tuned[row]["mean"] for row in rows], [tuned[row]["std"] or 0.0 for row in rows]


def write(
    settings: dict[str, Any],
    labels: dict[str, str],
    results: dict[str, list[dict[str, Any]]],
    summary: Summary,
    checks: dict[str, bool],
    seconds: float,
    path: Path,
) -> None:
    """Everything as JSON: settings, versions, the numbers of each seed, what was pruned to 2:4, the checks."""
    methods = {
        method: {
            "label": labels[method],
            "summary": summary[method],
            "seeds": [{key: value for key, value in run.items() if key != "weights"} for run in runs],
            "report_2of4": runs[0]["weights"][1].to_dict(),
        }
        for method, runs in results.items()
    }
    data = {
        "settings": settings,
        "versions": {"cram_kernels": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "numpy", "mlxtend")},
        "machine": {"backend": backend.name_for("cpu"), "cpu": torch.backends.cpu.get_cpu_capability(), "cores": os.cpu_count()},
        "seconds": seconds,
        "checks": checks,
        "methods": methods,
    }
    path.write_text(json.dumps(data, indent=2) + "\n")
