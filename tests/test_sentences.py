"""The documentation is readable: short sentences on average, counted by tools/sentences.py, which is checked by hand-made pages."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import sentences


@pytest.mark.parametrize("page", sentences.PAGES, ids=lambda page: str(page.relative_to(sentences.ROOT)))
def test_a_page_has_short_sentences(page: Path) -> None:
    text = page.read_text()
    longest = max(sentences.sentences(text), key=lambda s: len(sentences.words(s)), default="")
    assert sentences.average(text) <= sentences.LIMIT, f"the longest: {longest}"


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("One two three four. Five six seven eight nine!\n", [4, 5]),
        ("One two three\nfour five.\n\nSix seven eight nine\n", [5, 4]),
        ("- one two three four\n- five six seven eight nine\n", [4, 5]),
        ("# A heading of five words\n\nToo short.\n", []),
        ("```python\nnot = counted at all here\n```\nBut this is counted.\n", [4]),
        ("    a formula that is not counted\n\n<!-- nor is this comment here -->\n", []),
        ("The call `prune(model, pattern)` is one word.\n", [6]),
        ("A [link of four words](page.md) counts its text.\n", [8]),
        ("| short cell | " + "word " * 12 + "|\n", [12]),
        ("It works, e.g. with torch. Then it stops, see below.\n", [5, 5]),
    ],
)
def test_the_counter(text: str, counts: list[int]) -> None:
    assert [len(sentences.words(s)) for s in sentences.sentences(text)] == counts
