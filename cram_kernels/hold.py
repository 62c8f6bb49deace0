"""Train a pruned model further, with its zeros held."""

from collections.abc import Iterable
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .distributed import check_not_fsdp1, local_of
from .params import check_module, check_unperturbed, excluded, perturbed


class HeldZeros:
    """What `hold_zeros` returns. `remove()`, or the end of a `with` block, frees the weights.

    Attributes:
        zeros: how many elements are held, by the name of the parameter; of a sharded model, those of this rank.

    Example:
        held = hold_zeros(model)
        print(held.zeros)
        held.remove()
    """

    def __init__(self, model: nn.Module, masks: dict[str, Tensor]) -> None:
        self._model, self._masks = ref(model), masks
        self.zeros = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
        self._drop_hook = finalize(model, register_optimizer_step_post_hook(self._after_step).remove)  # all optimizers call it

    def remove(self) -> None:
        """From now on steps may change the zeros. May be called again."""
        self._drop_hook()
        self._masks = {}

    def __enter__(self) -> "HeldZeros":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        model = self._model()
        parameters = {} if model is None else dict(model.named_parameters())
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if stepped.isdisjoint(map(id, parameters.values())):
            return
        for name, mask in list(self._masks.items()):
            p = parameters.get(name)
            if p is None or (local := local_of(p)).shape != mask.shape:
                found = "none of this name" if p is None else f"shape {tuple(local.shape)}"
                raise RuntimeError(
                    f"hold_zeros: parameter {name!r} must keep its name and its shape {tuple(mask.shape)}, got {found}; "
                    "call remove(), change the model, and call hold_zeros again"
                )
            if perturbed(p):
                continue  # this is another optimizer's step, between the halves of a step of CrAM, which restores the weights
            if mask.device != local.device:
                mask = self._masks[name] = mask.to(local.device)
            local.masked_fill_(mask, 0)


@torch.no_grad()
def hold_zeros(model: nn.Module, exclude: Iterable[str] | None = ()) -> HeldZeros:
    """Keep what is zero now in the model's weights exactly zero, after every step of any torch optimizer: to fine-tune a pruned model.

    A hook after each optimizer step sets the held elements to zero, whatever momentum, weight decay or a scaler did to them (a mask on the
    gradients alone is not enough for that). Nothing is added to the model: its state dict, its parameters and its copies are as ever. A
    copy is not held, and a new process calls `hold_zeros` again after loading; the zeros themselves are in the checkpoint. Call it after
    the model is pruned and, with FSDP2, after `fully_shard`; DDP may wrap the model before or after. Gradients and optimizer state of held
    elements are not touched: they count in a gradient norm. Between the halves of a step of CrAM held elements may be perturbed.

    Any torch optimizer is one that derives from `torch.optim.Optimizer`, has a parameter of the model in its groups, and whose `step` runs
    torch's hooks. A `step` that was put into the class after its first object was made does not.

    Args:
        model: its parameters of 2 or more dims that have zeros are held. The memory is one byte for each element of those.
        exclude: patterns of the names of parameters to leave free, as in `fnmatch`: `["*.lora_B.weight"]`, which begin as zeros.

    Returns:
        A `HeldZeros`: a handle with `remove()`, and a context manager.

    Raises:
        ValueError: no parameter has zeros, one is not initialised, a pattern in `exclude` matches no parameter, or FSDP1 has the model.
        RuntimeError: weights are perturbed, within a step of CrAM. Later, from a step: a parameter has gone or has another shape.

    Example:
        prune(model, TopK(sparsity=0.9))
        with hold_zeros(model):
            fine_tune(model)
    """
    check_module("hold_zeros", model)
    check_not_fsdp1("hold_zeros", model.parameters())
    named = list(model.named_parameters(remove_duplicate=False))
    free = {id(named[i][1]) for i in excluded("hold_zeros: ", exclude, [(name,) for name, _ in named])}
    masks = {}
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"hold_zeros: parameter {name!r} must be initialised, got a lazy one: run a forward pass first")
        check_unperturbed("hold_zeros", [(name, p)])
        if p.dim() > 1 and p.is_floating_point() and id(p) not in free and bool((mask := local_of(p) == 0).any()):
            masks[name] = mask
    if not masks:
        raise ValueError("hold_zeros: model must have zeros in parameters of 2 or more dims, got none: prune it first")
    return HeldZeros(model, masks)
