"""Is it really n:m, on which axis, and who can run it?"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..params import excluded
from ..patterns import NM
from .consumers import CONSUMERS, Facts, dtype_name
from .report import NMReport, Row
from .weights import Weight, weights_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
NO_WEIGHTS = (torch.bool, torch.int64, torch.bits8)  # masks, indices, and text in ONNX files; other integers may be packed weights


@torch.no_grad()
def check_nm(model: nn.Module | Mapping[str, Any], n: int = 2, m: int = 4, exclude: Iterable[str] | None = ()) -> NMReport:
    """Count, for every tensor, the groups of m input channels with more than n numbers that are not zero.

    Args:
        model: a module or a state dict, on any device; it is only read. A state dict does not say what uses a matrix: embeddings and
            buffers are then checked as if they were weights of Linear layers.
        n, m: 1 <= n < m <= 1024.
        exclude: patterns of names that may stay dense, as in `fnmatch`.

    Returns:
        An `NMReport`. `report.ok`: no tensor violates n:m, at least one holds it, and none is left that may be a weight and could not be
        checked (`report.unchecked`: a shard, a sparse or packed layout, a subclass that does not give its numbers).

    Raises:
        TypeError: model is neither, or a state dict without a tensor.
        ValueError: n and m are no pattern; a pattern in `exclude` matches no tensor.

    Example:
        prune(model, NM(2, 4))
        print(check_nm(model))
    """
    return check_weights(weights_of(model), NM(n, m), exclude)


def check_weights(weights: list[Weight], pattern: NM, exclude: Iterable[str] | None = ()) -> NMReport:
    left_alone = excluded("", exclude, [(weight.name, *weight.aliases) for weight in weights], "tensor")
    return NMReport(pattern, tuple(_row(weight, pattern, i in left_alone) for i, weight in enumerate(weights)))


def why_unread(t: Tensor) -> str | None:
    """None where the numbers of t can be counted."""
    if t.dtype not in DTYPES:
        return f"dtype {dtype_name(t.dtype)}"
    if t.layout != torch.strided:
        return f"layout {t.layout}"
    return "a meta tensor" if t.is_meta else None


def why_no_pattern(weight: Weight, pattern: NM) -> str | None:
    """None where the weight can be n:m, else the reason why it stays dense."""
    t = weight.tensor
    if weight.kind == "other" and t.dim() > 1:
        return "not the weight of a product"
    if weight.kind == "conv transpose":
        return "axis 1 of a transposed convolution is the outputs"
    if weight.kind == "transposed linear":
        return "axis 1 of transformers' Conv1D is the outputs"
    why = pattern.why_dense(t.shape) or ("empty" if t.numel() == 0 else None)
    if why is None or weight.kind != "conv" or t.shape[1] >= pattern.m:
        return why
    if t.shape[1] == 1 and weight.groups != 1:  # a file does not say how many
        return "depthwise: one input channel a group" if weight.groups else "depthwise, or a stem with one input channel"
    return f"{why} (a stem)" if weight.groups in (None, 1) else f"{why} ({weight.groups} groups)"


def _row(weight: Weight, pattern: NM, excluded: bool) -> Row:
    t = weight.tensor
    shape = tuple(t.shape) if weight.shape is None else weight.shape
    common = (weight.name, shape, dtype_name(t.dtype) if weight.is_tensor else "", weight.kind)
    unread = weight.why_dense or why_unread(t)
    if why := unread or why_no_pattern(weight, pattern):
        may_be_weight = weight.unchecked if weight.why_dense else unread and weight.kind != "other" and t.dtype not in NO_WEIGHTS
        unchecked = bool(may_be_weight) and not excluded
        return Row(*common, None, None, math.prod(shape), _zeros(t), why_dense=why, unchecked=unchecked, aliases=weight.aliases)
    groups, first, nonzeros = violations(t, pattern.n, pattern.m)
    facts = Facts(is_24=_holds(t, 2, 4), is_12=_holds(t, 1, 2))
    return Row(
        *common,
        _axis(weight),
        groups,
        t.numel(),
        t.numel() - nonzeros,
        groups=t.numel() // pattern.m,
        first=None if first is None else _place(weight, first, pattern.m),
        holds_along=_elsewhere(weight, pattern) if groups else None,
        why_dense="excluded" if excluded and groups else None,
        verdicts={consumer.name: consumer.verdict(weight, facts) for consumer in CONSUMERS},
        aliases=weight.aliases,
    )


def _zeros(t: Tensor) -> int | None:
    """None where torch cannot count them: meta tensors, layouts and dtypes that are seldom met."""
    if t.is_meta:
        return None
    try:
        return t.numel() - int(t.count_nonzero())
    except (NotImplementedError, RuntimeError):
        return None


def nonzero(t: Tensor) -> Tensor:
    """bool, the shape of t: a NaN is not zero, -0 is. By the bits, since torch can be set to take denormals for zero."""
    if t.dtype == torch.int8:
        return t != 0
    bits = t.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
    return bits & torch.iinfo(bits.dtype).max != 0  # without the sign


def violations(t: Tensor, n: int, m: int) -> tuple[int, tuple[int, ...] | None, int]:
    """Groups along axis 1 with more than n numbers that are not zero; the index in t of the first number of the first of them; and how many
    numbers of t are not zero."""
    counts = nonzero(t).unflatten(1, (-1, m)).sum(2, dtype=torch.int16)
    wrong = counts > n
    groups, nonzeros = int(wrong.sum()), int(counts.sum())
    if groups == 0:
        return 0, None, nonzeros
    first = torch.unravel_index(wrong.flatten().to(torch.uint8).argmax(), wrong.shape)
    return groups, tuple(int(i) * (m if dim == 1 else 1) for dim, i in enumerate(first)), nonzeros


def _stored(weight: Weight, first: tuple[int, ...], m: int) -> list[list[int]]:
    """For each dim of the stored tensor, the indices there of m numbers of weight.tensor along axis 1, from `first` on."""
    if weight.index is None:
        return [list(range(i, i + m)) if dim == 1 else [i] for dim, i in enumerate(first)]
    assert weight.shape is not None
    place: tuple[Any, ...] = (first[0], slice(first[1], first[1] + m), *first[2:])
    flat = weight.index()[place]
    return [sorted(set(places.tolist())) for places in torch.unravel_index(flat, weight.shape)]


def _axis(weight: Weight) -> int | None:
    """The axis of the input channels in the stored tensor; None where they lie along several."""
    if weight.index is None:
        return 1
    places = _stored(weight, (0,) * weight.tensor.dim(), weight.tensor.shape[1])
    along = [dim for dim, indices in enumerate(places) if len(indices) > 1]
    return along[0] if len(along) == 1 else None


def _place(weight: Weight, first: tuple[int, ...], m: int) -> str:
    """A group as an index into the stored tensor: "[3, 4:8, 0, 1]"."""

    def text(i: list[int]) -> str:
        return str(i[0]) if len(i) == 1 else f"{i[0]}:{i[-1] + 1}" if i == list(range(i[0], i[-1] + 1)) else str(i)

    return f"[{', '.join(map(text, _stored(weight, first, m)))}]"


def _holds(t: Tensor, n: int, m: int) -> bool:
    return t.dim() >= 2 and t.shape[1] % m == 0 and violations(t, n, m)[0] == 0


def _elsewhere(weight: Weight, pattern: NM) -> str | None:
    """Another axis along which the pattern holds: the usual mistakes."""
    n, m, t = pattern.n, pattern.m, weight.tensor
    if t.shape[0] % m == 0 and _holds(t.transpose(0, 1), n, m):
        axis = _axis(weight)
        return f"axis {1 - axis}, the outputs" if axis in (0, 1) else "the outputs"
    flat = math.prod(t.shape[1:])
    if t.dim() > 2 and flat % m == 0 and _holds(t.reshape(t.shape[0], flat), n, m):
        return "axes 1 and up flattened, across kernel positions"
    return None
