"""Prune a trained model in one shot, in place."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import ops
from .distributed import is_spread
from .params import (
    check_module,
    embedding_tables,
    excluded,
    is_plain,
    listed,
    outputs_on_axis_1,
    overlapping,
    perturbed,
    reparametrized,
    why_unfit,
)
from .patterns import NM, Pattern, TopK
from .report import Layer, Report
from .warning import warn

_FAR = 0.05  # zeros beyond what was asked for that the report remarks on, as a share of the weights


@torch.no_grad()
def prune(model: nn.Module, pattern: Pattern, exclude: Iterable[str] | None = (), *, prune_embeddings: bool = False) -> Report:
    """Set the weights that `pattern` drops to zero, in place, and report for every parameter what happened or why it stayed dense.

    This is the one-shot pruning of the paper's evaluation: no retraining, only `tune_batchnorm` afterwards. The rule is the optimizer's
    (docs/contract.md). Of n weights that are ranked together, those stay whose magnitude is larger than the k-th largest,
    k = ceil(n * (1 - sparsity)). N:M keeps the n largest of each m along the input channels.

    Parameters of 2 or more dims and of floating dtype are pruned, frozen ones (`requires_grad=False`) too. These stay dense, and the report
    says why:

    - excluded parameters and embedding tables;
    - what N:M does not fit: axis 1 is not a multiple of m, or not the input channels (transposed convolutions, transformers' Conv1D);
    - frozen parameters that cannot be pruned: another dtype or layout, no data, a tensor subclass.

    Tied parameters count once, under their first name. Everything is checked and counted before anything is changed. So the model is as it
    was if this raises, or if a warning is turned into an error.

    Args:
        model: its weights are float32, bfloat16 or float16, mixed freely, dense in any memory order, on one device.
        pattern: `TopK(sparsity=0.9)`, ranked over the model, or over each tensor with `scope="tensor"`; or `NM(2, 4)`.
        exclude: patterns of the names of parameters that stay dense, as in `fnmatch`: `["head.*", "*.embedding.weight"]`; for a
            tied parameter any of its names.
        prune_embeddings: prune the tables of `nn.Embedding` and `nn.EmbeddingBag` too, and what is tied to them.

    Returns:
        A `Report`, which prints as a table.

    Warns:
        CrAMWarning: nothing is pruned; a layer has only zeros left; ties or tiny tensors lead to far more zeros than were asked for.

    Raises:
        ValueError: a weight to be pruned cannot be: it is NaN, not initialised, not dense, of another dtype, sharded over ranks, or
            perturbed by a step of CrAM that is not over. Or it shares memory with another parameter. Or the layer's weight is computed from
            it (weight norm, spectral norm, `orthogonal`, torch.nn.utils.prune). Also if the scope is "group", for a model has no parameter
            groups, and if a pattern in `exclude` matches no parameter.

    Example:
        >>> report = prune(model, TopK(sparsity=0.9), exclude=["head.*"])
        >>> print(report)
        >>> tune_batchnorm(model, loader)

    Source: "CrAM: A Compression-Aware Minimizer", arXiv 2207.14200, section 4: one-shot pruning, then batch-norm tuning.
    """
    check_module("prune", model)
    if not isinstance(pattern, TopK | NM):
        raise ValueError(f"prune: pattern must be TopK(sparsity=...) or NM(n, m), got {pattern!r}")
    if isinstance(pattern, TopK) and pattern.scope == "group":
        raise ValueError("prune: pattern must have scope 'model' or 'tensor', got 'group': a model has no parameter groups")
    from .inference.modules import SparseLayer  # which the package does not import by itself

    if sparse := [name for name, module in model.named_modules() if isinstance(module, SparseLayer)]:
        raise ValueError(f"prune: layers must be dense, got {sparse[0]!r} on sparse weights: call cram_kernels.inference.to_dense first")
    if not isinstance(prune_embeddings, bool):
        raise ValueError(f"prune: prune_embeddings must be True or False, got {prune_embeddings!r}")
    with torch._C.DisableTorchFunctionSubclass():  # a subclass without a dispatch of its own is the memory it has
        return _prune(model, pattern, exclude, prune_embeddings)


def _prune(model: nn.Module, pattern: Pattern, exclude: Iterable[str] | None, prune_embeddings: bool) -> Report:
    parameters = _tied_once(model)
    dense = _why_dense(model, parameters, pattern, exclude, prune_embeddings)
    pruned = [found for found in parameters if found.name not in dense]
    _check(model, parameters, pruned)
    weights = [found.tensor for found in pruned]
    sets = list(range(len(weights))) if isinstance(pattern, TopK) and pattern.scope == "tensor" else [0] * len(weights)
    k = _ranks(pattern, weights, sets)
    thresholds = _thresholds(weights, sets, k)
    zeros = [_zeros_after(w, pattern, threshold) for w, threshold in zip(weights, thresholds, strict=True)]
    layers = _layers(parameters, pattern, dense, zeros)
    remarks = tuple(_remarks(pattern, layers, weights, sets, thresholds))
    report = Report(layers, remarks)
    for remark in remarks:
        warn(f"prune: {remark}")
    if isinstance(pattern, NM):
        ops.prune_nm_(weights, (), [1] * len(weights), pattern.n, pattern.m)
    elif weights:
        ops.prune_topk_(weights, (), sets, k)
    return report


@dataclass
class _Found:
    """A parameter of a model. Tied names share one: it has all of them, and every Parameter object that is this memory."""

    names: list[str]
    objects: list[Tensor]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def tensor(self) -> Tensor:
        return self.objects[0]

    @cached_property
    def shape(self) -> tuple[int, ...] | None:
        try:
            return tuple(map(int, self.tensor.shape))
        except Exception:  # a lazy one, a nested one, a subclass that answers in its own way: left alone, it must not stop the others
            return None

    @cached_property
    def numel(self) -> int:
        return 0 if self.shape is None else math.prod(self.shape)

    @property
    def has_memory(self) -> bool:
        p = self.tensor
        return not is_lazy(p) and is_plain(p) and p.layout is torch.strided and not p.is_meta and p.data_ptr() != 0


def _tied_once(model: nn.Module) -> list[_Found]:
    """Every parameter with all its names; parameters that view the same elements of memory are one."""
    found: dict[object, _Found] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        one = _Found([name], [p])
        same = (p.device, p.data_ptr(), p.dtype, p.shape, p.stride()) if one.has_memory else id(p)
        earlier = found.setdefault(same, one)
        if earlier is not one:
            earlier.names.append(name)
            earlier.objects.append(p)
    return list(found.values())


def _why_dense(
    model: nn.Module, parameters: list[_Found], pattern: Pattern, exclude: Iterable[str] | None, prune_embeddings: bool
) -> dict[str, str]:
    """First name -> reason, for what stays dense."""
    left_alone = excluded("prune: ", exclude, [found.names for found in parameters])
    told = {} if prune_embeddings else embedding_tables(model)
    if isinstance(pattern, NM):
        told = outputs_on_axis_1(model) | told
    dense = {}
    for i, found in enumerate(parameters):
        reasons = [told[id(p)] for p in found.objects if id(p) in told]
        if i in left_alone:
            dense[found.name] = "excluded"
        elif reasons:
            dense[found.name] = reasons[0]
        elif (reason := _why_unprunable(found, pattern)) is not None:
            dense[found.name] = reason
    return dense


def _why_unprunable(found: _Found, pattern: Pattern) -> str | None:
    """None where the parameter is to be pruned, whether or not that can be done: `_check` refuses what cannot."""
    p = found.tensor
    if not is_lazy(p) and not p.is_floating_point():
        return f"dtype {p.dtype}"
    if found.shape is not None and (reason := pattern.why_dense(found.shape) or ("empty" if found.numel == 0 else None)) is not None:
        return reason
    if not p.requires_grad and (wrong := _why_unfit(p)) is not None:
        return "cannot be pruned: " + wrong.rpartition(", got ")[2]
    return None


def _why_unfit(p: Tensor) -> str | None:
    if is_lazy(p):
        return "must be initialised, got a lazy one: run a forward pass first"
    if is_spread(p):
        return "must be whole, got a shard (DTensor): gather the model first"
    if (wrong := why_unfit(p)) is not None:
        return wrong
    return "must have data, got memory that was freed: gather the model first" if p.data_ptr() == 0 and p.numel() > 0 else None


def _check(model: nn.Module, parameters: list[_Found], pruned: list[_Found]) -> None:
    parts = reparametrized(model)
    for found in pruned:
        name = found.name
        if (wrong := _why_unfit(found.tensor)) is not None:
            raise ValueError(f"prune: parameter {name!r} {wrong}, or exclude it")
        for p in found.objects:
            if id(p) in parts:
                raise ValueError(f"prune: parameter {name!r} must be a weight itself, got {parts[id(p)]}, or exclude it")
        if any(perturbed(p) for p in found.objects):
            raise ValueError(f"prune: parameter {name!r} must not be perturbed, got one within a step: step() or restore() first")
    with_memory = [(found.name, found.tensor) for found in parameters if found.has_memory]
    if (shared := overlapping(with_memory, {found.name for found in pruned})) is not None:
        raise ValueError(
            f"prune: parameter {shared[0]!r} must have memory of its own, got some that {shared[1]!r} has too, or exclude both"
        )
    if len(devices := {str(found.tensor.device): found.name for found in pruned}) > 1:
        (one, first), (other, second) = list(devices.items())[:2]
        raise ValueError(f"prune: parameters must be on one device, got {first!r} on {one} and {second!r} on {other}")
    if nan := [found.name for found in pruned if found.tensor.isnan().any()]:
        raise ValueError(f"prune: parameters must not be NaN, got NaN in {', '.join(map(repr, nan))}")


def _ranks(pattern: Pattern, weights: list[Tensor], sets: list[int]) -> Tensor:
    """The rank k of the threshold of each selection set."""
    sizes = [0] * (max(sets, default=-1) + 1)
    for i, w in zip(sets, weights, strict=True):
        sizes[i] += w.numel()
    ranks = [] if isinstance(pattern, NM) else [pattern.k(n) for n in sizes]
    return torch.tensor(ranks, dtype=torch.int64, device=weights[0].device if weights else None)


def _thresholds(weights: list[Tensor], sets: list[int], k: Tensor) -> list[float]:
    """For each weight the magnitude up to which all goes; 0 where nothing does."""
    if k.numel() == 0:
        return [0.0] * len(weights)
    magnitudes = ops.topk_threshold(weights, sets, k).clamp(min=0).view(torch.float32).tolist()
    return [magnitudes[i] for i in sets]


def _zeros_after(weight: Tensor, pattern: Pattern, threshold: float) -> int:
    if isinstance(pattern, NM):
        groups = (weight != 0).unflatten(1, (weight.shape[1] // pattern.m, pattern.m))
        return weight.numel() - int(groups.sum(2).clamp(max=pattern.n).sum())
    return weight.numel() - int((weight.float().abs() > threshold).count_nonzero())


def _layers(parameters: list[_Found], pattern: Pattern, dense: dict[str, str], zeros: list[int]) -> tuple[Layer, ...]:
    after = iter(zeros)
    layers = []
    for found in parameters:
        reason = dense.get(found.name)
        how, left = (str(pattern), next(after)) if reason is None else (None, _zeros(found))
        layers.append(Layer(found.name, found.shape, how, found.numel, left, reason))
    return tuple(layers)


def _zeros(found: _Found) -> int | None:
    """Of a parameter that stays as it is; None where torch cannot count them."""
    if not found.has_memory:
        return 0 if found.shape is not None and found.numel == 0 else None
    try:
        return found.numel - int(found.tensor.count_nonzero())
    except (NotImplementedError, RuntimeError):
        return None  # float8 and unsigned integers


def _remarks(pattern: Pattern, layers: Sequence[Layer], weights: list[Tensor], sets: list[int], thresholds: list[float]) -> Iterator[str]:
    """What the user should look at, each in a sentence."""
    if layers and not weights:
        yield f"{pattern} prunes nothing: the report says why each of {len(layers)} parameters stays dense"
    pruned = [layer for layer in layers if layer.pattern is not None]
    if emptied := [layer.name for layer, w in zip(pruned, weights, strict=True) if layer.emptied and w.any()]:
        ranked_together = isinstance(pattern, TopK) and pattern.scope == "model"
        advice = "; scope='tensor' ranks each layer on its own, exclude= keeps a layer dense" if ranked_together else ""
        yield f"{pattern} leaves no weight in {listed([repr(name) for name in emptied])}{advice}"
    if isinstance(pattern, TopK) and (far := list(_far(pattern, pruned, weights, sets, thresholds))):
        yield f"{pattern} prunes more than was asked for: {listed(far)}"


def _far(pattern: TopK, pruned: list[Layer], weights: list[Tensor], sets: list[int], thresholds: list[float]) -> Iterator[str]:
    """The selection sets in which far more weights go than the sparsity says, and the cause. What was zero before does not count."""
    together: dict[int, list[int]] = {}
    for i, chosen in enumerate(sets):
        together.setdefault(chosen, []).append(i)
    for members in together.values():
        numel, zeros = (sum(getattr(pruned[i], what) for i in members) for what in ("numel", "zeros"))
        if zeros <= (pattern.sparsity + _FAR) * numel:
            continue
        before = numel - sum(int(weights[i].count_nonzero()) for i in members)
        if zeros <= before + _FAR * numel:
            continue
        tied = sum(int((weights[i].float().abs() == thresholds[i]).sum()) for i in members)
        where = f" of {pruned[members[0]].name!r}" if pattern.scope == "tensor" else ""
        cause = f"{tied:,} tie with the k-th largest and go with it" if tied > 1 else "the k-th largest goes too, which counts in so few"
        yield f"{zeros / numel:.0%} of the {numel:,} weights{where} ({cause})"
