"""The messages of files of Python: what is raised, what is warned about, and what is printed to standard error.

A text is followed to where it is written: through variables, conditions and `str.format`, to what functions return, and to the arguments
of those that raise what they are given. One that cannot be followed is a message of the kind `unread`, which fails the test.
"""

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

UNREAD = "\0"  # stands for a text that is not found
METHODS = ("removeprefix", "removesuffix", "strip", "get")  # calls that return their text, or most of it
GIVE_BACK = ("wrapped", "str", "dedent", *METHODS)
WAYS_OUT = (("warnings", "warn"), ("sys", "stderr"), ("sys", "exit"))
LISTS = ("join", "listed")  # of values
CONTAINERS = ("tuple", "list", "sorted", "set", "next", "iter", "reversed")
SAYS = ("error", "warning", "critical", "exception", "add_note")  # methods of parsers, loggers and exceptions
PASSES_ON = {  # functions that say what somebody else gives them
    "_show_warning": "Python calls it with each warning",
    "_call": "the native library says it",
    "_draw": "it names the work that is under way",
}


@dataclass(frozen=True)
class Message:
    """`text`: with an ellipsis for what is filled in."""

    where: str
    kind: str
    text: str


@dataclass(frozen=True)
class Text:
    """One text that an expression can be; and what fills it in, with the text before each."""

    template: str
    node: Any
    parts: tuple[tuple[str, ast.FormattedValue], ...] = ()


