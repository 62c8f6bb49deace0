"""What a data loader gives: moved to a device, handed to a model, and shared out between the two passes of a step."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def _mapped(batch: Any, of: Callable[[Any], Any]) -> Any:
    """The batch with `of` applied to every part: containers keep their type, and the loader's own are not changed.

    `of` is asked first for each container and for everything in it; where it returns NotImplemented the items of a container (a mapping,
    sequence, set, named tuple or dataclass) are asked for instead, and anything else is passed on.
    """
    if (found := of(batch)) is not NotImplemented:
        return found
    other: Any
    if isinstance(batch, MutableMapping):
        other = copy.copy(batch)  # keeps a default factory, for one
        for key, value in batch.items():
            other[key] = _mapped(value, of)
        return other
    if isinstance(batch, Mapping):
        return {key: _mapped(value, of) for key, value in batch.items()}
    if isinstance(batch, MutableSequence):
        other = copy.copy(batch)
        for i, value in enumerate(batch):
            other[i] = _mapped(value, of)
        return other
    if isinstance(batch, tuple) and hasattr(batch, "_make"):  # a named tuple
        return type(batch)._make(_mapped(value, of) for value in batch)
    if isinstance(batch, tuple | set | frozenset):
        return type(batch)(_mapped(value, of) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        other = copy.copy(batch)
        for field in dataclasses.fields(batch):
            if hasattr(batch, field.name):
                object.__setattr__(other, field.name, _mapped(getattr(batch, field.name), of))  # also of a frozen one
        return other
    return batch


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on the device: containers keep their type, and the loader's own are not changed.

    Tensors are found in what has a `to()` (a PackedSequence, a BatchEncoding of transformers), mappings, sequences, sets, named tuples and
    dataclasses, nested in any way. Anything else is passed on.
    """

    def to_device(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.to(device)
        if callable(getattr(part, "to", None)) and not isinstance(part, type):
            return copy.copy(part).to(device)  # of a copy: some change themselves
        return NotImplemented

    return _mapped(batch, to_device)


def check_loader(op: str, loader: Any) -> None:
    """A batch, or a sample of one, can often be iterated, too: it is named before the model fails at a part of it."""
    if isinstance(loader, Tensor | Mapping | str) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise ValueError(f"{op}: loader must give batches, as a DataLoader or a list [batch] does, got {type(loader).__name__}")


def call(model: nn.Module, batch: Any) -> Any:
    """The model on x, on the first of (x, ...), or on a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple) and not isinstance(batch, PackedSequence):
        return model(batch[0])
    return model(batch)


def split_batch(batch: Any, second_pass: str = "all") -> tuple[Any, Any]:
    """The samples of each pass of a CrAM step: (batch of the first pass, batch of the second one).

    The second pass costs as much as the first. It need not see all samples:

    - "all": both passes see the batch, as in the paper; two forward and backward passes.
    - "half": the first pass sees the batch, the second one its second half; 1.5 times the cost of SGD.
    - "split": the first pass sees the first half, the second pass the second half; the cost of SGD.

    Of an odd number the second pass has one sample less; a batch of one serves both passes. The number of samples is the length of the
    first tensor that has dims; every tensor of that length is cut along dim 0, and so are lists and tuples of as many other things (names,
    paths). Containers keep their type.

    Args:
        batch: a tensor, or tensors in mappings (BatchEncoding too), sequences, named tuples and dataclasses, nested in any way.
        second_pass: "all", "half" or "split".

    Raises:
        ValueError: another value, a batch without such a tensor or without samples, a PackedSequence.

    Example:
        >>> first, second = split_batch((images, labels), "split")
    """
    check_second_pass("split_batch", second_pass)
    if second_pass == "all":
        return batch, batch
    lengths: list[int] = []

    def measure(part: Any) -> Any:
        if isinstance(part, PackedSequence):
            raise ValueError(f"split_batch: batch must be cut along dim 0 for second_pass={second_pass!r}, got a PackedSequence")
        if isinstance(part, Tensor):
            lengths.extend(part.shape[:1])
            return part
        return NotImplemented

    _mapped(batch, measure)
    if not lengths or lengths[0] == 0:
        raise ValueError(f"split_batch: batch must hold tensors of at least one sample, got {type(batch).__name__} with {lengths[:1]}")
    samples = lengths[0]
    middle = (samples + 1) // 2

    def cut(where: slice) -> Callable[[Any], Any]:
        def of(part: Any) -> Any:
            if isinstance(part, Tensor):
                return part[where] if part.dim() > 0 and len(part) == samples else part
            others = isinstance(part, list | tuple) and not hasattr(part, "_make") and not any(_is_container(item) for item in part)
            return part[where] if others and len(part) == samples else NotImplemented

        return of

    second = batch if samples == 1 else _mapped(batch, cut(slice(middle, None)))
    return (batch if second_pass == "half" else _mapped(batch, cut(slice(middle)))), second


def _is_container(item: Any) -> bool:
    return isinstance(item, Tensor | Mapping | MutableSequence | tuple | set | frozenset) or dataclasses.is_dataclass(item)


def check_second_pass(where: str, second_pass: Any) -> None:
    if second_pass not in ("all", "half", "split"):
        raise ValueError(f"{where}: second_pass must be 'all', 'half' or 'split', got {second_pass!r}")
