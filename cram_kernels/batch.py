"""What a data loader gives: moved to a device, and handed to a model."""

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping, MutableSequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on the device: containers keep their type, and the loader's own are not changed.

    Tensors are found in what has a `to()` (a PackedSequence, a BatchEncoding of transformers), mappings, sequences, sets, named tuples and
    dataclasses, nested in any way. Anything else is passed on.
    """
    if isinstance(batch, Tensor):
        return batch.to(device)
    if callable(getattr(batch, "to", None)) and not isinstance(batch, type):
        return copy.copy(batch).to(device)  # of a copy: some change themselves
    other: Any
    if isinstance(batch, MutableMapping):
        other = copy.copy(batch)  # keeps a default factory, for one
        for key, value in batch.items():
            other[key] = moved(value, device)
        return other
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, MutableSequence):
        other = copy.copy(batch)
        for i, value in enumerate(batch):
            other[i] = moved(value, device)
        return other
    if isinstance(batch, tuple) and hasattr(batch, "_make"):  # a named tuple
        return type(batch)._make(moved(value, device) for value in batch)
    if isinstance(batch, tuple | set | frozenset):
        return type(batch)(moved(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        other = copy.copy(batch)
        for field in dataclasses.fields(batch):
            if hasattr(batch, field.name):
                object.__setattr__(other, field.name, moved(getattr(batch, field.name), device))  # also of a frozen one
        return other
    return batch


def call(model: nn.Module, batch: Any) -> Any:
    """The model on x, on the first of (x, ...), or on a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, list | tuple) and not isinstance(batch, PackedSequence):
        return model(batch[0])
    return model(batch)
