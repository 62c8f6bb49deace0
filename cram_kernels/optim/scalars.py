"""Hyperparameters as the ops want them: one value where all groups agree, else one a tensor; made anew only when they change."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arena import Slot

Groups = list[dict[str, Any]]


def per_tensor(groups: Groups, slots: list[Slot], value: Callable[[dict[str, Any]], Any]) -> list:
    """[one value] where `value(group)` is the same for all groups, else one a slot."""
    values = [value(group) for group in groups]
    return values[:1] if all(v == values[0] for v in values) else [values[s.group] for s in slots]


class Scalars:
    """Small tensors on the device, kept while their numbers are the same: a step that changes none copies nothing to a GPU."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.device], tuple[Any, Tensor]] = {}

    def tensor(self, name: str, values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`values`, a number or a list, as a tensor; `name` says which one it replaces."""
        kept = self.kept.get((name, device))
        if kept is None or kept[0] != values:
            kept = self.kept[name, device] = (values, torch.tensor(values, dtype=dtype, device=device))
        return kept[1]

    def option(self, name: str, groups: Groups, slots: list[Slot], device: torch.device) -> Tensor:
        """A group option as float32 [] or [n]; where it is a tensor itself (lr) it is read on the device, without a synchronisation."""
        if any(isinstance(group[name], Tensor) for group in groups):
            each = [torch.as_tensor(group[name], dtype=torch.float32, device=device).reshape(()) for group in groups]
            return each[0] if len(groups) == 1 else torch.stack([each[s.group] for s in slots])
        values = per_tensor(groups, slots, lambda group: float(group[name]))
        return self.tensor(name, values[0] if len(values) == 1 else values, torch.float32, device)
