"""The package's docstrings, as mkdocstrings wants them: what stands under `Example:` is code, and `cram_kernels.prune` is the function, not
the module of that name."""

from typing import Any

import griffe


def fenced(text: str) -> str:
    """The docstring with the block under each `Example:` line fenced as Python."""
    lines, result = text.splitlines(), []
    while lines:
        result.append(line := lines.pop(0))
        if line.strip() != "Example:":
            continue
        margin = len(line) - len(line.lstrip())
        block = []
        while lines and (not lines[0].strip() or len(lines[0]) - len(lines[0].lstrip()) > margin):
            block.append(lines.pop(0))
        spaces = " " * (margin + 4)
        language = "pycon" if block and block[0].lstrip().startswith(">>>") else "python"
        result += [f"{spaces}```{language}", *"\n".join(block).rstrip().splitlines(), f"{spaces}```", ""]
    return "\n".join(result)


class Examples(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        for name, member in list(pkg.members.items()):
            if isinstance(member, griffe.Module) and pkg.imports.get(name) == f"{pkg.path}.{name}.{name}":
                pkg.members[name] = griffe.Alias(name, member.members[name], parent=pkg)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
