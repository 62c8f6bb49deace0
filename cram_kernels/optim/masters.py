"""Float32 master weights of 16-bit parameters: `state[p]["master"]`, beside momentum and the like, which are float32 too.

Whoever writes to a parameter (a loaded checkpoint, DDP's broadcast, a re-initialization) need not know of them: elements that are no longer
the rounded master are taken over. Torch's version counters say that somebody wrote; a write through `.data` does not count there.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..distributed import local_of, whole_of
from .arena import Slot

KEY = "master"


def prepare(base: Optimizer, slots: list[Slot]) -> None:
    """Make, find or correct the masters of these slots, whose parameters are not perturbed."""
    for slot in slots:
        param = slot.local
        if param.dtype == torch.float32:
            continue
        state = base.state[slot.param]
        master = local_of(state[KEY]) if KEY in state else None
        if master is None or master.dtype != torch.float32 or master.stride() != param.stride():
            master = torch.empty_like(param, dtype=torch.float32).copy_(param if master is None else master)
            state[KEY] = whole_of(slot.param, master)
            master = local_of(state[KEY])
        elif slot.master is master and slot.version == slot.versions():
            continue
        torch.where(param == master.to(param.dtype), master, param, out=master)
        slot.master, slot.version = master, slot.versions()


def reload(state: dict[Tensor, dict[str, Any]], groups: list[dict[str, Any]], loaded: dict[str, Any]) -> None:
    """Bring back the float32 state of 16-bit parameters that torch's load_state_dict has cast to the parameter's dtype."""
    params = [p for group in groups for p in group["params"]]
    names = [name for group in loaded["param_groups"] for name in group["params"]]
    for name, param in zip(names, params, strict=True):
        for key, value in loaded["state"].get(name, {}).items():
            if isinstance(value, Tensor) and key != "step" and value.dtype == torch.float32 != param.dtype:
                state[param][key] = value.detach().to(param.device, copy=True)
