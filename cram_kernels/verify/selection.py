"""Some ops, or all, once against the reference, small: what compute-sanitizer watches.

python -m cram_kernels.verify.selection [--dry-run] [OP ...]
"""

import sys

from . import checks
from .machine import machines
from .problems import PROBLEMS


def main(argv: list[str]) -> int:
    found = machines("--dry-run" in argv)
    if not found:
        print("no GPU")
        return 2
    section = checks.selection(found[0], [op for op in argv if op != "--dry-run"] or list(PROBLEMS))
    wrong = [row for row in section.rows if row["elements that differ"]]
    print(*section.rows, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
