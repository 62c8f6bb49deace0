"""Write six novels by Jane Austen (4.5 million characters) as train.txt and test.txt for characters.py; Persuasion is the test.

    pip install rdata && python examples/language/novels.py --out novels

They are the data of the R package janeaustenr, which Debian has as r-cran-janeaustenr; R is not needed.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
from debian import unpacked
from fine_foods import objects

PACKAGE = "r-cran-janeaustenr"
FOLDER = Path("usr/lib/R/site-library/janeaustenr/data")
TRAIN, TEST = ["emma", "mansfieldpark", "northangerabbey", "prideprejudice", "sensesensibility"], ["persuasion"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write six novels as text files.")
    parser.add_argument("--out", type=Path, default=Path("novels"))
    parser.add_argument("--deb", type=Path, help="Debian's package, where it is there already")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with unpacked(PACKAGE, given.deb) as folder:
        novels = [["".join(f"{line}\n" for line in lines) for lines in objects(folder / FOLDER, part)] for part in (TRAIN, TEST)]
    for name, texts in zip(("train", "test"), novels, strict=True):
        path = given.out / f"{name}.txt"
        path.write_text("".join(texts), encoding="utf-8")
        print(f"{path}: {len(texts)} novels, {sum(map(len, texts))} characters")


if __name__ == "__main__":
    main()
