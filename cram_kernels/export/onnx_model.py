"""The format "onnx": the model with dense initialisers, zeros included, run through ONNX Runtime and compared with torch."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .check import check_weights
from .container import KEY, manifest
from .onnx_weights import onnx_package, onnx_weights
from .report import NMReport
from .weights import Weight, weights_of

LIMIT = 2**31 - 2**24  # bytes of weights: protobuf writes no message of 2 GiB, and the graph needs a few
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # largest difference, as a share of the largest output


def write_onnx(model: nn.Module, path: Path, report: NMReport, example_inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Export a model in eval mode on the CPU; one file, so at most 2 GB. example_inputs on the CPU; options may hold kwargs of the model.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: the model is too large, does not run on the inputs or cannot be exported. In the file a weight is not n:m along its
            input channels. ONNX Runtime cannot run the file, or its outputs differ.
    """
    onnx = onnx_package()
    runtime = _runtime()
    weights = weights_of(model)
    if (half := next((weight for weight in weights if weight.tensor.dtype == torch.bfloat16), None)) is not None:
        raise ValueError(
            f"export: ONNX Runtime must be able to run the file on the CPU, so that it can be compared, got {half.name!r} in bfloat16: "
            "convert the model to float16 or float32"
        )
    if (size := sum(weight.tensor.nbytes for weight in weights)) > LIMIT:
        raise ValueError(
            f"export: model must have at most {LIMIT:,} bytes of weights for one ONNX file, got {size:,}: "
            "export with torch.onnx.export(model, inputs, path, external_data=True), and check that file"
        )
    try:
        program = torch.onnx.export(model, example_inputs, dynamo=True, verbose=False, **options)
    except Exception as error:  # torch's own, a page with advice for its developers
        raise _not_exported(model, example_inputs, options.get("kwargs") or {}, error) from error
    assert program is not None  # it is one where no file is named
    _names_of_the_model(program.model.graph, weights)
    program.model.metadata_props[KEY] = json.dumps(manifest("onnx", report, {}))
    onnx.save(program.model_proto, str(path))
    _same_pattern(path, report)
    _same_outputs(runtime, path, model, example_inputs, options.get("kwargs") or {})


def _runtime() -> Any:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx.export needs it)
    except ImportError as error:
        raise ImportError(f"format 'onnx' needs onnxscript and onnxruntime: pip install 'cram_kernels[onnx]' ({error})") from error
    return onnxruntime


def _not_exported(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], error: BaseException) -> ValueError:
    """The likeliest reason first: the model does not run on these inputs."""
    try:
        with torch.no_grad():
            model(*inputs, **kwargs)
    except Exception as own:
        shapes = ", ".join(str(list(t.shape)) for t in torch.utils._pytree.tree_leaves((inputs, kwargs)) if isinstance(t, Tensor))
        return ValueError(f"export: model must run on inputs of shape {shapes or 'none'}, got {_told(own)}")
    return ValueError(f"export: model must be one that torch.onnx.export takes, got {_told(error)}")


def _told(error: BaseException) -> str:
    """The first line of what caused it, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error)).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}"


def _names_of_the_model(graph: Any, weights: list[Weight]) -> None:
    """The exporter stores some matrices transposed, as val_7: they get their names back."""
    names: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for weight in weights:
        if weight.tensor.dim() == 2:
            t = weight.tensor.t().contiguous()
            names.setdefault(_content(t.shape, t.view(torch.uint8).numpy().tobytes()), []).extend((weight.name, *weight.aliases))
    for name in [name for name in graph.initializers if name.startswith("val_")]:
        value = graph.initializers[name]
        if len(value.shape) == 2 and value.const_value is not None:
            ours = names.get(_content(value.shape, value.const_value.tobytes()), ())
            value.name = next((own for own in ours if own not in graph.initializers), name)


def _content(shape: Iterable[int], data: bytes) -> tuple[tuple[int, ...], bytes]:
    return tuple(shape), hashlib.blake2b(data).digest()


def _same_pattern(path: Path, report: NMReport) -> None:
    """What is n:m in the model is n:m along the axis that engines read in the file, and no other matrix violates it."""
    rows = check_weights(onnx_weights(path), report.pattern).rows
    holding = {row.name for row in report.holding}
    others = [row for row in report.rows if not row.holds]
    names, sizes = {row.name for row in others}, {(row.numel, row.zeros) for row in others}  # the exporter renames some
    for row in rows:
        known = row.name in names or (row.name not in holding and (row.numel, row.zeros) in sizes)
        if not row.violates or row.kind == "embedding" or known:
            continue
        raise ValueError(
            f"export: tensor {row.name!r} must be {report.pattern} along its input channels in the ONNX file, got violations in "
            f"{row.describe()}"
        )


def _same_outputs(runtime: Any, path: Path, model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*inputs, **kwargs))
    values = [t for t in torch.utils._pytree.tree_leaves((inputs, kwargs)) if isinstance(t, Tensor)]
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [x.name for x in session.get_inputs()]
        found = session.run(None, {name: t.numpy() for name, t in zip(names, values, strict=True)})
    except Exception as error:  # ONNX Runtime's own: it has no bfloat16 kernels for the CPU, for one
        raise ValueError(
            f"export: ONNX Runtime must be able to run the file on the CPU, so that it can be compared, got {error}"
        ) from error
    wanted = [t for t in expected if isinstance(t, Tensor)]
    if len(wanted) != len(found):
        raise ValueError(f"export: ONNX Runtime must give {len(wanted)} outputs, as torch does, got {len(found)}")
    for i, (want, got) in enumerate(zip(wanted, map(torch.from_numpy, found), strict=True)):
        _same_output(i, want, got)


def _same_output(i: int, want: Tensor, got: Tensor) -> None:
    """Equal where not finite; elsewhere a difference is measured by the number itself or by the scale of the ordinary ones, whichever is
    larger.

    Raises:
        ValueError: the outputs differ.
    """
    if want.shape != got.shape:
        raise ValueError(f"export: output {i} of ONNX Runtime must have the shape {list(want.shape)}, got {list(got.shape)}")
    tolerance, want, got = TOLERANCE.get(want.dtype, 0.0), want.double(), got.double()
    allowed = tolerance * want.abs().clamp_min(_scale(want))
    same = (want == got) | (want.isnan() & got.isnan())
    same |= want.isfinite() & ((got - want).abs() <= allowed)
    if not bool(same.all()):
        first = int((~same).flatten().to(torch.uint8).argmax())
        there, here, limit = (float(t.flatten()[first]) for t in (got, want, allowed))
        raise ValueError(
            f"export: output {i} of ONNX Runtime must be within {limit:.3g} of torch's {here:.6g}, got {there:.6g} "
            f"(the first of {int((~same).sum()):,} that differ)"
        )


def _scale(t: Tensor) -> float:
    """The largest ordinary magnitude in an output. What fills masked places (-1e9, finfo.min) is equal or nearly so, hence few numbers once
    magnitudes are rounded to bfloat16, and far above the median of those: it does not count."""
    magnitudes = t[t.isfinite()].abs().bfloat16().unique()
    magnitudes = magnitudes[magnitudes.isfinite() & (magnitudes > 0)]
    return float(magnitudes[magnitudes <= 100 * magnitudes.median()].max()) if magnitudes.numel() else 0.0
