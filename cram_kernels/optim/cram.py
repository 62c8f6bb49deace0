"""CrAM as a torch optimizer: its options, what happens in a step in which order, and how everything else leads back to clean weights."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from .. import schedule
from ..coverage import Coverage, CoverageTable, kept_counts
from ..distributed import why_not_nm
from ..params import OPEN_STEPS, embedding_tables, outputs_on_axis_1, reparametrized
from ..patterns import NM, Pattern, TopK
from ..warning import warn
from . import halves, options
from .base import Wrapper, base_of
from .bucket import Slot, Workspace
from .fused import FUSED
from .model_hooks import ModelHooks
from .open_step import OpenStep
from .precision import reload_float32
from .step_info import StepInfo

MASKS = "cram_masks"  # the key of kept masks in a state_dict, beside torch's "state" and "param_groups"
COMPRESSION = (TopK(sparsity=0.5), TopK(sparsity=0.7), TopK(sparsity=0.9))


class CrAM(Wrapper):
    """The compression-aware minimizer (Peste et al., ICLR 2023, arXiv 2207.14200, Algorithm 1) around a base optimizer. In plain torch, a step is

        w' = w + rho * g                     g, the first gradient, of the loss at w
        w' = compression of the step (w')    the largest weights, or n of every m; the others 0
        G  = g + mask * (gradient at w')     without g where not `plus`, without the mask where not `sparse_grad`
        base_optimizer steps from w with G   then the gradients are released (None)

    in one of three forms:

        loss = opt.step(closure)                                               # the closure is run twice; the clean loss is returned
        loss(model).backward(); opt.perturb(); loss(model).backward(); opt.step()
        loss(model).backward()
        with opt.perturbed(): loss(model).backward()
        opt.step()

    Whatever is raised in between, the weights come back to the bit: at once in the first form and in the `with` block, else with
    `restore()`, the next `perturb()`, another optimizer over the same parameters, or the end of this one. Storage never moves. A parameter
    without a gradient in the first pass is not perturbed; without one in the second it is updated with g alone (`plus`) or not at all.
    `maximize` of the base concerns its update only. Schedulers, hooks and copies work as in torch, and checkpoints of the base optimizer go
    both ways.

    Args:
        params: the model, which is then also attached (see `attach`), gives the parameters their names and keeps embedding
            tables and parts of parametrized weights dense, and what N:M does not fit, as `prune` does; or as in torch tensors,
            (name, tensor) or groups; or an instance of a base optimizer. A group may have its own `rho`, `plus`, `sparse_grad`, `prune` and
            `compression`. Parameters are float32, bfloat16 or float16, dense in any memory order.
        base_optimizer: a class, or an instance over the same parameters. SGD, Adam and AdamW are fused with the restore, any other takes
            its own step.
        compression: `TopK` and `NM` patterns; each step takes one, by a hash of `seed` and the number of steps. A callable, such as
            `SparsityWarmup`, gives the patterns of a step. Empty or None: no pruning (SAM).
        rho: how far uphill, >= 0: a number, a tensor of one, or a callable such as `RhoWarmup` that gives the number of a step.
        plus: CrAM+, the sum of both gradients (paper, section 3.3).
        sparse_grad: mask the second gradient.
        prune: False: perturbed, but never pruned.
        prune_embeddings: prune the embedding tables of a model, too.
        normalize_grad: rho / (norm of all gradients, after clipping, + 1e-12) instead of rho.
        max_grad_norm: clip the gradients of each pass on their own, as torch.nn.utils.clip_grad_norm_ does, after unscaling; those of the
            second before the mask.
        grad_norms: put the gradient norms of both passes into `last`, also where no other option needs them.
        master_weights: keep a float32 copy of each 16-bit parameter, which the update steps, with state in float32; needs SGD or Adam(W).
        mask_period: a pattern's masks are computed at every mask_period-th use of that pattern.
        seed: of the draw of the pattern.
        exclude: names, as in `fnmatch`, of parameters that are not pruned: ["head.*"]; needs named parameters.
        base_options: for the class: lr, momentum, ...

    Raises:
        ValueError: an option of another type or out of its range, `differentiable`, `exclude` without names; a parameter that is sparse, not
            dense, given twice, or of another dtype.

    Example:
        opt = CrAM(model, torch.optim.SGD, lr=0.1, momentum=0.9, compression=[TopK(sparsity=0.5), TopK(sparsity=0.9)])
        for x, y in loader:
            def closure():
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss
            opt.step(closure)
    """

    _step_supports_amp_scaling = True  # a GradScaler hands its scale over to step(): grad_scale and found_inf
    _options = ("compression", "normalize_grad", "max_grad_norm", "master_weights", "mask_period", "exclude", "grad_norms")
    _copied = (*Wrapper._copied, *_options, "_dense", "_dense_under_nm")

    def __init__(
        self,
        params: Any = None,
        base_optimizer: Callable[..., Optimizer] | Optimizer = torch.optim.SGD,
        *,
        compression: Sequence[Pattern] | Pattern | Callable[[int], Sequence[Pattern]] | None = COMPRESSION,
        rho: float | Tensor | Callable[[int], float] = 0.05,
        plus: bool = True,
        sparse_grad: bool = True,
        prune: bool = True,
        prune_embeddings: bool = False,
        normalize_grad: bool = False,
        max_grad_norm: float | None = None,
        grad_norms: bool = False,
        master_weights: bool = False,
        mask_period: int = 1,
        seed: int = 0,
        exclude: Iterable[str] = (),
        **base_options: Any,
    ) -> None:
        self.compression = schedule.checked_compression(compression)
        options.check_optimizer_options(normalize_grad, max_grad_norm, master_weights, mask_period, seed, grad_norms)
        options.check_bool("prune_embeddings", prune_embeddings)
        self.normalize_grad, self.max_grad_norm, self.grad_norms = normalize_grad, max_grad_norm, grad_norms
        self.master_weights, self.mask_period = master_weights, mask_period
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        own = {"rho": rho, "plus": plus, "sparse_grad": sparse_grad, "prune": prune, "compression": None}
        options.check_group_options(own)
        model = params if isinstance(params, nn.Module) else None
        base = base_of(params, base_optimizer, base_options)
        if master_weights and type(base) not in FUSED:
            raise ValueError(f"CrAM: master_weights must be False for a base that takes its own step, got True and {type(base).__name__}")
        for index, group in enumerate(base.param_groups):
            options.check_new_group({**own, **group}, base.defaults)
            options.check_params(base.param_groups, index)
        options.check_exclude(base.param_groups, self.exclude)
        super().__init__(base, own | schedule.first_counters(seed))
        self._dense: dict[str, str] = {}  # name of a parameter -> why the model keeps it dense, under any pattern
        self._dense_under_nm: dict[str, str] = {}
        if model is not None:
            reasons = reparametrized(model) | ({} if prune_embeddings else embedding_tables(model))
            outputs = outputs_on_axis_1(model)
            names = [(name, id(p)) for group in self.param_groups for name, p in zip(group["param_names"], group["params"], strict=True)]
            self._dense = {name: reasons[p] for name, p in names if p in reasons}
            self._dense_under_nm = {name: outputs[p] for name, p in names if p in outputs}
        self._start()
        if model is not None:
            self.attach(model)

    def _start(self) -> None:
        """What an optimizer, or a copy of one, begins with."""
        self._workspace = Workspace()
        self._hooks: ModelHooks | None = None
        refuse = WeakMethod(self._refuse_step_of_base)  # a base that is kept keeps no optimizer, and none of its memory, alive
        self._guard = lambda *call: refuse() and refuse()(*call)  # type: ignore[misc]
        self.base_optimizer.register_step_pre_hook(self._guard)
        self._heal_others(p for group in self.param_groups for p in group["params"])

    @staticmethod
    def _heal_others(params: Iterable[Tensor]) -> None:
        """An optimizer whose cell was interrupted within a step, and that something still holds, has left these parameters perturbed."""
        for step in list(OPEN_STEPS):
            if any(step.holds(p) for p in params):
                step.give_up("another optimizer took the parameters over between perturb() and step()")

    def _refuse_step_of_base(self, base: Optimizer, *_: Any) -> None:
        if self.open_step is not None and not self._workspace.updating:
            self.restore()
            raise RuntimeError("CrAM: step() of the base optimizer must not be called after perturb(), got it called: call that of CrAM")

    @property
    def open_step(self) -> OpenStep | None:
        """The step that `perturb()` began and that is not over yet."""
        step = self._workspace.open
        return None if step is None or step.given_up is not None else step

    @property
    def last(self) -> StepInfo | None:
        """What the last step did, and to how many weights."""
        return self._workspace.last

    def __repr__(self) -> str:
        facts = ", ".join([type(self.base_optimizer).__name__, *(f"{name}={getattr(self, name)}" for name in self._options)])
        return super().__repr__().replace(f"{type(self).__name__} (", f"{type(self).__name__} around {facts} (", 1)

    # --- a step ---

    @torch._disable_dynamo  # the public name would import dynamo with the package
    def perturb(self, scaler: GradScaler | None = None) -> None:
        """Move the weights uphill and prune them; the gradients are taken away (p.grad = None). Warns where a step is open, which is given
        up, and where no parameter has a gradient.

        Args:
            scaler: what has scaled the gradients; they are unscaled here. `scaler.step(optimizer)` follows: where either pass overflowed
                nothing is updated, and the scale is lowered.

        Raises:
            RuntimeError: a gradient is sparse; TopK ranks weights of several devices together; the scaler's `unscale_` was called; the
                attached model is a DDP one whose ranks have not shared their gradients. Nothing was changed.
        """
        if self.open_step is not None:
            warn("CrAM: perturb() was called twice without step(): the first step is given up, and its gradients are dropped")
        self.restore()
        halves.begin(self, scaler)

    @torch._disable_dynamo  # the public name would import dynamo with the package
    def restore(self) -> None:
        """Bring the weights back, to the bit, and give the open step up, if there is one."""
        if (step := self._workspace.open) is not None:
            step.restore()
            self._workspace.open = None

    def give_up(self, reason: str) -> None:
        """Restore the weights where a step is open; the next `step()` raises with this reason, since its gradients are those at perturbed
        weights. For code that changes the model or the optimizer between the halves of a step."""
        if (step := self.open_step) is not None:
            step.give_up(reason)

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """`perturb()`, and at the end of the block the weights are back; `step()` follows. If the block raises, the step is given up and
        its gradients are released.

        Example:
            loss(model).backward()
            with opt.perturbed():
                loss(model).backward()
            opt.step()
        """
        with self._released_on_error():
            self.perturb()
            yield
        if (step := self.open_step) is not None:
            step.restore()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Complete the step that `perturb()` began. Without one, this is a plain step of the base optimizer, and the first such step of an
        optimizer warns: `plain_step()` is the way to want one. Afterwards all gradients are None. Warns where it completes a step and no
        parameter has a second gradient.

        Args:
            closure: computes the loss, calls backward, returns the loss. For a whole step it is run twice, at the clean and at the
                perturbed weights. If it raises, the weights are the clean ones and the gradients are released.

        Returns:
            The clean loss; None without a closure.

        Raises:
            RuntimeError: a GradScaler calls it with a closure, or after a `perturb()` that was not given the scaler, or does not call it
                after one that was; the step was given up, by a loaded model, a new group or another optimizer. The weights are the clean
                ones, nothing is updated.
        """
        if closure is not None:
            self._of_scaler(closure)
            self.restore()
            with self._released_on_error():
                with torch.enable_grad():
                    loss = closure()
                self._second_half(closure)
            return loss
        work = self._workspace
        if _asked_by_checkpoint():
            if self.open_step is not None:  # which state_dict() then refuses to save
                self.zero_grad()
                return None
        elif work.open is None and not work.warned_plain:
            work.warned_plain = True
            warn(
                "CrAM: step() without perturb() is a plain step of the base optimizer: call perturb() and backward() before, or plain_step()"
            )
        self._finish()
        return None

    def plain_step(self) -> None:
        """One step of the base optimizer with the gradients that are there, no perturbation: for steps that are not to be CrAM's."""
        self.restore()
        self._finish()

    @torch._disable_dynamo
    def _finish(self) -> None:
        step = self._workspace.open
        given = self._of_scaler(None)
        try:
            if step is not None and step.given_up is not None:
                self.restore()
                self.zero_grad()
                raise RuntimeError(
                    f"CrAM: step() must follow perturb() and backward() undisturbed, got a step that was given up: {step.given_up}"
                )
            halves.finish(self, given)
        except BaseException:
            for key in given:  # which the scaler would have taken away afterwards
                self.__dict__.pop(key, None)
            raise

    def _of_scaler(self, closure: Callable[[], Any] | None) -> dict[str, Any]:
        """What a GradScaler that calls step() has set: `grad_scale` and `found_inf`; empty without one."""
        given: dict[str, Any] = {key: self.__dict__[key] for key in ("grad_scale", "found_inf") if key in self.__dict__}
        step = self.open_step
        scaled_first = step is not None and step.factor.found_inf is not None
        wrong = None
        if given and closure is not None:
            wrong = "step(closure) must not be called by a GradScaler, which cannot scale what the closure does: perturb(scaler) and step()"
        elif given and step is not None and not scaled_first:
            wrong = "perturb() must be given the GradScaler that calls step(), got none: perturb(scaler)"
        elif not given and scaled_first and closure is None:
            wrong = "scaler.step(optimizer) must follow perturb(scaler), got step(): the second gradients are scaled"
        if wrong is not None:
            for key in given:
                delattr(self, key)
            self.restore()
            self.zero_grad()
            raise RuntimeError(f"CrAM: {wrong}")
        return given

    def _second_half(self, closure: Callable[[], Any]) -> None:
        """The step, from the gradients at the clean weights on."""
        self.perturb()
        with torch.enable_grad():
            closure()
        self._finish()

    @contextmanager
    def _released_on_error(self) -> Iterator[None]:
        """If the block raises, the step is given up and its gradients are released: nobody else has seen them."""
        try:
            yield
        except BaseException:
            self.restore()
            self.zero_grad()
            raise

    def first_step(self, zero_grad: bool = False) -> None:
        """`perturb()`, under the name that SAM implementations use. The gradients are taken away in any case: they are half of the update."""
        self.perturb()

    def second_step(self, zero_grad: bool = False) -> None:
        """`step()`, under the name that SAM implementations use. Without `zero_grad` the second gradients stay in `p.grad`."""
        kept = [] if zero_grad else [(p, p.grad) for group in self.param_groups for p in group["params"]]
        self.step()
        for p, grad in kept:
            p.grad = grad

    # --- what is pruned ---

    def _why_dense(self, slot: Slot, pattern: Pattern) -> str | None:
        """None where the pattern prunes this parameter."""
        group = self.param_groups[slot.group]
        if not slot.param.requires_grad:
            return "frozen (requires_grad=False)"
        if not group["prune"]:
            return "prune=False"
        name = options.name_of(group, slot.group, slot.position)
        for glob in self.exclude:
            if fnmatchcase(name, glob):
                return f"excluded by {glob!r}"
        if name in self._dense:
            return self._dense[name]
        if isinstance(pattern, NM) and (wrong := self._dense_under_nm.get(name) or why_not_nm(slot.param, pattern.m)) is not None:
            return wrong
        return pattern.why_dense(slot.param.shape)

    @torch.no_grad()
    def coverage(self, pattern: Pattern) -> CoverageTable:
        """What this pattern does to each parameter: pruned, or why it stays dense, and how many weights it would leave there now. Warns
        where it leaves nothing of a parameter.

        Example:
            print(opt.coverage(TopK(sparsity=0.9)))
        """
        slots = self._workspace.follow(self.param_groups)
        dense = {s.param: why for s in slots if (why := self._why_dense(s, pattern)) is not None}
        pruned = [s for s in slots if s.param not in dense and s.holds()]
        buckets = self._workspace.make_buckets((pattern,) * len(self.param_groups), pruned, self._why_dense) if pruned else []
        names = [options.name_of(self.param_groups[s.group], s.group, s.position) for s in slots]
        kept = kept_counts(buckets, pattern) if self.open_step is None else {}
        rows = zip(names, [s.param for s in slots], strict=True)
        table = CoverageTable(Coverage(name, p.shape, p.numel(), dense.get(p), kept.get(p)) for name, p in rows)
        if table.emptied:
            warn(
                f"CrAM: {pattern} leaves no weight of {', '.join(table.emptied)}: exclude it, or rank each tensor on its own (scope='tensor')"
            )
        return table

    # --- groups ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Where a step is open, it is given up: the next `step()` raises."""
        if not isinstance(param_group, dict):
            raise TypeError(f"CrAM: a parameter group must be a dict, got {type(param_group).__name__}")
        options.check_new_group({**{key: self.defaults[key] for key in options.GROUP_OPTIONS}, **param_group}, self.base_optimizer.defaults)
        self.give_up("a parameter group was added between perturb() and step()")
        if self.param_groups:
            param_group |= {key: self.param_groups[0][key] for key in schedule.COUNTERS}
        super().add_param_group(param_group)
        self._heal_others(param_group["params"])

    def _check_new_group(self, index: int) -> None:
        options.check_new_group(self.param_groups[index], self.base_optimizer.defaults)
        options.check_params(self.param_groups, index)
        if self.exclude and "param_names" not in self.param_groups[index]:
            raise ValueError(f"CrAM: exclude needs named parameters, got {list(self.exclude)} and a group without names")

    # --- the model ---

    def attach(self, model: nn.Module) -> "CrAM":
        """From now on, while the weights are perturbed, batch norms of the model keep their statistics, and `state_dict()` of it or of a
        part of it gives the unperturbed weights (copies of them). Modules that are added later are not covered. An optimizer that was made
        over the model is attached to it already. Returns the optimizer.

        Raises:
            ValueError: not a module, or one without parameters of this optimizer.
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
        """Undo `attach`. Where a step is open, it is given up: the next `step()` raises."""
        self.give_up("the optimizer was attached or detached between perturb() and step()")
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    # --- checkpoints and copies ---

    def refuse_within_step(self, what: str) -> None:
        """Raise RuntimeError where a step is open."""
        if self.open_step is not None:
            raise RuntimeError(
                f"CrAM: {what} must not be called between perturb() and step(), got it called there: step() or restore() first"
            )

    def state_dict(self) -> dict[str, Any]:
        """As of the base optimizer, into which it loads; with `mask_period` also the masks, under a key of their own that torch ignores.
        Patterns and schedules are not part of it.

        Raises:
            RuntimeError: a step is open.
        """
        self.refuse_within_step("state_dict()")
        halves.check_groups(self)
        state_dict = super().state_dict()
        for group, own in zip(state_dict["param_groups"], self.param_groups, strict=True):
            group |= {"compression": None, "rho": schedule.rho_of(own)}
        self._workspace.follow(self.param_groups)
        if masks := self._workspace.pack_masks():
            state_dict[MASKS] = masks
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ours, or one of the base optimizer: options that it lacks keep their values, and so do patterns and schedules; masks that it lacks
        are computed anew. Where a step is open, it is given up: the next `step()` raises."""
        self.give_up("the optimizer was loaded between perturb() and step()")
        super().load_state_dict(state_dict)
        if self.master_weights:
            reload_float32(self.state, self.param_groups, state_dict)
        self._load_masks(state_dict.get(MASKS, {}))

    def _load_masks(self, masks: dict[int, dict[str, Any]]) -> None:
        self._workspace.follow(self.param_groups)
        self._workspace.drop_masks()
        self._workspace.load_masks(masks, [p for choice in halves.choices(self) for p in choice])

    def __getstate__(self) -> dict[str, Any]:
        self.refuse_within_step("copy or pickle")
        self._workspace.follow(self.param_groups)
        return super().__getstate__() | {MASKS: self._workspace.pack_masks(), "model": self._hooks and self._hooks.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        masks, model = state.pop(MASKS, None), state.pop("model", None)
        for old, new in zip(self.param_groups if "base_optimizer" in self.__dict__ else (), state.get("param_groups", ()), strict=False):
            new["compression"] = old["compression"]
            if callable(old["rho"]):
                new["rho"] = old["rho"]
        copied = "base_optimizer" in state
        if not copied:
            self.give_up("the optimizer's state was replaced between perturb() and step()")
        super().__setstate__(state)
        if copied:
            self._start()
            if model is not None:
                self.attach(model)
        self._load_masks(masks or {})


def _asked_by_checkpoint() -> bool:
    """Whether torch.distributed.checkpoint calls, which has an optimizer make its state by a step with a rate and gradients of 0."""
    frame = sys._getframe(1)
    for _ in range(8):
        if frame is None or frame.f_code.co_name == "_init_optim_state":
            return frame is not None
        frame = frame.f_back  # type: ignore[assignment]
    return False
