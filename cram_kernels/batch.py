"""What a data loader gives: moved to a device, handed to a model, and shared out between the two passes of a step."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence
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


SecondPass = str | Callable[[Any], tuple[Any, Any]]


def split_batch(batch: Any, second_pass: SecondPass = "all") -> tuple[Any, Any]:
    """The samples of each pass of a CrAM step: (batch of the first pass, batch of the second one).

    The second pass costs as much as the first. It need not see all samples:

    - "all": both passes see the batch, as in the paper; two forward and backward passes.
    - "half": the first pass sees the batch, the second one its second half; 1.5 times the cost of SGD.
    - "split": the first pass sees the first half, the second pass the second half; the cost of SGD.
    - a function gives both, of the batch.

    Of an odd number the second pass has one sample less; a batch of one serves both passes. The number of samples is the length of all
    tensors along dim 0, where they are cut. With them lists and tuples of as many other things (names, paths, numbers) are cut; tensors
    without dims are not. Containers keep their type.

    Where that could be wrong, the batch is refused, and a function has to cut it: tensors of several lengths (weights of classes, the edges
    of a graph), and lists of tensors that may be samples (images and targets for detection).

    Args:
        batch: a tensor, or tensors in mappings (BatchEncoding too), sequences, named tuples and dataclasses, nested in any way.
        second_pass: "all", "half", "split", or a function of the batch.

    Raises:
        ValueError: another value; a batch without tensors, without samples, or in doubt; a PackedSequence; a function that gives no pair.

    Example:
        >>> first, second = split_batch((images, labels), "split")
        >>> first, second = split_batch((images, labels), lambda batch: tuple(zip(*[(part[:2], part[2:]) for part in batch])))
    """
    check_second_pass("split_batch", second_pass)
    if callable(second_pass):
        if not isinstance(pair := second_pass(batch), tuple) or len(pair) != 2:
            raise ValueError(f"split_batch: second_pass must return a tuple, the batches of both passes, got {type(pair).__name__}")
        return pair
    if second_pass == "all":
        return batch, batch
    samples = _samples(batch)
    middle = (samples + 1) // 2

    def cut(where: slice) -> Callable[[Any], Any]:
        def of(part: Any) -> Any:
            if isinstance(part, Tensor):
                return part[where] if part.dim() > 0 else part
            others = isinstance(part, list | tuple) and not hasattr(part, "_make") and not any(_tensors(part))
            return part[where] if others and len(part) == samples else NotImplemented

        return of

    second = batch if samples == 1 else _mapped(batch, cut(slice(middle, None)))
    return (batch if second_pass == "half" else _mapped(batch, cut(slice(middle)))), second


def _samples(batch: Any) -> int:
    """How many samples there are, if every tensor says the same and no list can be one of samples; ValueError otherwise."""
    found = list(_tensors(batch))
    if not found or len(found[0][1]) == 0:
        empty = [len(t) for _, t, _ in found[:1]]
        raise ValueError(f"split_batch: batch must hold tensors of at least one sample, got {type(batch).__name__} with {empty}")
    samples = len(found[0][1])
    for name, t, _ in found:
        if len(t) != samples:
            lengths = f"{samples} in {found[0][0]} and {len(t)} in {name}"
            raise ValueError(f"split_batch: batch must have one length in dim 0 of all tensors, got {lengths}: give second_pass a function")
    alone = all(lists for _, _, lists in found)
    for name, _, lists in found:
        if lists and (alone or 1 < samples in lists):
            raise ValueError(
                f"split_batch: batch must hold no list of tensors that may be samples, got {name}: give second_pass a function"
            )
    return samples


def _tensors(part: Any, name: str = "batch", lists: tuple[int, ...] | None = None) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """The tensors with dims: name, tensor, and the lengths of the lists around it that may be lists of samples.

    Of the outermost container that is asked only where it has dicts with the same keys: (x, y) are not two samples.
    """
    if isinstance(part, PackedSequence):
        raise ValueError("split_batch: batch must be cut along dim 0, got a PackedSequence: give second_pass a function")
    items: Iterable[tuple[Any, Any]] = ()
    inner = lists or ()
    if isinstance(part, Tensor):
        if part.dim() > 0:
            yield name, part, inner
    elif isinstance(part, Mapping):
        items = part.items()
    elif isinstance(part, MutableSequence | tuple | set | frozenset):
        items = enumerate(part)
        keys = [set(item) if isinstance(item, Mapping) else None for item in part]
        alike = len(keys) > 1 and keys[0] is not None and all(k == keys[0] for k in keys)
        if not hasattr(part, "_make") and (lists is not None or alike):
            inner += (len(part),)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        items = [(field.name, getattr(part, field.name)) for field in dataclasses.fields(part) if hasattr(part, field.name)]
    for key, value in items:
        yield from _tensors(value, f"{name}[{key!r}]", inner)


def check_second_pass(where: str, second_pass: Any) -> None:
    if second_pass not in ("all", "half", "split") and not callable(second_pass):
        raise ValueError(f"{where}: second_pass must be 'all', 'half', 'split' or a function, got {second_pass!r}")
