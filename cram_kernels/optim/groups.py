"""What a parameter group must be, and which of its parameters `exclude` names."""

import math
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

from torch import Tensor

from ..distributed import local_of
from ..params import overlapping, why_unfit


def check_options(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError where an option cannot be worked with."""
    for group in groups:
        rho = group["rho"]
        if not isinstance(rho, Real) or not 0 <= float(rho) < math.inf:
            raise ValueError(f"CrAM: rho must be a number >= 0, got {rho!r}")
        for key in ("plus", "sparse_grad", "prune"):
            if group[key] not in (True, False):
                raise ValueError(f"CrAM: {key} must be True or False, got {group[key]!r}")
        if group.get("differentiable"):
            raise ValueError("CrAM: differentiable must be False, got True: the ops have no backward")


def check_params(groups: list[dict[str, Any]], index: int) -> None:
    """Raise ValueError where a parameter of this group cannot be worked with; those that are frozen may be anything."""
    params = groups[index]["params"]
    if len(set(map(id, params))) < len(params):
        raise ValueError(f"CrAM: parameters of group {index} must be different ones, got one of them twice")
    for i, p in enumerate(params):
        if p.requires_grad and (wrong := why_unfit(local_of(p))) is not None:
            raise ValueError(f"CrAM: parameter {i} of group {index} {wrong}")
    named = [
        (f"parameter {i} of group {g}", local_of(p))
        for g, group in enumerate(groups)
        for i, p in enumerate(group["params"])
        if p.requires_grad
    ]
    if (shared := overlapping(named)) is not None:
        raise ValueError(f"CrAM: {shared[0]} must have memory of its own, got some that {shared[1]} has too: tie modules by one Parameter")


def excluded(group: dict[str, Any], globs: tuple[str, ...]) -> list[tuple[Tensor, str]]:
    """The parameters whose name one of the globs matches, with that glob.

    Raises:
        ValueError: the parameters have no names.
    """
    if not globs:
        return []
    if "param_names" not in group:
        raise ValueError(f"CrAM: exclude needs named parameters, such as model.named_parameters(), got {list(globs)} and no names")
    return [(p, glob) for name, p in zip(group["param_names"], group["params"], strict=True) for glob in globs if fnmatchcase(name, glob)]


def check_matches(groups: list[dict[str, Any]], globs: tuple[str, ...]) -> None:
    """Raise ValueError where a glob matches no name: a slip of the pen would prune what was to stay dense."""
    names = [name for group in groups for name in group.get("param_names", ())]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"CrAM: exclude must match the name of a parameter, got {glob!r}, which matches none of {len(names)}")
