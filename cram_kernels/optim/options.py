"""What the arguments, and the options and parameters of a group, may be. Errors say what was wanted and what was found, before anything is
changed."""

import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..distributed import check_not_fsdp1, local_of
from ..params import excluded, globs_of, overlapping, why_unfit
from ..schedule import Groups, checked_compression, is_function, is_number

GROUP_OPTIONS = ("rho", "plus", "sparse_grad", "prune", "compression")  # a group may have its own
OPTIMIZER_OPTIONS = (
    "normalize_grad",
    "max_grad_norm",
    "master_weights",
    "mask_period",
    "seed",
    "exclude",
    "prune_embeddings",
    "grad_norms",
)


def check_bool(name: str, value: Any) -> None:
    if value is not True and value is not False:
        raise ValueError(f"CrAM: {name} must be True or False, got {value!r}")


def check_optimizer_options(optimizer: Any) -> None:
    """Check the options that hold for the whole optimizer. They are attributes, which a script may have set since the last step."""
    for name in ("normalize_grad", "master_weights", "grad_norms"):
        check_bool(name, getattr(optimizer, name))
    max_grad_norm, mask_period = optimizer.max_grad_norm, optimizer.mask_period
    if max_grad_norm is not None and not (is_number(max_grad_norm) and max_grad_norm > 0):
        raise ValueError(f"CrAM: max_grad_norm must be None or a number > 0, got {max_grad_norm!r}")
    if type(mask_period) is not int or mask_period < 1:
        raise ValueError(f"CrAM: mask_period must be an int of at least 1, got {mask_period!r}")


def check_groups(base: Optimizer) -> None:
    """Check all groups before a step: a script may have changed them, or the base optimizer behind our back."""
    groups = base.param_groups
    for group in groups:
        check_no_optimizer_options(group, base.defaults)
        if "rho" not in group or "compression" not in group or "cram_step" not in group:
            raise RuntimeError(
                "CrAM: load_state_dict() and add_param_group() must be called on CrAM, got it called on the base optimizer; "
                "load or wrap it again"
            )
        if "param_names" in group and len(group["param_names"]) != len(group["params"]):
            found = f"{len(group['param_names'])} names of {len(group['params'])} parameters"
            raise ValueError(f"CrAM: param_names of a group must name each of its params, in order, got {found}")
        if group["cram_step"] != groups[0]["cram_step"]:
            found = f"{groups[0]['cram_step']} and {group['cram_step']}"
            raise ValueError(f"CrAM: cram_step, which the optimizer counts, must be the same in all groups, got {found}")
        check_group_options(group)


def check_no_optimizer_options(group: dict[str, Any], base_options: Iterable[str]) -> None:
    """Raise ValueError where a group has an option of ours that holds for all groups."""
    for key in OPTIMIZER_OPTIONS:
        if key in group and key not in base_options:
            raise ValueError(f"CrAM: {key} must be given to the optimizer, where it holds for all groups, got it in a parameter group")


def check_group_options(group: dict[str, Any]) -> None:
    """Check the options of a group, which a script may have changed since the last step."""
    rho = group["rho"]
    if type(rho) is not float or not 0 <= rho < math.inf:
        if isinstance(rho, Tensor):
            if rho.numel() != 1:
                raise ValueError(f"CrAM: rho must be a tensor of one element, got one of shape {tuple(rho.shape)}")
            if rho.device.type == "cpu" and not 0 <= float(rho) < math.inf:  # reading one on a GPU would wait for it in every step
                raise ValueError(f"CrAM: rho must be a number >= 0, got {rho!r}")
        elif not is_function(rho) and not (is_number(rho) and rho >= 0):
            raise ValueError(
                f"CrAM: rho must be a number >= 0, a tensor of one, or a schedule such as RhoWarmup(0.05, steps=500), got {rho!r}"
            )
    for key in ("plus", "sparse_grad", "prune"):
        check_bool(key, group[key])
    if group.get("differentiable"):
        raise ValueError("CrAM: differentiable must be False, got True: the ops have no backward")


def check_new_group(group: dict[str, Any], ours: dict[str, Any], base_options: Iterable[str]) -> None:
    """Check a group as a user gives it, and bring its `compression` into the stored form.

    Args:
        ours: the defaults of our options.
        base_options: names that the base optimizer uses, which win over ours.
    """
    check_no_optimizer_options(group, base_options)
    check_group_options({**ours, **group})
    if group.get("compression") is not None:
        group["compression"] = checked_compression(group["compression"])


def check_params(groups: Groups, index: int) -> None:
    """Check the parameters of one group against what the ops can work on; frozen ones may be anything."""
    params = groups[index]["params"]
    if len(set(map(id, params))) < len(params):
        raise ValueError(f"CrAM: parameters of group {index} must be different ones, got one of them twice")
    check_not_fsdp1("CrAM", params)
    for i, p in enumerate(params):
        if p.requires_grad and (wrong := why_unfit(local_of(p))) is not None:
            raise ValueError(f"CrAM: {_called(groups, index, i)} {wrong}")
    named = [
        (_called(groups, g, i), local_of(p)) for g, group in enumerate(groups) for i, p in enumerate(group["params"]) if p.requires_grad
    ]
    if (shared := overlapping(named)) is not None:
        raise ValueError(f"CrAM: {shared[0]} must have memory of its own, got some that {shared[1]} has too: tie modules by one Parameter")


