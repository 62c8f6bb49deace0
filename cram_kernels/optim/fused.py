"""The last part of a step: restore the weights, form the gradient of the update, and take a step of the base optimizer.

SGD, Adam and AdamW are one op a device; their state is made and kept as torch makes it, so that checkpoints go both ways. New state hangs
in `state` before the op runs, so an interrupt cannot lose it. Torch's flags for how to run (`foreach`, `fused`) choose among its own
implementations; as in torch, `fused` and `capturable` put Adam's step counter on the device.
"""

from collections.abc import Callable
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .. import ops as typed_ops
from ..distributed import as_dtensor
from ..schedule import Groups
from ..warning import warn
from .columns import Columns, Slot, kept_state
from .precision import PLAIN, Factor, on, put_master, skipped
from .settings import Settings
from .workspace import Workspace

Hooks = list[Callable[..., Any]]
ALWAYS = ("beta1", "beta2", "eps")  # of the options, those whose default in the ops is not 0
ops: Any = typed_ops  # mypy takes two ** in a call for arguments given twice


class Update:
    """One update of the base optimizer.

    Args:
        first: the factor of the first gradients.
        second: the factor of the second gradients, or of those of a plain step.
        settings: the options of the groups.
        perturbed: whether the update ends an open step.
        careful: look whether each tensor of the state has the strides and the dtype that the op wants, and make it so.
    """

    def __init__(
        self, base: Optimizer, workspace: Workspace, settings: Settings, first: Factor, second: Factor, perturbed: bool, careful: bool
    ) -> None:
        self.base, self.workspace, self.settings, self.first, self.second = base, workspace, settings, first, second
        self.groups, self.perturbed, self.careful = base.param_groups, perturbed, careful
        self.changeable = False  # whether a pre-hook of the base may have written to the groups, for this step or for all

    def run(self, parts: list[Columns], pre_hooks: Hooks, post_hooks: Hooks) -> None:
        """Restore and update the parameters of `parts`. Hooks are those that users have registered on the base; they see the combined
        gradient in `p.grad`, where a pre-hook may change it."""
        base, op = self.base, FUSED.get(type(self.base))
        base._opt_called = True  # type: ignore[attr-defined]  # what a scheduler made over the base looks for
        if watched := op is None or bool(pre_hooks or post_hooks):
            for part in parts:
                self._combine(part)
            if skipped(self.second):
                return
            self.changeable = bool(pre_hooks)
            for hook in pre_hooks:
                hook(base, (), {})
            self.second = PLAIN
        if op is None:
            own_step(base)
        else:
            for part in parts:
                if watched:
                    grads = [slot.nothing if slot.param.grad is None else slot.fitted(slot.param.grad) for slot in part.slots]
                    part = Columns(part.slots, part.flag, grads)
                op(self, part)
        for hook in post_hooks:
            hook(base, (), {})

    def _combine(self, part: Columns) -> None:
        """Restore the weights and put the combined gradient into `p.grad`."""
        if self.perturbed or self.second.inv_scale is not None:
            ops.restore_combine_(*part.common(), **self.factors(part))
        scale = on(self.first.inv_scale, part.device)
        for i, slot in enumerate(part.slots):
            grad = part.grads[i]
            if grad is slot.nothing:  # the op has nowhere to write: the first gradient, unscaled and clipped, is all there is
                grad = part.first[i]
                grad = grad if scale is None else (grad.float() * scale).to(grad.dtype)
            slot.param.grad = as_dtensor(slot.param, grad)

    def factors(self, part: Columns) -> dict[str, Any]:
        """The keyword arguments that every restoring op shares."""
        scalars = {"inv_scale": self.second.inv_scale, "first_inv_scale": self.first.inv_scale, "found_inf": self.second.found_inf}
        return {"masters": part.masters} | {name: on(scalar, part.device) for name, scalar in scalars.items() if scalar is not None}

    def options(self, part: Columns, read: Callable[[Groups], dict[str, list[Any]]]) -> dict[str, Any]:
        """Group options, which `read` finds, as the ops take them: one value for all, or one a parameter. Left out are those that are 0
        everywhere, which is the default of the ops but for the options in ALWAYS."""
        numbers = None if self.changeable else self.settings.numbers
        if numbers is None:
            found = {name: values for name, values in read(self.groups).items() if any(values) or name in ALWAYS}
            shared = {name: values[:1] for name, values in found.items() if values.count(values[0]) == len(values)}
            numbers = shared, {name: values for name, values in found.items() if name not in shared}
            if not self.changeable:
                self.settings.numbers = numbers
        shared, own = numbers
        return shared | {name: [values[s.group] for s in part.slots] for name, values in own.items()} if own else shared

    def lr(self, part: Columns) -> Tensor:
        return self.workspace.option("lr", [group["lr"] for group in self.groups], part.slots, part.device)

    def column(self, slots: list[Slot], states: list[dict[str, Any]], key: str) -> list[Tensor]:
        """One tensor of the state of each slot, as the op takes it."""
        if self.careful:
            return [kept_state(state, slot, key) for slot, state in zip(slots, states, strict=True)]
        return [state[key] for state in states]

    def sgd(self, part: Columns) -> None:
        """One step of torch.optim.SGD."""
        state, options = self.base.state, self.options(part, _sgd_options)
        for slot in part.slots if part.masters else ():
            put_master(state[slot.param], slot)
        momenta = options.get("momentum", [0.0])
        slots = part.slots if all(momenta) else [slot for slot in part.slots if self.groups[slot.group]["momentum"] != 0]
        states = self.workspace.state_of(state, slots)
        there: list[Any] = [own.get("momentum_buffer") for own in states]
        new = {slot for slot, buffer in zip(slots, there, strict=True) if buffer is None} if any(map(is_, there, repeat(None))) else set()
        for slot in new:
            state[slot.param]["momentum_buffer"] = torch.zeros_like(slot.param, dtype=slot.state_dtype())
        buffers = self.column(slots, states, "momentum_buffer") if new or self.careful else there
        if 0 < len(slots) < len(part.slots):
            by_slot = dict(zip(slots, buffers, strict=True))
            buffers = [by_slot.get(slot, slot.nothing) for slot in part.slots]
        fresh = [int(slot in new) for slot in part.slots] if new else [0]
        written: bool | None = None
        try:
            ops.restore_sgd_(*part.common(), buffers, fresh, self.lr(part), **options, **self.factors(part))
            written = not (new and skipped(self.second))  # waits for the device, but only where a parameter takes its first step
        except Exception:
            written = False
            raise
        finally:
            for slot in new if written is False else ():  # the next step is their first one
                del state[slot.param]["momentum_buffer"]

    def adam(self, part: Columns) -> None:
        """One step of torch.optim.Adam or AdamW."""
        slots, options = part.slots, self.options(part, _adam_options)
        states = self.workspace.state_of(self.base.state, slots)
        if self.careful or "amsgrad" in options or not all(["step" in state for state in states]):
            states = [self._adam_state(slot) for slot in slots]
        largest = zip(states, slots, strict=True) if "amsgrad" in options else ()
        ops.restore_adam_(
            *part.common(),
            self.column(slots, states, "exp_avg"),
            self.column(slots, states, "exp_avg_sq"),
            [kept_state(state, s, "max_exp_avg_sq") if self.groups[s.group]["amsgrad"] else s.nothing for state, s in largest],
            [state["step"] for state in states],
            self.lr(part),
            decoupled=self.groups[0]["decoupled_weight_decay"],
            **options,
            **self.factors(part),
        )

    def _adam_state(self, slot: Slot) -> dict[str, Any]:
        """As torch makes it, where it is not there yet."""
        state, group = self.base.state[slot.param], self.groups[slot.group]
        if "step" not in state:
            home = slot.device if group["capturable"] or group["fused"] else "cpu"
            first = {"step": torch.zeros((), dtype=torch.float32, device=home)}
            first |= {key: torch.zeros_like(slot.param, dtype=slot.state_dtype()) for key in ("exp_avg", "exp_avg_sq")}
            state.update(first)  # all of it or, out of memory, nothing
        elif state["step"].dtype != torch.float32:  # made under a default dtype of float64
            state["step"] = state["step"].float()
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(slot.param, dtype=slot.state_dtype())
        put_master(state, slot)
        return state


