"""Checkpoints of one process or of several: whole tensors, written by rank 0."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

import cram_kernels


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def read(path: Path, *keys: str) -> dict[str, Any]:
    """A checkpoint as it is, which must have these keys; ValueError for another file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it must be a checkpoint that train.py has written")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises anything
        why = f"{type(error).__name__} {error}".partition("\n")[0]
        raise ValueError(f"{path} must be a checkpoint of torch, got a file that it does not read: {why}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a checkpoint of train.py, got a {type(content).__name__}")
    if missing := [key for key in keys if not isinstance(content.get(key), dict)]:
        raise ValueError(f"{path} must be a checkpoint of train.py, got one without {missing[0]!r}")
    return content


def check_fits(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    """ValueError, before anything is loaded, where the tensors of a checkpoint are not those of the model."""
    own, given = ({name: tuple(getattr(t, "shape", ())) for name, t in tensors.items()} for tensors in (model.state_dict(), state))
    for name in (name for name in own | given if own.get(name) != given.get(name)):
        wanted, got = (f"{name} of shape {found[name]}" if name in found else f"no {name}" for found in (own, given))
        raise ValueError(f"{path} must be of the network that the options name, with {wanted}, got {got}")


class Checkpoints:
    """last.pt and best.pt in a folder, written by rank 0: whole tensors, also of a sharded model."""

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)

    def __init__(self, out: Path, model: nn.Module, optimizer: Optimizer | None) -> None:
        self.out, self.model, self.optimizer = out, model, optimizer
        self.sharded = isinstance(model, FSDPModule)

    def save(self, name: str, content: dict[str, Any], with_optimizer: bool) -> None:
        if self.sharded:
            model, optimizer = get_state_dict(self.model, self.optimizer, options=self.options)
        else:
            model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        if rank() == 0:
            cram_kernels.save(content | {"model": model} | ({"optimizer": optimizer} if with_optimizer else {}), self.out / name)

    def load(self, content: dict[str, Any], path: Path) -> None:
        """What `read` has found at the path; the optimizer too, where it is there."""
        check_fits(self.model, content["model"], path)
        model, optimizer, options = content["model"], content.get("optimizer"), StateDictOptions(full_state_dict=True)
        if not self.sharded:
            self.model.load_state_dict(model)
            if optimizer is not None:
                self.optimizer.load_state_dict(optimizer)
        elif optimizer is None:
            set_model_state_dict(self.model, model, options=options)
        else:
            set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=options)
