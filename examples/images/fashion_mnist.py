"""Fetch Fashion-MNIST (60,000 + 10,000 images; Xiao et al., 2017, MIT licence) from Debian's package, without installing it.

    python examples/images/fashion_mnist.py --out fashion

For root `apt install dataset-fashion-mnist` is the same.
"""

import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
from debian import options, unpacked

PACKAGE = "dataset-fashion-mnist"
FOLDER = Path("usr/share/datasets/fashion-mnist")


def main() -> None:
    given = options("Fetch Fashion-MNIST from Debian's package, without installing it.", Path("fashion"))
    given.out.mkdir(parents=True, exist_ok=True)
    with unpacked(PACKAGE, given.deb) as folder:
        for path in sorted((folder / FOLDER).glob("*-ubyte.gz")):
            shutil.copy(path, given.out)
            print(given.out / path.name)


if __name__ == "__main__":
    main()
