"""The commands `check` and `export`."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..patterns import NM
from .check import check_weights
from .files import read, weights_in
from .write import FORMATS, export

OK, VIOLATED, CANNOT = 0, 1, 2


def add_commands(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="is every tensor of a file 2:4, on which axis, and who can run it?",
        description="Exit status: 0, what can be n:m and is not excluded is; 1, a tensor is not, or none is; 2, the file cannot be read.",
    )
    check.add_argument("file", help="safetensors, torch checkpoint (loaded with weights_only) or .onnx")
    check.add_argument("--json", action="store_true", help="everything as JSON instead of a table")
    check.set_defaults(run=run_check)
    write = commands.add_parser(
        "export",
        help="write the weights of a file in another format, checked",
        description="Exit status: 0; 1, refused: a tensor violates the pattern; 2, the file cannot be read or an argument is wrong.",
    )
    write.add_argument("file", help="safetensors or torch checkpoint (loaded with weights_only)")
    write.add_argument("out", type=Path, help="replaced in one step when all is written and checked")
    write.add_argument("--format", choices=FORMATS, default="safetensors")
    write.add_argument("--prune", action="store_true", help="prune what violates the pattern, instead of refusing it")
    write.add_argument("--model", metavar="MODULE:FUNCTION", help="for onnx: makes the model for the weights; the module is imported")
    write.add_argument("--input", metavar="1,3,224,224", action="append", default=[], help="for onnx: shape of a float32 input, each")
    write.set_defaults(run=run_export)
    for command in (check, write):
        command.add_argument("--pattern", type=_pattern, default=NM(2, 4), metavar="2:4")
        command.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="names that may stay dense; may be repeated")


def _pattern(text: str) -> NM:
    try:
        n, m = map(int, text.split(":"))
        return NM(n, m)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be N:M, as 2:4, got {text!r}") from error


def run_check(options: argparse.Namespace) -> int:
    try:
        report = check_weights(weights_in(options.file), options.pattern, options.exclude)
    except (OSError, ValueError, ImportError, TypeError) as error:
        return _cannot("check", error)
    print(report.to_json() if options.json else report)
    return OK if report.ok else VIOLATED


def run_export(options: argparse.Namespace) -> int:
    common: dict[str, Any] = {"pattern": options.pattern, "exclude": options.exclude}
    try:
        weights = read(options.file)
        if not options.prune and (violating := check_weights(weights_in(options.file), **common).violating):
            print(f"export: refused, nothing written: {violating[0].name} has violations in {violating[0].describe()}", file=sys.stderr)
            return VIOLATED
        common |= {"format": options.format, "prune": options.prune}
        if options.format == "onnx":
            inputs = tuple(torch.randn([int(size) for size in text.split(",")]) for text in options.input)
            report = export(_model(options.model, weights), options.out, example_inputs=inputs, **common)
        else:
            report = export(weights, options.out, **common)
    except (OSError, ValueError, ImportError, TypeError, AttributeError, RuntimeError) as error:
        return _cannot("export", error)
    before, after = (Path(path).stat().st_size for path in (options.file, options.out))
    print(f"{report.summary()}\n{options.out}: {after:,} bytes, {options.format}; {options.file}: {before:,}")
    return OK


def _model(factory: str | None, weights: dict[str, Any]) -> nn.Module:
    module, _, function = (factory or "").partition(":")
    if not module or not function:
        raise ValueError(f"export: --model must be MODULE:FUNCTION for format 'onnx', got {factory!r}")
    sys.path.insert(0, "")  # as python -m does not everywhere
    model = getattr(importlib.import_module(module), function)()
    model.load_state_dict(weights)
    return model


def _cannot(command: str, error: Exception) -> int:
    print(f"{command}: {error}", file=sys.stderr)
    return CANNOT
