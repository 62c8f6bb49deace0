"""Mixed precision and clipping: what gradients are multiplied by, how an overflow reaches the GradScaler, float32 master weights."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from .. import ops
from ..distributed import Spread, as_dtensor, local_of, spread_of, whole_mesh
from ..schedule import Groups
from .columns import Slot

MASTER = "master"  # the key of a master weight in the base optimizer's state


class Factor(NamedTuple):
    """What the ops multiply the gradients of one pass by; both stay on the scaler's device.

    Attributes:
        inv_scale: float32 []; None: 1.
        found_inf: float32 [], not 0 where a gradient (before clipping) is Inf or NaN; None: nobody looks for an overflow.
    """

    inv_scale: Tensor | None = None
    found_inf: Tensor | None = None


PLAIN = Factor()  # no scale, and nobody looks for an overflow


def on(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    """The scalar on this device."""
    return None if scalar is None else scalar.to(device, torch.float32, non_blocking=True)


def skipped(factor: Factor) -> bool:
    """Whether an overflow skips this update. Waits for the device."""
    return factor.found_inf is not None and float(factor.found_inf) != 0


def given_by_scaler(optimizer: Any, with_closure: bool) -> dict[str, Any]:
    """What a GradScaler that calls step() has set on the optimizer: `grad_scale` and `found_inf`; empty without one.

    Raises:
        RuntimeError: the scaler knows of one pass only. The weights are the clean ones, and the gradients are released.
    """
    given: dict[str, Any] = {key: optimizer.__dict__[key] for key in ("grad_scale", "found_inf") if key in optimizer.__dict__}
    step = optimizer.open_step
    scaled_first = step is not None and step.factor.found_inf is not None
    wrong = None
    if given and with_closure:
        wrong = "step(closure) must not be called by a GradScaler, which cannot scale what the closure does: perturb(scaler) and step()"
    elif given and step is not None and not scaled_first:
        wrong = "perturb() must be given the GradScaler that calls step(), got none: perturb(scaler)"
    elif not given and scaled_first and not with_closure:
        wrong = "scaler.step(optimizer) must follow perturb(scaler), got step(): the second gradients are scaled"
    if wrong is not None:
        for key in given:
            delattr(optimizer, key)
        optimizer.restore()
        optimizer.zero_grad()
        raise RuntimeError(f"CrAM: {wrong}")
    return given


def first_factor(scaler: GradScaler | None, optimizer: Optimizer) -> Factor:
    """The factor of the first pass. Its overflow flag is 0 here: the op that perturbs raises it.

    Raises:
        TypeError: not a GradScaler.
        RuntimeError: the scaler has unscaled the gradients already, and would not unscale those of the second pass.
    """
    if scaler is None:
        return PLAIN
    if not isinstance(scaler, GradScaler):
        raise TypeError(f"CrAM: scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    if not scaler.is_enabled():
        return PLAIN
    if _record(scaler, optimizer)["stage"] is OptState.UNSCALED:
        raise RuntimeError("CrAM: scaler.unscale_() must not be called before perturb(scaler), which unscales by itself, got it called")
    if scaler._scale is None:
        raise RuntimeError("CrAM: scaler must have scaled a loss before perturb(scaler), got one that has not")
    return Factor(_inverse(scaler._scale), torch.zeros_like(scaler._scale))


def second_factor(given: dict[str, Any], first: Factor, scaler: GradScaler | None, optimizer: Optimizer) -> Factor:
    """The factor of the second pass, with the overflow of both passes on any rank that shares the parameters. The scaler is told.

    Args:
        given: what a GradScaler has set: `grad_scale` (None: the gradients are unscaled), `found_inf`. Empty: no scaler.
        first: the factor of the first pass.
        scaler: that of the first pass.
    """
    if not given:
        return PLAIN
    scale, found_inf = given["grad_scale"], torch.as_tensor(given["found_inf"], dtype=torch.float32)
    found_inf = found_inf.clone() if first.found_inf is None else first.found_inf + found_inf.to(first.found_inf.device)
    for mesh in whole_mesh([p for group in optimizer.param_groups for p in group["params"]]):
        mesh.reduce_(found_inf, dist.ReduceOp.MAX)  # torch looks at how the first gradient of all is placed, and reduces for that one
    if scaler is not None:
        _record(scaler, optimizer)["found_inf_per_device"][found_inf.device] = found_inf  # update() lowers the scale by this
    return Factor(None if scale is None else _inverse(scale), found_inf)


def clipped(factor: Factor, norm: Tensor, max_norm: float) -> tuple[Factor, Tensor]:
    """The factor that also clips as torch.nn.utils.clip_grad_norm_ does, and the norm of the clipped gradients (float32 [])."""
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    inv_scale = coefficient if factor.inv_scale is None else factor.inv_scale.to(norm.device) * coefficient
    return factor._replace(inv_scale=inv_scale), norm * coefficient


def total_norm(slots: list[Slot], grads: list[Tensor], factor: Factor) -> Tensor:
    """The norm of all these gradients after unscaling, over all ranks on which they lie, float32 []."""
    parts: dict[tuple[torch.device, Spread | None], list[Tensor]] = {}
    for slot, grad in zip(slots, grads, strict=True):
        parts.setdefault((slot.device, spread_of([slot.param]) if slot.spread else None), []).append(grad)
    squares = []
    for (device, spread), own in parts.items():
        norm = ops.grad_norm(own, inv_scale=on(factor.inv_scale, device))
        if len(parts) == 1 and spread is None:
            return norm
        square = norm.double().square()
        squares.append((square if spread is None else spread.reduce_(square)).to(slots[0].device))
    return torch.stack(squares).sum().sqrt().float()


def _inverse(scale: Tensor) -> Tensor:
    """As torch.amp does it: through float64."""
    return scale.double().reciprocal().float()


def _record(scaler: GradScaler, optimizer: Optimizer) -> dict[str, Any]:
    """What the scaler has noted of this optimizer since its last update(); torch has no public way to tell it of an overflow."""
    return scaler._per_optimizer_states[id(optimizer)]


# --- float32 master weights of 16-bit parameters: `state[p]["master"]`, beside momentum and the like, which are float32 too ---


def prepare_masters(base: Optimizer, slots: list[Slot]) -> None:
    """Make, find or correct the masters of these slots, whose parameters are not perturbed.

    Whoever writes to a parameter (a loaded checkpoint, DDP's broadcast, a re-initialization) need not know of its master: elements that
    are no longer the rounded master are taken over from the parameter. Torch's version counters say that somebody wrote; a write through
    `.data` does not count there.
    """
    for slot in slots:
        param = slot.local
        if param.dtype == torch.float32:
            continue
        state = base.state.get(slot.param, {})
        master = local_of(state[MASTER]) if MASTER in state else None
        if master is None or master.dtype != torch.float32 or master.stride() != param.stride():
            master = torch.empty_like(param, dtype=torch.float32).copy_(param if master is None else master)
            if MASTER in state:
                state[MASTER] = as_dtensor(slot.param, master)
                master = local_of(state[MASTER])
        elif slot.master is master and slot.version == slot.versions():
            continue
        torch.where(param == master.to(param.dtype), master, param, out=master)
        slot.master, slot.version = master, slot.versions()


def put_master(state: dict[str, Any], slot: Slot) -> None:
    """Make the master part of the state, with the first update: state that has a master, but not yet what the base makes in its first step,
    is more than torch's optimizers can load and copy."""
    if slot.master is not slot.nothing and MASTER not in state:
        state[MASTER] = as_dtensor(slot.param, slot.master)


def note_versions(slots: list[Slot]) -> None:
    """What the parameters hold now was written by us: `prepare_masters` need not look at them."""
    for slot in slots:
        if slot.master is not slot.nothing:
            slot.version = slot.versions()


def reload_float32(state: dict[Tensor, dict[str, Any]], groups: Groups, loaded: dict[str, Any]) -> None:
    """Bring back the float32 state of 16-bit parameters that torch's load_state_dict has cast to the parameter's dtype."""
    params = [p for group in groups for p in group["params"]]
    names = [name for group in loaded["param_groups"] for name in group["params"]]
    for name, param in zip(names, params, strict=True):
        for key, value in loaded["state"].get(name, {}).items():
            if isinstance(value, Tensor) and key != "step" and value.dtype == torch.float32 != param.dtype:
                state[param][key] = value.detach().to(param.device, copy=True)
