"""The last half of a step: restore, form the gradient of the update, and take a step of the base optimizer.

SGD, Adam and AdamW are one op for all groups of a device; their state is made and kept as torch makes it, so that checkpoints go both ways.
Torch's flags for how to run (`foreach`, `fused`) choose among its own implementations; as in torch, `fused` and `capturable` put Adam's
step counter on the device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .. import ops
from ..distributed import local_of, whole_of
from .arena import Arena, Slot, by_device, tensors_of
from .factor import Factor, on
from .scalars import Scalars, per_tensor

Tensors = list[Tensor]


def update_(base: Optimizer, arena: Arena, slots: list[Slot], scalars: Scalars, factor: Factor) -> None:
    """One step of the base. A subclass may do anything in its step(), and step hooks of its own want to see the combined gradient: both
    take their own step."""
    hooked = len(base._optimizer_step_pre_hooks) > 1 or base._optimizer_step_post_hooks  # one is CrAM's guard
    update = any_other_ if hooked else FUSED.get(type(base), any_other_)
    update(base, arena, slots, scalars, factor)
    base._opt_called = True  # type: ignore[attr-defined]  # what a scheduler made over the base looks for


def sgd_(base: Optimizer, arena: Arena, slots: list[Slot], scalars: Scalars, factor: Factor) -> None:
    groups = base.param_groups
    for device, part in by_device(slots):
        kept = [_momentum(base, s) for s in part]
        lacking = [s for s, buffer in zip(part, kept, strict=True) if buffer is None]
        new = {s: torch.empty_like(s.param, dtype=s.state_dtype()) for s in lacking}  # spread as the parameter is
        ops.restore_sgd_(
            *_common(arena, device, part),
            [local_of(new[s]) if b is None else b for s, b in zip(part, kept, strict=True)],
            [int(b is None) for b in kept] if new else [0],
            scalars.option("lr", groups, part, device),
            momentum=per_tensor(groups, part, lambda g: float(g["momentum"])),
            dampening=per_tensor(groups, part, lambda g: float(g["dampening"])),
            weight_decay=per_tensor(groups, part, lambda g: float(g["weight_decay"])),
            nesterov=per_tensor(groups, part, lambda g: int(g["nesterov"])),
            maximize=per_tensor(groups, part, lambda g: int(g["maximize"])),
            **_factors(arena, device, part, factor),
        )
        if new and not skipped(factor):  # a host synchronisation, but only where a parameter takes its first step under a GradScaler
            for slot, buffer in new.items():
                base.state[slot.param]["momentum_buffer"] = buffer


def adam_(base: Optimizer, arena: Arena, slots: list[Slot], scalars: Scalars, factor: Factor) -> None:
    groups = base.param_groups
    decoupled = any(g["decoupled_weight_decay"] for g in groups)
    if decoupled and not all(g["decoupled_weight_decay"] for g in groups):
        raise ValueError("CrAM: decoupled_weight_decay must be the same in all parameter groups, got both True and False")
    for device, part in by_device(slots):
        states = [_adam_state(base, s) for s in part]
        ops.restore_adam_(
            *_common(arena, device, part),
            [_kept(state, s, "exp_avg") for state, s in zip(states, part, strict=True)],
            [_kept(state, s, "exp_avg_sq") for state, s in zip(states, part, strict=True)],
            [_kept(t, s, "max_exp_avg_sq") if groups[s.group]["amsgrad"] else s.nothing for t, s in zip(states, part, strict=True)],
            [state["step"] for state in states],
            scalars.option("lr", groups, part, device),
            beta1=per_tensor(groups, part, lambda g: float(g["betas"][0])),
            beta2=per_tensor(groups, part, lambda g: float(g["betas"][1])),
            eps=per_tensor(groups, part, lambda g: float(g["eps"])),
            weight_decay=per_tensor(groups, part, lambda g: float(g["weight_decay"])),
            decoupled=decoupled,
            amsgrad=per_tensor(groups, part, lambda g: int(g["amsgrad"])),
            maximize=per_tensor(groups, part, lambda g: int(g["maximize"])),
            **_factors(arena, device, part, factor),
        )


def any_other_(base: Optimizer, arena: Arena, slots: list[Slot], scalars: Scalars, factor: Factor) -> None:
    """The combined gradient goes into p.grad; the rest is the base's own step, which an overflow skips as in GradScaler.step."""
    if arena.begun is not None or factor.inv_scale is not None:
        for device, part in by_device(slots):
            ops.restore_combine_(*_common(arena, device, part), **_factors(arena, device, part, factor))
    for slot in slots:
        slot.param.grad = whole_of(slot.param, slot.first if slot.grad is slot.nothing else slot.grad)
    if not skipped(factor):
        base.step()


FUSED = {SGD: sgd_, Adam: adam_, AdamW: adam_}


def skipped(factor: Factor) -> bool:
    """Whether an overflow skips this update."""
    return factor.found_inf is not None and float(factor.found_inf) != 0


def _common(arena: Arena, device: torch.device, slots: list[Slot]) -> tuple[Tensors, Tensors, Tensors, Tensors, Tensors, Tensor]:
    """The arguments with which every restoring op begins: params ... perturbed."""
    return (
        [s.local for s in slots],
        tensors_of(slots, "origin"),
        tensors_of(slots, "grad"),
        tensors_of(slots, "first"),
        tensors_of(slots, "mask"),
        arena.flag(device),
    )


def _factors(arena: Arena, device: torch.device, slots: list[Slot], factor: Factor) -> dict[str, Any]:
    """The keyword arguments that every restoring op shares."""
    return {
        "inv_scale": on(factor.inv_scale, device),
        "first_inv_scale": on(arena.first.inv_scale, device),
        "found_inf": on(factor.found_inf, device),
        "masters": tensors_of(slots, "master"),
    }


def _momentum(base: Optimizer, slot: Slot) -> Tensor | None:
    """The momentum buffer; None where it has no value yet."""
    if base.param_groups[slot.group]["momentum"] == 0:
        return slot.nothing
    state = base.state[slot.param]
    return None if state.get("momentum_buffer") is None else _kept(state, slot, "momentum_buffer")


def _adam_state(base: Optimizer, slot: Slot) -> dict[str, Any]:
    """As torch makes it, where it is not there yet."""
    state, group = base.state[slot.param], base.param_groups[slot.group]
    if "step" not in state:
        home = slot.layout[1] if group["capturable"] or group["fused"] else "cpu"
        first = {"step": torch.zeros((), dtype=torch.float32, device=home)}
        first |= {key: torch.zeros_like(slot.param, dtype=slot.state_dtype()) for key in ("exp_avg", "exp_avg_sq")}
        state.update(first)  # all of it or, out of memory, nothing
    elif state["step"].dtype != torch.float32:  # made under a default dtype of float64
        state["step"] = state["step"].float()
    if group["amsgrad"] and "max_exp_avg_sq" not in state:
        state["max_exp_avg_sq"] = torch.zeros_like(slot.param, dtype=slot.state_dtype())
    return state


def _kept(state: dict[str, Any], slot: Slot, key: str) -> Tensor:
    """What this rank holds of a state tensor, with the parameter's strides and our dtype where it has others (a checkpoint of a model in
    another memory format, or one without master weights)."""
    local, dtype = local_of(state[key]), slot.state_dtype()
    if local.stride() != slot.layout[-1] or local.dtype is not dtype:
        local = torch.empty_like(slot.local, dtype=dtype).copy_(local)
        state[key] = whole_of(slot.param, local)
    return local
