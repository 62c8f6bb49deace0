"""The documentation is readable: short sentences on average, on every page and in the public docstrings of every module. They are counted
by tools/sentences.py, which is checked by hand-made pages."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import sentences


@pytest.mark.parametrize("page", [*sentences.PAGES, *sentences.MODULES], ids=lambda page: str(page.relative_to(sentences.ROOT)))
def test_a_page_has_short_sentences(page: Path) -> None:
    text = sentences.text_of(page)
    longest = max(sentences.sentences(text), key=lambda s: len(sentences.words(s)), default="")
    assert sentences.average(text) <= sentences.LIMIT, f"the longest: {longest}"


MODULE = '''"""The module has this sentence of eight words."""

class Public:
    """It counts this sentence, too.

    Args:
        first, second: the name before a colon
            is left out.
        third: so this is one more paragraph.

    Example:
        not = counted at all
    """

    def method(self):
        """Methods are counted as well.

        Returns:
            What comes back, in a sentence.
        """

        def inner():
            """What is inside of them is not counted."""

    def _private(self):
        """What is private is not counted."""

def _hidden():
    """Nor is this."""
'''


def test_the_docstrings_of_a_module(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(MODULE)
    found = sentences.sentences(sentences.text_of(tmp_path / "a.py"))
    assert [len(sentences.words(s)) for s in found] == [8, 5, 8, 6, 5, 6]


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
        ("As in Sec. 4 of Peste et al. the step, cf. Fig. 2, is two passes.\n", [16]),
        ("It takes 3.5 ms here. compare it with copies of it.\n", [11]),  # a small letter begins no sentence
        ("Write `a. B. C` here first. `prune` comes after all that.\n", [4, 5]),  # code is one word, and may begin a sentence
        ("The call `` `x` or y. Z `` is one word too.\n", [7]),
        ("| call | `` a `|` b. C d e f g h i j k l m `` |\n", []),
        ("| one two three four five six seven eight. Nine ten eleven twelve \\| more. |\n", [8, 5]),
        ("one two three four | five\n--- | ---\n", [5]),  # no table without a bar before it: a paragraph
        ("~~~text\nnot. Counted at all here\n~~~\n````md\n```\nnor is this one here\n```\n````\nBut this is counted.\n", [4]),
        (
            "- one two three four\n    five six seven\n\n    Eight nine ten eleven.\n\nIt ends here, then.\n\n    a formula here\n",
            [7, 4, 4],
        ),
        ('!!! note\n    It is prose, and it counts.\n\n=== "Tab"\n\n    So does this one here.\n', [6, 5]),
        ("See <https://a.b/c. D> and <b>this bold text</b> there.\n", [6]),
        ('(It says so in brackets.) And it goes on here. He said "so it is." Then he went away.\n', [5, 5, 5, 4]),
        ("**Bold words to begin with.** Then _the rest_ follows here.\n", [5, 5]),
        ("A [link of four words][ref] counts its text.\n", [8]),
    ],
)
def test_the_counter(text: str, counts: list[int]) -> None:
    assert [len(sentences.words(s)) for s in sentences.sentences(text)] == counts
