"""Words a sentence, for every page of the documentation: python tools/sentences.py [PAGE ...].

Counted are paragraphs and list items, and those cells of tables that have 12 words or more. A sentence ends at . ? ! or at the end of its
paragraph, item or cell. Inline code is one word. Code blocks, formulas (indented), headings, and what has fewer than 4 words are left out.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LIMIT = 20  # on average, on every page


def blocks(text: str) -> Iterator[str]:
    """Each paragraph, list item and long cell of a table, without its markup."""
    text = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        new = not line.strip() or re.match(r"\s*([-*+]|\d+\.|#+|\||>|:::|===|!!!)( |$)|\|", line)
        if new and paragraph:
            yield " ".join(paragraph)
            paragraph = []
        if not line.strip() or line.startswith(("    ", "#", ":::", "===", "!!!", "![", "[![")):
            continue
        if line.lstrip().startswith("|"):
            yield from (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1] if len(cell.split()) >= 12)
        else:
            paragraph.append(re.sub(r"^\s*([-*+]|\d+\.|#+|>) ", "", line).strip())


def sentences(text: str) -> list[str]:
    """The sentences of a page of Markdown."""
    found = []
    for block in blocks(text):
        plain = re.sub(r"`[^`]+`", "code", block)
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", plain)
        plain = re.sub(r"[*_#]", "", plain)
        plain = re.sub(r"\b(e\.g|i\.e|et al|vs|approx)\.", r"\1", plain)
        for sentence in re.split(r"(?<=[.?!])\s+(?=[\"'(]?[A-Z0-9c])|(?<=[.?!])[\"')]\s+", plain):
            if len(words(sentence)) >= 4:
                found.append(sentence)
    return found


def words(sentence: str) -> list[str]:
    return [word for word in sentence.split() if re.search(r"\w", word)]


def average(text: str) -> float:
    found = sentences(text)
    return sum(len(words(s)) for s in found) / max(1, len(found))


def main(given: list[str]) -> int:
    pages = [Path(name) for name in given] or PAGES
    print(f"{'page':28} {'sentences':>9} {'words each':>10}  longest")
    failed = False
    for page in pages:
        text = page.read_text()
        found = sentences(text)
        longest = max((len(words(s)) for s in found), default=0)
        print(f"{page.name:28} {len(found):9} {average(text):10.1f}  {longest:7}{'  above ' + str(LIMIT) if average(text) > LIMIT else ''}")
        failed |= average(text) > LIMIT
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
