"""An optimizer around another one: for the outside world (schedulers, checkpoints, hooks, copies) there is one."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from .. import schedule
from ..params import OPEN_STEPS
from ..patterns import Pattern
from . import options
from .hooks import Guard, ModelHooks
from .open_step import OpenStep
from .precision import reload_float32
from .workspace import Workspace

Self = TypeVar("Self", bound="Wrapper")
MASKS = "cram_masks"  # the key of kept masks in a state_dict, beside torch's "state" and "param_groups"


def _packed(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Take patterns and schedules out of torch's state_dict, and put the kept masks in. The hooks of users come after this one."""
    for group in state_dict["param_groups"]:
        del group["compression"]
        if callable(group["rho"]):
            del group["rho"]
    optimizer._workspace.follow(optimizer.param_groups)
    if masks := optimizer._workspace.pack_masks():
        state_dict[MASKS] = masks


class Wrapper(Optimizer):
    """What `CrAM` is to torch. Groups and state live in the base optimizer alone: here they are properties, so they cannot part, whatever
    is loaded or assigned.

    Args:
        base: the base optimizer.
        group_options: defaults of our own group options.
    """

    base_optimizer: Optimizer
    master_weights: bool
    _patterns: Callable[[], list[Pattern]]  # all that the next step may draw
    _check_names: Callable[[], None]  # ValueError where an option needs names that a group does not have
    _copied: tuple[str, ...] = ("base_optimizer",)  # attributes that go with a copy or a pickle, beside those of torch

    def __init__(self, base: Optimizer, group_options: dict[str, Any]) -> None:
        # torch's own constructor would add every group once more: its __setstate__ makes the hook tables, and nothing else.
        Optimizer.__setstate__(self, {"base_optimizer": base, "defaults": {**base.defaults, **group_options}})
        wrapped = next((group for group in base.param_groups if "cram_step" in group), {})  # by an earlier optimizer: its counts go on
        counters = {key: wrapped[key] for key in schedule.COUNTERS if key in wrapped}
        for group in base.param_groups:
            for key, value in (group_options | counters).items():
                group.setdefault(key, value)
        self._start()

    def _start(self) -> None:
        """What an optimizer, or a copy of one, begins with."""
        self._workspace = Workspace()
        self._hooks: ModelHooks | None = None
        handle = self.base_optimizer.register_step_pre_hook(Guard(self))
        weakref.finalize(self, handle.remove)
        self.register_state_dict_post_hook(_packed, prepend=True)
        self._heal_others()

    def __getattr__(self, name: str) -> Any:
        """What a base has beyond torch's optimizers: `train()` of the schedule-free ones, `consolidate_state_dict()` of ZeRO."""
        base = self.__dict__.get("base_optimizer")
        if base is None or name.startswith("_") or not hasattr(base, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(base, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the base optimizer, with CrAM's options in them."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._note_counters()
        self.base_optimizer.param_groups = groups

    def _note_counters(self) -> None:
        if self.param_groups:
            self._workspace.counters = {key: self.param_groups[0][key] for key in schedule.COUNTERS if key in self.param_groups[0]}

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the base optimizer, such as momentum, by parameter."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    # --- the open step ---

    @property
    def open_step(self) -> OpenStep | None:
        """The step that `perturb()` began and that is not over yet."""
        step = self._workspace.open
        return None if step is None or step.given_up is not None else step

    def restore(self) -> None:
        """Bring the weights back, to the bit, and give the open step up, if there is one."""
        self._drop_step(keep_written=False)

    def _drop_step(self, keep_written: bool = True) -> None:
        """As `restore`; of a step that was forgotten, what somebody has written to the weights since then stays."""
        if (step := self._workspace.open) is not None:
            step.restore(keep_written)
            self._workspace.open = None

    @contextmanager
    def _released_on_error(self) -> Iterator[None]:
        """If the block raises, the step is given up and its gradients are released: nobody else has seen them."""
        try:
            yield
        except BaseException:
            self.restore()
            self.zero_grad()
            raise

    def give_up(self, reason: str) -> None:
        """Restore the weights where a step is open; the next `step()` raises with this reason, since its gradients are those at perturbed
        weights. For code that changes the model or the optimizer between the halves of a step.

        Args:
            reason: what happened, for the message.
        """
        if (step := self.open_step) is not None:
            step.give_up(reason)

    def refuse_within_step(self, what: str) -> None:
        """For calls that must not see perturbed weights.

        Args:
            what: the call, for the message.

        Raises:
            RuntimeError: a step is open.
        """
        if self.open_step is not None:
            raise RuntimeError(
                f"CrAM: {what} must not be called between perturb() and step(), got it called there: step() or restore() first"
            )

    def _heal_others(self) -> None:
        """An optimizer that was interrupted within a step, and that something still holds, may have left parameters of ours perturbed."""
        own = self._workspace.open
        if len(OPEN_STEPS) == (own is not None and own.perturbed):
            return
        params = [p for group in self.param_groups for p in group["params"]]
        for step in list(OPEN_STEPS):
            if step is not own and any(step.holds(p) for p in params):
                step.give_up("another optimizer took the parameters over between perturb() and step()")

    # --- the model ---

    def attach(self: Self, model: nn.Module) -> Self:
        """Let the model take part in the steps. While the weights are perturbed, its batch norms keep their statistics, and `state_dict()`
        of it or of a part of it gives copies of the unperturbed weights. Modules that are added later are not covered. An optimizer that
        was made with the model is attached already.

        Args:
            model: has parameters of this optimizer. One that was attached before is detached.

        Returns:
            The optimizer.

        Raises:
            ValueError: not a module, or one without parameters of this optimizer.

        Example:
            opt = CrAM(model.parameters(), torch.optim.SGD, lr=0.1).attach(model)
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f"CrAM.attach: model must be an nn.Module, got {type(model).__name__}")
        ours = {id(p) for group in self.param_groups for p in group["params"]}
        if ours.isdisjoint(map(id, model.parameters())):
            raise ValueError("CrAM.attach: model must have parameters of this optimizer, got one that has none")
        self.detach()
        self._hooks = ModelHooks(model, self)
        return self

    def detach(self) -> None:
        """Undo `attach`. A step that is open is given up: the weights are restored, and the next `step()` raises."""
        self.give_up("the optimizer was attached or detached between perturb() and step()")
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    # --- groups ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Options that the group does not have are those of the constructor. A step that is open is given up: the weights are
        restored, and the next `step()` raises.

        Args:
            param_group: a dict with `params` (and `param_names`, where the others have names), and options.

        Raises:
            ValueError: as the constructor. Nothing was changed.

        Example:
            adapter = nn.Linear(8, 8)
            params, names = [adapter.weight, adapter.bias], ["adapter.weight", "adapter.bias"]
            opt.add_param_group({"params": params, "param_names": names, "rho": 0.1})
        """
        if not (isinstance(param_group, dict) and "params" in param_group):
            raise ValueError(f"CrAM: param_group must be a dict with params, got {type(param_group).__name__}")
        ours = {key: self.defaults[key] for key in options.GROUP_OPTIONS}
        options.check_new_group(param_group, ours, self.base_optimizer.defaults)
        self._note_counters()
        self.base_optimizer.add_param_group(param_group)
        param_group |= {**self.defaults, **param_group, **self._workspace.counters}
        try:
            options.check_params(self.param_groups, len(self.param_groups) - 1)
            self._check_names()
        except ValueError:
            self.param_groups.pop()
            raise
        self.give_up("a parameter group was added between perturb() and step()")
        self._heal_others()

    # --- checkpoints and copies ---

    def state_dict(self) -> dict[str, Any]:
        """A state dict in the base optimizer's format, which the base optimizer can load, too. With `mask_period` above 1 it also holds the
        kept masks, under the key `cram_masks`, which torch ignores. Patterns and schedules are not part of it.

        Raises:
            RuntimeError: a step is open; or the base has a `state_dict` of its own, such as ZeRO's, that holds more than torch's.
        """
        base = type(self.base_optimizer)
        if base.state_dict is not Optimizer.state_dict or base.load_state_dict is not Optimizer.load_state_dict:
            message = f"{base.__name__} has one of its own, and a checkpoint of CrAM would lose what it holds: save that of base_optimizer"
            raise RuntimeError(f"CrAM: state_dict() must be that of torch.optim.Optimizer, got a base optimizer with its own: {message}")
        self.refuse_within_step("state_dict()")
        options.check_groups(self.base_optimizer)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of CrAM or of the base optimizer. Options that it lacks keep their values, and so do patterns and schedules.
        Masks that it lacks are computed anew. A step that is open is given up: the weights are restored, and the next `step()` raises.

        Args:
            state_dict: what `state_dict()` gave, with as many groups and parameters as this optimizer has.

        Raises:
            ValueError: not such a dict, or its groups are of other sizes. Nothing was changed.

        Example:
            save({"optimizer": opt.state_dict()}, "checkpoint.pt")
            opt.load_state_dict(torch.load("checkpoint.pt", weights_only=True)["optimizer"])
        """
        if not (isinstance(state_dict, dict) and "param_groups" in state_dict) and not self._optimizer_load_state_dict_pre_hooks:
            raise ValueError(
                f"CrAM: state_dict must be what state_dict() of an optimizer gave, got {type(state_dict).__name__} of another kind"
            )
        super().load_state_dict(state_dict)
        if self.master_weights:
            reload_float32(self.state, self.param_groups, state_dict)
        self._load_masks(state_dict.get(MASKS, {}))

    def _load_masks(self, masks: dict[int, dict[str, Any]]) -> None:
        self._workspace.follow(self.param_groups)
        self._workspace.load_masks(masks, self._patterns())

    def __getstate__(self) -> dict[str, Any]:
        self.refuse_within_step("copy or pickle")
        self._workspace.follow(self.param_groups)
        ours = {MASKS: self._workspace.pack_masks(), "model": self._hooks and self._hooks.model}
        return {"defaults": self.defaults} | {key: self.__dict__[key] for key in self._copied} | ours  # no hooks, as in torch

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies and pickles. Torch's load_state_dict, and scripts, call it with new state or groups, whose missing options, patterns
        and schedules keep their values."""
        state = dict(state)
        shared = {key: state.pop(key) for key in ("state", "param_groups") if key in state}
        masks, model, copied = state.pop(MASKS, {}), state.pop("model", None), "base_optimizer" in state
        if not copied:
            self.give_up("the optimizer was loaded between perturb() and step()")
            for old, new in zip(self.param_groups, shared.get("param_groups", ()), strict=False):
                fixed = {key: value for key, value in old.items() if key == "compression" or (key == "rho" and callable(value))}
                new |= {**old, **new, **fixed}
        super().__setstate__(state)
        base = self.base_optimizer
        if shared:  # the base's own __setstate__ brings what an old checkpoint lacks up to date
            base.__setstate__({"state": base.state, "param_groups": base.param_groups} | shared)
        if copied:
            self._start()
        if model is not None:
            self._hooks = ModelHooks(model, self)
        self._load_masks(masks)
