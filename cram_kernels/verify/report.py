"""Sections and the report of them, as Markdown and JSON."""

import hashlib
import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import _native
from ..atomic import replacing
from ..version import __version__

Row = dict[str, Any]
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")
PASSED, FAILED, NOT_RUN, ABSENT, DRY = "passed", "FAILED", "NOT RUN", "absent", "dry run: the code ran, on the CPU"


@dataclass
class Section:
    """One thing that was verified. `absent`: there is nothing to verify here; `not_run`: there is, and it was not."""

    name: str
    status: str = PASSED
    why: str = ""
    rows: list[Row] = field(default_factory=list)
    step: str = ""  # of the command, which made it: "graphs", "graphs: large"

    def compare(self, what: str, wrong: int) -> None:
        """A comparison with the reference in which `wrong` elements differ."""
        self.rows.append({"what": what, "elements that differ": wrong})
        if wrong:
            self.status = FAILED

    def require(self, holds: bool, why: str) -> None:
        if not holds:
            self.status, self.why = FAILED, why

    def shown(self) -> list[Row]:
        """The rows for a terminal: of comparisons those that differ."""
        return [row for row in self.rows if row.get("elements that differ", 1)]

    def absent(self, why: str) -> "Section":
        self.status, self.why = ABSENT, why
        return self

    def not_run(self, why: str) -> "Section":
        self.status, self.why = NOT_RUN, why
        return self


@dataclass
class Report:
    """All sections, and what they ran on."""

    dry_run: bool
    facts: list[Row]  # a machine each
    sections: list[Section] = field(default_factory=list)
    code: str = ""  # hash_of_code

    @property
    def verdict(self) -> str:
        if self.dry_run:
            return "DRY RUN: no GPU was used, nothing below was measured or verified on one"
        wrong = [s.name for s in self.sections if s.status in (FAILED, NOT_RUN)]
        return f"NOT VERIFIED: {', '.join(wrong)}" if wrong else "VERIFIED"

    def ok(self) -> bool:
        return not any(s.status == FAILED or (s.status == NOT_RUN and not self.dry_run) for s in self.sections)

    def markdown(self) -> str:
        facts = {name: self.head()[name] for name in ("cram_kernels", "code", "torch", "python")}
        lines = [f"# cram_kernels on a GPU: {self.verdict}", ""]
        lines += [", ".join(f"{name} {value}" for name, value in row.items()) for row in [facts, *self.facts]]
        lines += ["", *table([{"section": s.name, "": s.status, "why": s.why} for s in self.sections])]
        for section in self.sections:
            if section.rows:
                lines += ["", f"## {section.name}", "", *table(section.rows)]
        return "\n".join([*lines, ""])

    def done(self, step: str) -> bool:
        """Whether nothing of this step is left to be run: a failure is."""
        own = [s.status for s in self.sections if s.step == step]
        return bool(own) and set(own) <= {PASSED, ABSENT, DRY}

    def put(self, step: str, sections: list[Section]) -> None:
        """In place of what the report has of this step."""
        for section in sections:
            section.step = step
        self.sections = [*(s for s in self.sections if s.step != step), *sections]

    def take_over(self, folder: Path) -> None:
        """The sections of an earlier run, of the same code under the same torch on the same machines: what runs now replaces its own."""
        record = self.paths(folder)[1]
        if not record.exists():
            return
        earlier = json.loads(record.read_text())
        if all(earlier.get(name) == value for name, value in self.head().items()):
            self.sections = [Section(**section) for section in earlier["sections"]]

    def head(self) -> Row:
        software = {"cram_kernels": __version__, "code": self.code, "torch": torch.__version__, "python": platform.python_version()}
        return {"dry_run": self.dry_run} | software | {"machines": self.facts}

    def paths(self, folder: Path) -> list[Path]:
        stem = folder / ("dry_run" if self.dry_run else "verify_gpu")
        return [stem.with_suffix(".md"), stem.with_suffix(".json")]

    def write(self, folder: Path) -> list[Path]:
        """Both files; their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        record = {
            "verdict": self.verdict,
            **self.head(),
            "sections": [vars(section) for section in self.sections],
        }
        paths = self.paths(folder)
        for path, text in zip(paths, (self.markdown(), json.dumps(record, indent=1, allow_nan=False) + "\n"), strict=True):
            with replacing("verify-gpu", path) as new:  # whatever stops the process, the last whole report stays
                new.write_text(text)
        return paths


def hash_of_code(tests: Path) -> str:
    """Of every source of the package and of its native code, as far as they are here, of the libraries that are loaded, and of these tests:
    results of other code are not taken over."""
    root = Path(__file__).parents[2]
    folders = {"package": root / "cram_kernels", "csrc": root / "csrc", "tests": tests}
    files = {f"{name}/{p.relative_to(at)}": p for name, at in folders.items() for p in at.rglob("*") if p.suffix in SOURCES}
    files |= {f"loaded/{p.name}": p for p in _native._FOLDER.glob("*.so")}
    files |= {p.name: p for p in root.glob("native_build.py")}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def table(rows: list[Row]) -> list[str]:
    """Lines of a Markdown table."""
    columns = list({column: None for row in rows for column in row})
    lines = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]
