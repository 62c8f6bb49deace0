"""The arguments of each op, made from a case: one function an op family, variants by name."""

from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Spec, fill
from torch import Tensor

from cram_kernels.patterns import TopK

EMPTY = torch.empty(0)
POISON = "bits"  # what written-only buffers hold beforehand


def flag(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


def f32(*values: float) -> Tensor:
    """float32 [n], or [] for one value."""
    return torch.tensor(values if len(values) != 1 else values[0], dtype=torch.float32)


def mask_bytes(case: Case, role: str) -> list[Tensor]:
    """Masks with random bits, the spare ones 0."""
    masks = []
    for i, spec in enumerate(case.specs):
        generator = torch.Generator().manual_seed(i + len(role))
        mask = torch.randint(0, 256, (-(-spec.numel // 8),), dtype=torch.uint8, generator=generator)
        if spec.numel % 8:
            mask[-1] &= (1 << spec.numel % 8) - 1
        masks.append(Spec(tuple(mask.shape)).place(mask, shift=i % 7))
    return masks


def poisoned_masks(case: Case) -> list[Tensor]:
    return [torch.full((-(-spec.numel // 8),), 0x5A, dtype=torch.uint8) for spec in case.specs]


def without(tensors: list[Tensor], period: int, phase: int) -> list[Tensor]:
    """tensors with every period-th entry absent."""
    return [t.new_empty(0) if i % period == phase else t for i, t in enumerate(tensors)]


def beside_master(case: Case, masters: list[Tensor], values: str, role: str) -> list[Tensor]:
    """A list of optimizer state: of T, or float32 beside a master weight."""
    specs = case.specs
    if masters:
        specs = [spec._replace(dtype=torch.float32) if m.numel() else spec for spec, m in zip(specs, masters, strict=True)]
    return fill(specs, values, role)


def make_masters(case: Case) -> list[Tensor]:
    """float32 masters for the 16-bit parameters, none for the others."""
    masters = fill([spec._replace(dtype=torch.float32) for spec in case.specs], case.values, "masters")
    return [m if spec.dtype != torch.float32 else m.new_empty(0) for m, spec in zip(masters, case.specs, strict=True)]


SELECTIONS = {  # name -> (scope, k of a set's number of weights)
    "keep_none": ("model", lambda n: 0),
    "largest": ("model", lambda n: 1),
    "second": ("model", lambda n: 2),
    "half": ("model", TopK(0.5).k),
    "tenth": ("model", TopK(0.9).k),
    "smallest": ("model", lambda n: n),
    "keep_all": ("model", TopK(0).k),
    "far_below": ("model", lambda n: -(2**62)),
    "far_above": ("model", lambda n: 2**62),
    "per_tensor": ("tensor", TopK(0.6).k),
    "groups": ("groups", TopK(0.7).k),
    "all_dense": ("dense", TopK(0.5).k),
}


def selection(name: str, weights: list[Tensor]) -> dict[str, Any]:
    """`sets` and `k`; "groups": three interleaved sets and one without members, every fifth tensor dense."""
    scope, rank = SELECTIONS[name]
    n = len(weights)
    sets, num_sets = {
        "model": ([0] * n, 1),
        "tensor": (list(range(n)), n),
        "groups": ([-1 if i % 5 == 4 else 3 - i % 3 if i % 3 else 0 for i in range(n)], 4),
        "dense": ([-1] * n, 0),
    }[scope]
    numels = [sum(w.numel() for w, s in zip(weights, sets, strict=True) if s == own) for own in range(num_sets)]
    return {"sets": sets, "k": torch.tensor([rank(numel) for numel in numels], dtype=torch.int64)}


PERTURB_VARIANTS = ("plain", "amp", "masters", "few_masks", "no_masks")


def perturb(case: Case, variant: str = "plain", rho: float = 0.05) -> dict[str, Any]:
    """Arguments that every perturb shares, outputs poisoned; perturb_masked_ wants `masks` replaced by real ones."""
    n = len(case.specs)
    arguments = {
        "params": case.tensors("params"),
        "grads": case.tensors("grads"),
        "saved": fill(case.specs, POISON, "saved"),
        "masks": poisoned_masks(case),
        "perturbed": flag(0),
        "rho": f32(rho),
    }
    if variant == "amp":
        arguments |= {"inv_scale": f32(1 / 3), "found_inf": torch.zeros(1), "rho": torch.linspace(-rho, rho, n)}
    elif variant == "masters":
        masters = make_masters(case)
        saved = [EMPTY.to(s.dtype) if m.numel() else s for s, m in zip(arguments["saved"], masters, strict=True)]
        arguments |= {"masters": masters, "saved": saved, "found_inf": torch.tensor(0.0)}
    elif variant == "few_masks":
        arguments["masks"] = without(arguments["masks"], 2, 1)
    elif variant == "no_masks":
        arguments["masks"] = []
    return arguments


UPDATE_VARIANTS = ("plain", "amp", "overflow", "masters", "partial", "first_only", "second_only", "unperturbed")


def combine(case: Case, variant: str = "plain") -> dict[str, Any]:
    """The arguments of restore_combine_, which every update shares."""
    arguments = {
        "params": case.tensors("params"),
        "saved": case.tensors("saved"),
        "grads": case.tensors("grads"),
        "first_grads": case.tensors("first_grads"),
        "masks": mask_bytes(case, "masks"),
        "perturbed": flag(1),
    }
    if variant == "amp":
        arguments |= {"inv_scale": f32(1 / 3), "first_inv_scale": f32(2**-10), "found_inf": torch.tensor(-0.0)}
    elif variant == "overflow":
        arguments["found_inf"] = torch.ones(1)
    elif variant == "masters":
        masters = make_masters(case)
        saved = [EMPTY.to(s.dtype) if m.numel() else s for s, m in zip(arguments["saved"], masters, strict=True)]
        arguments |= {"masters": masters, "saved": saved}
    elif variant == "partial":
        arguments["grads"] = without(arguments["grads"], 3, 1)
        arguments["first_grads"] = without(arguments["first_grads"], 2, 1)
        arguments["masks"] = without(arguments["masks"], 4, 0)
    elif variant == "first_only":
        arguments |= {"grads": [], "masks": []}
    elif variant == "second_only":
        arguments |= {"first_grads": [], "inv_scale": f32(1 / 3)}
    elif variant == "unperturbed":
        arguments |= {"perturbed": flag(0), "saved": []}
    return arguments


def restore(case: Case, variant: str = "plain") -> dict[str, Any]:
    arguments = combine(case, variant)
    return {name: arguments[name] for name in ("params", "saved", "perturbed", "masters") if name in arguments}


def cycle(values: list, n: int, phase: int) -> list:
    """n values in turn."""
    return [values[(i + phase) % len(values)] for i in range(n)]


def sgd(case: Case, variant: str = "plain", **options: Any) -> dict[str, Any]:
    """Arguments of restore_sgd_; without options every tensor has a combination of its own."""
    arguments = combine(case, variant)
    n = len(case.specs)
    arguments["momentum_buffers"] = beside_master(case, arguments.get("masters", []), case.values, "momentum_buffers")
    if options:
        return arguments | {"fresh": [0], "lr": f32(0.1)} | options
    combinations = [  # momentum, dampening, weight_decay, nesterov, maximize, fresh
        (0.0, 0.0, 0.0, 0, 0, 0),
        (0.9, 0.0, 5e-4, 1, 0, 0),
        (0.9, 1 / 3, 0.0, 0, 1, 0),
        (0.9, 1 / 3, 5e-4, 0, 0, 1),
        (0.0, 0.0, 1e-60, 0, 1, 0),  # 0 once it is float32, so absent: -0 + 0 * w would be +0, and 0 * Inf NaN
        (0.9, 1.0, 0.0, 0, 0, 0),
        (1e-3, 0.0, 0.1, 1, 1, 1),
    ]
    columns = zip(*[combinations[i % len(combinations)] for i in range(max(n, 1))], strict=True)
    names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "fresh")
    per_tensor = {name: list(column)[:n] for name, column in zip(names, columns, strict=True)}
    buffers = [b if mu else b.new_empty(0) for b, mu in zip(arguments["momentum_buffers"], per_tensor["momentum"], strict=True)]
    return arguments | per_tensor | {"momentum_buffers": buffers, "lr": torch.linspace(0.5, 0.001, n)}


def adam(case: Case, variant: str = "plain", **options: Any) -> dict[str, Any]:
    """Arguments of restore_adam_; without options every tensor has a combination of its own."""
    arguments = combine(case, variant)
    n = len(case.specs)
    masters = arguments.get("masters", [])
    arguments |= {
        "exp_avgs": beside_master(case, masters, case.values, "exp_avgs"),
        # squares are not negative; bits, NaN and Inf stay what they are
        "exp_avg_sqs": [t.abs_() for t in beside_master(case, masters, case.values, "exp_avg_sqs")],
        "max_exp_avg_sqs": [t.abs_() for t in beside_master(case, masters, case.values, "max_exp_avg_sqs")],
        "steps": [f32(float(s)) for s in cycle([0, 1, 9, 1000, 2**20, 2**24], n, 0)],
    }
    if options:
        return arguments | {"lr": f32(1e-3)} | options
    amsgrad = cycle([0, 1], n, 0)
    present = [m if on else m.new_empty(0) for m, on in zip(arguments["max_exp_avg_sqs"], amsgrad, strict=True)]
    return arguments | {
        "max_exp_avg_sqs": present,
        "amsgrad": amsgrad,
        "lr": torch.linspace(0.01, 1e-4, n),
        "beta1": cycle([0.9, 0.95, 0.0], n, 0),
        "beta2": cycle([0.999, 0.9], n, 1),
        "eps": cycle([1e-8, 1e-3, 0.0], n, 1),
        "weight_decay": cycle([0.0, 0.01, 1e-60, 0.1], n, 2),
        "maximize": cycle([0, 0, 1], n, 0),
    }


def samples(case: Case) -> dict[str, Callable[[], dict[str, Any]]]:
    """op -> a maker of the arguments of a typical call, with every option given."""
    amp = {"inv_scale": 0.5, "found_inf": 0.0}
    scales = {"inv_scale": 0.5, "first_inv_scale": 0.25, "found_inf": 0.0}
    nm = {"prune": [int(len(spec.shape) > 1 and spec.shape[1] % 4 == 0) for spec in case.specs], "n": 2, "m": 4}

    def weights() -> dict[str, Any]:
        return {"weights": case.tensors("params"), "masks": poisoned_masks(case)}

    def chosen() -> dict[str, Any]:
        return selection("groups", case.tensors("params"))

    def perturbation(**more: Any) -> dict[str, Any]:
        return perturb(case, "masters") | scalars(amp) | more

    def histogram() -> dict[str, Any]:
        read = {role: value for role, value in perturbation().items() if role in ("params", "grads", "rho", "masters", "inv_scale")}
        return read | {"sets": chosen()["sets"], "prefix": torch.zeros(4, dtype=torch.int64), "shift": 20, "bits": 11}

    def scalars(values: dict[str, float]) -> dict[str, Any]:
        return {role: f32(value) for role, value in values.items()}

    return {
        "topk_threshold": lambda: {"weights": case.tensors("params"), **chosen()},
        "topk_histogram": histogram,
        "prune_topk_": lambda: weights() | chosen(),
        "perturb_topk_": lambda: perturbation(**chosen()),
        "prune_nm_": lambda: weights() | nm,
        "perturb_nm_": lambda: perturbation(**nm),
        "perturb_masked_": lambda: perturbation(masks=mask_bytes(case, "masks")),
        "restore_": lambda: restore(case, "masters"),
        "restore_combine_": lambda: combine(case, "masters") | scalars(scales),
        "restore_sgd_": lambda: sgd(case, "masters") | scalars(scales),
        "restore_adam_": lambda: adam(case, "masters") | scalars(scales),
        "grad_norm": lambda: {"grads": case.tensors("grads"), "inv_scale": f32(0.5)},
    }
