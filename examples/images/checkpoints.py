"""Checkpoints of one process or of several: whole tensors, written by rank 0."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

import cram_kernels


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


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

    def load(self, name: str) -> dict[str, Any]:
        if not (self.out / name).is_file():
            raise FileNotFoundError(f"{self.out / name} is missing: there is nothing to go on with or to test")
        content = torch.load(self.out / name, map_location="cpu", weights_only=True)
        if self.sharded and "optimizer" in content:
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=content["model"],
                optim_state_dict=content["optimizer"],
                options=StateDictOptions(full_state_dict=True),
            )
        else:
            self.model.load_state_dict(content["model"])
            if "optimizer" in content:
                self.optimizer.load_state_dict(content["optimizer"])
        return content
