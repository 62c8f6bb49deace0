"""The messages of the package, collected from its source: what is raised, in Python, in C++ and while it is built; what is warned about;
what the command line prints to standard error; and the reasons that messages end with."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from python_messages import Message, Python

ROOT = Path(__file__).parent.parent
SOURCES = [
    *sorted((ROOT / "cram_kernels").rglob("*.py")),
    *(ROOT / name for name in ("native_build.py", "setup.py", "benchmarks/compare.py", "benchmarks/run.py", "benchmarks/suite.py")),
]
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


def split(text: str, mark: str) -> list[str]:
    """The parts of a C++ expression between marks that are in no brackets and no string."""
    parts, depth = [""], 0
    for token in re.findall(r'"(?:\\.|[^"\\])*"|[\s\S]', text):
        depth += (token in tuple("([{")) - (token in tuple(")]}"))
        if token == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def inside(text: str) -> str:
    """Of a text that follows an opening bracket: up to the one that closes it."""
    depth, found = 1, ""
    for token in re.findall(r'"(?:\\.|[^"\\])*"|[\s\S]', text):
        depth += (token in tuple("([{")) - (token in tuple(")]}"))
        if depth == 0:
            break
        found += token
    return found


def cpp_template(expression: str) -> str:
    """The text of a C++ string, or of a sum of them, with an ellipsis for each part that is computed."""
    found = ""
    for part in split(expression, "+"):
        part = re.sub(r'^std::string\(("(?:\\.|[^"\\])*")\)$', r"\1", part)
        strings = re.fullmatch(r'(?:"((?:\\.|[^"\\])*)"\s*)+', part)
        found += "".join(re.findall(r'"((?:\\.|[^"\\])*)"', part)) if strings else "…"
    return re.sub("…+", "…", found)


SAYS = r"""(?<!void\ )\brefuse\( | \bthrow\ (?!;)[^;({]*[({]? |
    \w*(?<!ERROR_CODE)_CHECK\w*\( | TORCH_WARN\w*\( | printf\( | std::cerr | perror\("""
PASSED_ON = {  # what is thrown with a text that somebody else gives
    'std::string(op) + ": " + show(place) + " must " + wanted + ", got " + found': "refuse() itself",
    'std::string("packed must have ") + what + std::to_string(limit) + ", got " + std::to_string(found)': "that of product.cpp",
    'std::string(op) + ": " + wrong.what()': "it names the op in what was thrown",
}


def in_native(path: Path) -> Iterator[Message]:
    """Those of one file of C++: `refuse(place, wanted, found)`, `refuse(op, place, wanted, found)`, and what is thrown."""
    text = re.sub(r"//[^\n]*", "", path.read_text())
    for match in re.finditer(SAYS, text, re.VERBOSE):
        where = f"{path.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}"
        inner = inside(text[match.end() :])
        arguments = split(inner, ",")
        wanted = arguments[0]
        if re.fullmatch(r"throw std::\w+\(", match[0]):
            if inner in PASSED_ON:
                continue
            found = cpp_template(wanted)
        elif match[0] != "refuse(":
            found = wanted = ""
        elif len(arguments) == 3 and path.name == "product.cpp":  # its own: what, limit, found
            found = f"packed must have {cpp_template(wanted)}…, got …"
        else:
            place, wanted, got = arguments[-3:] if len(arguments) in (3, 4) else ("", "", "")
            if (path.name, wanted) == ("check.h", "wanted"):
                continue
            name = re.match(r'(Place\(|\{)?"([^"]+)"', place)
            found = f"…: {name[2] + '[…]' * bool(name[1]) if name else '…'} must {cpp_template(wanted)}, got {cpp_template(got)}"
        said = re.search(r"[a-z]{2}", cpp_template(wanted)) is not None
        yield Message(where, "native" if said else "unread", found if said else match[0] + inner)


@cache
def messages() -> list[Message]:
    return [*Python(SOURCES, ROOT).messages(), *(message for path in NATIVE for message in in_native(path))]


def listed(text: str) -> bool:
    """Whether a message that was raised is one of those, as far as more than "must be ..., got ..." of it is known."""
    specific = (m.text for m in messages() if len(re.sub(r"\b(must|be|have|got)\b|[^a-z]", "", m.text)) > 3)
    return any(re.fullmatch(".*".join(map(re.escape, known.split("…"))), text, re.DOTALL) for known in specific)
