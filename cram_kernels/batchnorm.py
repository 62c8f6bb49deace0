"""Batch-norm statistics beside pruning: keep them still in the perturbed pass, measure them anew after pruning."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm, _NormBase  # _NormBase: batch and instance norms of all kinds
from torch.nn.modules.lazy import LazyModuleMixin

from . import buffers
from .batch import call, check_loader, moved
from .params import check_module, listed, perturbed
from .warning import warn

_UNTRACKED = (_BatchNorm.forward, SyncBatchNorm.forward)  # those that leave everything alone where track_running_stats is False
_TOO_FEW = re.compile("Expected more than 1 (value per channel|spatial element) when training")


class _Hold:
    """Keeps a module still as long as any block needs that."""

    __slots__ = ("blocks", "saved", "tracks")

    def __init__(self, module: Any, weights: set[int]) -> None:
        batch_norm = isinstance(module, _BatchNorm)
        self.blocks: set[object] = set()
        self.tracks = batch_norm and module.track_running_stats
        self.saved = [] if batch_norm and type(module).forward in _UNTRACKED else buffers.save(module, weights)

    def release(self, module: nn.Module) -> None:
        if self.tracks:
            _track(module, True)
        if self.saved:
            buffers.restore(module, self.saved)


def _track(module: nn.Module, tracks: bool) -> None:
    """In train mode a batch norm that does not track normalises with the batch, and touches nothing."""
    object.__setattr__(module, "track_running_stats", tracks)  # past nn.Module's own, which takes ten times as long


_held: WeakKeyDictionary[nn.Module, _Hold] = WeakKeyDictionary()


def kept_buffers(module: nn.Module) -> dict[str, Tensor]:
    """What the end of the block will put back into a module that is frozen now, by the names of its buffers."""
    hold = _held.get(module)
    return {} if hold is None else {saved.name: saved.values for saved in hold.saved}


class frozen_batchnorm(AbstractContextManager[None]):  # named as what it is used like: torch.no_grad
    """Forward passes within the block leave no trace in the statistics and other buffers of the model.

    CrAM's second pass runs in train mode on perturbed, pruned weights. It normalises with the statistics of the batch, but the running ones
    must follow the first pass alone. An optimizer that knows its model uses this by itself; use it for passes of your own.

    - `nn.BatchNorm*d`, `nn.SyncBatchNorm`: running_mean, running_var and num_batches_tracked are not touched, even by a batch with Inf or
      NaN. (A momentum of 0 would not protect them: 0 * Inf is NaN.) Within the block `state_dict()` has them, too.
    - All other buffers of the model are copied on entry, and put back, to the bit, at the end of the block. Such are the buffers of
      `nn.InstanceNorm*d`, of norms of other libraries and of spectral norm, and codebooks, queues, observers, counters. It costs two
      copies of these buffers. Statistics that are kept elsewhere than in buffers are not put back.

    In eval mode modules work as without the block. Blocks may be nested or overlap; the end of the last one puts the buffers back. A copy
    of the model that is made within the block stays frozen. It works through `torch.compile` (with one more graph) and DDP (which, with
    broadcast_buffers, copies rank 0's statistics to the others at any forward). Call `backward()` within the block: after its end torch
    refuses to go back through a buffer that was restored.

    Args:
        model: any module.

    Raises (on entry, before anything is changed):
        RuntimeError: a lazy norm has not seen a batch yet.

    Example:
        >>> with frozen_batchnorm(model):
        ...     loss(model(images), labels).backward()

    Source: the published code of "CrAM: A Compression-Aware Minimizer", arXiv 2207.14200, which sets the momentum of nn.BatchNorm2d to 0
    in the second pass.
    """

    def __init__(self, model: nn.Module) -> None:
        check_module("frozen_batchnorm", model)
        self.model = model
        self.blocks: list[tuple[object, list[tuple[nn.Module, _Hold]]]] = []

    def __enter__(self) -> None:
        modules = _with_buffers(self.model)
        if any(map(_is_lazy, modules)):
            name = next(name for name, m in self.model.named_modules() if _is_lazy(m))
            raise RuntimeError(f"frozen_batchnorm: layer {name!r} must be initialised, got a lazy one: run a forward pass first")
        weights = set() if all(isinstance(m, _BatchNorm) for m in modules) else buffers.memory_of(self.model)
        block: object = object()
        held: list[tuple[Any, _Hold]] = []
        self.blocks.append((block, held))  # first of all: whatever interrupts the rest, an exit finds what to undo
        try:
            for m in modules:
                hold = _held.get(m) or _Hold(m, weights)
                held.append((m, hold))
                hold.blocks.add(block)
                _held[m] = hold
                if hold.tracks:
                    _track(m, False)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exc: object) -> None:
        """Of the innermost block. Interrupted, it can be called again; without a block it does nothing."""
        if not self.blocks:
            return
        block, held = self.blocks[-1]
        for module, hold in held:
            hold.blocks.discard(block)
            if not hold.blocks:
                _held.pop(module, None)
                hold.release(module)
        self.blocks.pop()


def _with_buffers(model: nn.Module) -> list[Any]:
    """Three times as fast as `model.modules()`, which makes names: this is run in every step."""
    seen: set[nn.Module] = set()
    found: list[Any] = []
    todo: list[nn.Module | None] = [model]
    while todo:
        m = todo.pop()
        if m is not None and m not in seen:
            seen.add(m)
            todo.extend(m._modules.values())
            if m._buffers:
                found.append(m)
    return found


def _is_lazy(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and isinstance(module, _NormBase) and module.has_uninitialized_params()


def tune_batchnorm(model: nn.Module, loader: Iterable[Any], batches: int = 100) -> int:
    """Measure the running statistics of every batch norm anew, over `batches` batches of training data; use it after `prune`.

    The statistics of a trained model do not fit its pruned weights: without this a pruned network is worth little. Only batch and instance
    norms that track statistics are in train mode (no dropout), and there are no gradients. All batches weigh the same (a cumulative
    average, as with `momentum=None`). CrAM's published tuning has a momentum of 0.1, where the last twenty or so decide: the same accuracy
    within 0.3 points, but noisier.

    A batch that leaves a norm one value per channel, such as a last one of a single sample, is skipped with a warning. A norm that no batch
    reaches keeps its statistics, with a warning. Afterwards modes and momenta are as they were; after an exception every buffer is, too.

    Args:
        model: runs eagerly, on its own device, to which batches are moved.
        loader: gives x, (x, ...) or a mapping of keyword arguments, of any types: named tuples, dataclasses, PackedSequence and nested
            containers stay what they are.
        batches: how many are used, at least 1. A loader that is shorter is started again as often as needed, so that its samples count
            several times, in another order if it shuffles; a generator cannot be, and gives what it has.

    Returns:
        The number of norms tuned. 0: the model has none that track statistics, and nothing was done.

    Warns:
        CrAMWarning: a batch was skipped, a norm saw no batch, or the model has running statistics in modules that are not torch's norms or
            subclasses of them (FrozenBatchNorm2d, EvoNorm, ...), which are left alone.

    Raises:
        ValueError: `batches` is not an int of at least 1, or the loader gives no batch, or none with more than one value per channel.
        RuntimeError: a norm is frozen, by `frozen_batchnorm` or between the halves of a step; weights are perturbed; or statistics came out
            that are not finite. In all cases, and where the loader or the model raises, the model is as it was.

    Example:
        >>> prune(model, TopK(sparsity=0.9))
        >>> tune_batchnorm(model, loader)
        53

    Source: "CrAM: A Compression-Aware Minimizer", arXiv 2207.14200, section 4: batch-norm tuning after one-shot pruning.
    """
    check_module("tune_batchnorm", model)
    check_loader("tune_batchnorm", loader)
    if type(batches) is not int or batches < 1:
        raise ValueError(f"tune_batchnorm: batches must be an int of at least 1, got {batches!r}")
    if frozen := [name for name, m in model.named_modules() if m in _held]:
        raise RuntimeError(f"tune_batchnorm: batch norms must not be frozen (frozen_batchnorm, an open step), got {frozen[0]!r} frozen")
    if any(perturbed(p) for p in model.parameters()):
        raise RuntimeError("tune_batchnorm: weights must not be perturbed, got some within a step: step() or restore() first")
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _NormBase) and m.track_running_stats}
    if foreign := [
        f"{name!r} ({type(m).__name__})" for name, m in model.named_modules() if _has_statistics(m) and not isinstance(m, _NormBase)
    ]:
        warn(f"tune_batchnorm: the statistics of {listed(foreign)} stay as they are, for these are not torch's batch or instance norms")
    if not norms:
        return 0
    data = _repeated(loader, batches)
    if (first := next(data, None)) is None:
        raise ValueError("tune_batchnorm: loader must give at least one batch, got an empty one")
    weights = buffers.memory_of(model)
    before = {m: buffers.save(m, weights) for m in model.modules()}
    modes = [(m, m.training) for m in before]
    momenta = [m.momentum for m in norms.values()]
    calls = dict.fromkeys(norms, 0)
    hooks = []
    try:
        for name, norm in norms.items():
            hooks.append(norm.register_forward_pre_hook(_cumulative(name, calls)))
        for m in before:
            m.training = False  # not model.eval(), which models override
        for norm in norms.values():
            norm.training = True
            if not _is_lazy(norm):  # a lazy one begins anew anyway
                norm.reset_running_stats()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # the hooks count, and the momentum changes with each batch
            _measure(model, chain([first], data), norms, calls)
        for name, norm in norms.items():
            if calls[name] == 0:
                buffers.restore(norm, before[norm])
            elif not all(t.isfinite().all() for t in (norm.running_mean, norm.running_var) if t is not None):
                raise RuntimeError(f"tune_batchnorm: statistics must be finite, got Inf or NaN in {name!r}")
        if unseen := [repr(name) for name, count in calls.items() if count == 0]:
            warn(f"tune_batchnorm: no batch reached {listed(unseen)}, which keep their statistics")
    except BaseException:
        for m, saved in before.items():
            buffers.restore(m, saved)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for m, training in modes:
            m.training = training
        for norm, momentum in zip(norms.values(), momenta, strict=True):
            norm.momentum = momentum
    return len(norms) - len(unseen)


def _has_statistics(module: nn.Module) -> bool:
    return any(buffer is not None and name in ("running_mean", "running_var") for name, buffer in module._buffers.items())


def _cumulative(name: str, calls: dict[str, int]) -> Callable[[nn.Module, Any], None]:
    """A hook before each forward pass of a norm: pass k has the momentum 1 / k, which makes the running statistics the mean of all passes.
    That is what `momentum=None` means to torch's own batch norms; subclasses and instance norms may not know it."""

    def hook(norm: Any, _: Any) -> None:
        calls[name] += 1
        norm.momentum = 1 / calls[name]

    return hook


def _measure(model: nn.Module, data: Iterable[Any], norms: dict[str, _NormBase], calls: dict[str, int]) -> None:
    device = next((t.device for t in chain(model.parameters(), model.buffers()) if not t.is_meta), torch.device("cpu"))
    given = skipped = 0
    for batch in data:
        given += 1
        before, counts = [(norm, buffers.save(norm, set())) for norm in norms.values()], dict(calls)
        try:
            call(model, moved(batch, device))
        except ValueError as error:
            if not _TOO_FEW.search(str(error)):
                raise
            skipped += 1
            for norm, saved in before:
                buffers.restore(norm, saved)
            calls.update(counts)
    if skipped == given:
        raise ValueError(f"tune_batchnorm: loader must give batches with more than one value per channel, got {given} without")
    if skipped:
        warn(
            f"tune_batchnorm: {skipped} of {given} batches were skipped: they have one value per channel, such as a last one of one sample"
        )


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
