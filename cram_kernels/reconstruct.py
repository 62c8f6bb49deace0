"""Repair a pruned network layer by layer: least squares against the dense network, in closed form, without labels or gradients."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from .batch import check_loader, moved
from .batchnorm import _held
from .distributed import is_spread
from .layerwise.layers import LinearLayer, find_layers, trace
from .layerwise.problems import Network, Problem, accumulate, fit, groups, owners
from .layerwise.report import LayerError, Reconstruction
from .params import check_module, check_unperturbed, overlapping, why_unfit
from .warning import warn


@torch.no_grad()
def reconstruct(model: nn.Module, dense: nn.Module, loader: Iterable[Any], samples: int = 512, progress: bool = False) -> Reconstruction:
    """Fit the weights that `prune` left to what the dense network computes, layer by layer; weights that are zero stay zero.

    Use it after `prune`. Batch norms take the statistics of the dense network, so `tune_batchnorm` is not needed between the two, and does
    harm after it. But call it on the dense network, before that is copied: training leaves running means, which lag behind the weights
    where its rate did not fall to 0, and what is off there would be copied.

    Every Linear, Conv and projection of nn.MultiheadAttention is fitted by ridge regression, in the order of execution. X is its (unfolded)
    input in the pruned network, repaired up to there. Y is its output in the dense network. Both are centred: their means are taken away.
    With

        A = X'X        B = X'Y        e = 1e-3 * mean(diag A)

    the non-zero weights S of each output channel become `w_S = (A_SS + e I)^-1 (B_S + e w_S)`. The bias becomes `mean Y - w mean X`, in the
    layer or in the batch norm that alone reads its output. A layer with neither is fitted without centring. This is layerwise
    reconstruction as in AdaPrune (Hubara et al., 2021, arXiv 2102.08124) and OBC (Frantar and Alistarh, 2022, arXiv 2208.11580).

    Both networks run in eval mode. Layers with the same input (query, key, value) cost one pass together, so the time is that of about
    one forward pass of both networks a layer, and of the algebra. Memory: a copy of the weights; 8 * in * (in + out) bytes of sums for the
    largest layer; the batches. Whatever is raised, the model is as it was, to the bit.

    Args:
        model: pruned; changed in place. float32, bfloat16, float16, on any devices.
        dense: the network before pruning: `copy.deepcopy(model)` then. It is not changed, and may be on another device.
        loader: gives x, (x, ...) or a dict of keyword arguments, as training data, without labels. Where a dict has an "attention_mask"
            of [batch, length], rows of padding do not count.
        samples: how many to use, counted along dim 0; a loader that is shorter gives what it has.
        progress: show a bar, with rich or tqdm.

    Returns:
        A `Reconstruction`: the error of every layer before and after, and why others were left. A weight that is shared with an embedding,
        computed from others (weight_norm), of a layer whose forward was replaced, or never called, is left. So are the pruned matrices of
        other modules (LSTM, ConvTranspose, the Conv1D of GPT-2), each with a row. What hooks make of an output is not looked at.

    Raises:
        ValueError: the networks differ or share weights; weights are sharded; the loader is empty; an activation is not finite.
        RuntimeError: weights are perturbed or batch norms are frozen, within a step.

    Example:
        tune_batchnorm(model, loader)
        dense = copy.deepcopy(model)
        prune(model, TopK(sparsity=0.9))
        print(reconstruct(model, dense, loader))
    """
    check_loader("reconstruct", loader)
    if type(samples) is not int or samples < 1:
        raise ValueError(f"reconstruct: samples must be an int of at least 1, got {samples!r}")
    _check_models(model, dense)
    layers, left = find_layers(model)
    originals, _ = find_layers(dense)
    _check_layers(layers, left, originals)
    left |= _beyond(model, dense, layers, left)
    batches, used = _taken(loader, samples)
    pruned, target = Network(model, layers), Network(dense, originals)
    results: dict[str, LayerError] = {}
    memory = 0
    with _evaluating(model, dense), _kept_on_failure(model, layers):
        for name, norm in _tracking(model).items():
            for own, original in zip(_statistics(norm), _statistics(dense.get_submodule(name)), strict=True):
                own.copy_(original)
        calls = trace(model, layers, lambda: pruned.run(batches[0]))
        called = Counter(call.name for call in calls)
        others = owners(model, layers)
        left |= {name: "not called in a forward pass" for name in layers if name not in called}
        left |= {name: f"shared with {others[x.parameter]}" for name, x in layers.items() if x.parameter in others}
        order = groups([call for call in calls if call.name not in left], layers)
        del calls  # they hold the activations of a batch
        for problems in _shown(order, progress):
            accumulate(problems, pruned, target, called, batches)
            memory = max(memory, sum(m.bytes for problem in problems for m in problem.moments.values()))
            for problem in problems:
                results |= {result.name: result for result in fit(problem)}
    unfitted = (LayerError(name, None, None, 0, why) for name, why in left.items())
    return Reconstruction((*results.values(), *unfitted), used, memory)


def _check_models(model: nn.Module, dense: nn.Module) -> None:
    for name, given in (("model", model), ("dense", dense)):
        check_module("reconstruct", given, name)
    ours, theirs = dict(model.named_parameters()), dict(dense.named_parameters())
    if differing := [
        name for name in {**ours, **theirs} if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape
    ]:
        raise ValueError(f"reconstruct: dense must have the parameters of model before pruning, got another {differing[0]!r}")
    for name, p in ours.items():
        other = theirs[name]
        if p.dim() > 1 and p.is_floating_point() and _zeros(other) > _zeros(p):
            found = f"{_zeros(other):,} zeros in its {name!r}, and {_zeros(p):,} in model's: were the two swapped?"
            raise ValueError(f"reconstruct: dense must be the network before pruning, got {found}")
    if missing := _tracking(model).keys() - _tracking(dense).keys():
        raise ValueError(f"reconstruct: dense must have the batch norms of model, got none at {min(missing)!r} that tracks statistics")
    for name, p in ours.items():
        if is_spread(p):
            raise ValueError(f"reconstruct: parameter {name!r} must be whole, got a shard (DTensor): gather the model first")
    check_unperturbed("reconstruct", ours.items())
    if frozen := [name for name, module in model.named_modules() if module in _held]:
        raise RuntimeError(f"reconstruct: batch norms must not be frozen (frozen_batchnorm, an open step), got {frozen[0]!r} frozen")
    named = [(f"model's {name}", p) for name, p in ours.items()] + [(f"dense's {name}", p) for name, p in theirs.items()]
    if (pair := overlapping((name, p) for name, p in named if not is_lazy(p))) is not None:
        raise ValueError(f"reconstruct: parameters must have memory of their own, got {pair[0]} and {pair[1]} in one place")


def _zeros(t: Tensor) -> int:
    return int((t == 0).sum())


def _beyond(model: nn.Module, dense: nn.Module, layers: dict[str, LinearLayer], left: dict[str, str]) -> dict[str, str]:
    """Why no other pruned matrix is fitted, by the name of the parameter."""
    known, originals = {id(layer.parameter) for layer in layers.values()}, dict(dense.named_parameters())
    reasons = {}
    for name, p in model.named_parameters():
        told = id(p) in known or any(name.startswith(f"{layer}." if layer else "") for layer in left)
        if p.dim() > 1 and not told and _zeros(p) > _zeros(originals[name]):
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            reasons[name] = f"{kind} is no Linear, Conv or MultiheadAttention that is fitted"
    return reasons


def _check_layers(layers: dict[str, LinearLayer], left: dict[str, str], originals: dict[str, LinearLayer]) -> None:
    if not layers and not left:
        raise ValueError("reconstruct: model must have a Linear, Conv or MultiheadAttention, got none")
    if layers.keys() != originals.keys():
        raise ValueError(f"reconstruct: dense must have the layers of model, got another {min(layers.keys() ^ originals.keys())!r}")
    for name, layer in layers.items():
        if (wrong := why_unfit(layer.weight)) is not None and layer.weight.dtype is not torch.float64:
            raise ValueError(f"reconstruct: weight of {name!r} {wrong}")


def _taken(loader: Iterable[Any], samples: int) -> tuple[list[Any], int]:
    """Batches on the CPU with as many samples, the last one cut, and how many there are."""
    batches, have = [], 0
    for batch in loader:
        batch = moved(batch, torch.device("cpu"))
        tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim() > 0]
        if not tensors:
            raise ValueError(f"reconstruct: loader must give batches of tensors, got {type(batch).__name__}")
        size = len(tensors[0])
        if have + size > samples:
            batch = tree_map(
                lambda t, n=size, k=samples - have: t[:k] if isinstance(t, Tensor) and t.dim() > 0 and len(t) == n else t, batch
            )
            size = samples - have
        batches.append(batch)
        have += size
        if have == samples:
            break
    if not have:
        raise ValueError("reconstruct: loader must give at least one batch, got an empty one")
    return batches, have


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode, and attention that computes layer by layer; afterwards as before."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in modes:
            module.training = False  # not model.eval(), which models override
        yield
    finally:
        for module, training in modes:
            module.training = training
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _kept_on_failure(model: nn.Module, layers: dict[str, LinearLayer]) -> Iterator[None]:
    """Whatever is raised within, weights, biases and statistics become what they were, to the bit."""
    changing = [t for layer in layers.values() for t in (layer.weight, layer.bias) if t is not None]
    saved = [(t, t.clone()) for t in chain(changing, *map(_statistics, _tracking(model).values()))]
    try:
        yield
    except BaseException:
        for t, old in saved:
            t.copy_(old)
        raise


def _tracking(model: nn.Module) -> dict[str, nn.Module]:
    """The batch and instance norms with running statistics."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _NormBase) and m.running_mean is not None}


def _statistics(norm: Any) -> tuple[Tensor, Tensor]:
    return norm.running_mean, norm.running_var


def _shown(problems: list[list[Problem]], progress: bool) -> Iterable[list[Problem]]:
    """With a progress bar, of rich or else tqdm."""
    if progress:
        try:
            from rich.progress import track

            return track(problems, "reconstruct")
        except ImportError:
            pass
        try:
            from tqdm.auto import tqdm

            return tqdm(problems, "reconstruct")
        except ImportError:
            warn("reconstruct: progress=True needs rich or tqdm, and neither is installed")
    return problems
