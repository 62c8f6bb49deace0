"""Export: check, prune where asked, write, read back, and only then take the file's place."""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..atomic import replacing, target
from ..params import DTYPES, check_unperturbed, globs_of
from ..patterns import NM
from ..warning import warn
from . import bitmask, container, cutlass
from .check import check_weights
from .files import read_safetensors
from .onnx_model import write_onnx
from .report import NMReport, Row
from .weights import Weight, is_plain, weights_of

Encoder = Callable[[str, Tensor, Row], dict[str, Tensor] | None]

ENCODERS: dict[str, Encoder] = {  # format -> the tensors to store for one, or None: as it is
    "safetensors": lambda name, t, row: None,
    bitmask.NAME: lambda name, t, row: bitmask.encode(name, t),
    cutlass.NAME: cutlass.encode,
}
FORMATS = (*ENCODERS, "onnx")


@torch.no_grad()
def export(
    model: nn.Module | Mapping[str, Any],
    path: str | Path,
    format: str = "safetensors",
    *,
    pattern: NM = NM(2, 4),  # noqa: B008 (frozen)
    exclude: Iterable[str] = (),
    prune: bool = False,
    example_inputs: tuple[Any, ...] | None = None,
    onnx_options: Mapping[str, Any] | None = None,
) -> NMReport:
    """Write a pruned model to one file, which is read back and compared before it takes the place of `path`.

    Args:
        model: a module, or a state dict (not for "onnx"). It is not changed.
        path: of the file, NAME.safetensors, or NAME.onnx; a link is followed. A process that is killed leaves the old file, or none.
        format: "safetensors": dense with zeros; every reader reads it. "bitmask": smaller, for `read`. "cutlass-sm80": matrices packed for
            SM 8.x. "onnx": the model with dense weights, run through ONNX Runtime and compared.
        pattern: what every tensor but excluded ones and embedding tables must hold, as far as its shape allows: see `check_nm`.
        exclude: patterns of names that may stay dense, as in `fnmatch`.
        prune: prune what violates the pattern, in the file alone. Without it such a tensor is refused. Of a module no buffer is touched; a
            state dict does not tell buffers from weights: exclude them.
        example_inputs: "onnx": what the model is traced and compared with.
        onnx_options: "onnx": more arguments of `torch.onnx.export`, such as kwargs, dynamic_shapes or opset_version.

    Returns:
        What `check_nm` says of the exported weights.

    Raises:
        ValueError: a tensor violates the pattern (count and first place are given), an argument is wrong, or the file does not give back
            what was written. Nothing at `path` was changed.
        RuntimeError: weights of the module are perturbed, within a step of an optimizer.
        ImportError: the format's package is not installed.
        OSError: the file cannot be written. The old one is as it was.

    Example:
        prune(model, NM(2, 4))
        export(model, "model.safetensors")
    """
    path = Path(path)
    if not isinstance(pattern, NM):
        raise ValueError(f"export: pattern must be NM(n, m), got {pattern!r}")
    if not isinstance(prune, bool):
        raise ValueError(f"export: prune must be True or False, got {prune!r}")
    if format not in FORMATS:
        raise ValueError(f"export: format must be one of {', '.join(FORMATS)}, got {format!r}")
    suffix = ".onnx" if format == "onnx" else ".safetensors"
    if path.suffix != suffix:
        raise ValueError(f"export: path must end in {suffix} for format {format!r}, got {str(path)!r}")
    if not target("export", path).parent.is_dir():
        raise ValueError(f"export: path must be in a folder that is there, got {str(path)!r}")
    if isinstance(model, nn.Module):
        check_unperturbed("export", model.named_parameters())
    if format == "onnx":
        return _export_onnx(model, path, pattern, exclude, prune, example_inputs, dict(onnx_options or {}))
    if example_inputs is not None or onnx_options is not None:
        raise ValueError(f"export: example_inputs and onnx_options must be absent for format {format!r}, got some")
    weights = storable("export", model)
    report = _conforming(weights, pattern, exclude, prune)
    tensors: dict[str, Tensor] = {}
    stored: dict[str, str] = {}
    for weight, row in zip(weights, report.rows, strict=True):
        parts = ENCODERS[format](weight.name, weight.tensor, row)
        if parts is not None:
            stored[weight.name] = format
        for name, t in (parts or {weight.name: weight.tensor}).items():
            if name in tensors:
                raise ValueError(f"export: names must differ from those of packed parts, got {name!r} twice")
            tensors[name] = t
    with replacing("export", path) as partial:
        container.save(partial, tensors, {container.KEY: json.dumps(container.manifest(format, report, stored))})
        _verify(partial, weights, stored, path)
    return report


