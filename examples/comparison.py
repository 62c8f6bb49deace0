"""What the recipes share: records and errors of a run, the runs of a comparison of methods, and mean and spread over seeds as a table."""

import argparse
import contextlib
import dataclasses
import json
import re
import statistics
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import cram_kernels

Summary = dict[str, dict[str, tuple[float, float, int]]]
OWN = (str(Path(__file__).parent), str(Path(cram_kernels.__file__).parent))  # whose errors are written for users of a script


def told(main: Callable[[], Any]) -> None:
    """Run a script. What options or files lack is a line on standard error and exit status 2, as argparse does, and no traceback.

    A ValueError that another library raises is no such message: nobody could tell from one line where it comes from.
    """
    try:
        main()
    except (OSError, ValueError) as error:
        *_, (last, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and not last.f_code.co_filename.startswith(OWN):
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as JSON has it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(settings).items()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def comparable(value: Any) -> Any:
    """A setting as it is compared: a list may hold 0.5 or "0.5"."""
    return [str(item) for item in value] if isinstance(value, list) else value


def without_seed(folder: str, seed: int) -> str:
    """The name of a run's folder without its seed, as in cram-0."""
    return folder.removesuffix(f"-{seed}")


def check_same(settings: Any, recorded: dict[str, Any], places: Collection[str], where: Path) -> None:
    """ValueError for a setting that `where` has otherwise. What an older record lacks had its default."""
    recorded = plain(type(settings)()) | recorded
    for name, value in plain(settings).items():
        if name not in places and comparable(recorded[name]) != comparable(value):
            raise ValueError(f"{name} must be {recorded[name]!r} as in {where}, got {value!r}: another run needs another --out")


def check_unused(out: Path, *files: str) -> None:
    """ValueError where a new run would leave files of an older one beside its own."""
    for path in (path for name in files for path in out.glob(name)):
        raise ValueError(f"out must be a folder without another run, got {path}: resume that run, remove it, or take another --out")


def check_seeds(runs: list[dict[str, Any]]) -> None:
    """ValueError for runs of one label that differ by more than their seed, or not even by that: a mean over them means nothing.

    Runs may start from a network of their own seed: `start` is cram-0/last.pt with seed 0, and cram-1/last.pt with seed 1.
    """
    known: dict[tuple[str, str], Any] = {}
    seeds: set[tuple[str, int]] = set()
    for run in runs:
        label, settings = run["label"], run.get("config", run.get("settings", {}))
        for name, value in settings.items():
            if name == "start" and value:
                value = str(Path(without_seed(str(Path(value).parent), settings["seed"])) / Path(value).name)
            if name == "seed" and (label, value) in seeds:
                raise ValueError(f"runs of one label must have seeds of their own, got seed {value} twice for {label!r}")
            if name == "seed":
                seeds.add((label, value))
            elif name == "reconstruct" and value == 0:
                continue  # this run has no figures after it
            elif comparable(known.setdefault((label, name), value)) != comparable(value):
                got = f"{known[label, name]!r} and {value!r}"
                raise ValueError(f"runs of one label must differ by their seed alone, got {name} {got} for {label!r}")


METHODS = {  # what the names in --methods mean
    "sgd": "plain steps of the base optimizer",
    "sgd-twice": "sgd for twice the epochs, which is the work of cram",
    "adamw": "plain steps of AdamW",
    "adamw-twice": "adamw for twice the epochs or steps, which is the work of cram",
    "cram": "CrAM+: a dense and a pruned pass a step, each over the whole batch",
    "half": "cram with half of the batch in the second pass",
    "split": "cram with another half of the batch in each pass, which is the work of plain steps",
    "split-twice": "split for twice the epochs",
    "drawn": "one pass a step, at the dense or at the pruned weights by the toss of a coin",
    "warmup": "cram with sparsities that rise over the first half",
    "no-rise": "cram without a rise of the sparsities (not run by default)",
    "up-to-70": "cram with 50, 60 and 70 % (not run by default)",
}


def parser_of(kind: type, description: str, skip: Collection[str] = ()) -> Any:
    """A parser of the options of a dataclass, lists in either form of `in_one_word`."""
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def parse_args(self, args: Sequence[str] | None = None, **others: Any) -> Any:
            lists = [f"--{f.name}" for f in dataclasses.fields(kind) if "list[" in str(f.type)]
            return super().parse_args(in_one_word(sys.argv[1:] if args is None else args, lists), **others)

        def format_help(self) -> str:
            return re.sub(r"<class\s+'Path'>", "Path", super().format_help())

    parser = Parser(description=f"{description} Lists: --NAME A B, or as JSON.")
    parser.add_class_arguments(kind, skip=set(skip))
    return parser


def in_one_word(arguments: Sequence[str], lists: Collection[str]) -> list[str]:
    """`--patterns 0.9 2:4` as `--patterns '[0.9, "2:4"]'`; a list that is JSON already stays. Of the options `lists`."""
    found, rest = [], list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option not in lists:
            found.append(option + equals + value)
            continue
        words = [value] if equals else []
        while rest and not rest[0].startswith("--") and not (words and words[0].startswith("[")):
            words.append(rest.pop(0))
        found += [option, words[0] if words and words[0].startswith("[") else json.dumps([_number(word) for word in words])]
    return found


def _number(word: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    return word


def arguments(description: str, methods: dict[str, Any], named_only: Collection[str] = ()) -> tuple[argparse.Namespace, list[str]]:
    """--seeds and --methods, and the rest of the command line. Those `named_only` run where --methods names them, not by default.

    With --help these are shown, and --help stays in the rest, so that the options of a run are shown after them.
    """
    meanings = "\n".join(f"  {name:<12} {METHODS[name]}" for name in methods)
    parser = argparse.ArgumentParser(
        description=f"{description}\n\nmethods:\n{meanings}",
        usage=f"{Path(sys.argv[0]).name} [--seeds N] [--methods NAME ...] [options of a run, below]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,  # --method is an option of a run
    )
    parser.add_argument("--seeds", type=int, default=3, help="run each method with the seeds 0 to N - 1 (default: 3)", metavar="N")
    default = [name for name in methods if name not in named_only]
    parser.add_argument("--methods", nargs="+", choices=methods, default=default, help="which methods (default: all)", metavar="NAME")
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(parser.format_help())
    given, others = parser.parse_known_args()
    if any(option.partition("=")[0] == "--method" for option in others):
        parser.error("--method is what a study varies: its option is --methods")
    if given.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {given.seeds}")
    return given, others


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
    begun: Callable[[Path], dict[str, Any] | None] | None,
    run: Callable[[Any], Any],
    places: Collection[str],
) -> list[Any]:
    """The settings of all runs, after those have been run that have no results.json; one that was interrupted is resumed.

    Args:
        methods: name -> what it changes, see `changed`.
        begun: the settings of an interrupted run that has left something in its folder to go on from, else None; or None in place of the
            function, where no run can be resumed.
        places: settings that may differ from those of a finished or interrupted run.

    Raises:
        ValueError: a run that is there has other settings, before any is run.
    """
    runs = [changed(settings, name, methods[name], seed) for seed in range(given.seeds) for name in given.methods]
    left: list[Any] = []
    for one in runs:
        path = one.out / "results.json"
        if path.is_file():
            found = json.loads(path.read_text())
            found = found.get("config", found.get("settings", {}))
        else:
            found = begun(one.out) if begun else None
            left.append(one if begun is None else dataclasses.replace(one, resume=found is not None))
        if found is not None:
            check_same(one, found, places, path if path.is_file() else one.out)
    for one in left:
        print(one.out, flush=True)
        run(one)
    return [changed(settings, name, methods[name], seed) for name in given.methods for seed in range(given.seeds)]


def summarise(results: list[dict[str, Any]]) -> Summary:
    """label -> column -> (mean, sample standard deviation, runs); a column is "dense" or "PATTERN, REPAIR", or one of them, corrupted."""
    check_seeds(results)
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
