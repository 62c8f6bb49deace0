"""Write six novels by Jane Austen (4.5 million characters) as train.txt and test.txt for characters.py; Persuasion is the test.

    pip install rdata && python examples/language/novels.py --out novels

They are the data of the R package janeaustenr, which Debian has as r-cran-janeaustenr; R is not needed.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
from debian import options, unpacked
from fine_foods import objects

PACKAGE = "r-cran-janeaustenr"
FOLDER = Path("usr/lib/R/site-library/janeaustenr/data")
TRAIN, TEST = ["emma", "mansfieldpark", "northangerabbey", "prideprejudice", "sensesensibility"], ["persuasion"]


def main() -> None:
    given = options("Write six novels as text files.", Path("novels"))
    given.out.mkdir(parents=True, exist_ok=True)
    with unpacked(PACKAGE, given.deb) as folder:
        novels = [["".join(f"{line}\n" for line in lines) for lines in objects(folder / FOLDER, part)] for part in (TRAIN, TEST)]
    for name, texts in zip(("train", "test"), novels, strict=True):
        path = given.out / f"{name}.txt"
        path.write_text("".join(texts), encoding="utf-8")
        print(f"{path}: {len(texts)} novels, {sum(map(len, texts))} characters")


if __name__ == "__main__":
    main()
