"""One part of the command, by its name; the parts that hold a GPU run in processes of their own.

python -m cram_kernels.verify.part [--dry-run] NAME FILE    # FILE: gets the sections as JSON
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import checks
from .bandwidth import bandwidth, launches
from .machine import Machine, machines
from .report import Section

Runs = dict[str, Callable[[], list[Section]]]  # by the name of a step's part, "graphs: large", or of the step


def parts(found: list[Machine]) -> Runs:
    """Whatever runs kernels and is no program that others watch or wrote."""
    first, kinds = found[0], of_each_kind(found)
    runs: Runs = {}
    for name, check, under_test in (("bits", checks.bits, found), ("graphs", checks.graphs, [first]), ("streams", checks.streams, [first])):
        for size in checks.SIZES:
            runs[f"{name}: {size}"] = partial(on_each, under_test, check, size)
    runs["devices"] = lambda: [checks.second_device(found)]
    for name in first.backends:
        runs[f"bandwidth: {name}"] = partial(on_each, kinds, bandwidth, name)
    for name in first.backends:
        runs[f"launches: {name}"] = partial(on_each, kinds, launches, name)
    return runs


def on_each(found: list[Machine], check: Callable[[Machine, str], Section], argument: str) -> list[Section]:
    made = []
    for machine in found:
        with machine.current():
            made.append(check(machine, argument))
    return made


def of_each_kind(found: list[Machine]) -> list[Machine]:
    """One GPU a model, in the order of `machines`: Ampere first."""
    return list({machine.facts()["GPU"]: machine for machine in reversed(found)}.values())[::-1]


def main(argv: list[str]) -> None:
    *options, name, file = argv
    made = parts(machines("--dry-run" in options))[name]()
    Path(file).write_text(json.dumps([vars(section) for section in made], allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
