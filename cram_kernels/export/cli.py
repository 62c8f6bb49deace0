"""The commands `check`, `prune` and `export`."""

import argparse
import dataclasses
import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..patterns import NM, TopK
from ..report import Report
from ..terminal import Help, progress, say, show
from .check import check_weights
from .files import read, weights_in
from .load import fitting
from .prune_file import prune_file
from .weights import weights_of
from .write import FORMATS, export, violating_rows

OK, VIOLATED, UNCHECKED = 0, 1, 3
OPTIONS = {"prune_embeddings=True": "--prune-embeddings", "scope='tensor'": "--scope tensor", "exclude=": "--exclude"}
FILES = "safetensors, torch checkpoint (loaded with weights_only), index.json of a model in parts"


def add_commands(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="is every weight in a file N:M, and which engines run it faster?",
        description="Says for every tensor whether it is 2:4 along its input channels, and which engines run that faster.\n\n"
        "Exit status: 0, what can be N:M and is not excluded is; 1, a tensor is not, or none is; 2, the file cannot be read; "
        "3, something that may be a weight could not be checked.",
        epilog="Example:\n  cram-kernels check model.safetensors --exclude 'head.*'",
        formatter_class=Help,
    )
    check.add_argument("file", help=f"{FILES}, or .onnx")
    check.set_defaults(run=run_check)
    prune = commands.add_parser(
        "prune",
        help="prune the weights in a file in one shot",
        description="Sets the smallest weights in a file to zero, and writes another file. All tensors of 2 or more dims are ranked "
        "together; a matrix with the name of an embedding table stays dense. A torch checkpoint keeps all else that it holds.\n\n"
        "A network with batch norm then needs tune_batchnorm(), which takes data.\n\n"
        "Exit status: 0; 2, nothing was written: the file cannot be read or pruned, or an argument is wrong.",
        epilog="Example:\n  cram-kernels prune model.pt pruned.pt --sparsity 0.9 --exclude 'fc.*'\n"
        "  cram-kernels prune model.safetensors pruned.safetensors --pattern 2:4",
        formatter_class=Help,
    )
    prune.add_argument("file", type=Path, help=FILES)
    prune.add_argument("out", type=Path, help="NAME.safetensors, or a torch checkpoint; replaced in one step when all is written")
    rule = prune.add_mutually_exclusive_group(required=True)
    rule.add_argument("--sparsity", type=_sparsity, metavar="0.9", help="the share of the weights that becomes zero")
    rule.add_argument("--pattern", type=_pattern, metavar="2:4", help="N:M, keep N of every M weights along the input channels")
    prune.add_argument("--scope", choices=("model", "tensor"), help="with --sparsity: rank all tensors together (default), or each alone")
    prune.add_argument("--prune-embeddings", action="store_true", help="prune what has the name of an embedding table too")
    prune.set_defaults(run=run_prune)
    write = commands.add_parser(
        "export",
        help="write the weights of a file for an engine, checked",
        description="Checks that the weights are 2:4, writes them in a format that engines read, and reads the file back.\n\n"
        "Exit status: 0; 1, refused: a tensor violates the pattern; 2, the file cannot be read or an argument is wrong.",
        epilog="Example:\n  cram-kernels export checkpoint.pt model.safetensors --prune\n"
        "  cram-kernels export checkpoint.pt model.onnx \\\n      --model torchvision.models:resnet50 --input 1,3,224,224",
        formatter_class=Help,
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
        command.add_argument(
            "--pattern",
            type=_pattern,
            default=NM(2, 4),
            metavar="2:4",
            help="N:M, at most N of every M weights along the input channels; 2:4 if absent",
        )
    for command in (check, prune, write):
        command.add_argument("--key", metavar="A.B", help="where a torch checkpoint has its state dict; the usual keys if absent")
        command.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="names that may stay dense; may be repeated")
        command.add_argument("--json", action="store_true", help="the report as JSON instead of a table")


