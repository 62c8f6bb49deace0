"""Words a sentence, for every page of the documentation and the public docstrings of every module: python tools/sentences.py [FILE ...].

Counted are paragraphs and list items, and those cells of tables that have 12 words or more. A sentence ends at . ? ! or at the end of its
paragraph, item or cell. Inline code is one word. Code blocks, formulas (indented, but for what belongs to a list item, a tab or a note),
headings, tags, and what has fewer than 4 words are left out. In a docstring an entry under `Args:` and its like is a paragraph, without the
name before its colon.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools" / "site"))

import notebooks  # noqa: E402

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.*") if path.suffix in (".md", ".ipynb")),
]
MODULES = sorted((ROOT / "cram_kernels").rglob("*.py"))
LIMIT = 20  # on average, on every page and in every module
SECTIONS = ("Args:", "Attributes:", "Returns:", "Yields:", "Raises:", "Warns:")
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")  # as many backticks at its end as at its beginning
CELL = re.compile(r"(?<!\\)\|")
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|et al|vs|cf|approx|incl|resp|no|nos|fig|figs|sec|eq|p|pp|ch|dr|st)\.(?=\s)", re.IGNORECASE)


def blocks(text: str) -> Iterator[str]:
    """Each paragraph, list item and long cell of a table, without its markup."""
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = CODE.sub("CODE", text)
    text = re.sub(r"</?[a-zA-Z][^>\n]*>|<https?:[^>]*>", " ", text)
    paragraph: list[str] = []
    inside = False  # a list item, a tab or a note: what is indented below it belongs to it
    for line in [*text.splitlines(), ""]:
        new = not line.strip() or re.match(r"\s*([-*+]|\d+\.|#+|\||>|:::|===|!!!)( |$)|\|", line)
        if new and paragraph:
            yield " ".join(paragraph)
            paragraph = []
        if line.strip() and not line.startswith(" "):
            inside = re.match(r"([-*+]|\d+\.|===|!!!|\?\?\?) ", line) is not None
        formula = line.startswith("    ") and not inside
        if formula or not line.strip() or line.lstrip().startswith(("#", ":::", "===", "!!!", "???", "![", "[![")):
            continue
        if line.lstrip().startswith("|"):
            yield from (cell.strip() for cell in CELL.split(line.strip().strip("|")) if len(cell.split()) >= 12)
        else:
            paragraph.append(re.sub(r"^\s*([-*+]|\d+\.|#+|>) ", "", line).strip())


def sentences(text: str) -> list[str]:
    """The sentences of a page of Markdown."""
    found = []
    for block in blocks(text):
        plain = re.sub(r"!?\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", block)
        plain = re.sub(r"[*_#]", "", plain)
        plain = ABBREVIATIONS.sub(r"\1", plain)
        for sentence in re.split(r"(?<=[.?!])\s+(?=[\"'(]?[A-Z0-9])|(?<=[.?!])[\"')]+\s+(?=[\"'(]?[A-Z0-9])", plain):
            if len(words(sentence)) >= 4:
                found.append(sentence)
    return found


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Those of a module and of its public classes, functions and methods, as Markdown."""
    if isinstance(tree, ast.Module | ast.ClassDef | ast.FunctionDef):
        yield from filter(None, [ast.get_docstring(tree)])
    if not isinstance(tree, ast.FunctionDef):
        for node in ast.iter_child_nodes(tree):
            if not getattr(node, "name", "_").startswith("_"):
                yield from docstrings(node)


def markdown(docstring: str) -> str:
    """A docstring with each entry of its sections as a paragraph, and without its example."""
    lines, section = [], ""
    for line in docstring.splitlines():
        if line and not line.startswith(" "):
            section = line if line in (*SECTIONS, "Example:") else ""
        if not section:
            lines.append(line)
        elif section in SECTIONS and line.strip() and line != section:
            entry = re.fullmatch(r"    ([\w*., /]+: )?(\S.*)", line)  # else it goes on with the one above
            lines += ["", entry[2]] if entry else [line.strip()]
    return "\n".join([*lines, ""])


def text_of(page: Path) -> str:
    """Markdown, of a notebook and of the docstrings of a module, too."""
    if page.suffix == ".py":
        return "\n\n".join(markdown(docstring) for docstring in docstrings(ast.parse(page.read_text())))
    return notebooks.markdown(page) if page.suffix == ".ipynb" else page.read_text()


def words(sentence: str) -> list[str]:
    return [word for word in sentence.split() if re.search(r"\w", word)]


def average(text: str) -> float:
    found = sentences(text)
    return sum(len(words(s)) for s in found) / max(1, len(found))


def main(given: list[str]) -> int:
    pages = [Path(name) for name in given] or [*PAGES, *MODULES]
    print(f"{'page or module':28} {'sentences':>9} {'words each':>10}  longest")
    failed = False
    for page in pages:
        text = text_of(page)
        found = sentences(text)
        longest = max((len(words(s)) for s in found), default=0)
        print(f"{page.name:28} {len(found):9} {average(text):10.1f}  {longest:7}{'  above ' + str(LIMIT) if average(text) > LIMIT else ''}")
        failed |= average(text) > LIMIT
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
