"""Every error and warning of the package is on the page that explains them, and in the one form that all have."""

from pathlib import Path

import messages as messages_module
import pytest
from messages import messages

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"


def plain(text: str) -> str:
    return text.replace("`", "").replace("\\|", "|")


def test_the_collector_finds_all_kinds() -> None:
    found = messages()
    kinds = {"reason", "CrAMWarning", "ValueError", "RuntimeError", "BackendUnavailable", "native", "BuildError", "said"}
    assert kinds <= {message.kind for message in found}
    assert len(found) > 300
    texts = {message.text for message in found}
    assert {
        "prune: pattern must be TopK(sparsity=...) or NM(n, m), got …",
        "this torch is built without CUDA",
        "CXX names no compiler that is installed: …",
        "export: refused, nothing written: … has violations in …",
        "…: … must have the shape … of its parameter, got …",
        "packed must have places of rows below …, got …",
        "CRAM_KERNELS_SIMD / set_simd_level: the level must be one that this CPU has (…), got …",
    } <= texts


def test_messages_in_cpp_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commas and brackets in strings and calls, strings in two parts, indices, and what is commented out."""
    source = tmp_path / "a.cpp"
    source.write_text(
        'if (n < 1) refuse(Place("sets", i), "be in [-1, " + std::to_string(n) + ")", show(f(a, b)));\n'
        'check.refuse(\n    place, "be \\"odd\\", "\n    "and more" + std::string(x ? ", or" : ""), std::string("a (b"));\n'
        '// refuse("no", "be read", "this");\n'
        'throw std::runtime_error(std::string(op) + ": " + wrong.what());\n'
        'throw std::invalid_argument("too few, got " + std::to_string(n));\n'
    )
    monkeypatch.setattr(messages_module, "ROOT", tmp_path)
    assert [(found.where, found.text) for found in messages_module.in_native(source)] == [
        ("a.cpp:1", "…: sets[…] must be in [-1, …), got …"),
        ("a.cpp:2", '…: … must be \\"odd\\", and more…, got a (b'),
        ("a.cpp:7", "too few, got …"),
    ]


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
