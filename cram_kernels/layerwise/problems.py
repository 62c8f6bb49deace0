"""What is solved together, and how the sums for it are gathered from the two networks."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import call as forward
from ..batch import moved
from .layers import Call, LinearLayer, listen
from .least_squares import Moments, solve
from .report import LayerError


@dataclass
class Problem:
    """Weights that are found together: those of layers with the same input, stacked; or one that several layers or calls share."""

    layers: list[LinearLayer]
    norms: dict[str, Any]  # of layers without a bias: the batch norm that takes it
    stacked: bool
    moments: dict[int, Moments] = field(default_factory=dict)  # one for each bias, so that its rows are about their own mean; 0 if stacked
    differs: bool = False  # the networks called it with other shapes

    def sums(self, layer: LinearLayer) -> Moments:
        return self.moments.setdefault(0 if self.stacked else id(layer.bias), Moments())

    def intercept(self, layer: LinearLayer) -> bool:
        return layer.bias is not None or layer.name in self.norms


def groups(calls: list[Call], layers: dict[str, LinearLayer]) -> list[list[Problem]]:
    """The problems, in lists of those whose first calls have the same input, in the order of execution."""
    sharing: dict[tuple[int, int], list[LinearLayer]] = {}
    for name in dict.fromkeys(call.name for call in calls):
        sharing.setdefault(layers[name].place, []).append(layers[name])
    called = Counter(call.name for call in calls)
    groups: dict[tuple[int, int], dict[Any, Problem]] = {}
    for call in calls:
        layer = layers[call.name]
        if (sharers := sharing.pop(layer.place, None)) is None:  # came with an earlier call
            continue
        once = called[layer.name] == len(sharers) == 1
        norm = call.norm if once and layer.bias is None else None
        free = norm is not None or layer.bias is not None
        stacked = once and not layer.conv
        group = groups.setdefault((id(call.input), call.version), {})
        problem = group.setdefault(("stack", free) if stacked else layer.name, Problem([], {}, stacked))
        problem.layers += sharers
        if norm is not None:
            problem.norms[layer.name] = norm
    return [list(group.values()) for group in groups.values()]


class Network:
    def __init__(self, model: nn.Module, layers: dict[str, LinearLayer]) -> None:
        self.model, self.layers = model, layers
        self.device = next(chain(model.parameters(), model.buffers())).device

    def run(self, batch: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return forward(self.model, moved(batch, self.device))

    def listen(self, names: list[str], calls: int, batch: Any, inputs: bool) -> dict[str, list[tuple[Tensor, torch.Size]]]:
        """What the layers read, or else what they give, with the shape of the latter, call by call. The pass ends after so many calls."""
        heard: dict[str, list[tuple[Tensor, torch.Size]]] = {name: [] for name in names}

        def note(name: str, x: Tensor, y: Tensor) -> None:
            nonlocal calls
            calls -= 1
            value = x if inputs else y
            heard[name].append((value.clone() if calls else value, y.shape))  # what follows may write to it
            if not calls:
                raise _Heard

        try:
            with listen({name: self.layers[name] for name in names}, note):
                self.run(batch)
        except _Heard:
            pass
        return heard


class _Heard(BaseException):
    """Ends a forward pass; no Exception, for models that catch those."""


def accumulate(problems: list[Problem], pruned: Network, target: Network, called: Counter[str], batches: list[Any]) -> None:
    names = [layer.name for problem in problems for layer in problem.layers]
    calls = sum(called[name] for name in names)
    for batch in batches:
        read, given = pruned.listen(names, calls, batch, inputs=True), target.listen(names, calls, batch, inputs=False)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        real = mask.bool() if isinstance(mask, Tensor) else None
        for problem in problems:
            if any([shape for _, shape in read[x.name]] != [shape for _, shape in given[x.name]] for x in problem.layers):
                problem.differs = True
                continue
            if problem.stacked:
                outputs = [given[layer.name][0][0] for layer in problem.layers if given[layer.name]]
                pairs = [(problem.layers[0], x, torch.cat(outputs, -1)) for x, _ in read[problem.layers[0].name]]
            else:
                pairs = [
                    (layer, x, y) for layer in problem.layers for (x, _), (y, _) in zip(read[layer.name], given[layer.name], strict=True)
                ]
            for layer, x, y in pairs:
                for rows in layer.rows(x, y, real):
                    problem.sums(layer).add(*rows)


def fit(problem: Problem) -> list[LayerError]:
    """Solve, write, and say what became of the errors."""
    if problem.differs or not all(problem.sums(layer).n for layer in problem.layers):
        why = "the dense and the pruned network call it with other shapes" if problem.differs else "no rows"
        return [LayerError(layer.name, None, None, 0, why) for layer in problem.layers]
    olds = [layer.matrix() for layer in problem.layers]
    parts, end = [], 0
    for layer, old in zip(problem.layers, olds, strict=True):
        sums = problem.sums(layer)
        if not hasattr(sums, "intercept"):
            sums.finish(problem.intercept(layer))
        if not bool(sums.xx.isfinite().all() and sums.xy.isfinite().all()):
            raise ValueError(f"reconstruct: inputs and outputs of layers must be finite, got NaN or Inf at {layer.name!r}")
        start, end = (end, end + old.shape[1]) if problem.stacked else (0, old.shape[1])
        parts.append((layer, sums, slice(start, end)))
    every = list({id(sums): sums for _, sums, _ in parts}.values())
    xx, xy = (torch.stack([getattr(sums, name) for sums in every]).sum(0) for name in ("xx", "xy"))
    new = solve(xx, xy, torch.cat(olds, 1) if problem.stacked else olds[0])
    before = [sums.error(old, _vector(layer, old), part) for (layer, sums, part), old in zip(parts, olds, strict=True)]
    results = []
    for (layer, sums, part), was in zip(parts, before, strict=True):
        w = new[:, part]
        _write(layer, layer.weight, w)
        bias = sums.mean_y[:, part] - (w @ sums.mean_x[:, :, None])[:, :, 0]
        if layer.bias is not None:
            _write(layer, layer.bias, bias)
        elif (norm := problem.norms.get(layer.name)) is not None:
            _write(layer, norm.running_mean, norm.running_mean.to(bias) - bias.flatten())
        else:
            bias = torch.zeros_like(bias)
        now = sums.error(layer.matrix(), bias if layer.bias is None else _vector(layer, w), part)
        results.append(LayerError(layer.name, was, now, sums.n, None))
    torch.clear_autocast_cache()  # a block of autocast around us keeps casts of the old weights
    return results


def _vector(layer: LinearLayer, w: Tensor) -> Tensor:
    """The bias as float64 [groups, out / groups]."""
    return torch.zeros_like(w[:, :, 0]) if layer.bias is None else layer.bias.to(w).reshape(w.shape[:2])


def _write(layer: LinearLayer, target: Tensor, value: Tensor) -> None:
    target.copy_(value.reshape(target.shape))
    if not bool(target.isfinite().all()):
        raise ValueError(f"reconstruct: weights must fit in {target.dtype}, got Inf at {layer.name!r}")


def owners(model: nn.Module, layers: dict[str, LinearLayer]) -> dict[Tensor, str]:
    """Weights that modules other than the layers have, too: weight -> name of the module."""
    fitted = {m for layer in layers.values() for m in (layer.module, getattr(layer.module, "out_proj", None))}
    return {p: name for name, m in model.named_modules() if m not in fitted for p in m._parameters.values() if p is not None}
