"""How the command line looks: help texts with an example, progress, colours and the width of a terminal.

Output that does not go to a terminal has no colours, no progress and no limit on its width, so that other programs can read it.
"""

import argparse
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from .report import table_width

RED, GREEN, YELLOW = "\x1b[31m", "\x1b[32m", "\x1b[33m"
CLEAR, END = "\r\x1b[K", "\x1b[0m"
COLOURS = {"VIOLATED": RED, "MISSED": RED, "UNKNOWN": YELLOW, "missing": YELLOW, "available": GREEN}


def is_terminal(stream: Any) -> bool:
    """Whether escape sequences work there."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def painted(text: str, stream: Any) -> str:
    """Words that tell a state in colours, on a terminal, and where NO_COLOR (https://no-color.org) does not forbid it."""
    if not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return text
    return re.sub(rf"\b({'|'.join(COLOURS)})\b", lambda found: f"{COLOURS[found[0]]}{found[0]}{END}", text)


def columns() -> int | None:
    """Of the terminal that standard output is; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def show(*results: Any, as_json: bool = False) -> None:
    """Print reports and texts below each other; on a terminal they fit its width. as_json: the first, which has `to_json`, alone."""
    if as_json:
        print(results[0].to_json())
        return
    width = columns()
    with table_width(width):
        text = "\n".join(map(str, results))
    if width is not None:  # what is no table
        text = wrapped(text, width)
    print(painted(text, sys.stdout))


def wrapped(text: str, width: int) -> str:
    lines = (textwrap.wrap(line, width, subsequent_indent="    ", break_on_hyphens=False) for line in text.split("\n"))
    return "\n".join("\n".join(parts) for parts in lines)


def say(text: str) -> None:
    """On standard error, within the width of a terminal, above the line of progress; where that is full or closed, the exit status has to
    do."""
    with suppress(OSError):
        if _stage:
            _draw("")
        print(wrapped(text, shutil.get_terminal_size().columns) if sys.stderr.isatty() else text, file=sys.stderr)
        if _stage:
            _draw(_stage)


_stage = ""  # what `progress` shows now


def _draw(line: str) -> None:
    print(f"{CLEAR}{line}", end="", file=sys.stderr, flush=True)


@contextmanager
def progress(stage: str) -> Iterator[None]:
    """Show on the terminal what takes its time, until it is done."""
    global _stage
    if is_terminal(sys.stderr):
        _stage = f"{textwrap.shorten(stage, shutil.get_terminal_size().columns - 5, placeholder='')} ..."
        _draw(_stage)
    try:
        yield
    finally:
        if _stage:
            _stage = ""
            _draw("")


class Parser(argparse.ArgumentParser):
    """Its errors fit the width of the terminal, which a list of choices alone can exceed."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message and sys.stderr.isatty():
            message = wrapped(message, shutil.get_terminal_size().columns)
        super().exit(status, message)


class Help(argparse.HelpFormatter):
    """Fills paragraphs to the width of the terminal; those with indented lines (examples, lists) stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(p if "\n " in p else textwrap.fill(p, width) for p in text.strip().split("\n\n"))
