"""Batch-norm statistics beside pruning: keep them still in the perturbed pass, measure them anew after pruning."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the base of all kinds: 1d, 2d, 3d, Sync and their lazy forms
from torch.nn.modules.lazy import LazyModuleMixin

_frozen: WeakKeyDictionary[_BatchNorm, set[object]] = WeakKeyDictionary()  # layer -> the blocks that keep it frozen


def _tracking(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers that track statistics, or would if no block froze them."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and (m.track_running_stats or m in _frozen)}


def _is_lazy(layer: _BatchNorm) -> bool:
    return isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params()


class frozen_batchnorm(AbstractContextManager[None]):  # named as what it is used like: torch.no_grad
    """Within the block the batch norms of the model keep running_mean, running_var and num_batches_tracked, to the bit.

    In train mode they still normalise with the statistics of the batch, as CrAM's second pass needs; eval mode is as ever.
    Blocks may be nested or overlap, and `state_dict()` has the statistics within, too. A copy made within stays frozen. A batch that is
    not finite does no harm either: the statistics are left alone, where a momentum of 0 would make them 0 * Inf = NaN. Works through
    `torch.compile` (one more graph) and DDP (which, with broadcast_buffers, copies rank 0's statistics to the others at any forward).

    Raises (on entry, before anything is changed):
        RuntimeError: a lazy batch norm has not seen a batch yet.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks: list[tuple[object, list[_BatchNorm]]] = []

    def __enter__(self) -> None:
        layers = _tracking(self.model)
        for name, layer in layers.items():
            if _is_lazy(layer):
                raise RuntimeError(f"frozen_batchnorm: layer {name!r} must be initialised, got a lazy one: run a forward pass first")
        block = object()
        self.blocks.append((block, list(layers.values())))  # first of all: whatever interrupts the rest, an exit finds what to undo
        try:
            for layer in layers.values():
                _frozen.setdefault(layer, set()).add(block)
                layer.track_running_stats = False  # in train mode: normalise with the batch, and touch nothing
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc: object) -> None:
        """Of the innermost block. Interrupted, it can be called again; without a block it does nothing."""
        if not self.blocks:
            return
        block, layers = self.blocks[-1]
        for layer in layers:
            others = _frozen.get(layer, set()) - {block}
            if others:
                _frozen[layer] = others
            else:
                layer.track_running_stats = True
                _frozen.pop(layer, None)
        self.blocks.pop()


def tune_batchnorm(model: nn.Module, loader: Iterable[Any], batches: int = 100) -> int:
    """Measure the running statistics of every batch norm anew, over `batches` batches of training data; use it after `prune`.

    Only batch norms are in train mode (no dropout), and there are no gradients. All batches weigh the same (a cumulative average).
    CrAM's published tuning has a momentum of 0.1, where the last twenty or so decide: the same accuracy within 0.3 points, but noisier.
    Afterwards, and after an exception, modes and momentum are as they were.

    Args:
        model: runs eagerly, on its own device, to which batches are moved.
        loader: gives x, (x, ...) or a dict of keyword arguments. Where it is shorter than `batches` it is started again; an
            iterator that cannot be gives what it has.
        batches: at least 1.

    Returns:
        The number of batch norms tuned. 0: the model has none that track statistics, and nothing was done.

    Raises:
        ValueError: `batches` is not an int of at least 1, or the loader is empty.
        RuntimeError: a batch norm is frozen, by `frozen_batchnorm` or between the halves of a step. Nothing was changed.
    """
    if not isinstance(batches, int) or batches < 1:
        raise ValueError(f"tune_batchnorm: batches must be an int of at least 1, got {batches!r}")
    tracking = _tracking(model)
    if held := [name for name, layer in tracking.items() if layer in _frozen]:
        raise RuntimeError(f"tune_batchnorm: batch norms must not be frozen (frozen_batchnorm, an open step), got {held[0]!r} frozen")
    layers = list(tracking.values())
    if not layers:
        return 0
    data = _repeated(loader, batches)
    if (first := next(data, None)) is None:
        raise ValueError("tune_batchnorm: loader must give at least one batch, got an empty one")
    device = next(chain(model.parameters(), model.buffers())).device
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    try:
        for module, _ in modes:
            module.training = False  # not model.eval(), which models override
        for layer in layers:
            layer.training, layer.momentum = True, None
            if not _is_lazy(layer):  # a lazy one begins anew anyway
                layer.reset_running_stats()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # momentum None reads a counter: no whole graph
            for batch in chain([first], data):
                _forward(model, _moved(batch, device))
    finally:
        for module, training in modes:
            module.training = training
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    return len(layers)


def _repeated(loader: Iterable[Any], batches: int) -> Iterator[Any]:
    """`batches` batches, from the beginning again as often as needed; fewer where the loader has nothing left, as a generator."""
    count = 0
    while True:
        before = count
        for batch in loader:
            yield batch
            count += 1
            if count == batches:
                return
        if count == before:
            return


def _forward(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch[0] if isinstance(batch, list | tuple) else batch)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_moved(value, device) for value in batch]
    return batch
