"""Prune a trained model in one shot, in place."""

import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import ops
from .distributed import is_spread
from .params import OPEN_STEPS, overlapping, why_unfit
from .patterns import NM, Pattern, TopK
from .report import Layer, Report


@torch.no_grad()
def prune(model: nn.Module, pattern: Pattern, exclude: Iterable[str] = ()) -> Report:
    """Set the weights that `pattern` drops to zero, in place; parameters that it does not fit stay dense and are reported.

    Tied parameters count once. Batch-norm statistics do not fit the pruned weights any more: see `tune_batchnorm`.

    Args:
        model: its parameters of 2 or more dims and floating dtype are pruned: float32, bfloat16 or float16, dense in any memory order.
        pattern: `TopK(sparsity)`, ranked over the model, or each tensor with scope="tensor"; or `NM(n, m)`.
        exclude: patterns of the names of parameters that stay dense, as in `fnmatch`: `["head.*", "*.embedding.weight"]`; for a
            tied parameter any of its names.

    Returns:
        A `Report`: every parameter, its zeros, and why it was left dense.

    Raises:
        ValueError: a weight is NaN, has another dtype, is not dense or not initialised; the scope is "group", and a model has no
            parameter groups; a pattern in `exclude` matches no parameter. Nothing was changed.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"prune: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(pattern, TopK | NM):
        raise ValueError(f"prune: pattern must be TopK(sparsity) or NM(n, m), got {pattern!r}")
    if isinstance(pattern, TopK) and pattern.scope == "group":
        raise ValueError("prune: pattern must have scope 'model' or 'tensor', got 'group': a model has no parameter groups")
    parameters = _tied_once(model)
    excluded = _excluded([names for _, names in parameters], exclude)
    why = [_why_dense(p, pattern) if i not in excluded else "excluded" for i, (p, _) in enumerate(parameters)]
    weights = {names[0]: p for (p, names), reason in zip(parameters, why, strict=True) if reason is None}
    _check(weights)
    if not weights and parameters:
        warnings.warn(
            f"prune: {pattern} prunes nothing: the report says why each of {len(parameters)} parameters stays dense", stacklevel=3
        )
    _prune_(list(weights.values()), pattern)
    return Report(
        tuple(
            Layer(names[0], tuple(p.shape), str(pattern) if reason is None else None, p.numel(), p.numel() - int(p.count_nonzero()), reason)
            for (p, names), reason in zip(parameters, why, strict=True)
        )
    )


def _prune_(weights: list[Tensor], pattern: Pattern) -> None:
    if not weights:
        return
    if isinstance(pattern, NM):
        ops.prune_nm_(weights, (), [1] * len(weights), pattern.n, pattern.m)
        return
    sets = [0] * len(weights) if pattern.scope == "model" else list(range(len(weights)))
    sizes = [0] * (max(sets) + 1)
    for i, w in zip(sets, weights, strict=True):
        sizes[i] += w.numel()
    k = torch.tensor([pattern.k(n) for n in sizes], dtype=torch.int64, device=weights[0].device)
    ops.prune_topk_(weights, (), sets, k)


def _tied_once(model: nn.Module) -> list[tuple[Tensor, list[str]]]:
    """Every parameter with all its names; parameters that view the same elements of memory are one."""
    found: dict[object, tuple[Tensor, list[str]]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if is_lazy(p):
            raise ValueError(f"prune: parameter {name!r} must be initialised, got a lazy one: run a forward pass first")
        strided = p.layout == torch.strided and p.numel() > 0
        same = (p.device, p.data_ptr(), p.dtype, p.shape, p.stride()) if strided and not p.is_meta else id(p)
        found.setdefault(same, (p, []))[1].append(name)
    return list(found.values())


def _excluded(names: list[list[str]], exclude: Iterable[str]) -> set[int]:
    excluded = set()
    for glob in [exclude] if isinstance(exclude, str) else exclude:
        matched = {i for i, aliases in enumerate(names) if any(fnmatchcase(name, glob) for name in aliases)}
        if not matched:
            raise ValueError(f"prune: exclude must match the name of a parameter, got {glob!r}, which matches none of {len(names)}")
        excluded |= matched
    return excluded


def _why_dense(p: Tensor, pattern: Pattern) -> str | None:
    return pattern.why_dense(p.shape) if p.is_floating_point() else f"dtype {p.dtype}"


def _check(weights: dict[str, Tensor]) -> None:
    for name, w in weights.items():
        if (wrong := why_unfit(w)) is not None:
            raise ValueError(f"prune: parameter {name!r} {wrong}, or exclude it")
        if is_spread(w):
            raise ValueError(f"prune: parameter {name!r} must be whole, got a shard (DTensor): gather the model first, or exclude it")
        if any(step.holds(w) for step in OPEN_STEPS):
            raise ValueError(f"prune: parameter {name!r} must not be perturbed, got one within a step: step() or restore() first")
    if (shared := overlapping(weights.items())) is not None:
        raise ValueError(f"prune: parameter {shared[0]!r} must have memory of its own, got some that {shared[1]!r} has too, or exclude it")
    if nan := [name for name, w in weights.items() if w.isnan().any()]:
        raise ValueError(f"prune: parameters must not be NaN, got NaN in {', '.join(map(repr, nan))}")
