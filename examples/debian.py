"""Files of a Debian package, fetched and unpacked without installing it. Needs Debian or a descendant of it, such as Ubuntu, and
`apt-get update` some time before."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def stop(why: str) -> None:
    sys.exit(f"{Path(sys.argv[0]).name}: {why}")


def called(*command: str, folder: Path) -> None:
    if shutil.which(command[0]) is None:
        stop(f"{command[0]} is missing: this needs Debian or a descendant of it")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        stop(f"{' '.join(command)} failed: {done.stderr.strip()}")


def options(description: str, out: Path) -> argparse.Namespace:
    """Of a script that fetches data: `out`, the folder to write to, and `deb`, the package where it is there already."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=out, help=f"folder to write into (default: {out})")
    parser.add_argument("--deb", type=Path, help="Debian's package, where it is there already")
    return parser.parse_args()


@contextmanager
def unpacked(package: str, deb: Path | None = None) -> Iterator[Path]:
    """The root folder of the package's files; of `deb`, where the package is there already."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if deb is None:
            called("apt-get", "download", package, folder=folder)
        deb = deb.resolve() if deb else next(folder.glob(f"{package}_*.deb"))
        called("dpkg-deb", "-x", str(deb), str(folder), folder=folder)
        yield folder