def _called(groups: Groups, group: int, position: int) -> str:
    """A parameter as errors name it."""
    names = groups[group].get("param_names")
    return f"parameter {names[position]!r}" if names else f"parameter {position} of group {group}"


def check_exclude(groups: Groups, exclude: Any, model: Any = None) -> tuple[str, ...]:
    """Check that each glob matches the name of a parameter. Returns globs of first names: the groups do not know the others of a tied one.

    Args:
        exclude: as a user gives it.
        model: what the optimizer was made over.
    """
    globs = globs_of("CrAM: ", exclude)
    if not globs:
        return ()
    if any("param_names" not in group for group in groups):
        raise ValueError(
            f"CrAM: exclude needs named parameters, such as the model itself or model.named_parameters(), got {list(globs)} and no names"
        )
    tied: dict[int, list[str]] = {}
    for name, p in unwrapped(model).named_parameters(remove_duplicate=False) if isinstance(model, nn.Module) else ():
        tied.setdefault(id(p), []).append(name)
    named = [
        list(dict.fromkeys([name, *tied.get(id(p), ())])) for g in groups for name, p in zip(g["param_names"], g["params"], strict=False)
    ]
    chosen = [named[i][0] for i in sorted(excluded("CrAM: ", globs, named))]
    by_first = [glob for glob in globs if any(fnmatchcase(name, glob) for name in chosen)]
    return (*by_first, *[escape(name) for name in chosen if not any(fnmatchcase(name, glob) for glob in by_first)])


def check_unique(groups: Groups, special: set[str]) -> None:
    """Names that decide what stays dense must name one parameter each: a second model may use them, too."""
    names = [name for group in groups for name in group.get("param_names", ()) if name in special]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"CrAM: names of parameters must differ, got {twice[0]!r} twice: put a prefix before those of the second model")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers such as DistributedDataParallel and torch.compile: its parameters have the names that the user knows."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif (inner := getattr(model, "_orig_mod", None)) is not None:
            model = inner
        else:
            return model


def base_of(params: Any, base_optimizer: Callable[..., Optimizer] | Optimizer, base_options: dict[str, Any]) -> Optimizer:
    """`base_optimizer(params, **base_options)`; or the instance that either argument is, to which `params` may give names.

    Raises:
        ValueError: no parameters, options beside an instance, other parameters than those of the instance, or not such an optimizer.
    """
    if isinstance(params, Optimizer):
        params, base_optimizer = None, params
    named = list(unwrapped(params).named_parameters()) if isinstance(params, nn.Module) else None
    if isinstance(base_optimizer, Optimizer):
        base = base_optimizer
        if base_options:
            raise ValueError(f"CrAM: options must be given to the base optimizer itself, got {', '.join(base_options)} beside the instance")
    elif not is_function(base_optimizer) and not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
        raise ValueError(f"CrAM: base_optimizer must be a class such as torch.optim.SGD, or an instance, got {base_optimizer!r}")
    elif params is None:
        raise ValueError("CrAM: params must be given, got None and no instance of a base optimizer")
    elif not isinstance(params, nn.Module | Iterable):
        raise ValueError(f"CrAM: params must be a model, or parameters or groups as in torch, got {type(params).__name__}")
    else:
        base = base_optimizer(params if named is None else [p for _, p in named], **base_options)  # not every base takes names
    if not isinstance(base, Optimizer) or isinstance(base, LBFGS) or "cram_step" in base.defaults:
        raise ValueError(f"CrAM: base_optimizer must be a torch.optim.Optimizer that takes one gradient a step, got {type(base).__name__}")
    if named is not None:  # an instance may have a part of the model
        held = {id(p) for group in base.param_groups for p in group["params"]}
        _name(base, [(name, p) for name, p in named if id(p) in held])
    elif params is not None and base is base_optimizer:
        _name(base, params)
    return base


def _name(base: Optimizer, params: Iterable[Any]) -> None:
    """Check that `params` are those of the base optimizer; take over their names, if they have any."""
    entries = list(params)
    if entries and isinstance(entries[0], dict):
        if extra := sorted({key for group in entries for key in group} - {"params"}):
            raise ValueError(f"CrAM: group options must be given to the base optimizer itself, got {', '.join(extra)} beside the instance")
        entries = [p for group in entries for p in ([group["params"]] if isinstance(group["params"], Tensor) else group["params"])]
    names = {id(entry[1]): entry[0] for entry in entries if isinstance(entry, tuple)}
    given = set(names) | {id(p) for p in entries if not isinstance(p, tuple)}
    held = [id(p) for group in base.param_groups for p in group["params"]]
    if given != set(held):
        found = f"{len(given)}, of which it has {len(given & set(held))}"
        raise ValueError(f"CrAM: params must be the {len(held)} parameters of the base optimizer, got {found}")
    if len(names) == len(held):
        for group in base.param_groups:
            group["param_names"] = [names[id(p)] for p in group["params"]]
