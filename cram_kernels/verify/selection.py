"""Every op once, small, against the reference: what compute-sanitizer watches. `python -m cram_kernels.verify.selection [--dry-run]`."""

import sys

from . import checks
from .machine import machines


def main(argv: list[str]) -> int:
    found = machines("--dry-run" in argv)
    if not found:
        print("no GPU")
        return 2
    section = checks.selection(found[0])
    wrong = [row for row in section.rows if row["elements that differ"]]
    print(*section.rows, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
