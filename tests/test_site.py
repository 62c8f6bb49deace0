"""The documentation as a site: it builds without a warning and without a network, asks a reader's browser for nothing, and leaves no
public name out."""

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import cram_kernels
from cram_kernels import export, inference, ops

ROOT = Path(__file__).parent.parent
NO_NETWORK = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}  # nobody listens there
OPS = [node.name for node in ast.parse(Path(ops.__file__).read_text()).body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
INTEGRATIONS = ["lightning.TwoPassModule", "transformers.TwoPassTrainer"]
PUBLIC = [
    *(f"cram_kernels.{name}" for name in cram_kernels.__all__),
    *(f"cram_kernels.export.{name}" for name in export.__all__),
    *(f"cram_kernels.inference.{name}" for name in inference.__all__),
    *(f"cram_kernels.integrations.{name}" for name in INTEGRATIONS),
    *(f"cram_kernels.ops.{name}" for name in OPS),
]


class Page(HTMLParser):
    """What a browser would load for a page, and the places in it that can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.ids.add(given.get("id", ""))
        if tag in ("script", "img", "iframe", "source", "video", "object", "embed"):
            self.loaded += [given[name] for name in ("src", "data") if name in given]
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """The pages by name, of a strict build: a warning fails it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | NO_NETWORK | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    for sheet in folder.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text()), f"{sheet.name} loads from the network"
    return {str(path.relative_to(folder)): Page(path) for path in folder.rglob("*.html")}


def test_a_browser_loads_nothing_from_the_network(site: dict[str, Page]) -> None:
    assert len(site) > 10
    for name, page in site.items():
        assert page.loaded, name
        assert [url for url in page.loaded if re.match(r"(https?:)?//", url)] == [], name


def test_the_reference_has_every_public_name(site: dict[str, Page]) -> None:
    assert [name for name in PUBLIC if name not in site["api.html"].ids] == []