def storable(op: str, model: nn.Module | Mapping[str, Any]) -> list[Weight]:
    """Contiguous copies on the CPU: the files are row-major, and tensors that share memory are each stored. Of what is no tensor and holds
    no weights (extra state, a version) one warning gives the names."""
    found, left_out = [], []
    entries = model.state_dict() if isinstance(model, nn.Module) else model
    for weight in weights_of(model):
        t, own = weight.tensor, entries.get(weight.name)
        if not weight.is_tensor and not weight.unchecked:
            left_out.append(weight.name)
            continue
        if weight.why_dense or t.layout != torch.strided or t.is_meta or (isinstance(own, Tensor) and not is_plain(own)):
            kind = f"one of class {type(own).__name__}: export the model before it is converted"
            why = weight.why_dense or ("a meta tensor" if t.is_meta else f"layout {t.layout}" if t.layout != torch.strided else kind)
            raise ValueError(f"{op}: tensor {weight.name!r} must be dense and have data, got {why}")
        found.append(dataclasses.replace(weight, tensor=t.cpu().contiguous().clone()))
    if left_out:
        warn(f"{op}: left out, since a safetensors file holds tensors only: {', '.join(left_out)}")
    return found


def _conforming(weights: list[Weight], pattern: NM, exclude: Iterable[str], prune: bool) -> NMReport:
    """The report of weights of which none violates the pattern; pruned in place where asked."""
    exclude = globs_of("export: ", exclude)
    report = check_weights(weights, pattern, exclude)
    if prune and (names := {row.name for row in violating_rows(report)}):
        _prune_([weight for weight in weights if weight.name in names], pattern)
        before = {row.name: row.zeros or 0 for row in report.rows if row.name in names}
        report = check_weights(weights, pattern, exclude)
        report = dataclasses.replace(
            report, pruned={row.name: (row.zeros or 0) - before[row.name] for row in report.rows if row.name in names}
        )
    if violating := violating_rows(report):
        row, *others = violating
        more = f", and {len(others)} more tensors violate it" if others else ""
        how = "exclude it" if prune else "prune it (prune=True), or exclude it"
        raise ValueError(
            f"export: tensor {row.name!r} must be {pattern} along axis {row.axis}, got violations in {row.describe()}{more}; {how}"
        )
    return report


def violating_rows(report: NMReport) -> list[Row]:
    """Embedding tables may be dense, as `cram_kernels.prune` leaves them."""
    return [row for row in report.violating if row.kind != "embedding"]


def _prune_(weights: list[Weight], pattern: NM) -> None:
    for weight in weights:
        if weight.tensor.dtype not in DTYPES:
            raise ValueError(f"export: tensor {weight.name!r} must be float32, bfloat16 or float16 to be pruned, got {weight.tensor.dtype}")
        if weight.tensor.isnan().any():
            raise ValueError(f"export: tensor {weight.name!r} must not be NaN to be pruned, got NaN")
        pruned = weight.tensor.contiguous()
        ops.prune_nm_([pruned], (), [1], pattern.n, pattern.m)
        if pruned is not weight.tensor:
            weight.tensor.copy_(pruned)


def _verify(partial: Path, weights: list[Weight], stored: Mapping[str, str], path: Path) -> None:
    found = read_safetensors(partial)
    for weight in weights:
        same = _same_numbers if stored.get(weight.name) == cutlass.NAME else same_bits
        for name in (weight.name, *weight.aliases):
            if not same(found[name], weight.tensor):
                raise ValueError(f"export: {path} must give back {name!r}, got another tensor")


def _bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8).view(-1, max(1, t.element_size()))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _same_numbers(a: Tensor, b: Tensor) -> bool:
    """To the bit, but that a -0 may be +0: packing has no place for it beside two numbers."""
    zeros = (a == 0) & (b == 0)
    return same_bits(a.masked_fill(zeros, 0), b.masked_fill(zeros, 0))


def _export_onnx(
    model: nn.Module | Mapping[str, Any],
    path: Path,
    pattern: NM,
    exclude: Iterable[str],
    prune: bool,
    example_inputs: tuple[Any, ...] | None,
    options: dict[str, Any],
) -> NMReport:
    if not isinstance(model, nn.Module):
        raise ValueError(f"export: model must be a torch.nn.Module for format 'onnx', got {type(model).__name__}")
    if not isinstance(example_inputs, tuple):
        raise ValueError(
            f"export: example_inputs must be a tuple of the model's inputs for format 'onnx', got {type(example_inputs).__name__}"
        )
    model = copy.deepcopy(model).cpu().eval()
    example_inputs, options = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().cpu(), (example_inputs, options))
    assert example_inputs is not None
    report = _conforming(weights_of(model), pattern, exclude, prune)
    with replacing("export", path) as partial:
        write_onnx(model, partial, report, example_inputs, options)
    return report
