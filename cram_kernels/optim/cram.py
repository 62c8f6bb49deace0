"""CrAM as a torch optimizer: its options, and the forms in which a step is taken."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from .. import schedule
from ..coverage import CoverageTable, coverage_of, dense_in, why_dense
from ..patterns import Pattern, TopK
from ..warning import warn
from . import halves, options
from .base import Wrapper
from .columns import Slot
from .fused import check_base
from .precision import given_by_scaler
from .step_info import StepInfo

COMPRESSION = (TopK(sparsity=0.5), TopK(sparsity=0.7), TopK(sparsity=0.9))


class CrAM(Wrapper):
    """The compression-aware minimizer (Peste et al., ICLR 2023, arXiv 2207.14200, Algorithm 1) around a base optimizer. A step is

        w' = w + rho * g                     g, the first gradient, of the loss at w
        w' = compression of the step (w')    the largest weights, or n of every m; the others 0
        G  = g + mask * (gradient at w')     without g where not `plus`, without the mask where not `sparse_grad`
        base_optimizer steps from w with G   then the gradients are released (None)

    in one of three forms:

        loss = opt.step(closure)  # the closure is run twice; the clean loss is returned
        loss(model).backward(); opt.perturb(); loss(model).backward(); opt.step()
        loss(model).backward()
        with opt.perturbed(): loss(model).backward()
        opt.step()

    Whatever is raised in between, the weights come back to the bit: at once in the first form and in the `with` block. Otherwise they come
    back with `restore()`, the next `perturb()`, another optimizer over the same parameters, or when this one is deleted. The parameters
    keep their memory. A parameter without a gradient in the first pass is not perturbed. One without a gradient in the second pass is
    updated with g alone (`plus`) or not at all. `maximize` of the base concerns its update only. Schedulers, hooks and copies work as in
    torch. CrAM loads checkpoints of the base optimizer, and the base optimizer those of CrAM.

    Args:
        params: best the model. It is then attached (see `attach`) and names the parameters. Embedding tables, parts of parametrized weights
            and what N:M does not fit stay dense, as with `prune`. Or, as in torch, tensors, (name, tensor) pairs or groups; or an instance
            of a base optimizer. A group may have its own `rho`, `plus`, `sparse_grad`, `prune` and `compression`. Parameters are float32,
            bfloat16 or float16, dense in any memory order.
        base_optimizer: a class, or an instance over the same parameters. SGD, Adam and AdamW are fused with the restore, any other takes
            its own step.
        compression: `TopK` and `NM` patterns; each step takes one, by a hash of `seed` and the number of steps. A callable, such as
            `SparsityWarmup`, gives the patterns of a step. Empty or None: no pruning (SAM).
        rho: the step uphill adds rho times the gradient, >= 0: a number, a tensor of one, or a callable such as `RhoWarmup` that gives the
            number of a step.
        plus: CrAM+, the sum of both gradients (paper, section 3.3).
        sparse_grad: mask the second gradient.
        prune: False: perturbed, but never pruned.
        prune_embeddings: prune the embedding tables of a model, too.
        normalize_grad: rho / (norm of all gradients, after clipping, + 1e-12) instead of rho.
        max_grad_norm: clip the gradients of each pass on their own, as torch.nn.utils.clip_grad_norm_ does, after unscaling; those of the
            second before the mask.
        grad_norms: put the gradient norms of both passes into `last`, also where no other option needs them.
        master_weights: keep a float32 copy of each 16-bit parameter, which the update steps, with state in float32; needs SGD or Adam(W).
        mask_period: a pattern's masks are computed at every mask_period-th use of that pattern, and used again in between. `state_dict()`
            holds them. Files of torch.distributed.checkpoint do not: after loading one they are computed anew.
        seed: decides, with the number of the step, which pattern a step draws.
        exclude: names, as in `fnmatch`, of parameters that are not pruned: ["head.*"]; needs named parameters.
        base_options: options of the base optimizer, where `base_optimizer` is a class: lr, momentum, ...

    Raises:
        ValueError: an option of another type or out of its range, `differentiable`, `exclude` without names; a parameter that is sparse,
            not dense, given twice, or of another dtype.

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
    _copied = (*Wrapper._copied, *(name for name in _options if name != "exclude"), "_exclude", "_dense")

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
        exclude: Iterable[str] | None = (),
        **base_options: Any,
    ) -> None:
        self.compression = schedule.checked_compression(compression)
        self.normalize_grad, self.max_grad_norm, self.grad_norms = normalize_grad, max_grad_norm, grad_norms
        self.master_weights, self.mask_period = master_weights, mask_period
        options.check_optimizer_options(self)
        options.check_bool("prune_embeddings", prune_embeddings)
        if type(seed) is not int:
            raise ValueError(f"CrAM: seed must be an int, got {seed!r}")
        group_options = {"rho": rho, "plus": plus, "sparse_grad": sparse_grad, "prune": prune, "compression": None}
        options.check_group_options(group_options)
        base = options.base_of(params, base_optimizer, base_options)
        check_base(base, master_weights)
        for index, group in enumerate(base.param_groups):
            options.check_new_group(group, group_options, base.defaults)
            options.check_params(base.param_groups, index)
        self._exclude = options.check_exclude(base.param_groups, exclude, params)
        self._dense = dense_in(params, base.param_groups, prune_embeddings) if isinstance(params, nn.Module) else ({}, {})
        super().__init__(base, group_options | schedule.first_counters(seed))
        if isinstance(params, nn.Module):
            self.attach(params)

    @property
    def exclude(self) -> tuple[str, ...]:
        """Globs of the names of parameters that are not pruned. What is assigned is checked as in the constructor, and holds from the next
        step on.

        Raises:
            ValueError: what is assigned matches no name, or parameters have no names. The old globs stay.

        Example:
            opt.exclude = ["head.*"]
        """
        return self._exclude

    @exclude.setter
    def exclude(self, globs: Iterable[str] | None) -> None:
        self._exclude = options.check_exclude(self.param_groups, globs, self._hooks and self._hooks.model)
        self._workspace.plans.clear()

    @property
    def last(self) -> StepInfo | None:
        """What the last step did, and to how many weights."""
        work = self._workspace
        if isinstance(work.last, tuple):
            work.last = StepInfo(*work.last)
        return work.last

    def __repr__(self) -> str:
        facts = ", ".join([type(self.base_optimizer).__name__, *(f"{name}={getattr(self, name)}" for name in self._options)])
        return super().__repr__().replace(f"{type(self).__name__} (", f"{type(self).__name__} around {facts} (", 1)

    # --- a step ---

    @halves.eager
    def perturb(self, scaler: GradScaler | None = None) -> None:
        """Add rho times the gradient to the weights, and prune them. This consumes the gradients: p.grad becomes None. It warns if no
        parameter has a gradient. It also warns if a step is open already, and gives that one up.

        Args:
            scaler: what has scaled the gradients; they are unscaled here. `scaler.step(optimizer)` follows: where either pass overflowed
                nothing is updated, and the scale is lowered.

        Raises:
            RuntimeError: a gradient is sparse; TopK ranks weights of several devices together; the scaler's `unscale_` was called; the
                attached model is a DDP one whose ranks have not shared their gradients. Nothing was changed.

        Example:
            loss(model).backward()
            opt.perturb()
            loss(model).backward()
            opt.step()
        """
        if self.open_step is not None:
            warn("CrAM: perturb() was called twice without step(): the first step is given up, and its gradients are dropped")
        self._drop_step()
        halves.begin(self, scaler)

    @contextmanager
    def perturbed(self, scaler: GradScaler | None = None) -> Iterator[None]:
        """`perturb(scaler)`, and at the end of the block the weights are back; `step()` follows, or `scaler.step(optimizer)`. If the block
        raises, the step is given up and its gradients are released.

        Args:
            scaler: as in `perturb`.

        Example:
            loss(model).backward()
            with opt.perturbed():
                loss(model).backward()
            opt.step()
        """
        with self._released_on_error():
            self.perturb(scaler)
            yield
        if (step := self.open_step) is not None:
            step.restore()

    @halves.hooked
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
            TypeError: the closure is no function, as in `step(loss)`. Nothing was changed.
            RuntimeError: a GradScaler calls it with a closure, or after a `perturb()` that was not given the scaler. Or `perturb()` was
                given a scaler, and something else calls it. Or the step was given up, by a loaded model, a new group or another optimizer.
                In each case the weights are the clean ones, and nothing is updated.

        Example:
            def closure():
                value = loss(model)
                value.backward()
                return value

            value = opt.step(closure)
        """
        if closure is not None:
            if not schedule.is_function(closure):
                raise TypeError(f"CrAM: closure must be a function that computes the loss and calls backward, got {type(closure).__name__}")
            given_by_scaler(self, with_closure=True)
            self._drop_step()
            with self._released_on_error():
                with torch.enable_grad():
                    loss = closure()
                self._second_half(closure)
            return loss
        work = self._workspace
        if halves.asked_by_checkpoint():
            if self.open_step is not None:  # which state_dict() then refuses to save
                return self.zero_grad()
        elif work.open is None and not (work.plain_wanted or work.warned_plain):
            work.warned_plain = True
            warn("CrAM: step() without perturb() is a plain step of the base: call perturb() and backward() before it, or plain_step()")
        return self._finish()

    def plain_step(self, scaler: GradScaler | None = None) -> None:
        """One step of the base optimizer with the gradients that are there, without a perturbation: for steps that are not to be CrAM's.
        It is a step to hooks and schedulers. A step that is open is dropped first, and its weights come back.

        Args:
            scaler: what has scaled the gradients. The step is `scaler.step(optimizer)` then, which unscales them.

        Raises:
            TypeError: the scaler is something else, such as a closure, which `plain_step` does not run. Nothing was changed.

        Example:
            loss(model).backward()
            opt.plain_step()
        """
        if not isinstance(scaler, GradScaler | None):
            raise TypeError(f"CrAM.plain_step: scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
        self._drop_step()
        self._workspace.plain_wanted = True
        try:
            self.step() if scaler is None else scaler.step(self)
        finally:
            self._workspace.plain_wanted = False

    @halves.eager
    def _finish(self) -> None:
        step = self._workspace.open
        given = given_by_scaler(self, with_closure=False)
        try:
            if step is not None and step.given_up is not None:
                self.restore()
                raise RuntimeError(f"CrAM: step() must follow perturb() and backward() undisturbed, got a step given up: {step.given_up}")
            halves.finish(self, given)
        except BaseException:
            if step is not None:
                self.zero_grad()  # of gradients at perturbed weights
            for key in given:  # which the scaler would have taken away afterwards
                self.__dict__.pop(key, None)
            raise

    def _second_half(self, closure: Callable[[], Any]) -> None:
        """The step, from the gradients at the clean weights on."""
        self.perturb()
        with torch.enable_grad():
            closure()
        self._finish()

    def first_step(self, zero_grad: bool = False) -> None:
        """`perturb()`, under the name that SAM implementations use.

        Args:
            zero_grad: ignored. The gradients, one half of the update, are taken away in any case.

        Example:
            loss(model).backward()
            opt.first_step(zero_grad=True)
            loss(model).backward()
            opt.second_step(zero_grad=True)
        """
        self.perturb()

    def second_step(self, zero_grad: bool = False) -> None:
        """`step()`, under the name that SAM implementations use.

        Args:
            zero_grad: release the gradients. If False, the second gradients stay in `p.grad`.

        Example:
            loss(model).backward()
            opt.first_step()
            loss(model).backward()
            opt.second_step(zero_grad=True)
        """
        params = [p for group in self.param_groups for p in group["params"]]
        kept = [] if zero_grad else [(p, p.grad.clone()) for p in params if p.grad is not None]  # a base of another kind writes to them
        self.step()
        for p, grad in kept:
            p.grad = grad

    # --- what is pruned ---

    def _patterns(self) -> list[Pattern]:
        return [p for choice in schedule.choices(self.param_groups, self.compression) for p in choice]

    def _why_dense(self, slot: Slot, pattern: Pattern) -> str | None:
        """None where the pattern prunes this parameter."""
        return why_dense(self.param_groups[slot.group], slot, pattern, self.exclude, *self._dense)

    def coverage(self, pattern: Pattern | None = None) -> CoverageTable:
        """What patterns do to each parameter: pruned, or why it stays dense, and how many weights would be left there now. Warns where
        nothing is left of a parameter.

        Args:
            pattern: None: each that a group may draw in the next step. One that no group draws stands for the optimizer's `compression`.

        Example:
            print(opt.coverage())
        """
        options.check_groups(self.base_optimizer)
        return coverage_of(self._workspace, self.param_groups, self.compression, pattern, self._why_dense)

    def _check_names(self) -> None:
        options.check_exclude(self.param_groups, self.exclude)
        options.check_unique(self.param_groups, {name for reasons in self._dense for name in reasons})