def _pattern(text: str) -> NM:
    try:
        n, m = map(int, text.split(":"))
        return NM(n, m)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be N:M, as 2:4, got {text!r}") from error


def _sparsity(text: str) -> float:
    try:
        return TopK(sparsity=float(text)).sparsity
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1), 0.9 for 90 %, got {text!r}") from error


def run_check(options: argparse.Namespace) -> int:
    with progress(f"checking {options.file}"):
        report = check_weights(weights_in(options.file, options.key), options.pattern, options.exclude)
    show(report, as_json=options.json)
    if report.unchecked and not report.violating:
        return UNCHECKED
    return OK if report.ok else VIOLATED


def run_prune(options: argparse.Namespace) -> int:
    if options.scope and options.pattern:
        raise ValueError("--scope must be absent for --pattern, which ranks within groups")
    pattern = options.pattern or TopK(sparsity=options.sparsity, scope=options.scope or "model")
    more = {"key": options.key, "prune_embeddings": options.prune_embeddings, "progress": progress}
    report = _in_options(prune_file(options.file, options.out, pattern, options.exclude, **more))
    show(report, f"{options.out}: {options.out.stat().st_size:,} bytes", as_json=options.json)
    return OK


def _in_options(report: Report) -> Report:
    """With the names that arguments of `prune` have on the command line."""

    def said(text: str) -> str:
        for argument, option in OPTIONS.items():
            text = text.replace(argument, option)
        return text

    layers = tuple(dataclasses.replace(layer, why_dense=layer.why_dense and said(layer.why_dense)) for layer in report.layers)
    return dataclasses.replace(report, layers=layers, remarks=tuple(map(said, report.remarks)))


def run_export(options: argparse.Namespace) -> int:
    options.format = options.format or ("onnx" if options.out.suffix == ".onnx" else "safetensors")
    if options.format != "onnx" and (options.model is not None or options.input):
        raise ValueError(f"export: --model and --input must be absent for format {options.format!r}, got some")
    if options.format == "onnx" and not options.input:
        raise ValueError("export: --input must be given for format 'onnx', got none")
    common: dict[str, Any] = {"pattern": options.pattern, "exclude": options.exclude}
    with progress(f"reading {options.file}"):
        source: Any = read(options.file, options.key)
        source = _model(options.model, source) if options.format == "onnx" else source
    before = options.file.stat().st_size  # now: it may be the one that is replaced
    if not options.prune and (violating := violating_rows(found := check_weights(weights_of(source), **common))):
        if options.json:
            show(found, as_json=True)
        more = f", and {len(violating) - 1} more tensors violate {options.pattern}" if len(violating) > 1 else ""
        say(f"export: refused, nothing written: {violating[0].name} has violations in {violating[0].describe()}{more}")
        return VIOLATED
    common |= {"format": options.format, "prune": options.prune}
    if options.format == "onnx":
        common["example_inputs"] = tuple(_input(text, source) for text in options.input)
    with progress(f"writing {options.out}"), _silent_logs():
        report = export(source, options.out, **common)
    after = options.out.stat().st_size
    if options.json:
        show(report, as_json=True)
    else:
        pruned = f"pruned: {sum(report.pruned.values()):,} weights of {len(report.pruned)} tensors set to zero; " if report.pruned else ""
        show(f"{pruned}{report.summary()}", f"{options.out}: {after:,} bytes, {options.format}; {options.file}: {before:,}")
    return OK


@contextmanager
def _silent_logs() -> Iterator[None]:
    """Torch's exporter logs what it lacks and tries, also where all goes well; what fails is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


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
    sizes = [int(size) if size.strip().isdecimal() else 0 for size in shape.split(",")]
    if isinstance(dtype, torch.dtype) and 0 not in sizes:
        with suppress(RuntimeError):  # too large, or a dtype that no numbers become
            return torch.randn(sizes).to(dtype) if dtype.is_floating_point else torch.randint(2, sizes).to(dtype)
    raise ValueError(f"export: --input must be a shape, and after a colon a dtype of torch, got {text!r}")
