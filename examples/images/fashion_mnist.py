"""Fetch Fashion-MNIST (60,000 + 10,000 images; Xiao et al., 2017, MIT licence) from Debian's package, without installing it.

    python examples/images/fashion_mnist.py --out fashion

Needs Debian or a descendant of it, such as Ubuntu, and `apt update` some time before. For root `apt install dataset-fashion-mnist` is
the same.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "dataset-fashion-mnist"
FOLDER = Path("usr/share/datasets/fashion-mnist")


def called(*command: str, folder: Path) -> None:
    if shutil.which(command[0]) is None:
        sys.exit(f"fashion_mnist.py: {command[0]} is missing: this needs Debian or a descendant of it")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"fashion_mnist.py: {' '.join(command)} failed: {done.stderr.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch Fashion-MNIST from Debian's package, without installing it.")
    parser.add_argument("--out", type=Path, default=Path("fashion"))
    parser.add_argument("--deb", type=Path, help="the package, where it is there already")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.deb is None:
            called("apt-get", "download", PACKAGE, folder=folder)
        deb = given.deb.resolve() if given.deb else next(folder.glob(f"{PACKAGE}_*.deb"))
        called("dpkg-deb", "-x", str(deb), str(folder), folder=folder)
        for path in sorted((folder / FOLDER).glob("*-ubyte.gz")):
            shutil.copy(path, given.out)
            print(given.out / path.name)


if __name__ == "__main__":
    main()