def _sgd_options(groups: Groups) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [float(group[name]) for group in groups] for name in ("momentum", "dampening", "weight_decay")}
    return found | {name: [int(group[name]) for group in groups] for name in ("nesterov", "maximize")}


def _adam_options(groups: Groups) -> dict[str, list[Any]]:
    if len({bool(group["decoupled_weight_decay"]) for group in groups}) > 1:
        raise ValueError("CrAM: decoupled_weight_decay must be the same in all parameter groups, got both True and False")
    found: dict[str, list[Any]] = {name: [float(group["betas"][i]) for group in groups] for i, name in enumerate(("beta1", "beta2"))}
    found |= {name: [float(group[name]) for group in groups] for name in ("eps", "weight_decay")}
    return found | {name: [int(group[name]) for group in groups] for name in ("amsgrad", "maximize")}


def own_step(base: Optimizer) -> None:
    """The step of a base that is not fused, without what torch puts around it: the hooks of the base are run by `Update.run`, and hooks of
    all optimizers by the step() of CrAM, so that each runs once."""
    step = type(base).step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(base)  # type: ignore[attr-defined]


FUSED = {SGD: Update.sgd, Adam: Update.adam, AdamW: Update.adam}


def check_base(base: Optimizer, master_weights: bool) -> None:
    """Say what an optimizer that is not fused costs, or cannot do."""
    if type(base) in FUSED:
        return
    if master_weights:
        raise ValueError(f"CrAM: master_weights must be False for a base that takes its own step, got True and {type(base).__name__}")
    if isinstance(base, tuple(FUSED)):
        fused = ", ".join(kind.__name__ for kind in FUSED)
        warn(f"CrAM: {type(base).__name__} takes its own step, which is slower: it is a subclass, only {fused} themselves are fused")
