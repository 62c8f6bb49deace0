"""The buffers of modules, put aside and put back: running statistics, estimates of spectral norms, codebooks, queues."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .distributed import local_of
from .params import is_plain


class Saved(NamedTuple):
    """One buffer of a module, as it was."""

    name: str
    buffer: Tensor
    version: int
    values: Tensor


def memory_of(model: nn.Module) -> set[int]:
    """The storages of the model's parameters. A buffer in one of them is a weight, which an optimizer restores and updates."""
    return {t.untyped_storage().data_ptr() for p in model.parameters() if _has_memory(t := local_of(p))}


def _has_memory(t: Tensor) -> bool:
    return not is_lazy(t) and is_plain(t) and t.layout is torch.strided and not (t.is_meta or t.is_inference())


@torch.no_grad()
def save(module: nn.Module, weights: set[int]) -> list[Saved]:
    """Copies of the buffers of one module, of those that a forward pass can change."""
    found = []
    for name, buffer in module._buffers.items():
        if buffer is not None and _has_memory(t := local_of(buffer)) and t.untyped_storage().data_ptr() not in weights:
            found.append(Saved(name, buffer, t._version, t.clone()))
    return found


@torch.no_grad()
def restore(module: nn.Module, saved: Iterable[Saved]) -> None:
    """Put the values of its buffers back, to the bit; a buffer that was replaced by one of its kind is put back itself.

    Not every write is seen in a version counter (`.data`, the running statistics of torch's batch norm), so all are copied. The counter
    goes up where it had gone up meanwhile: a backward pass that needs such a buffer raises, and one that needs a constant is not disturbed.
    """
    for name, buffer, version, values in saved:
        now = module._buffers[name] if name in module._buffers else None  # of a scripted module it has no get()
        if now is not buffer:
            if not isinstance(now, Tensor) or now.shape != buffer.shape:
                continue  # a cache that grew
            if (now.dtype, now.device) != (buffer.dtype, buffer.device):
                local_of(now).copy_(values)  # the module was moved
                continue
            setattr(module, name, buffer)
        t = local_of(buffer)
        t.data.copy_(values)
        if t._version != version:
            torch.autograd.graph.increment_version(t)
