"""The two halves of a step, in order. Whatever raises in one of them leads back to clean weights."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from itertools import islice
from operator import is_
from traceback import walk_stack
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import schedule
from ..distributed import check_not_fsdp1
from ..patterns import Pattern
from ..warning import warn
from .bucket import Bucket
from .columns import Columns, Slot, by_device
from .fused import Update
from .hooks import Guard
from .open_step import OpenStep
from .precision import PLAIN, Factor, clipped, first_factor, note_versions, prepare_masters, second_factor, skipped, total_norm

if TYPE_CHECKING:
    from .cram import CrAM

_Function = TypeVar("_Function", bound=Callable[..., Any])


def eager(half: _Function) -> _Function:
    """A half of a step, outside the graphs of torch.compile and of autograd."""

    @torch._disable_dynamo  # the public name would import dynamo with the package
    @wraps(half)
    def without_graph(*args: Any, **kwargs: Any) -> None:
        enabled = torch.is_grad_enabled()
        try:  # as torch.no_grad(), which takes 3 us longer
            torch._C._set_grad_enabled(False)
            half(*args, **kwargs)
            torch._C._set_grad_enabled(enabled)
        except BaseException:
            torch._C._set_grad_enabled(enabled)
            raise

    return without_graph  # type: ignore[return-value]


def hooked(step: _Function) -> _Function:
    """`step` with what torch puts around it, where `torch.profiler.profile` is to see it, or a hook to be called. The mark for a profiler
    alone takes half as long as torch's own fused step. Torch itself puts it around the step() of a class that overrides this one."""
    around = Optimizer.profile_hook_step(step)

    @wraps(step)
    def called(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        everywhere = _global_optimizer_pre_hooks or _global_optimizer_post_hooks
        if type(self).step is not called:  # type: ignore[comparison-overlap]
            return step(self, *args, **kwargs)
        if profiler._is_profiler_enabled or hooks or everywhere:
            return around(self, *args, **kwargs)
        result = step(self, *args, **kwargs)
        for hook in (*self._optimizer_step_post_hooks.values(), *_global_optimizer_post_hooks.values()):  # made by the closure
            hook(self, (self, *args), kwargs)
        return result

    called.hooked = True  # type: ignore[attr-defined]  # for torch, which puts it around each step() that does not say so
    return called  # type: ignore[return-value]


def asked_by_checkpoint() -> bool:
    """Whether torch.distributed.checkpoint calls, which has an optimizer make its state by a step with a rate and gradients of 0."""
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    if module is None or torch.compiler.is_compiling():
        return False
    return any(frame.f_code is module._init_optim_state.__code__ for frame, _ in islice(walk_stack(sys._getframe(1)), 8))


def begin(optimizer: "CrAM", scaler: GradScaler | None) -> None:
    """The first half: move the weights uphill and prune them. Clean weights are given."""
    work, groups, hooks = optimizer._workspace, optimizer.param_groups, optimizer._hooks
    settings = work.settings_of(optimizer)
    unclipped = first_factor(scaler, optimizer)
    lists = settings.choices or schedule.choices(groups, optimizer.compression)
    indices = [schedule.draw(g["cram_seed"], g["cram_step"], len(c)) if c else None for g, c in zip(groups, lists, strict=True)]
    patterns = tuple([None if i is None else c[i] for i, c in zip(indices, lists, strict=True)])
    plus, sparse = settings.plus, settings.sparse
    if hooks is not None:
        masked = [own and pattern is not None for own, pattern in zip(sparse, patterns, strict=True)]
        hooks.check_synced("first", any(plus) or any(masked))
    optimizer._heal_others()
    work.follow(groups)
    rhos, keep = settings.rhos or [schedule.rho_of(group) for group in groups], optimizer.mask_period > 1
    try:
        active, grads, looked_at = work.gradients(False)
        if not active:
            check_not_fsdp1("CrAM", optimizer._hooks.model.parameters() if optimizer._hooks else ())  # it has taken our parameters out
            warn("CrAM: no parameter has a gradient, so nothing is perturbed: call backward() before perturb()")
        while True:
            try:
                if optimizer.master_weights:
                    prepare_masters(optimizer.base_optimizer, active)
                factor, divisor, norm = _clipped(optimizer, active, grads, unclipped)
                buckets = work.buckets(patterns, active, settings.prune, optimizer._why_dense)
                reused = _reused(optimizer, buckets, {p for c in lists for p in c}) if keep else set()
                each = [work.option("rho", rhos, bucket.slots, bucket.device) for bucket in buckets]
                if divisor is not None:
                    each = [rho / (divisor.to(rho.device) + 1e-12) for rho in each]
                step = work.open = OpenStep(buckets, work.slots, hooks, factor, scaler)
                step.begin(active, grads, optimizer.master_weights)
                thresholds, stats = step.perturb(each, sparse, reused, keep)
                break
            except Exception:
                if looked_at:
                    raise
                optimizer.restore()
                before, (active, grads, looked_at) = (active, grads), work.gradients(True)
                if before[0] == active and all(map(is_, before[1], grads)):
                    raise  # every tensor fits: it would fail once more
        ranked = [bucket for bucket in buckets if bucket.numels and bucket.pattern not in reused]
        numels = tuple([n for bucket in ranked for n in bucket.numels])
        work.last = (patterns, indices[0] if indices else None, thresholds, stats, numels, norm, None, tuple(map(ref, ranked)))
        step.keep_gradients(plus, fitted=looked_at)
        for param in work.params:
            param.grad = None
        if hooks is not None:
            hooks.reshard()
            hooks.unsynced.clear()
        torch.clear_autocast_cache()  # of casts of the clean weights
    except BaseException:
        optimizer.restore()
        raise


def _reused(optimizer: "CrAM", buckets: list[Bucket], known: set[Pattern]) -> set[Pattern | None]:
    """The patterns whose masks of an earlier step are taken. All must be there: a parameter may be new, or have its first gradient."""
    optimizer._workspace.keep_masks(known)
    uses = schedule.uses_of(optimizer.param_groups)
    due = {p for p in known if uses.get(schedule.key_of(p), 0) % optimizer.mask_period == 0}
    lacking = {b.pattern for b in buckets if any(b.pattern not in s.masks for s in b.pruned)}
    return {b.pattern for b in buckets} - due - lacking - {None}


def _clipped(optimizer: "CrAM", slots: list[Slot], grads: list[Tensor], factor: Factor) -> tuple[Factor, Tensor | None, Tensor | None]:
    """The factor that also clips; what divides rho, None where nothing does; the norm before clipping, None where nobody asks for it."""
    if not slots or not (optimizer.normalize_grad or optimizer.grad_norms or optimizer.max_grad_norm is not None):
        return factor, None, None
    norm = after = total_norm(slots, grads, factor)
    if optimizer.max_grad_norm is not None:
        factor, after = clipped(factor, norm, optimizer.max_grad_norm)
    return factor, after if optimizer.normalize_grad else None, norm


def finish(optimizer: "CrAM", given: dict[str, Any]) -> None:
    """The second half, or a plain step where none is open; `given` by a GradScaler.

    The order matters: state is there before an op writes it, and the step is counted last, so an interrupt at any line leaves clean
    weights, or weights that `restore()` makes clean.
    """
    work, step, base, hooks = optimizer._workspace, optimizer.open_step, optimizer.base_optimizer, optimizer._hooks
    try:
        work.updating = True
        settings = work.settings_of(optimizer)
        optimizer._heal_others()
        work.follow(optimizer.param_groups)
        first, scaler = (PLAIN, None) if step is None else (step.factor, step.scaler)
        if step is not None:
            if step.slots is not work.slots:
                raise RuntimeError("CrAM: the parameters must be the same in both halves of a step, got other ones after perturb()")
            if hooks is not None:
                hooks.check_synced("second", True)
            elif not work.warned_written and (written := step.written_to()):
                work.warned_written = True
                warn(
                    f"CrAM: {written[0]} was written to between perturb() and step(), which brings the weights from before perturb() back: "
                    "attach(model) where a checkpoint was loaded"
                )
            step.check_first()
        unclipped = second_factor(given, first, scaler, optimizer)
        pre_hooks = [hook for hook in base._optimizer_step_pre_hooks.values() if not isinstance(hook, Guard)]
        # Weights that are back already do not say whether an op has run; of several buckets one may be done when the next one is refused.
        for again in (step is None or not step.perturbed or len(step.buckets) > 1, True):
            active, grads, looked_at = work.gradients(again, step)
            if step is not None and not active:
                warn("CrAM: no parameter has a second gradient: was backward() called between perturb() and step()?")
            try:
                columns, others = ([], dict(zip(active, grads, strict=True))) if step is None else step.columns(active, grads)
                if optimizer.master_weights:
                    prepare_masters(base, list(others))
                for device, slots in by_device(others).items():
                    clean = torch.zeros((), dtype=torch.int32, device=device)
                    columns = [*columns, Columns(slots, clean, [others[s] for s in slots])]
                factor, _, norm = _clipped(optimizer, active, grads, unclipped)
                update = Update(base, work, settings, first, factor, step is not None, looked_at)
                update.run(columns, pre_hooks, list(base._optimizer_step_post_hooks.values()))
                break
            except Exception:
                if looked_at or step is None or not step.is_untouched():
                    raise
        for part in columns if optimizer.master_weights else ():
            note_versions(part.slots)
        if step is not None and step.renewed and skipped(factor):  # waits for the device, where masks are kept under a GradScaler
            step.forget_masks()  # of gradients that overflowed
    except BaseException:
        optimizer.restore()
        raise
    finally:
        work.updating = False
    for param in work.params:
        param.grad = None
    if hooks is not None:
        hooks.unsynced.clear()
    if step is None:
        torch.clear_autocast_cache()  # of casts of the weights before the step
        return
    step.end()
    work.open = None
    if norm is not None and optimizer.last is not None:
        work.last = replace(optimizer.last, second_grad_norm=norm)
    if optimizer.mask_period > 1:
        used = [b.pattern for b in step.buckets if b.pattern is not None]
        schedule.count(optimizer.param_groups, used, {schedule.key_of(p) for p in optimizer._patterns()})
    else:
        schedule.count(optimizer.param_groups)
