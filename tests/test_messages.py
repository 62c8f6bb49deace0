"""Every error and warning of the package is on the page that explains them, and in the one form that all have."""

import re
from pathlib import Path

import messages as messages_module
import pytest
from messages import messages
from python_messages import Python

PAGE = Path(__file__).parent.parent / "docs" / "troubleshooting.md"


def plain(text: str) -> str:
    return text.replace("`", "").replace("\\|", "|")


def test_the_collector_finds_all_kinds() -> None:
    found = messages()
    kinds = {"reason", "warning", "ValueError", "RuntimeError", "BackendUnavailable", "native", "BuildError", "said"}
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


WAYS = {  # how a message can be said -> what the collector makes of it; None: it is unread, which fails the tests of the page
    'raise ValueError("op: x must be 1, got 2")': ["op: x must be 1, got 2"],
    'raise ValueError(f"op: {x!r} must be one, got {y}")': ["op: … must be one, got …"],
    'text = "op: x must be one"\nraise ValueError(text)': ["op: x must be one"],
    'raise ValueError("op: x must be one" if x else f"op: {y} must be two")': ["op: x must be one", "op: … must be two"],
    'raise ValueError("op: {} must be one".format(x))': ["op: … must be one"],
    'raise ValueError("op: %s must be one" % x)': ["op: … must be one"],
    'raise ValueError("op: x must " + ("be one" if x else "be two"))': ["op: x must be one", "op: x must be two"],
    'error = ValueError("op: x must be one")\nraise error': ["op: x must be one"],
    'def wrong(x):\n    return ValueError(f"op: {x} must be one")\nraise wrong(1)': ["op: … must be one"],
    'def fail(text):\n    raise ValueError(text)\nfail("op: x must be one")\nfail(text="op: x must be two")': [
        "op: x must be one",
        "op: x must be two",
    ],
    'def need(what):\n    raise ValueError(f"op: x must {what}, got 2")\nneed("be one")': ["op: x must be one, got 2"],
    'def why(x):\n    return "must be plain, got a view" if x else None\nif w := why(x):\n    raise ValueError(f"op: {w}")': [
        "op: must be plain, got a view"
    ],
    'def why(x):\n    return "must be plain, got a view"\nif w := why(x):\n    raise ValueError(f"op: parameter {x!r} {w}, or not")': [
        "op: parameter … must be plain, got a view, or not"
    ],
    'def why(x):\n    return "this machine has none"\nif w := why(x):\n    raise ValueError(f"op: it cannot run here: {w}")': [
        "op: it cannot run here: …",
        "this machine has none",
    ],
    'def remarks(x):\n    yield f"{x} is empty"\n    yield "nothing is left"\nfor one in remarks(x):\n    warnings.warn(f"op: {one}")': [
        "op: … is empty",
        "op: nothing is left",
    ],
    'try:\n    f()\nexcept OSError as error:\n    print(f"op: {error}", file=sys.stderr)': [],
    'for wanted in ("be one", "be two"):\n    raise ValueError(f"op: x must {wanted}")': ["op: x must be one", "op: x must be two"],
    'assert x, "op: x must be one"': ["op: x must be one"],
    'raise SystemExit("op: x must be one")': ["op: x must be one"],
    'sys.exit("op: x must be one")': ["op: x must be one"],
    'parser.error("op: x must be one")': ["op: x must be one"],
    'sys.stderr.write("op: x must be one")': ["op: x must be one"],
    'warnings.warn(message="op: x must be one", category=UserWarning)': ["op: x must be one"],
    'print("op: x must be one", file=sys.stderr)': ["op: x must be one"],
    'print("op: x must be one", file=stream)': ["op: x must be one"],
    "try:\n    f()\nexcept OSError as error:\n    raise error": [],
    'try:\n    f()\nexcept OSError as error:\n    raise ValueError(f"{path}: {error}") from error': None,
    'try:\n    f()\nexcept OSError as error:\n    raise ValueError(f"{path}: the disk says {error}") from error': ["…: the disk says …"],
    "def f(x):\n    raise NotImplementedError": [],
    "raise ValueError(x)": None,
    "raise ValueError(texts[x])": None,
    "raise ValueError(*x)": None,
    "raise ValueError(message=x)": None,
    'raise ValueError(f"op: {x}")': None,
    'raise ValueError(f"op: {x} {y}")': None,
    'raise ValueError(f"op: x must {y}, got {x}")': None,
    "raise x": None,
    "raise self.error": None,
    'def check(op):\n    raise ValueError(f"{op}x must be one")\ncheck("op: ")\ncheck("")': ["op: x must be one", "x must be one"],
    'class Wrong(ValueError):\n    def __init__(self):\n        super().__init__("op: x")\nraise Wrong': None,
    'def fail(text):\n    raise ValueError(text)\nfail(*["op: x must be one"])': None,
    "assert x, y": None,
    "sys.exit(x)": None,
    "parser.error(x)": None,
    "sys.stderr.write(x)": None,
    "warnings.warn(message=x)": None,
    "print(x, file=sys.stderr)": None,
    "print(*x, file=sys.stderr)": None,
    "from warnings import warn": None,
    "stream = sys.stderr": None,
    'found.append("op: x must be one, got 2")': None,
}


@pytest.mark.parametrize("code", WAYS)
def test_messages_in_python_are_read(code: str, tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text(code)
    found = list(Python([source], tmp_path).messages())
    if WAYS[code] is None:
        assert "unread" in [message.kind for message in found]
    else:
        assert [message.text for message in found] == WAYS[code] and "unread" not in [message.kind for message in found]


@pytest.mark.parametrize(
    "code",
    [
        "throw std::runtime_error(text);",
        "throw std::runtime_error(std::string(op) + text);",
        "throw Wrong(1);",
        "throw wrong;",
        'TORCH_CHECK(x, "x must be one");',
        'STD_TORCH_CHECK(x, "x must be one");',
        "refuse(place, wanted, found);",
        'check.refuse("x", wanted, "2");',
        'std::cerr << "x must be one";',
        'fprintf(stderr, "x must be one");',
    ],
)
def test_messages_in_cpp_that_cannot_be_read(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages_module, "ROOT", tmp_path)
    (tmp_path / "a.cpp").write_text(code)
    assert [message.kind for message in messages_module.in_native(tmp_path / "a.cpp")] == ["unread"]


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


def rows() -> list[str]:
    """What the page explains: the first cell of each row that begins with a message, or has several, and the items of its lists."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith(("| `", "- `"))]
    cells = [re.split(r" (?<!\\)\|", line[2:])[0].strip() for line in lines]
    cells = [message for cell in cells for message in cell.split("<br>")]
    return [plain(re.sub(r"` \([^`]*\)$", "`", cell)).strip() for cell in cells]  # without a remark behind it


def test_the_page_has_every_message() -> None:
    missing = [f"{m.where} {m.kind}: {m.text}" for m in messages() if m.kind == "unread" or plain(m.text) not in rows()]
    assert missing == [], (
        "give docs/troubleshooting.md a row with the cause and the cure, with … for what is filled in; "
        "and write what is unread where tests/messages.py finds it"
    )


def test_the_page_has_no_message_that_is_gone() -> None:
    said = [plain(message.text) for message in messages()]
    assert len(rows()) > 300
    assert [row for row in rows() if row not in said] == []
    assert len(set(rows())) == len(rows())
