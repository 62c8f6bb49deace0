"""An optimizer around another one: for the outside world (schedulers, checkpoints, hooks, copies) there is one."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from .options import unwrapped


class Wrapper(Optimizer):
    """Groups and state live in the base optimizer alone: here they are properties, so they cannot part, whatever is loaded or assigned.

    Args:
        base: the base optimizer.
        options: defaults of our own group options.
    """

    _copied: tuple[str, ...] = ("base_optimizer",)  # attributes that go with a copy or a pickle, beside those of torch

    def __init__(self, base: Optimizer, options: dict[str, Any]) -> None:
        # torch's own constructor would add every group once more: its __setstate__ makes the hook tables, and nothing else.
        Optimizer.__setstate__(self, {"base_optimizer": base, "defaults": {**base.defaults, **options}})
        for group in base.param_groups:
            for key, value in options.items():
                group.setdefault(key, value)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    def _check_new_group(self, index: int) -> None:
        """Raise ValueError where the group at this index, just added, cannot be worked with."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; options that the group does not have are those of the constructor.

        Raises:
            ValueError: as the constructor. Nothing was changed.
        """
        self.base_optimizer.add_param_group(param_group)
        for key, value in self.defaults.items():
            param_group.setdefault(key, value)
        try:
            self._check_new_group(len(self.param_groups) - 1)
        except ValueError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults} | {key: self.__dict__[key] for key in self._copied}  # no hooks, as in torch

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies and pickles; and torch's load_state_dict and scripts call it with new state or groups, whose missing options keep their values."""
        base = state.get("base_optimizer") or self.base_optimizer
        shared = {key: value for key, value in state.items() if key in ("state", "param_groups")}
        if "param_groups" in shared:
            for old, new in zip(base.param_groups, shared["param_groups"], strict=False):
                for key, value in old.items():
                    new.setdefault(key, value)
        super().__setstate__({key: value for key, value in state.items() if key not in shared})
        if shared:  # the base's own __setstate__ brings what an old checkpoint lacks up to date
            base.__setstate__({"state": base.state, "param_groups": base.param_groups} | shared)


def base_of(params: Any, base_optimizer: Callable[..., Optimizer] | Optimizer, options: dict[str, Any]) -> Optimizer:
    """`base_optimizer(params, **options)`; or the instance that either argument is, to which `params` may give names.

    Raises:
        ValueError: no parameters, options beside an instance, other parameters than those of the instance, or not such an optimizer.
    """
    if isinstance(params, Optimizer):
        params, base_optimizer = None, params
    if isinstance(params, nn.Module):
        params = list(unwrapped(params).named_parameters())
    if isinstance(base_optimizer, Optimizer):
        base = base_optimizer
        if options:
            raise ValueError(f"CrAM: options must be given to the base optimizer itself, got {', '.join(options)} beside the instance")
        if params is not None:
            _name(base, params)
    elif not callable(base_optimizer):
        raise ValueError(f"CrAM: base_optimizer must be a class such as torch.optim.SGD, or an instance, got {base_optimizer!r}")
    elif params is None:
        raise ValueError("CrAM: params must be given, got None and no instance of a base optimizer")
    else:
        base = base_optimizer(params, **options)
    if not isinstance(base, Optimizer) or isinstance(base, Wrapper | LBFGS):
        raise ValueError(f"CrAM: base_optimizer must be a torch.optim.Optimizer that takes one gradient a step, got {type(base).__name__}")
    return base


def _name(base: Optimizer, params: Iterable[Any]) -> None:
    """Check that `params` are those of the instance; take over their names, if they have any."""
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