def called(call: ast.Call) -> str:
    """The last name of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""


def around(node: Any) -> Iterator[Any]:
    """The functions, and then the module, that a node is in, innermost first."""
    while (node := getattr(node, "parent", None)) is not None:
        if isinstance(node, ast.FunctionDef | ast.Module):
            yield node


class Python:
    """The messages of some files of Python. Nodes know their parent and their file."""

    def __init__(self, paths: Iterable[Path], root: Path) -> None:
        self.nodes: list[Any] = []
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text())):
                node.path = str(path.relative_to(root))  # type: ignore[attr-defined]
                self.nodes.append(node)
                for child in ast.iter_child_nodes(node):
                    child.parent = node  # type: ignore[attr-defined]
        self.functions: dict[str, list[ast.FunctionDef]] = defaultdict(list)
        self.classes: dict[str, ast.ClassDef] = {}
        self.calls: dict[str, list[ast.Call]] = defaultdict(list)  # by the name of what is called
        self.keywords: dict[str | None, list[ast.expr]] = defaultdict(list)  # what is given by that name, in all calls
        self.bindings: dict[tuple[Any, str], list[ast.expr]] = defaultdict(list)  # of a name in a function or a module
        self.done: set[tuple[str, Text]] = set()
        self.known: dict[ast.expr, list[Text]] = {}
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef):
                self.functions[node.name].append(node)
            elif isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.Call):
                self.calls[called(node)].append(node)
                for keyword in node.keywords:
                    self.keywords[keyword.arg].append(keyword.value)
            targets, values = binding(node)
            for target in targets:
                for name in (part.id for part in ast.walk(target) if isinstance(part, ast.Name)):
                    self.bindings[next(around(node)), name] += [paired(target, value, name) for value in values]

    def messages(self) -> Iterator[Message]:
        """All of them, and the reasons that they end with."""
        for node in self.nodes:
            for kind, said in self.said(node):
                for text in self.texts(said):
                    yield from (found for found in self.checked(kind, text) if not (passes_on(node) and found.kind == "unread"))
        for node in self.nodes:
            if self.is_hidden(node):
                yield Message(f"{node.path}:{node.lineno}", "unread", ast.unparse(node))

    def is_hidden(self, node: Any) -> bool:
        """Whether a message may be said here unseen: a sentence in their form that no statement says, or a way out by another name."""
        if isinstance(node, ast.ImportFrom):
            return (node.module, *[name.name for name in node.names if name.name in ("warn", "stderr", "exit")]) in WAYS_OUT
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.stderr":
            asked = isinstance(node.parent, ast.Attribute) and node.parent.attr in ("isatty", "write", "flush")
            named = isinstance(node.parent, ast.keyword) and node.parent.arg == "file"
            return not (asked or named or (isinstance(node.parent, ast.Call) and called(node.parent) in ("is_terminal", "_give_up")))
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or isinstance(node.parent, ast.Expr):
            return False
        read = node in self.known or node.parent in self.known
        return not read and re.search(r"\bmust\b.*\bgot\b", node.value, re.DOTALL) is not None

    def said(self, node: Any) -> Iterator[tuple[str, ast.expr]]:
        """What this statement says: its kind, and the expression of its text."""
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield from self.raised(node.exc)
        elif isinstance(node, ast.Assert) and node.msg is not None:
            yield "AssertionError", node.msg
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if function in ("warnings.warn", "warnings.warn_explicit"):
                yield "warning", [*node.args, *filter(None, [keywords.get("message")])][0]
            elif function == "print" and ast.unparse(keywords.get("file", node)) not in ("sys.stdout", ast.unparse(node)):
                yield from (("said", argument) for argument in node.args)
            elif function.endswith("stderr.write") or function in ("sys.exit", "exit", "parser.exit"):
                yield from (("said", argument) for argument in node.args)
            elif isinstance(node.func, ast.Attribute) and node.func.attr in SAYS and len(node.args) == 1:
                yield "said", node.args[0]

    def raised(self, error: Any) -> Iterator[tuple[str, ast.expr]]:
        """The texts of an exception: a call of its class or of a function that returns one, its class, or a name that it was given."""
        if isinstance(error, ast.IfExp):
            yield from (found for side in (error.body, error.orelse) for found in self.raised(side))
        elif isinstance(error, ast.Call):
            functions = self.functions.get(called(error), [])
            for value in (value for function in functions for value in self.returned(function)):
                yield from self.raised(value)
            if not functions and (error.args or error.keywords):
                yield called(error), (error.args or [keyword.value for keyword in error.keywords])[0]
            elif not functions:
                yield from self.raised(error.func)
        elif isinstance(error, ast.Name):
            if error.id in self.classes or hasattr(builtins, error.id):
                if any(isinstance(part, ast.FunctionDef) for part in getattr(self.classes.get(error.id), "body", ())):
                    yield error.id, error  # its text is in a method, where nobody looks
            else:
                values = self.values(error)
                for value in values or ():
                    yield from self.raised(value)
                if values is None:
                    yield "raised", error
        else:
            yield "raised", error

    def returned(self, function: ast.FunctionDef) -> list[ast.expr]:
        """The expressions that a function returns or yields."""
        kinds = (ast.Return, ast.Yield, ast.YieldFrom)
        found = (node for node in ast.walk(function) if isinstance(node, kinds) and next(around(node)) is function)
        return [node.value for node in found if node.value is not None]

    def values(self, name: ast.Name) -> list[ast.expr] | None:
        """All that a name may be: what it is assigned, what it loops over, what callers give; [] for a caught exception; None: unknown."""
        node: Any = name
        while (node := getattr(node, "parent", None)) is not None:
            if isinstance(node, ast.ExceptHandler) and node.name == name.id:
                return []
        for scope in around(name):
            arguments = [*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs] if isinstance(scope, ast.FunctionDef) else []
            found = self.bindings.get((scope, name.id), [])
            if name.id in [argument.arg for argument in arguments]:
                given = self.given(scope, name.id)
                return None if given is None else [*found, *given]
            if found:
                return found
        return None

    def given(self, function: ast.FunctionDef, name: str) -> list[ast.expr] | None:
        """What callers give for a parameter; None: nobody calls it, or it cannot be told."""
        positional = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        if isinstance(function.parent, ast.ClassDef) and positional[:1] in (["self"], ["cls"]):  # type: ignore[attr-defined]
            positional = positional[1:]
        found: list[ast.expr] = []
        calls = [call for call in self.calls[function.name] if "warnings." not in ast.unparse(call.func) and function not in around(call)]
        defaults = dict(zip(reversed(positional), reversed(function.args.defaults), strict=False))
        defaults |= {a.arg: d for a, d in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True) if d is not None}
        for call in calls:
            by_name = [keyword.value for keyword in call.keywords if keyword.arg == name]
            place = positional.index(name) if name in positional else len(call.args)
            if any(isinstance(argument, ast.Starred) for argument in call.args[: place + 1]):
                return None
            found += by_name or call.args[place : place + 1] or filter(None, [defaults.get(name)])
        return found if calls else None

    def texts(self, node: ast.expr) -> list[Text]:
        """All that a text may be; none for what is no text; an ellipsis for a caught exception."""
        if node not in self.known:
            self.known[node] = []  # for a function that calls itself
            self.known[node] = list(dict.fromkeys(self._texts(node)))
        return self.known[node]

    def _texts(self, node: Any) -> list[Text]:
        def every(nodes: Iterable[ast.expr]) -> list[Text]:
            return [text for one in nodes for text in self.texts(one)]

        unread = [Text(UNREAD, node)]
        match node:
            case ast.Constant():
                return [Text(node.value, node)] if isinstance(node.value, str) else []
            case ast.JoinedStr():
                before, parts = "", []
                for part in node.values:
                    if isinstance(part, ast.FormattedValue):
                        parts.append((before, part))
                    before += part.value if isinstance(part, ast.Constant) else "…"
                return [Text(before, node, tuple(parts))]
            case ast.BinOp(op=ast.Add()):
                sides = product(self.texts(node.left), self.texts(node.right))
                return [
                    Text(a.template + b.template, node, a.parts + tuple((a.template + before, part) for before, part in b.parts))
                    for a, b in sides
                ]
            case ast.BinOp(op=ast.Mod()):
                return [Text(re.sub(r"%[^a-zA-Z]*[a-zA-Z]", "…", text.template), node) for text in self.texts(node.left)]
            case ast.IfExp():
                return every((node.body, node.orelse))
            case ast.BoolOp():
                return every(node.values)
            case ast.NamedExpr() | ast.Subscript() | ast.Starred() | ast.FormattedValue() | ast.Await():
                return every([node.value])
            case ast.Tuple() | ast.List() | ast.Set():
                return every(node.elts)
            case ast.Dict():
                return every(node.values)
            case ast.DictComp():
                return every([node.value])
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp():
                return every([node.elt])
            case ast.Name():
                values = self.values(node)
                return unread if values is None else every(values) or ([] if values else [Text("…", node)])
            case ast.Attribute():
                return every(self.keywords[node.attr]) or unread
            case ast.Call(func=ast.Attribute(attr="format")):
                return [Text(re.sub(r"\{[^}]*\}", "…", text.template), node) for text in self.texts(node.func.value)]
            case ast.Call() if called(node) in self.functions and called(node) not in GIVE_BACK:
                functions = self.functions[called(node)]
                if all(isinstance(f.returns, ast.Name) and f.returns.id in ("int", "bool", "float") for f in functions):
                    return []
                return every(value for function in functions for value in self.returned(function))
            case ast.Call() if called(node) in (*GIVE_BACK, *CONTAINERS):
                return every(node.args[:1] if called(node) not in METHODS else [node.func.value])
        return unread

    def checked(self, kind: str, text: Text) -> Iterator[Message]:
        """The message of a text, with what it wants filled in, and the reasons that it ends with. A message that says nothing without its
        reason, or has its "must" from it, is joined with it. There is none where it only prints what was said elsewhere."""
        if (kind, text) in self.done or not re.search("[A-Za-z]{2}|…|\0", text.template):
            return
        self.done.add((kind, text))
        where = f"{text.node.path}:{text.node.lineno}"
        reasons: list[Text] = []
        bare = "…" in text.template and not words(text.template)
        for before, part in text.parts:
            after = text.template[len(before) + 1 :]
            wanted = re.search(r"must (be |have )?$", before)
            who = self.texts(part.value) if not before and part.conversion == -1 else []  # names before a message
            if who and all("…" not in one.template and UNREAD not in one.template for one in who):
                for one in who:
                    yield from self.checked(kind, Text(one.template + after, text.node, text.parts[1:]))
                return
            if "got " in before or not (wanted or before.endswith("… ") or (before[-2:] in ("", ": ") and not after)):
                continue  # a value
            found = self.texts(part.value)
            known = [one for one in found if " " in one.template and UNREAD not in one.template]
            if wanted and known:
                for one in known:
                    yield from self.checked(kind, Text(before + one.template + after, text.node))
                return
            listed = isinstance(part.value, ast.Call) and called(part.value) in LISTS
            a_value = part.conversion != -1 or listed or (wanted is not None and wanted[1] is not None)
            if not a_value and len(known) < len(found) and not any(one.template == "…" for one in found):
                known += [] if passes_on(text.node) else [Text(UNREAD, part)]
            if known and (bare or all(re.match("must |\0", one.template) for one in known)):
                for one in known:
                    yield from self.checked(kind, Text(before + one.template + after, text.node))
                return
            reasons += known or [one for one in found if one.template == "…"]
        passed_on = passes_on(text.node) or (kind == "said" and reasons)
        if UNREAD in text.template or (bare and not passed_on):
            yield Message(where, "unread", ast.unparse(text.node))
        elif not bare:
            yield Message(where, kind, re.sub("…+", "…", text.template))
        for reason in reasons:
            if reason.template != "…":
                yield from self.checked("reason", reason)


def passes_on(node: Any) -> bool:
    return any(getattr(scope, "name", None) in PASSES_ON for scope in around(node))


def words(template: str) -> list[str]:
    """The words that a message itself says about what is wanted, without the name of what says it."""
    wanted = re.sub(r"^[\w.…-]+: ", "", template.split(", got ")[0])
    return [word for word in re.findall(r"[A-Za-z]{2,}", wanted) if word not in ("must", "be", "have", "not", "the")]


def binding(node: Any) -> tuple[list[ast.expr], list[ast.expr]]:
    """What a statement gives values to, and the values, one after the other."""
    match node:
        case ast.Assign():
            return node.targets, [node.value]
        case ast.AnnAssign() | ast.NamedExpr() if node.value is not None:
            return [node.target], [node.value]
        case ast.For() | ast.comprehension():
            return [node.target], node.iter.elts if isinstance(node.iter, ast.Tuple | ast.List) else [node.iter]
    return [], []


def paired(target: ast.expr, value: ast.expr, name: str) -> ast.expr:
    """Of `a, b = 1, 2`: what belongs to the name; else the whole value."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for one, given in zip(target.elts, value.elts, strict=True):
            if any(isinstance(part, ast.Name) and part.id == name for part in ast.walk(one)):
                return given
    return value
