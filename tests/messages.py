"""The messages of the package, collected from its source: what is raised, what is warned about, and the reasons that messages end with."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "cram_kernels"
WARN = ("warn", "warnings.warn")
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
    where = str(path.relative_to(PACKAGE.parent))
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
        else:
            continue
        if (text := template(argument)) != "…":
            yield Message(f"{where}:{node.lineno}", kind, text)


def messages() -> list[Message]:
    return [message for path in sorted(PACKAGE.rglob("*.py")) for message in in_source(path)]
