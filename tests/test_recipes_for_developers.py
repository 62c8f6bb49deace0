"""docs/developing.md names every place of an argument and of an op, and no other."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from cram_kernels import _native, ops, reference

ROOT = Path(__file__).parent.parent
CODE = [*sorted((ROOT / "csrc").rglob("*.*")), *sorted((ROOT / "cram_kernels").rglob("*.py"))]


def steps(title: str) -> list[str]:
    """The files that the numbered list under a title names first in each entry."""
    page = (ROOT / "docs" / "developing.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^\d+\. `([^`]+)`:", page, re.MULTILINE)


def holding(word: str) -> list[str]:
    """The files of the package in which a word occurs."""
    pattern = re.compile(rf"(?<!\w){word}(?!\w)")
    return [str(path.relative_to(ROOT)) for path in CODE if pattern.search(path.read_text(encoding="utf-8"))]


def test_places_of_an_argument() -> None:
    """A new argument is written where an argument of the same kind is: in five places at most."""
    assert sorted(steps("Add an argument")) == sorted(holding("momentum_buffers"))
    found = {place for place in (*holding("dampening"), *holding("one_minus_dampening")) if not place.startswith("cram_kernels/optim")}
    assert found == {*steps("Add an argument"), "csrc/sgd.h"} and len(found) == 5


def test_places_of_an_op() -> None:
    """Seven at most, and each of them has the op: by its name, or by the name of its struct."""
    places = steps("Add an op")
    assert len(places) <= 7
    named = {*holding("grad_norm"), *holding("GradNorm")}
    others = {place for place in named if place.startswith(("cram_kernels/optim", "cram_kernels/compat", "cram_kernels/integrations"))}
    assert named - others == {*places}


@pytest.mark.parametrize("name", _native.host.ops())
def test_signature_is_the_schema(name: str) -> None:
    """The public function, the reference and the schema take the same arguments, with the same defaults."""
    schema = {a.name: a for a in getattr(torch.ops.cram_kernels, name).default._schema.arguments}
    for function in (getattr(ops, name), getattr(reference, name)):
        parameters = inspect.signature(function).parameters
        assert {*parameters} == {*schema}
        assert [n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY] == [n for n, a in schema.items() if not a.kwarg_only]
        for parameter, argument in ((p, schema[n]) for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY):
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            assert default == (argument.default_value if argument.has_default_value() else [])
