"""The messages of the package, collected from its source: what is raised, in Python, in C++ and while it is built; what is warned about;
what the command line prints to standard error; and the reasons that messages end with."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = [
    *sorted((ROOT / "cram_kernels").rglob("*.py")),
    *(ROOT / name for name in ("native_build.py", "setup.py", "benchmarks/compare.py", "benchmarks/run.py", "benchmarks/suite.py")),
]
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))
WARN = ("warn", "warnings.warn")
SAY = ("sys.exit", "say")  # and print() to standard error
REASONS = (
    "_load",
    "_load_cpu",
    "_load_cuda",
    "_too_old",
    "why_unfit",
    "_why_unfit",
    "_remarks",
)  # return or yield what a message ends with


@dataclass(frozen=True)
class Message:
    """`text`: with an ellipsis for what is filled in."""

    where: str
    kind: str
    text: str


def template(node: ast.expr) -> str:
    """The text of a string, an f-string or a sum of them, with an ellipsis for each part that is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "…"


def in_source(path: Path) -> Iterator[Message]:
    """Those of one file. Errors that are passed on, and those without a text, have none."""
    tree = ast.parse(path.read_text())
    where = str(path.relative_to(ROOT))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name in REASONS:
            for node in ast.walk(function):
                if isinstance(node, ast.Return | ast.Yield) and isinstance(node.value, ast.expr) and (text := template(node.value)) != "…":
                    yield Message(f"{where}:{node.lineno}", "reason", text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            kind, argument = ast.unparse(node.exc.func), node.exc.args[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in WARN and node.args:
            kind, argument = "CrAMWarning", node.args[0]
        elif isinstance(node, ast.Call) and node.args and is_said(node):
            kind, argument = "said", node.args[0]
        else:
            continue
        if (text := template(argument)) != "…" and (kind != "said" or re.search(r"\w", text)):
            yield Message(f"{where}:{node.lineno}", kind, text)


def is_said(call: ast.Call) -> bool:
    streams = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "file"]
    return ast.unparse(call.func) in SAY or (ast.unparse(call.func) == "print" and streams == ["sys.stderr"])


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


def in_native(path: Path) -> Iterator[Message]:
    """Those of one file of C++: `refuse(place, wanted, found)`, `refuse(op, place, wanted, found)`, and what is thrown."""
    text = re.sub(r"//[^\n]*", "", path.read_text())
    for match in re.finditer(r"(?<!void )\brefuse\(|throw std::\w+\(", text):
        where = f"{path.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}"
        arguments = split(inside(text[match.end() :]), ",")
        if "throw" in match[0]:
            found = cpp_template(arguments[0])
        elif path.name == "product.cpp":  # its own: what, limit, found
            found = f"packed must have {cpp_template(arguments[0])}…, got …"
        else:
            place, wanted, got = arguments[-3:]
            name = re.match(r'(Place\(|\{)?"([^"]+)"', place)
            found = f"…: {name[2] + '[…]' * bool(name[1]) if name else '…'} must {cpp_template(wanted)}, got {cpp_template(got)}"
        if re.search(r"[a-z]", re.sub(r"\b(packed|must|be|have|got)\b", "", found)):  # else it fills in what others say
            yield Message(where, "native", found)


def listed(text: str) -> bool:
    """Whether a message that was raised is one of those, as far as more than "must be ..., got ..." of it is known."""
    specific = (m.text for m in messages() if len(re.sub(r"\b(must|be|have|got)\b|[^a-z]", "", m.text)) > 3)
    return any(re.fullmatch(".*".join(map(re.escape, known.split("…"))), text, re.DOTALL) for known in specific)


@cache
def messages() -> list[Message]:
    return [message for path in SOURCES for message in in_source(path)] + [message for path in NATIVE for message in in_native(path)]
