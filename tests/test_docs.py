"""README and guides: every code block runs, every command exists, every link leads somewhere. A Python block is executed, each page from
top to bottom in a namespace of its own (doc_names.py); one that cannot run here is preceded by `<!-- skip: next "needs ..." -->`.
Notebooks are run by test_tutorial.py."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import torch
from doc_names import names
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from cram_kernels import cli

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from sentences import PAGES, text_of  # noqa: E402

LANGUAGES = {"python", "sh", "text", "json", "mermaid"}
MAKE = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = set(re.findall(r"^(\w+) = \[\"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def check_commands(example: Example) -> None:
    for line in example.parsed.splitlines():
        if words := shlex.split(line, comments=True):
            check_command(words)


def check_options(arguments: list[str]) -> None:
    """The command has a help text, and that has every option."""
    command = [word for word in arguments[:1] if not word.startswith("-")]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as left:
        cli.main([*command, "--help"])
    assert left.value.code == 0
    assert [word for word in arguments if word.startswith("--") and word not in shown.getvalue()] == []


def check_command(words: list[str]) -> None:
    """A command of ours must be one that there is, with options that it takes; others belong under a skip, with the reason."""
    while re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    program, *arguments = words
    if program in ("python", "python3") and arguments[0] == "-m" and arguments[1] in ("cram_kernels", "pip", "pytest"):
        program, *arguments = arguments[1:]
    if program == "make":
        assert {word for word in arguments if "=" not in word} <= MAKE, words
    elif program == "pip":
        wanted = [extra for word in arguments for part in re.findall(r"\.\[(.*)\]", word) for extra in part.split(",")]
        assert arguments[0] == "install" and set(wanted) <= EXTRAS, words
    elif program in ("cram-kernels", "cram_kernels"):
        check_options(arguments)
    elif program in ("python", "python3") and arguments[0] == "-m":
        module = ROOT / Path(*arguments[1].split("."))
        assert module.with_suffix(".py").exists() or module.is_dir(), words
    elif program in ("python", "python3"):
        assert (ROOT / arguments[0]).exists(), words
    elif program in ("pytest", "torchrun"):
        arguments = [word for word in arguments if not word.startswith("-") and not word.isdigit()]
        assert (ROOT / arguments[0]).exists(), words
    else:
        raise AssertionError(f"{shlex.join(words)}: not a command of this project; skip it with the reason why it cannot run here")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_code_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    parsers: list[Any] = [SkipParser(), CodeBlockParser("sh", check_commands)]
    if page.suffix == ".md":
        parsers.append(PythonCodeBlockParser())
    (tmp_path / "page.md").write_text(text_of(page))
    document = Document.parse(str(page if page.suffix == ".md" else tmp_path / "page.md"), *parsers)
    document.namespace.update(names())
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest as reason:
            assert str(reason).startswith("needs "), f"{page.name}:{example.line}: a skip must say what is needed: needs ..."
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_language(page: Path) -> None:
    """So that none escapes the test above."""
    fences = re.findall(r"^ *```(.*)$", text_of(page), re.MULTILINE)
    assert len(fences) % 2 == 0
    assert {fence.split()[0] if fence else "" for fence in fences[::2]} <= LANGUAGES


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    text: Any = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in found:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and target.name != "api.md":  # those come from docstrings: mkdocs checks them
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_fits_a_terminal() -> None:
    assert [line for line in (ROOT / "README.md").read_text().splitlines() if len(line) > 120] == []


def test_the_map_of_the_code_is_right() -> None:
    """Every path on docs/house.md is there, and the table of the optimizer has every file."""
    text = (ROOT / "docs" / "house.md").read_text()
    paths = re.findall(r"`((?:csrc|cram_kernels|tests|tools|benchmarks)/[\w/.]*)`", text)
    assert len(paths) > 25
    assert [path for path in paths if not (ROOT / path).exists()] == []
    files = {path.name for path in (ROOT / "cram_kernels" / "optim").glob("*.py")} - {"__init__.py"}
    assert {file for file in files if f"| `{file}` |" not in text} == set()


def test_a_sparsity_is_named_wherever_a_reader_sees_it() -> None:
    """`TopK(0.9)` reads as "keep 90 %"."""
    seen = [*PAGES, *ROOT.glob("docs/*.ipynb"), *ROOT.glob("examples/**/*.py"), *ROOT.glob("cram_kernels/**/*.py")]
    unnamed = [f"{name_of(path)}: {found}" for path in seen for found in re.findall(r"TopK\([\d.][^)]*\)", path.read_text())]
    assert len(seen) > 50 and not unnamed, unnamed
