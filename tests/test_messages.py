"""Every error and warning of the package is on the page that explains them, and in the one form that all have."""

from pathlib import Path

from messages import messages

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"


def plain(text: str) -> str:
    return text.replace("`", "").replace("\\|", "|")


def test_the_collector_finds_all_kinds() -> None:
    found = messages()
    assert {"reason", "CrAMWarning", "ValueError", "RuntimeError", "BackendUnavailable"} <= {message.kind for message in found}
    assert len(found) > 150
    texts = {message.text for message in found}
    assert "prune: pattern must be TopK(sparsity=...) or NM(n, m), got …" in texts
    assert "this torch is built without CUDA" in texts


def test_the_page_has_every_message() -> None:
    page = plain(PAGE.read_text())
    missing = [f"{message.where} {message.kind}: {message.text}" for message in messages() if plain(message.text) not in page]
    assert missing == [], "give docs/troubleshooting.md a row with the cause and the cure, with … for what is filled in"


def test_the_page_has_no_message_that_is_gone() -> None:
    """A row begins with a message in backticks, which must be in the source, or a part of one."""
    known = [plain(message.text) for message in messages()]
    sources = "".join(path.read_text() for path in (PAGE.parent.parent / "cram_kernels").rglob("*.py"))
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith(("| `", "- `"))]
    assert len(rows) > 150
    for row in rows:
        message = plain(row.lstrip("|- ").split(" | ")[0]).strip().removesuffix(" |")
        assert message in known or message in sources, row
