"""Hooks of the model: `state_dict()` gives the unperturbed weights, and loading a checkpoint first restores them. A hook of the base."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from ..batchnorm import kept_buffers

if TYPE_CHECKING:
    from .base import Wrapper


class ModelHooks:
    """Hooks of every module of the model, so that the state_dict of a part of it is right, too.

    The hooks know the optimizer by a weak reference: a model keeps no optimizer, and none of its memory, alive. In a copy of the model they
    do nothing; the copy of the optimizer, if it was copied too, attaches itself to it.
    """

    def __init__(self, model: nn.Module, optimizer: "Wrapper") -> None:
        self.model, self.optimizer = model, weakref.ref(optimizer)
        optimizer._workspace.name_by(model)
        self.handles: list[Any] = []
        self.unsynced: dict[nn.Module, bool] = {}  # module -> whether DDP has left the gradients of its last pass to each rank
        self.sharded: list[Any] | None = None  # the modules that FSDP2 has sharded by the first step
        for module in model.modules():
            self.handles.append(module.register_state_dict_post_hook(_Hook(self, "after_state_dict")))
            self.handles.append(module.register_load_state_dict_pre_hook(_Hook(self, "before_load")))
        wrappers: list[nn.Module] = [m for m in model.modules() if isinstance(m, DDP)]
        for module in wrappers or [model]:
            self.handles.append(module.register_forward_hook(_Hook(self, "after_forward")))

    def after_state_dict(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
        optimizer = self.optimizer()
        if optimizer is None or (step := optimizer.open_step) is None:
            return
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            if prefix + name in state_dict and (saved := step.unperturbed(param)) is not None:
                state_dict[prefix + name] = saved
        for name, values in kept_buffers(module).items():
            if prefix + name in state_dict:
                state_dict[prefix + name] = values.clone()

    def before_load(self, *args: Any) -> None:
        """What is loaded within a step must not be overwritten by the weights that were saved before: those come back first."""
        if (optimizer := self.optimizer()) is not None:
            optimizer.give_up("the model was loaded between perturb() and step()")

    def after_forward(self, module: nn.Module, *_: Any) -> None:
        """Note whether DDP, in the attached model or around it, will share the gradients of this pass."""
        ddp = module if isinstance(module, DDP) else DDP._active_ddp_module
        if ddp is not None and torch.is_grad_enabled():  # the pass goes by what holds now, whatever no_sync() does until then
            self.unsynced[module] = not ddp.require_backward_grad_sync

    def check_synced(self, which: str, needed: bool) -> None:
        """Raise where the gradients of this pass are needed on all ranks alike, and a DDP model has not shared them."""
        if needed and any(self.unsynced.values()):
            wanted = "be the same on all ranks" + (" (or plus=False, sparse_grad=False)" if which == "first" else "")
            raise RuntimeError(f"CrAM: the {which} gradients must {wanted}, got those of a pass under no_sync(): the ranks would part")

    def reshard(self) -> None:
        """The root of an FSDP model keeps a whole copy of its weights after a forward pass: an old one after a change of the shards."""
        if self.sharded is None:
            self.sharded = [module for module in self.model.modules() if hasattr(module, "reshard") and hasattr(module, "unshard")]
        for module in self.sharded:
            module.reshard()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def __del__(self) -> None:
        self.remove()


class _Hook:
    """A method of a `ModelHooks`, held weakly; a copy or a pickle of it does nothing."""

    def __init__(self, hooks: ModelHooks | None = None, name: str = "") -> None:
        self.hooks, self.name = (lambda: None) if hooks is None else weakref.ref(hooks), name

    def __call__(self, *args: Any) -> None:
        if (hooks := self.hooks()) is not None:
            getattr(hooks, self.name)(*args)

    def __reduce__(self) -> tuple[type, tuple]:
        if (hooks := self.hooks()) is not None and (optimizer := hooks.optimizer()) is not None:
            optimizer.refuse_within_step("copy or pickle of the model")
        return _Hook, ()


class Guard:
    """A hook of the base, whose own step() must not be called within a step. It keeps no optimizer alive."""

    def __init__(self, optimizer: "Wrapper") -> None:
        self.optimizer = weakref.ref(optimizer)

    def __call__(self, *_: Any) -> None:
        optimizer = self.optimizer()
        if optimizer is not None and optimizer.open_step is not None and not optimizer._workspace.updating:
            optimizer.restore()
            raise RuntimeError("CrAM: step() of the base optimizer must not be called after perturb(), got it called: call that of CrAM")
