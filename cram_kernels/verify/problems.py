"""Small and large inputs of every op, and the comparison with the reference, to the bit."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..backend import use_backend
from ..patterns import TopK

Arguments = dict[str, Any]
Shapes = list[tuple[int, ...]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL: Shapes = [(64, 32, 3, 3), (7,), (257, 129), (1,), (33, 64), (1000, 48), (2048,)]
LARGE: Shapes = [(64, 32), (3000, 4096), (1000, 500, 3, 3), (4099,)]  # 16.8 M weights
MANY: Shapes = [(8, 8), (3,)] * 500
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Lists:
    """Makes the lists of a call on one device, the same numbers for the same seed; with `dtype` None the dtypes mix."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype | None, device: torch.device, seed: int = 0) -> None:
        self.shapes, self.device = shapes, device
        self.dtypes = [dtype or DTYPES[i % len(DTYPES)] for i in range(len(shapes))]
        self.generator = torch.Generator(device).manual_seed(seed)

    def tensors(self, scale: float = 1.0) -> list[Tensor]:
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return [(scale * torch.randn(s, generator=self.generator, device=self.device)).to(d) for s, d in pairs]

    def masks(self) -> list[Tensor]:
        made = []
        for numel in map(math.prod, self.shapes):
            mask = torch.randint(0, 256, (-(-numel // 8),), dtype=torch.uint8, generator=self.generator, device=self.device)
            if numel % 8:
                mask[-1] &= (1 << numel % 8) - 1
            made.append(mask)
        return made

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self.device)

    def flag(self, value: int) -> Tensor:
        return torch.tensor(value, dtype=torch.int32, device=self.device)


def perturb(lists: Lists) -> Arguments:
    params = lists.tensors()
    return {
        "params": params,
        "grads": lists.tensors(0.1),
        "saved": [torch.zeros_like(p) for p in params],
        "masks": lists.masks(),
        "perturbed": lists.flag(0),
        "rho": lists.number(0.05),
    }


def perturb_topk(lists: Lists) -> Arguments:
    k = torch.tensor([TopK(0.9).k(sum(map(math.prod, lists.shapes)))], device=lists.device)
    return perturb(lists) | {"sets": [0] * len(lists.shapes), "k": k}


def perturb_nm(lists: Lists) -> Arguments:
    return perturb(lists) | {"prune": [int(len(s) > 1 and s[1] % 4 == 0) for s in lists.shapes], "n": 2, "m": 4}


def combine(lists: Lists) -> Arguments:
    return {
        "params": lists.tensors(),
        "saved": lists.tensors(),
        "grads": lists.tensors(0.1),
        "first_grads": lists.tensors(0.1),
        "masks": lists.masks(),
        "perturbed": lists.flag(1),
    }


def sgd(lists: Lists) -> Arguments:
    options = {"momentum": [0.9], "weight_decay": [1e-4], "fresh": [0]}
    return combine(lists) | {"momentum_buffers": lists.tensors(0.1), "lr": lists.number(1e-4)} | options


def adam(lists: Lists) -> Arguments:
    return combine(lists) | {
        "exp_avgs": lists.tensors(0.1),
        "exp_avg_sqs": [t.square_() for t in lists.tensors(0.1)],
        "max_exp_avg_sqs": [],
        "steps": [lists.number(9.0) for _ in lists.shapes],
        "lr": lists.number(1e-4),
        "weight_decay": [0.01],
        "decoupled": True,
    }


def restore(lists: Lists) -> Arguments:
    return {"params": lists.tensors(), "saved": lists.tensors(), "perturbed": lists.flag(1)}


def norm(lists: Lists) -> Arguments:
    return {"grads": lists.tensors()}


def prune(lists: Lists) -> Arguments:
    arguments = perturb_topk(lists)
    return {"weights": arguments["params"], "masks": arguments["masks"], "sets": arguments["sets"], "k": arguments["k"]}


def threshold(lists: Lists) -> Arguments:
    return {name: value for name, value in prune(lists).items() if name != "masks"}


def histogram(lists: Lists) -> Arguments:
    arguments = perturb_topk(lists)
    read = {name: arguments[name] for name in ("params", "grads", "rho", "sets")}
    return read | {"prefix": torch.zeros_like(arguments["k"]), "shift": 20, "bits": 11}


def prune_nm(lists: Lists) -> Arguments:
    arguments = perturb_nm(lists)
    return {"weights": arguments["params"], "masks": arguments["masks"], "prune": arguments["prune"], "n": 2, "m": 4}


PROBLEMS: dict[str, Callable[[Lists], Arguments]] = {
    "topk_threshold": threshold,
    "topk_histogram": histogram,
    "prune_topk_": prune,
    "perturb_topk_": perturb_topk,
    "prune_nm_": prune_nm,
    "perturb_nm_": perturb_nm,
    "perturb_masked_": perturb,
    "restore_": restore,
    "restore_combine_": combine,
    "restore_sgd_": sgd,
    "restore_adam_": adam,
    "grad_norm": norm,
}


def tensors_of(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = x.values()
    return [t for entry in x for t in tensors_of(entry)] if not isinstance(x, str | int | float) else []


def clone(x: Any, device: torch.device | None = None) -> Any:
    """A copy of arguments, on another device where one is given."""
    if isinstance(x, Tensor):
        return x.detach().clone() if device is None else x.detach().to(device, copy=True)
    if isinstance(x, dict):
        return {name: clone(value, device) for name, value in x.items()}
    return type(x)(clone(value, device) for value in x) if isinstance(x, list | tuple) else x


def contract_part(result: Any) -> Any:
    """Without the statistics that are the backend's own (contract: Top-k)."""
    return (result[0], result[1][:, 0]) if isinstance(result, tuple) else () if result is None else result


def call(op: str, arguments: Arguments, name: str) -> Any:
    """The public op on one backend."""
    with use_backend(name):
        return contract_part(getattr(ops, op)(**arguments))


def expected(op: str, arguments: Arguments) -> list[Tensor]:
    """What the reference makes of the arguments, which stay as they are: all of them, then the result."""
    own = clone(arguments, torch.device("cpu"))
    result = contract_part(getattr(reference, op)(**own))
    return [*tensors_of(own), *tensors_of(result)]


def differences(actual: list[Tensor], wanted: list[Tensor]) -> int:
    """Elements whose bits differ."""
    return sum(int((bits(a) != bits(w)).sum()) for a, w in zip(actual, wanted, strict=True))


def bits(t: Tensor) -> Tensor:
    return t.detach().cpu().contiguous().flatten().view(INTEGERS[t.element_size()])
