"""CrAM as a torch optimizer: what happens in a step, in which order, and how everything else leads back to a clean state."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from types import NoneType
from typing import Any, NamedTuple
from warnings import warn
from weakref import WeakMethod

import torch
from torch import Size, Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..distributed import why_not_nm
from ..patterns import NM, Pattern, TopK
from ..signals import uninterrupted
from . import masters
from .amp import clipped, first_factor, second_factor, total_norm
from .arena import Arena, Slot, release_gradients
from .attachment import Attachment
from .factor import Factor
from .groups import check_matches, check_options, check_params, excluded
from .last import Perturbation
from .levels import COUNTERS, count, draw, first_counters, uses
from .perturb import perturb_
from .scalars import Scalars
from .selection import Selection
from .update import FUSED, skipped, update_
from .wrapper import Wrapper, base_of

MASKS = "cram_masks"  # their key in a state_dict, beside torch's "state" and "param_groups"
COMPRESSION = (TopK(0.5), TopK(0.7), TopK(0.9))


def _nothing(*_: Any) -> None:
    """What the guard of an optimizer that is gone does."""


class Coverage(NamedTuple):
    """One parameter under a pattern; `why_dense` is None where it is pruned."""

    name: str
    shape: Size
    numel: int
    why_dense: str | None


def _is_a_dry_step(groups: list[dict[str, Any]], slots: list[Slot]) -> bool:
    """torch.distributed.checkpoint takes a step with a rate of 0 and gradients of 0 to make an optimizer's state. Between the halves of a
    step there is nothing to be made, and the step stays open."""
    rates = [group["lr"] for group in groups]
    if not slots or any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
        return False  # reading a rate on a GPU would wait for it in every step
    return all(float(rate) == 0 for rate in rates) and not any(bool(s.grad.any()) for s in slots)


class CrAM(Wrapper):
    """The compression-aware minimizer (Peste et al., ICLR 2023) around a base optimizer. In plain torch, a step is

        w' = w + rho * g                     g, the first gradient, of the loss at w
        w' = compression of the step (w')    the largest weights, or n of every m; the others 0
        G  = g + mask * (gradient at w')     without g where not `plus`, without the mask where not `sparse_grad`
        base_optimizer steps from w with G   then the gradients are released (None)

    in one of three forms; `step()` alone is the plain step of the base optimizer:

        loss = opt.step(closure)                                               # the closure is run twice; the clean loss is returned
        loss(model).backward(); opt.perturb(); loss(model).backward(); opt.step()
        loss(model).backward()
        with opt.perturbed(): loss(model).backward()
        opt.step()

    Whatever is raised in between, the weights come back to the bit: at once in the first form and in the `with` block, else with
    `restore()` or the next `perturb()`; a `step()` would complete the step. Storage never moves. A parameter without a gradient in the
    first pass is not perturbed; without one in the second it is updated with g alone (`plus`) or not at all. `maximize` of the base
    concerns its update only. Schedulers, hooks and copies work as in torch, and checkpoints of the base optimizer go both ways.

    Args:
        params: as in torch: tensors, (name, tensor) or groups, whose own `rho`, `plus`, `sparse_grad` and `prune` go before the defaults
            here; or an instance of a base optimizer. Parameters are float32, bfloat16 or float16, dense in any memory order.
        base_optimizer: a class, or an instance over the same parameters. SGD, Adam and AdamW are fused with the restore, any other takes
            its own step.
        compression: `TopK` and `NM` patterns; each step takes one, by a hash of `seed` and the number of steps. Empty or None: no pruning
            (SAM).
        rho: how far uphill, >= 0.
        plus: CrAM+, the sum of both gradients.
        sparse_grad: mask the second gradient.
        prune: False: perturbed, but never pruned.
        normalize_grad: rho / (norm of all gradients + 1e-12) instead of rho.
        max_grad_norm: clip the gradients of each pass on their own, as torch.nn.utils.clip_grad_norm_ does, after unscaling; those of the
            second before the mask.
        master_weights: keep a float32 copy of each 16-bit parameter, which the update steps, with state in float32; needs SGD or Adam(W).
        mask_period: a pattern's masks are computed at every mask_period-th use of that pattern.
        seed: of the draw of the pattern.
        exclude: names, as in `fnmatch`, of parameters that are not pruned: ["head.*"]; needs named parameters.
        base_options: for the class: lr, momentum, ...

    Raises:
        ValueError: an option out of its range, `differentiable`, `exclude` without names; a parameter that is sparse, not dense, given
            twice, or of another dtype.
    """

    _step_supports_amp_scaling = True  # a GradScaler hands its scale over to step(): grad_scale and found_inf
    _copied = (
        *Wrapper._copied,
        *("compression", "normalize_grad", "max_grad_norm", "master_weights", "mask_period", "exclude"),
        *("_arena", "_attachment"),
    )

    def __init__(
        self,
        params: Any = None,
        base_optimizer: Callable[..., Optimizer] | Optimizer = torch.optim.SGD,
        *,
        compression: Sequence[Pattern] | Pattern | None = COMPRESSION,
        rho: float = 0.05,
        plus: bool = True,
        sparse_grad: bool = True,
        prune: bool = True,
        normalize_grad: bool = False,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        mask_period: int = 1,
        seed: int = 0,
        exclude: Iterable[str] = (),
        **base_options: Any,
    ) -> None:
        if isinstance(compression, TopK | NM):
            compression = (compression,)
        if not isinstance(compression, list | tuple | NoneType):
            raise ValueError(f"CrAM: compression must be a list of patterns such as TopK(0.9) or NM(2, 4), got {compression!r}")
        self.compression = tuple(compression or ())
        self.normalize_grad, self.mask_period = bool(normalize_grad), mask_period
        self.max_grad_norm, self.master_weights = max_grad_norm, bool(master_weights)
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        if wrong := [p for p in self.compression if not isinstance(p, TopK | NM)]:
            raise ValueError(f"CrAM: compression must be patterns such as TopK(0.9) or NM(2, 4), got {wrong[0]!r}")
        if max_grad_norm is not None and not (isinstance(max_grad_norm, Real) and 0 < float(max_grad_norm) < math.inf):
            raise ValueError(f"CrAM: max_grad_norm must be None or a number > 0, got {max_grad_norm!r}")
        if not isinstance(mask_period, int) or mask_period < 1:
            raise ValueError(f"CrAM: mask_period must be an int of at least 1, got {mask_period!r}")
        if not isinstance(seed, int):
            raise ValueError(f"CrAM: seed must be an int, got {seed!r}")
        options = {"rho": rho, "plus": plus, "sparse_grad": sparse_grad, "prune": prune}
        self._arena = Arena()
        self._attachment: Attachment | None = None
        base = base_of(params, base_optimizer, base_options)
        if master_weights and type(base) not in FUSED:
            raise ValueError(f"CrAM: master_weights must be False for a base that takes its own step, got True and {type(base).__name__}")
        super().__init__(base, options | first_counters(seed, len(self.compression)))
        check_matches(self.param_groups, self.exclude)

    _guard: RemovableHandle | None = None

    def _link(self) -> None:
        super()._link()
        self._scalars = Scalars()
        self._updating = False
        if self._guard is not None:
            self._guard.remove()
        refuse = WeakMethod(self._refuse_step_of_base)  # a base that is kept keeps no optimizer, and none of its memory, alive
        self._guard = self.base_optimizer.register_step_pre_hook(lambda *call: (refuse() or _nothing)(*call))
        self._read_names()
        self.last: Perturbation | None = None  # what the last perturb() did
        self._arena.drop_masks()

    def _refuse_step_of_base(self, base: Optimizer, *_: Any) -> None:
        if self._arena.begun is not None and not self._updating:
            self.restore()
            raise RuntimeError("CrAM: step() of the base optimizer must not be called after perturb(), got it called: call that of CrAM")

    def _check_linked(self) -> None:
        """Raise where somebody loaded or extended the base optimizer behind our back."""
        base = self.base_optimizer
        if base.param_groups is not self.param_groups or base.state is not self.state or any("rho" not in g for g in self.param_groups):
            message = "must be called on CrAM, got it called on the base optimizer; load or wrap it again"
            raise RuntimeError(f"CrAM: load_state_dict() and add_param_group() {message}")

    def __repr__(self) -> str:
        names = ("normalize_grad", "max_grad_norm", "master_weights", "mask_period")
        facts = ", ".join([type(self.base_optimizer).__name__, f"compression={list(self.compression)}", f"exclude={list(self.exclude)}"])
        facts += "".join(f", {name}={getattr(self, name)}" for name in names)
        return super().__repr__().replace(f"{type(self).__name__} (", f"{type(self).__name__} around {facts} (", 1)

    def _read_names(self) -> None:
        self._selections: dict[Pattern | None, tuple[list[tuple[bool, int]], Selection]] = {}
        self._excluded = {id(p): glob for group in self.param_groups for p, glob in excluded(group, self.exclude)}

    # --- a step ---

    @torch._disable_dynamo  # the public name would import dynamo with the package
    @torch.no_grad()
    def perturb(self, scaler: GradScaler | None = None) -> None:
        """Move the weights uphill and prune them; the gradients are taken away (p.grad = None). An open step is given up first. Warns where
        no parameter has a gradient.

        Args:
            scaler: what has scaled the gradients; they are unscaled here. `scaler.step(optimizer)` follows: where either pass overflowed
                nothing is updated, and the scale is lowered.

        Raises:
            RuntimeError: a gradient is sparse; TopK ranks weights of several devices together; the scaler's `unscale_` was called; the
                attached model is a DDP one whose ranks have not shared their gradients. Nothing was changed.
        """
        self.restore()
        self._check_linked()
        factor, groups, patterns = first_factor(scaler, self), self.param_groups, self.compression
        check_options(groups)
        level = draw(groups, len(patterns)) if patterns else None
        if self._attachment is not None and any(self._attachment.unsynced.values()):
            if any(group["plus"] or (group["sparse_grad"] and patterns) for group in groups):
                wanted = "be the same on all ranks (or plus=False, sparse_grad=False)"
                raise RuntimeError(f"CrAM: the first gradients must {wanted}, got those of a pass under no_sync(): the ranks would part")
        slots = [s for s in self._arena.of(groups) if s.has_gradient()]
        if not slots:
            reason = "backward() comes before perturb(), and before step(closure) of the published names"
            warn(f"CrAM: no parameter has a gradient, so nothing is perturbed: {reason}", stacklevel=1)
        selection = self._selection(None if level is None else patterns[level], slots)
        place = level if self.mask_period > 1 else None
        reuse = (
            place is not None
            and uses(groups, len(patterns))[place] % self.mask_period > 0
            and all(place in s.finished for s in selection.pruned)  # not so where one is new, or has got its first gradient now
        )
        try:
            if self.master_weights:
                masters.prepare(self.base_optimizer, slots)
            factor, norm = self._clipped(slots, factor, self.normalize_grad)
            self._arena.first, self._arena.scaler = factor, scaler
            self.last = perturb_(self._arena, selection, groups, self._scalars, factor, norm, level, place, reuse)
            for slot in slots:
                if groups[slot.group]["plus"]:
                    slot.keep_gradient()
            release_gradients(slots)
            self._arena.reshard()
            if self._attachment is not None:
                self._attachment.unsynced.clear()
        except BaseException:
            self.restore()
            raise

    def _clipped(self, slots: list[Slot], factor: Factor, norm_wanted: bool = False) -> tuple[Factor, Tensor | None]:
        """The factor that also clips, and the norm of the gradients after it where it is wanted."""
        if not slots or not (norm_wanted or self.max_grad_norm is not None):
            return factor, None
        norm = total_norm(slots, factor)
        return (factor, norm) if self.max_grad_norm is None else clipped(factor, norm, self.max_grad_norm)

    @torch._disable_dynamo  # the public name would import dynamo with the package
    def restore(self) -> None:
        """Bring the weights back, to the bit, and give the open step up, if there is one."""
        self._arena.restore()
        self._arena.end()

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """`perturb()`, and at the end of the block the weights are back; `step()` follows. If the block raises, the step is given up and
        its gradients are released."""
        with self._released_on_error():
            self.perturb()
            yield
        self._arena.restore()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Complete the step that `perturb()` began; without one, the plain step of the base optimizer. Afterwards all gradients are None.
        Warns where it completes a step and no parameter has a second gradient.

        Args:
            closure: computes the loss, calls backward, returns the loss. For a whole step it is run twice, at the clean and at the
                perturbed weights. If it raises, the weights are the clean ones and the gradients are released.

        Returns:
            The clean loss; None without a closure.

        Raises:
            RuntimeError: a GradScaler calls it with a closure, or after a `perturb()` that was not given the scaler, or does not call it
                after one that was. The weights are the clean ones, nothing is updated.
        """
        given = self._of_scaler(closure)
        if closure is None:
            try:
                self._update(given)
            except BaseException:
                for key in given:  # which the scaler would have taken away afterwards
                    self.__dict__.pop(key, None)
                raise
            return None
        self.restore()
        with self._released_on_error():
            with torch.enable_grad():
                loss = closure()
            self._second_half(closure)
        return loss

    def _of_scaler(self, closure: Callable[[], Any] | None) -> dict[str, Any]:
        """What a GradScaler that calls step() has set: `grad_scale` and `found_inf`; empty without one."""
        given: dict[str, Any] = {key: self.__dict__[key] for key in ("grad_scale", "found_inf") if key in self.__dict__}
        scaled_first, open_step = self._arena.first.found_inf is not None, self._arena.begun is not None
        wrong = None
        if given and closure is not None:
            wrong = "step(closure) must not be called by a GradScaler, which cannot scale what the closure does: perturb(scaler) and step()"
        elif given and open_step and not scaled_first:
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
        self._update({})

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
        """`perturb()`, under the name that SAM implementations use."""
        self.perturb()
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """`step()`, under the name that SAM implementations use. (It releases the gradients anyway.)"""
        self.step()

    @torch._disable_dynamo  # the public name would import dynamo with the package
    @torch.no_grad()
    @uninterrupted()  # the weights, the state and the counters are those of one step
    def _update(self, given: dict[str, Any]) -> None:
        """The second half; `given` by a GradScaler."""
        arena = self._arena
        try:
            self._updating = True
            self._check_linked()
            check_options(self.param_groups)
            slots = arena.of(self.param_groups)
            second = [s for s in slots if s.has_gradient()]
            if arena.begun is not None and _is_a_dry_step(self.param_groups, second):
                release_gradients(slots)
                return
            if arena.begun and not second:
                warn("CrAM: no parameter has a second gradient: was backward() called between perturb() and step()?", stacklevel=1)
            for slot in arena.begun or ():
                slot.check_first()
            active = [s for s in slots if s.grad is not s.nothing or s.first is not s.nothing]
            if not set(active).issuperset(arena.begun or ()):
                arena.restore()  # all of them, here: those without a gradient take no part in the update
            factor, _ = self._clipped(second, second_factor(given, arena.first, arena.scaler, self))
            if self.master_weights:
                masters.prepare(self.base_optimizer, list(set(active).difference(arena.begun or ())))
            update_(self.base_optimizer, arena, active, self._scalars, factor)
            arena.note_versions(active)
            if arena.renewed and skipped(factor):  # a host synchronisation, where masks are kept under a GradScaler
                for slot, place in arena.renewed:
                    slot.finished.discard(place)  # of gradients that overflowed
        except BaseException:
            self.restore()
            raise
        finally:
            self._updating = False
        completed = arena.begun is not None
        arena.end()
        release_gradients(slots)
        if completed:
            count(self.param_groups, len(self.compression))

    # --- what is pruned ---

    def _selection(self, pattern: Pattern | None, slots: list[Slot]) -> Selection:
        """The last one for this pattern where it still holds."""
        groups = [(group["prune"], len(group["params"])) for group in self.param_groups]
        kept_groups, kept = self._selections.get(pattern, (None, None))
        if kept is None or kept_groups != groups or kept.slots != slots:
            kept = Selection(pattern, slots, [pattern is not None and self._why_dense(s, pattern) is None for s in slots])
            if pattern is not None and slots and not kept.pruned:
                warn(f"CrAM: {pattern} prunes none of the {len(slots)} parameters; coverage(pattern) says why", stacklevel=1)
            self._selections[pattern] = groups, kept
        return kept

    def _why_dense(self, slot: Slot, pattern: Pattern) -> str | None:
        """None where the pattern prunes this parameter."""
        if not self.param_groups[slot.group]["prune"]:
            return "prune=False"
        if (glob := self._excluded.get(id(slot.param))) is not None:
            return f"excluded by {glob!r}"
        if isinstance(pattern, NM) and (wrong := why_not_nm(slot.param, pattern.m)) is not None:
            return wrong
        return pattern.why_dense(slot.param.shape)

    def coverage(self, pattern: Pattern) -> list[Coverage]:
        """What this pattern does to each parameter: pruned, or why it stays dense."""
        report = []
        for slot in self._arena.of(self.param_groups):
            names = self.param_groups[slot.group].get("param_names")
            name = names[slot.position] if names else f"{slot.group}.{slot.position}"
            report.append(Coverage(name, slot.param.shape, slot.param.numel(), self._why_dense(slot, pattern)))
        return report

    # --- groups ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.restore()
        if self.param_groups:
            param_group |= {key: self.param_groups[0][key] for key in COUNTERS}
        super().add_param_group(param_group)
        self._read_names()

    def _check_group(self, index: int) -> None:
        group = self.param_groups[index]
        check_options([group])
        check_params(self.param_groups, index)
        excluded(group, self.exclude)

    # --- the model ---

    def attach(self, model: nn.Module) -> "CrAM":
        """From now on, while the weights are perturbed, batch norms of the model keep their statistics, and `state_dict()` of it or of a
        part of it gives the unperturbed weights (copies of them). Modules that are added later are not covered. Returns the optimizer.

        Raises:
            ValueError: not a module, or one without parameters of this optimizer.
        """
        if not isinstance(model, nn.Module):
            raise ValueError(f"CrAM.attach: model must be an nn.Module, got {type(model).__name__}")
        ours = {id(p) for group in self.param_groups for p in group["params"]}
        if ours.isdisjoint(map(id, model.parameters())):
            raise ValueError("CrAM.attach: model must have parameters of this optimizer, got one that has none")
        self.detach()
        self._arena.model, self._attachment = model, Attachment(model, self._arena)
        return self

    def detach(self) -> None:
        """Undo `attach`."""
        self.restore()
        if self._attachment is not None:
            self._attachment.remove()
            self._arena.model, self._attachment = None, None

    # --- checkpoints and copies ---

    def state_dict(self) -> dict[str, Any]:
        """As of the base optimizer, into which it loads; with `mask_period` also the masks, under a key of their own that torch ignores."""
        self._check_linked()
        state_dict = super().state_dict()
        if masks := self._arena.pack_masks(self.param_groups):
            state_dict[MASKS] = masks
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ours, or one of the base optimizer: options that it lacks keep their values, masks that it lacks are computed anew."""
        self.restore()
        super().load_state_dict(state_dict)
        if self.master_weights:
            masters.reload(self.state, self.param_groups, state_dict)
        self._arena.load_masks(state_dict.get(MASKS, {}), self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {MASKS: self._arena.pack_masks(self.param_groups)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        masks = state.pop(MASKS, {})
        super().__setstate__(state)
        self._arena.load_masks(masks, self.param_groups)
