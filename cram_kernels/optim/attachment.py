"""A model that knows of its optimizer: its state_dict() has no perturbed weights, and what is loaded into it stays."""

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from .arena import Arena


class Attachment:
    """A hook of every module of the model, so that the state_dict of a part of it is right, too.

    Copied together with model and optimizer it belongs to the copies. In a copy of the model alone its arena has no slots: it does nothing.
    """

    def __init__(self, model: nn.Module, arena: Arena) -> None:
        self.arena = arena
        self.handles = [module.register_state_dict_post_hook(self) for module in model.modules()]
        self.unsynced: dict[nn.Module, bool] = {}  # DDP -> whether it has left the gradients of its last pass to each rank
        self.handles += [module.register_forward_hook(self.after_forward) for module in model.modules() if isinstance(module, DDP)]
        self.handles += [module.register_load_state_dict_pre_hook(self.before_load) for module in model.modules()]

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            if prefix + name in state_dict and (saved := self.arena.unperturbed(param)) is not None:
                state_dict[prefix + name] = saved

    def after_forward(self, module: DDP, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.unsynced[
                module
            ] = not module.require_backward_grad_sync  # the pass after this one goes by it, whatever no_sync() does until then

    def before_load(self, *args: Any) -> None:
        """What is loaded within a step must not be overwritten by the weights that were saved before: they come back first."""
        self.arena.restore()
        self.arena.end()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
