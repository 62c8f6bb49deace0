"""Write reviews of food (4,000 + 1,000, "great" or "other"; of McAuley and Leskovec, 2013) as train.tsv and test.tsv for classify.py.

    pip install rdata && python examples/language/fine_foods.py --out foods

They are `small_fine_foods` of the R package modeldata, which Debian has as r-cran-modeldata; R is not needed.
"""

import argparse
import lzma
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))
from bbc_news import write_tables
from debian import stop, unpacked

PACKAGE = "r-cran-modeldata"
FOLDER = Path("usr/lib/R/site-library/modeldata/data")
LZMA2 = [{"id": lzma.FILTER_LZMA2, "preset": 9}]


def unserialized(content: bytes) -> Any:
    """A value in R's serialization, gzipped or not."""
    try:
        import rdata
    except ModuleNotFoundError:
        stop("pip install rdata")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that bytes have no name, and that a tibble is read as a data frame
        return rdata.conversion.convert(rdata.parser.parse_data(content))


def objects(folder: Path, names: list[str]) -> list[Any]:
    """Of an R package's data: Rdata.rdx says where in Rdata.rdb each object is.

    There stand the size when unpacked, big-endian in 4 bytes, the letter Z, and a raw LZMA2 stream.
    """
    where = unserialized((folder / "Rdata.rdx").read_bytes())["variables"]
    content = (folder / "Rdata.rdb").read_bytes()
    found = []
    for name in names:
        start, length = map(int, where[name])
        (size,), kind, packed = (
            struct.unpack_from(">I", content, start),
            content[start + 4 : start + 5],
            content[start + 5 : start + length],
        )
        if kind != b"Z":
            raise ValueError(f"{folder / 'Rdata.rdb'}: {name} must be packed by xz (Z), got {kind!r}")
        unpacked = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA2).decompress(packed)
        if len(unpacked) != size:
            raise ValueError(f"{folder / 'Rdata.rdb'}: {name} must have {size} bytes when unpacked, got {len(unpacked)}")
        found.append(unserialized(unpacked))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Write reviews of food as TSV files.")
    parser.add_argument("--out", type=Path, default=Path("foods"))
    parser.add_argument("--deb", type=Path, help="Debian's package, where it is there already")
    given = parser.parse_args()
    with unpacked(PACKAGE, given.deb) as folder:
        parts = objects(folder / FOLDER, ["training_data", "testing_data"])
    train, test = ([(" ".join(text.split()), str(score)) for text, score in zip(t.review, t.score, strict=True)] for t in parts)
    write_tables(given.out, train, test)


if __name__ == "__main__":
    main()
