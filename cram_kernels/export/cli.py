"""The commands `check` and `export`."""

import argparse
import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..patterns import NM
from .check import check_weights
from .files import read, weights_in
from .load import fitting
from .weights import weights_of
from .write import FORMATS, export

OK, VIOLATED, CANNOT, UNCHECKED = 0, 1, 2, 3
FILES = "safetensors, torch checkpoint (loaded with weights_only), index.json of a model in parts"


def add_commands(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="is every tensor of a file 2:4, on which axis, and who can run it?",
        description="Exit status: 0, what can be n:m and is not excluded is; 1, a tensor is not, or none is; 2, the file cannot be read; "
        "3, something that may be a weight could not be checked.",
    )
    check.add_argument("file", help=f"{FILES}, or .onnx")
    check.add_argument("--json", action="store_true", help="everything as JSON instead of a table")
    check.set_defaults(run=run_check)
    write = commands.add_parser(
        "export",
        help="write the weights of a file in another format, checked",
        description="Exit status: 0; 1, refused: a tensor violates the pattern; 2, the file cannot be read or an argument is wrong.",
    )
    write.add_argument("file", type=Path, help=FILES)
    write.add_argument("out", type=Path, help="replaced in one step when all is written and checked")
    write.add_argument(
        "--format",
        choices=FORMATS,
        help="safetensors: dense with zeros; bitmask: smaller, for read(); cutlass-sm80: packed for SM 8.x; onnx: needs --model, --input. "
        "Without it, onnx where OUT ends in .onnx, else safetensors",
    )
    write.add_argument("--prune", action="store_true", help="prune what violates the pattern, instead of refusing it")
    write.add_argument("--model", metavar="MODULE:FUNCTION", help="for onnx: makes the model for the weights; the module is imported")
    write.add_argument(
        "--input",
        metavar="1,3,224,224",
        action="append",
        default=[],
        help="for onnx: shape of an input, in the dtype of the weights or in one that is named (1,128:int64); once for each input",
    )
    write.set_defaults(run=run_export)
    for command in (check, write):
        command.add_argument("--key", metavar="A.B", help="where a torch checkpoint has its state dict; the usual keys if absent")
        command.add_argument(
            "--pattern", type=_pattern, default=NM(2, 4), metavar="2:4", help="N:M, at most N of M input channels; 2:4 if absent"
        )
        command.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="names that may stay dense; may be repeated")


def _pattern(text: str) -> NM:
    try:
        n, m = map(int, text.split(":"))
        return NM(n, m)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be N:M, as 2:4, got {text!r}") from error


def run_check(options: argparse.Namespace) -> int:
    try:
        report = check_weights(weights_in(options.file, options.key), options.pattern, options.exclude)
        print(report.to_json() if options.json else report)
    except Exception as error:
        return _cannot("check", error)
    if report.unchecked and not report.violating:
        return UNCHECKED
    return OK if report.ok else VIOLATED


def run_export(options: argparse.Namespace) -> int:
    options.format = options.format or ("onnx" if options.out.suffix == ".onnx" else "safetensors")
    common: dict[str, Any] = {"pattern": options.pattern, "exclude": options.exclude}
    try:
        source: Any = read(options.file, options.key)
        source = _model(options.model, source) if options.format == "onnx" else source
        before = options.file.stat().st_size  # now: it may be the one that is replaced
        if not options.prune and (violating := check_weights(weights_of(source), **common).violating):
            print(f"export: refused, nothing written: {violating[0].name} has violations in {violating[0].describe()}", file=sys.stderr)
            return VIOLATED
        common |= {"format": options.format, "prune": options.prune}
        if options.format == "onnx":
            common["example_inputs"] = tuple(_input(text, source) for text in options.input)
        report = export(source, options.out, **common)
        print(f"{report.summary()}\n{options.out}: {options.out.stat().st_size:,} bytes, {options.format}; {options.file}: {before:,}")
    except Exception as error:
        return _cannot("export", error)
    return OK


def _model(factory: str | None, weights: dict[str, Any]) -> nn.Module:
    """The model with these weights, in their dtypes."""
    module, _, function = (factory or "").partition(":")
    if not module or not function:
        raise ValueError(f"export: --model must be MODULE:FUNCTION for format 'onnx', got {factory!r}")
    sys.path.insert(0, "")  # as python -m does not everywhere
    try:
        model = getattr(importlib.import_module(module), function)()
    except Exception as error:  # the user's code
        raise ValueError(f"export: --model {factory} must make a model, got {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"export: --model {factory} must make a torch.nn.Module, got {type(model).__name__}")
    weights = fitting("export", model, weights)
    for name, p in model.named_parameters():
        p.data = p.data.to(weights[name].dtype) if name in weights else p.data
    model.load_state_dict(weights)
    return model


def _input(text: str, model: nn.Module) -> torch.Tensor:
    """1,3,224,224: normal numbers in the dtype of the model; 1,128:int64: zeros and ones."""
    shape, _, name = text.partition(":")
    dtype = getattr(torch, name, None) if name else next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"export: --input must be a shape, and after a colon a dtype of torch, got {text!r}")
    sizes = [int(size) for size in shape.split(",")]
    return torch.randn(sizes).to(dtype) if dtype.is_floating_point else torch.randint(2, sizes).to(dtype)


def _cannot(command: str, error: Exception) -> int:
    """Whatever it was: Python's own exit status for an exception, 1, would say that a tensor violates the pattern."""
    if not isinstance(error, OSError | ValueError | ImportError | TypeError):
        traceback.print_exception(error)
    print(f"{command}: {str(error).removeprefix(f'{command}: ')}", file=sys.stderr)
    return CANNOT
