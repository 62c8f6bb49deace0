"""What the gradients of a pass are multiplied by: the inverse of a GradScaler's scale, and the factor that clips their norm. And how an
overflow of the first pass reaches the scaler, which looks at the gradients of the second alone.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from .. import ops
from ..distributed import Spread, spread_of, whole_mesh
from .arena import Slot
from .factor import Factor, on


def first_factor(scaler: GradScaler | None, optimizer: Optimizer) -> Factor:
    """Of the first pass. The overflow flag is 0 yet: the perturbing op raises it.

    Raises:
        TypeError: not a GradScaler.
        RuntimeError: the scaler has unscaled the gradients already, and would not unscale those of the second pass.
    """
    if scaler is None:
        return Factor()
    if not isinstance(scaler, GradScaler):
        raise TypeError(f"CrAM: scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    if not scaler.is_enabled():
        return Factor()
    if _record(scaler, optimizer)["stage"] is OptState.UNSCALED:
        raise RuntimeError("CrAM: scaler.unscale_() must not be called before perturb(scaler), which unscales by itself, got it called")
    if scaler._scale is None:
        raise RuntimeError("CrAM: scaler must have scaled a loss before perturb(scaler), got one that has not")
    return Factor(_inverse(scaler._scale), torch.zeros_like(scaler._scale))


def second_factor(given: dict[str, Any], first: Factor, scaler: GradScaler | None, optimizer: Optimizer) -> Factor:
    """Of the second pass, with the overflow of both on any rank that shares the parameters; the scaler hears of it, if it is known.

    Args:
        given: what a GradScaler has set: `grad_scale` (None: the gradients are unscaled), `found_inf`. Empty: no scaler.
        scaler: that of the first pass.
    """
    if not given:
        return Factor()
    scale, found_inf = given["grad_scale"], torch.as_tensor(given["found_inf"], dtype=torch.float32)
    found_inf = found_inf.clone() if first.found_inf is None else first.found_inf + found_inf.to(first.found_inf.device)
    for mesh in whole_mesh([p for group in optimizer.param_groups for p in group["params"]]):
        mesh.reduce_(found_inf, dist.ReduceOp.MAX)  # torch looks at how the first gradient of all is placed, and reduces for that one
    if scaler is not None:
        _record(scaler, optimizer)["found_inf_per_device"][found_inf.device] = found_inf  # update() lowers the scale by this
    return Factor(None if scale is None else _inverse(scale), found_inf)


def clipped(factor: Factor, norm: Tensor, max_norm: float) -> tuple[Factor, Tensor]:
    """The factor that also clips as torch.nn.utils.clip_grad_norm_ does, and the norm after it (float32 [])."""
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    inv_scale = coefficient if factor.inv_scale is None else factor.inv_scale.to(norm.device) * coefficient
    return factor._replace(inv_scale=inv_scale), norm * coefficient


def total_norm(slots: list[Slot], factor: Factor) -> Tensor:
    """The norm of all gradients of the slots, over all ranks on which they lie, float32 []."""
    parts: dict[tuple[torch.device, Spread | None], list[Tensor]] = {}
    for slot in slots:
        parts.setdefault((slot.layout[1], spread_of([slot.param])), []).append(slot.grad)
    norms = {part: ops.grad_norm(grads, inv_scale=on(factor.inv_scale, part[0])) for part, grads in parts.items()}
    if len(norms) == 1 and None in {spread for _, spread in norms}:
        return next(iter(norms.values()))
    device = slots[0].layout[1]
    squares = [norm.double().square() if spread is None else spread.reduce_(norm.double().square()) for (_, spread), norm in norms.items()]
    return torch.stack([s.to(device) for s in squares]).sum().sqrt().float()


def _inverse(scale: Tensor) -> Tensor:
    """As torch.amp does it: through float64."""
    return scale.double().reciprocal().float()


def _record(scaler: GradScaler, optimizer: Optimizer) -> dict[str, Any]:
    """What the scaler has noted of this optimizer since its last update(); torch has no public way to tell it of an overflow."""
    return scaler._per_optimizer_states[id(optimizer)]
