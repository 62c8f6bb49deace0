"""The documentation as a site: it builds without a warning and without a network, asks a reader's browser for nothing, and leaves no
public name out."""

import ast
import contextlib
import copy
import dataclasses
import doctest
import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_names import names
from python_messages import called

import cram_kernels
from cram_kernels import export, inference, ops
from cram_kernels.integrations.lightning import TwoPassModule
from cram_kernels.integrations.transformers import TwoPassTrainer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools" / "site"))

import docstrings  # noqa: E402

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
    modules = [name for name in PUBLIC if f"{name}.{name.rpartition('.')[2]}" in site["api.html"].ids]
    assert modules == [], "the page shows a module in place of the function of its name"


CONSTANTS = {"cram_kernels.__version__", "cram_kernels.Pattern", "cram_kernels.export.FORMATS"}
MADE_BY_OTHERS = {"cram_kernels.HeldZeros"}  # by a function of ours, not by its constructor


def documented(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def members_of(cls: type) -> dict[str, Any]:
    """Public methods and properties that the package wrote, its own and those of base classes of the package."""
    ours = [base for base in cls.__mro__ if base.__module__.split(".")[0] == "cram_kernels"]
    own = {name: value for base in reversed(ours) for name, value in vars(base).items() if not name.startswith("_")}
    return {name: value for name, value in own.items() if inspect.isroutine(value) or isinstance(value, property)}


DOCUMENTED = {name: documented(name) for name in PUBLIC if name not in CONSTANTS}
MEMBERS = {f"{name}.{own}": m for name, cls in DOCUMENTED.items() if inspect.isclass(cls) for own, m in members_of(cls).items()}
EVERYTHING = DOCUMENTED | MEMBERS


def code_of(thing: Any) -> Any:
    """The function whose parameters and `raise` statements are those of a name; None: a class that nobody but the package makes."""
    if inspect.isclass(thing):
        is_data = dataclasses.is_dataclass(thing) and "__post_init__" not in vars(thing)
        return None if is_data or "__init__" not in vars(thing) else thing.__init__
    return inspect.unwrap(thing.fget if isinstance(thing, property) else thing)


def entries(documentation: str, section: str) -> set[str]:
    """The words before the colon of each entry of a section."""
    found = re.search(rf"^{section}:\n((?:    .*\n|\n)+)", documentation + "\n", re.MULTILINE)
    heads = re.findall(r"^    (\S.*?):(?: |$)", found[1], re.MULTILINE) if found else []
    return {word for head in heads for word in re.findall(r"\w+", head)}


@pytest.mark.parametrize("name", EVERYTHING)
def test_every_public_name_says_what_it_takes_and_raises(name: str) -> None:
    thing, documentation = EVERYTHING[name], inspect.getdoc(EVERYTHING[name])
    assert documentation, "no docstring"
    if (function := code_of(thing)) is None or name in MADE_BY_OTHERS:
        return
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p.name for p in inspect.signature(function).parameters.values() if p.name != "self" and p.kind not in variable]
    assert [p for p in parameters if p not in entries(documentation, "Args")] == []
    body = ast.parse(textwrap.dedent(inspect.getsource(getattr(thing, "__post_init__", function))))
    raised = {called(node.exc) for node in ast.walk(body) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)}
    assert raised - entries(documentation, "Raises") == set()


@pytest.mark.parametrize("name", ["perturb", "step", "plain_step", "first_step", "second_step", "load_state_dict", "attach"])
def test_every_form_of_a_step_has_an_example(name: str) -> None:
    assert "\nExample:\n" in inspect.getdoc(MEMBERS[f"cram_kernels.CrAM.{name}"])


def example_of(documentation: str) -> str:
    """The code under `Example:`; of a dialogue with `>>>`, what is typed."""
    code = re.search(r"```(python|pycon)\n(.*?)^ *```", docstrings.fenced(documentation), re.DOTALL | re.MULTILINE)
    assert code is not None
    text = textwrap.dedent(code[2])
    return "".join(line.source for line in doctest.DocTestParser().get_examples(text)) if code[1] == "pycon" else text


WITH_EXAMPLE = [name for name in DOCUMENTED if ".ops." not in name]  # and those members that have one
WITH_EXAMPLE += [name for name, member in MEMBERS.items() if "\nExample:\n" in (inspect.getdoc(member) or "")]


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_every_public_name_has_an_example_that_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = names()
    for module in (cram_kernels, export, inference):
        found |= {public: getattr(module, public) for public in module.__all__}
    model, criterion = found["model"], found["criterion"]

    def loss(*arguments: Any) -> Any:
        """`loss(model)` of the batch, or `loss(outputs, labels)`."""
        return criterion(*arguments) if len(arguments) == 2 else criterion(model(found["images"]), found["labels"])

    def closure() -> Any:
        value = loss(model)
        value.backward()
        return value

    opt = cram_kernels.CrAM(model, found["torch"].optim.SGD, lr=0.1)
    pruned = copy.deepcopy(model)
    cram_kernels.prune(pruned, cram_kernels.NM(2, 4))
    export.export(pruned, "model.safetensors")
    if name == "cram_kernels.HeldZeros" or name == "cram_kernels.hold_zeros":
        model.load_state_dict(pruned.state_dict())
    found |= {
        "opt": opt,
        "optimizer": opt,
        "closure": closure,
        "loss": loss,
        "pruned_linear": pruned.fc,
        "x": torch.randn(2, 32),
        "copy": copy,
        "json": json,
        "ops": ops,
        "fine_tune": lambda model: None,
    }
    found |= {"LightningModule": object, "Trainer": object, "TwoPassModule": TwoPassModule, "TwoPassTrainer": TwoPassTrainer}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        code = example_of(inspect.getdoc(EVERYTHING[name]) or "")
        exec(compile(code, f"example of {name}", "exec"), found)


def test_the_example_of_the_ops_calls_each_of_them() -> None:
    """The page has one for all, which test_docs.py runs: an op alone makes no sense."""
    example = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)[-1]
    assert [op for op in OPS if f"ops.{op}(" not in example] == []
