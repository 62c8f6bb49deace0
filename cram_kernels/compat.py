"""The names and signatures of the code published with the paper (IST-DASLab/CrAM), as CrAM with other defaults.

A training loop written for it changes one import. `step(closure)` expects the first gradients to be there, and runs the closure once.
docs/migrating.md lists what is different, and why.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from .optim.columns import Slot
from .optim.cram import CrAM
from .optim.options import check_bool
from .optim.precision import given_by_scaler
from .patterns import NM, Pattern, TopK


class SAM(CrAM):
    """Sharpness-aware minimization: rho * g / |g| uphill, no pruning, a step with the second gradient.

    Args:
        params, base_optimizer, rho, kwargs (options of the base): as in `CrAM`.

    Example:
        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    """

    def __init__(self, params: Any, base_optimizer: Callable[..., Optimizer], rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, base_optimizer, **{"compression": None, "rho": rho, "plus": False, "normalize_grad": True, **kwargs})

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One whole step; the gradients at the clean weights must be there. Without a closure, the second half that follows `first_step()`.

        Args:
            closure: computes the gradients anew, at the perturbed weights.

        Raises:
            ValueError: no closure, and no step that `first_step()` began.
            RuntimeError: as `CrAM.step`.
        """
        if closure is not None:
            given_by_scaler(self, with_closure=True)
            with self._released_on_error():
                self._second_half(closure)
        elif self._workspace.open is None:
            given_by_scaler(self, with_closure=False)
            raise ValueError(f"{type(self).__name__}.step: closure must be given, got None; or call first_step() and second_step()")
        else:
            self._finish()

    def update_state_dict(self) -> None:
        """Nothing to do: the state of the base optimizer is ours."""

    @torch.no_grad()
    def get_sparsity(self) -> float:
        """The share of zeros among all parameters, as they are now."""
        params = [p for group in self.param_groups for p in group["params"]]
        return sum(int((p == 0).sum()) for p in params) / max(1, sum(p.numel() for p in params))


class TopkCrAM(SAM):
    """CrAM by magnitude: one of `sparsities` a step, ranked over each parameter group.

    Args:
        params, base_optimizer, rho, kwargs (options of the base): as in `CrAM`.
        sparsities: each in [0, 1).
        grad_norm: `normalize_grad`.
        plus_version: `plus`.
        unif_prune: rank each tensor on its own; the first entry of each parameter group and the last two stay dense.
        sparse_grad: as in `CrAM`.

    Raises:
        ValueError: sparsities is no list of numbers in [0, 1); or as `CrAM`.

    Example:
        opt = TopkCrAM(model.parameters(), torch.optim.SGD, sparsities=[0.5, 0.9], lr=0.1)
        loss(model).backward()
        opt.step(closure)
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        sparsities: Sequence[float] = (0.5, 0.7, 0.9),
        grad_norm: bool = False,
        plus_version: bool = True,
        unif_prune: bool = False,
        sparse_grad: bool = True,
        **kwargs: Any,
    ) -> None:
        options = {"plus": plus_version, "sparse_grad": sparse_grad, "normalize_grad": grad_norm}
        check_bool("unif_prune", unif_prune)
        self.unif_prune = unif_prune
        if isinstance(sparsities, str) or not isinstance(sparsities, Iterable):
            raise ValueError(f"{type(self).__name__}: sparsities must be a list of numbers in [0, 1), got {sparsities!r}")
        patterns = [TopK(s, "tensor" if unif_prune else "group") for s in sparsities]
        super().__init__(params, base_optimizer, rho, compression=patterns, **options, **kwargs)

    _copied = (*CrAM._copied, "unif_prune")

    def _why_dense(self, slot: Slot, pattern: Pattern) -> str | None:
        if self.unif_prune and not 0 < slot.position < len(self.param_groups[slot.group]["params"]) - 2:
            return "the first or one of the last two of its group"
        return super()._why_dense(slot, pattern)


class TopkCrAMPeriod(TopkCrAM):
    """`TopkCrAM` that computes the mask of a sparsity at every `mask_freq`-th use of it.

    Args:
        params, base_optimizer, rho, sparsities, grad_norm, plus_version, unif_prune, sparse_grad, kwargs: as in `TopkCrAM`.
        mask_freq: `mask_period`, at least 1.

    Example:
        opt = TopkCrAMPeriod(model.parameters(), torch.optim.SGD, sparsities=[0.5, 0.9], mask_freq=10, lr=0.1)
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        sparsities: Sequence[float] = (0.5,),
        grad_norm: bool = False,
        plus_version: bool = True,
        unif_prune: bool = False,
        sparse_grad: bool = True,
        mask_freq: int = 1,
        **kwargs: Any,
    ) -> None:
        flags = (grad_norm, plus_version, unif_prune, sparse_grad)
        super().__init__(params, base_optimizer, rho, sparsities, *flags, mask_period=mask_freq, **kwargs)


class NMTopkCrAM(SAM):
    """CrAM with 2:4 or 4:8 each step; of linear layers and 2-d convolutions.

    Args:
        params, base_optimizer, rho, kwargs (options of the base): as in `CrAM`.
        grad_norm, sparse_grad, plus_version: as in `TopkCrAM`, in another order.

    Example:
        opt = NMTopkCrAM(model.parameters(), torch.optim.SGD, lr=0.1)
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        grad_norm: bool = False,
        sparse_grad: bool = True,
        plus_version: bool = True,
        **kwargs: Any,
    ) -> None:
        options = {"plus": plus_version, "sparse_grad": sparse_grad, "normalize_grad": grad_norm}
        super().__init__(params, base_optimizer, rho, compression=[NM(2, 4), NM(4, 8)], **options, **kwargs)

    def _why_dense(self, slot: Slot, pattern: Pattern) -> str | None:
        dims = slot.param.dim()
        return super()._why_dense(slot, pattern) if dims in (2, 4) else f"{dims} dims, not 2 or 4"
