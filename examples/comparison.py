"""What the recipes share: the runs of a comparison of methods, and mean and spread over seeds as a table."""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

Summary = dict[str, dict[str, tuple[float, float, int]]]


def arguments(description: str, methods: dict[str, Any], named_only: Collection[str] = ()) -> tuple[argparse.Namespace, list[str]]:
    """--seeds and --methods, and the rest of the command line. Those `named_only` run where --methods names them, not by default."""
    parser = argparse.ArgumentParser(description=f"{description} Other options are those of a run.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=methods, default=[name for name in methods if name not in named_only])
    return parser.parse_known_args()


def changed(settings: Any, name: str, changes: dict[str, Any], seed: int) -> Any:
    """The settings of one run. Of numbers of epochs and steps `changes` has factors."""
    changes = {"seed": seed, "out": settings.out / f"{name}-{seed}", **changes}
    for option in ("epochs", "warmup_epochs", "steps"):
        if option in changes:
            changes[option] *= getattr(settings, option)
    return dataclasses.replace(settings, **changes)


def runs_of(
    settings: Any,
    methods: dict[str, dict[str, Any]],
    given: argparse.Namespace,
    started: Callable[[Path], bool] | None,
    run: Callable[[Any], Any],
) -> list[Any]:
    """The settings of all runs, after those have been run that have no results.json; one that was interrupted is resumed.

    Args:
        methods: name -> what it changes, see `changed`.
        started: whether a run has left something in its folder to go on from; None, where no run can be resumed.
    """
    for seed in range(given.seeds):
        for name in given.methods:
            one = changed(settings, name, methods[name], seed)
            if not (one.out / "results.json").is_file():
                print(one.out, flush=True)
                run(one if started is None else dataclasses.replace(one, resume=started(one.out)))
    return [changed(settings, name, methods[name], seed) for name in given.methods for seed in range(given.seeds)]


def summarise(results: list[dict[str, Any]]) -> Summary:
    """label -> column -> (mean, sample standard deviation, runs); a column is "dense" or "PATTERN, REPAIR", or one of them, corrupted."""
    columns: dict[str, dict[str, list[float]]] = {}
    for r in results:
        found = columns.setdefault(r["label"], {})
        found.setdefault("dense", []).append(r["dense"])
        if "dense_tuned" in r:
            found.setdefault("dense, batch norm tuned", []).append(r["dense_tuned"])
        for name, states in r["pruned"].items():
            for what, value in states.items():
                found.setdefault(f"{name}, {what}", []).append(value)
        for name, by_corruption in r.get("corrupted", {}).items():
            values = [v for severities in by_corruption.values() for v in severities.values()]
            found.setdefault(f"{name}, corrupted", []).append(statistics.fmean(values))
    return {
        name: {c: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0, len(v)) for c, v in found.items()}
        for name, found in columns.items()
    }


def counted(count: float, unit: str) -> str:
    """ "1 epoch", "20,000 steps"."""
    return f"{count:,g} {unit}" + "s" * (count != 1)


def cell(found: dict[str, tuple[float, float, int]], column: str, digits: int = 1) -> str:
    if column not in found:
        return ""
    mean, spread, runs = found[column]
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if runs > 1 else "")


def table(summary: Summary, patterns: list[str], repairs: list[str], digits: int = 1) -> str:
    """Markdown: a line for each way of training and of repair that was measured. "dense" is the network that a repair begins with."""
    if not patterns:  # networks as they are
        own = [f"| {name} | {found['dense'][2]} | {cell(found, 'dense', digits)} |" for name, found in summary.items()]
        return "\n".join(["| trained with | runs | as trained |", "|---|---|---|", *own]) + "\n"
    lines = ["| trained with | runs | dense | after `prune` | " + " | ".join(patterns) + " |", "|---" * (4 + len(patterns)) + "|"]
    for name, found in summary.items():
        first = [name, str(found["dense"][2])]
        for suffix in ("", ", corrupted"):
            for what in repairs:
                dense = "dense, batch norm tuned" if what.startswith("dense tuned") else "dense" if first[0] or suffix else ""
                cells = [cell(found, f"{p}, {what}{suffix}", digits) for p in patterns]
                if any(cells):
                    lines.append("| " + " | ".join([*first, cell(found, dense + suffix, digits), what + suffix, *cells]) + " |")
                    first = ["", ""]
    return "\n".join(lines) + "\n"
