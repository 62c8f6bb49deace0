"""Write reviews of food (4,000 + 1,000, "great" or "other"; of McAuley and Leskovec, 2013) as train.tsv and test.tsv for classify.py.

    pip install rdata && python examples/language/fine_foods.py --out foods

They are `small_fine_foods` of the R package modeldata, which Debian has as r-cran-modeldata; R is not needed.
"""

import lzma
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))
from bbc_news import write_tables
from debian import options, stop, unpacked

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
    """Of an R package's data: Rdata.rdx says where in Rdata.rdb each object is, and how all are packed.

    There stand the size when unpacked, big-endian in 4 bytes, and a zlib stream (1), or the letter Z and a raw LZMA2 stream (3).
    """
    index = unserialized((folder / "Rdata.rdx").read_bytes())
    content = (folder / "Rdata.rdb").read_bytes()
    found = []
    for name in names:
        start, length = map(int, index["variables"][name])
        (size,), packed = struct.unpack_from(">I", content, start), content[start + 4 : start + length]
        if int(index["compressed"][0]) == 1:
            unpacked = zlib.decompress(packed)
        elif packed[:1] == b"Z":
            unpacked = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA2).decompress(packed[1:])
        else:
            raise ValueError(f"{folder / 'Rdata.rdb'}: {name} must be packed by gzip, or by xz (Z), got {packed[:1]!r}")
        if len(unpacked) != size:
            raise ValueError(f"{folder / 'Rdata.rdb'}: {name} must have {size} bytes when unpacked, got {len(unpacked)}")
        found.append(unserialized(unpacked))
    return found


def main() -> None:
    given = options("Write reviews of food as TSV files.", Path("foods"))
    with unpacked(PACKAGE, given.deb) as folder:
        parts = objects(folder / FOLDER, ["training_data", "testing_data"])
    train, test = ([(" ".join(text.split()), str(score)) for text, score in zip(t.review, t.score, strict=True)] for t in parts)
    write_tables(given.out, train, test)


if __name__ == "__main__":
    main()
