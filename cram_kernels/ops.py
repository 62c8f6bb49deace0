"""The ops: public functions over lists of tensors. Their meaning is docs/contract.md; this page gives shapes, dtypes and who changes what.

A trailing underscore mutates. T is a parameter's own dtype: float32, bfloat16 or float16, mixed freely in a list. In the arguments
marked * a tensor with 0 elements means "absent for this parameter", and an empty list "absent for all". Everything that belongs to a
parameter has its shape and strides. Bad input raises RuntimeError before anything is changed. The message names the op and the argument,
and says what is wanted and what was found.
"""

# mypy: disable-error-code="empty-body"
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_origin

import torch
from torch import Tensor

from . import backend

Tensors = Sequence[Tensor]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _op(of_none: Callable[[], object] | None = None) -> Callable[[_Function], _Function]:
    """Make a function that is only a signature and a docstring call the op of its name, on the backend that serves its first argument.

    Sequences are handed over as lists. Options that are not given are left to the op, which has the same defaults: to hand one over takes
    torch longer than to fill it in. of_none: makes the result of an empty list, where torch has no tensor by which to find a backend.
    """

    def make(described: _Function) -> _Function:
        # Written out, as dataclasses do it: arguments that a function sorts in each call would cost more than the checks of the op.
        name, parameters = described.__name__, inspect.signature(described).parameters.values()
        taken = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        listed = "{0} if isinstance({0}, list) else list({0})"
        passed = [listed.format(p.name) if get_origin(p.annotation) is Sequence else p.name for p in taken]
        lines = [f"def {name}({', '.join(p.name for p in taken)}, **options):"]
        if of_none is not None:
            lines.append(f"    if len({taken[0].name}) == 0:\n        return of_none()")
        if "masters" in [p.name for p in parameters]:  # the one option for which a schema can have no default
            lines.append("    options.setdefault('masters', [])")
        lines.append("    for key, value in options.items():\n        if key in sequences and not isinstance(value, list):")
        lines.append("            options[key] = list(value)")
        lines.append(f"    return backend.select({taken[0].name}).{name}({', '.join(passed)}, **options)")
        sequences = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and get_origin(p.annotation) is Sequence}
        scope: dict[str, Any] = {"backend": backend, "of_none": of_none, "sequences": sequences}
        exec(compile("\n".join(lines), f"{__file__}:{name}", "exec"), scope)
        function: Any = functools.update_wrapper(scope[name], described)
        return function

    return make


@_op()
def topk_threshold(weights: Tensors, sets: Sequence[int], k: Tensor) -> Tensor:
    """The k-th largest magnitude key of each selection set.

    Args:
        weights: [n] tensors of T, read only.
        sets: [n] the selection set of each tensor, in [0, num_sets), or -1: in none.
        k: int64 [num_sets], see `TopK.k`.

    Returns:
        int32 [num_sets] threshold keys: kept is what has a larger key. `.view(torch.float32)` is the magnitude, where it is >= 0.
    """


@_op()
def topk_histogram(
    params: Tensors,
    grads: Tensors,
    rho: Tensor,
    sets: Sequence[int],
    prefix: Tensor,
    shift: int,
    bits: int,
    *,
    inv_scale: Tensor | None = None,
    masters: Tensors = (),
) -> Tensor:
    """How many perturbed weights have which digit in their key, among those whose key begins with `prefix`. Nothing is written: a selection
    over several ranks adds these up and finds the threshold digit by digit.

    Args:
        params, grads*, rho, inv_scale, masters*: as in `perturb_topk_`, read only; without a gradient the weight itself counts.
        sets: [n], as in `topk_threshold`.
        prefix: int64 [num_sets], the digits that are known: keys with `key >> (shift + bits) == prefix` count.
        shift, bits: the digit is `(key >> shift) & (2**bits - 1)`; 1 <= bits <= 16, 0 <= shift <= 31 - bits.

    Returns:
        int64 [num_sets, 2**bits].
    """


@_op()
def prune_topk_(weights: Tensors, masks: Tensors, sets: Sequence[int], k: Tensor) -> tuple[Tensor, Tensor]:
    """Zero all but the largest weights of each selection set.

    Args:
        weights: [n] tensors of T, in place.
        masks*: [n] uint8 [ceil(numel / 8)], written: bit 1 = kept.
        sets, k: as in `topk_threshold`.

    Returns:
        thresholds int32 [num_sets]; stats int64 [num_sets, 3]: weights kept, candidates, fallback taken.
    """


@_op()
def perturb_topk_(
    params: Tensors,
    grads: Tensors,
    saved: Tensors,
    masks: Tensors,
    perturbed: Tensor,
    rho: Tensor,
    sets: Sequence[int],
    k: Tensor,
    *,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Tensors = (),
) -> tuple[Tensor, Tensor]:
    """Save the weights, move them uphill by rho * gradient, and prune them to the largest of each selection set.

    Args:
        params: [n] tensors of T, in place.
        grads: [n] of T, read only.
        saved*: [n] of T, written; not needed where a master weight is given.
        masks*: [n] uint8 [ceil(numel / 8)], written: bit 1 = kept.
        perturbed: int32 [], the flag: 0 -> 1.
        rho: float32 [] or [n].
        sets, k: as in `topk_threshold`; a tensor in no set is perturbed and not pruned.
        inv_scale: float32 [], multiplies the gradients.
        found_inf: float32 [] or [1], set to 1 if a gradient is not finite.
        masters*: [n] float32, read only: the weights of which params are the rounded copy.

    Returns:
        thresholds and stats, as `prune_topk_`.
    """


@_op(of_none=lambda: None)
def prune_nm_(weights: Tensors, masks: Tensors, prune: Sequence[int], n: int, m: int) -> None:
    """Keep n of every m weights along axis 1 of each tensor whose `prune` is 1; axis 1 must be a multiple of m.

    Args:
        weights: tensors of T, in place.
        masks*: uint8 [ceil(numel / 8)] each, written.
        prune: 0 or 1 a tensor.
        n, m: 1 <= n < m <= 1024.
    """


@_op()
def perturb_nm_(
    params: Tensors,
    grads: Tensors,
    saved: Tensors,
    masks: Tensors,
    perturbed: Tensor,
    rho: Tensor,
    prune: Sequence[int],
    n: int,
    m: int,
    *,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Tensors = (),
) -> None:
    """`perturb_topk_` with the N:M pattern.

    Args:
        params, grads, saved*, masks*, perturbed, rho, inv_scale, found_inf, masters*: as in `perturb_topk_`.
        prune, n, m: as in `prune_nm_`; a tensor whose `prune` is 0 is perturbed and not pruned.
    """


@_op()
def perturb_masked_(
    params: Tensors,
    grads: Tensors,
    saved: Tensors,
    masks: Tensors,
    perturbed: Tensor,
    rho: Tensor,
    *,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Tensors = (),
) -> None:
    """`perturb_topk_` with masks that are there already.

    Args:
        params, grads, saved*, perturbed, rho, inv_scale, found_inf, masters*: as in `perturb_topk_`.
        masks*: [n] uint8 [ceil(numel / 8)], read only; without a mask a tensor is perturbed and not pruned.
    """


@_op()
def restore_(params: Tensors, saved: Tensors, perturbed: Tensor, *, masters: Tensors = ()) -> None:
    """Bring the weights back, bit for bit, and lower the flag; does nothing where the flag is 0.

    Args:
        params: [n] tensors of T, in place.
        saved*: [n] of T, read only.
        perturbed: int32 [], the flag: -> 0.
        masters*: [n] float32; the parameter becomes its rounded copy.
    """


@_op()
def restore_combine_(
    params: Tensors,
    saved: Tensors,
    grads: Tensors,
    first_grads: Tensors,
    masks: Tensors,
    perturbed: Tensor,
    *,
    inv_scale: Tensor | None = None,
    first_inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Tensors = (),
) -> None:
    """`restore_`, and grads = first_grads + (mask ? grads : 0), for any optimizer that then takes its own step.

    Args:
        params, saved*, perturbed, masters*: as in `restore_`.
        grads*: [n] of T, in place: the second gradients become the gradient of the update, rounded to T.
        first_grads*: [n] of T, read only.
        masks*: [n] uint8 [ceil(numel / 8)], read only.
        inv_scale, first_inv_scale: float32 [], multiply grads and first_grads.
        found_inf: float32 [] or [1]; where not 0 the gradients stay as they are.
    """


@_op()
def restore_sgd_(
    params: Tensors,
    saved: Tensors,
    grads: Tensors,
    first_grads: Tensors,
    masks: Tensors,
    perturbed: Tensor,
    momentum_buffers: Tensors,
    fresh: Sequence[int],
    lr: Tensor,
    *,
    momentum: Sequence[float] = (0.0,),
    dampening: Sequence[float] = (0.0,),
    weight_decay: Sequence[float] = (0.0,),
    nesterov: Sequence[int] = (0,),
    maximize: Sequence[int] = (0,),
    inv_scale: Tensor | None = None,
    first_inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Tensors = (),
) -> None:
    """Restore the weights and take a step of torch.optim.SGD with first_grads + (mask ? grads : 0), in one pass.

    Args:
        params, saved*, grads* (read only here), first_grads*, masks*, perturbed, inv_scale, first_inv_scale: as in `restore_combine_`.
            A parameter with neither gradient is restored and not updated.
        momentum_buffers*: [n] of T (float32 beside a master), in place; needed where momentum is not 0.
        fresh: one for all or [n]: 1 where the buffer has no value yet and becomes the gradient, as in torch.
        lr: float32 [] or [n].
        momentum, dampening, weight_decay, nesterov, maximize: one for all or [n].
        found_inf: float32 [] or [1]; where not 0 the weights are restored and nothing is updated.
        masters*: [n] float32, in place.
    """


@_op()
def restore_adam_(
    params: Tensors,
    saved: Tensors,
    grads: Tensors,
    first_grads: Tensors,
    masks: Tensors,
    perturbed: Tensor,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    steps: Tensors,
    lr: Tensor,
    *,
    beta1: Sequence[float] = (0.9,),
    beta2: Sequence[float] = (0.999,),
    eps: Sequence[float] = (1e-8,),
    weight_decay: Sequence[float] = (0.0,),
    decoupled: bool = False,
    amsgrad: Sequence[int] = (0,),
    maximize: Sequence[int] = (0,),
    inv_scale: Tensor | None = None,
    first_inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    masters: Tensors = (),
) -> None:
    """Restore the weights and take a step of torch.optim.Adam (decoupled: AdamW), in one pass.

    Args:
        params, saved*, grads*, first_grads*, masks*, perturbed, lr, inv_scale, first_inv_scale, found_inf, masters*: as in `restore_sgd_`.
        decoupled: True: weight decay as AdamW has it; False: as Adam.
        exp_avgs, exp_avg_sqs: [n] of T (float32 beside a master), in place.
        max_exp_avg_sqs*: the same, in place; needed where amsgrad is 1.
        steps: [n] float32 [], in place: counted up by the parameters that are updated.
        beta1, beta2, eps, weight_decay, amsgrad, maximize: one for all or [n].
    """


@_op(of_none=lambda: torch.zeros(()))
def grad_norm(grads: Tensors, *, inv_scale: Tensor | None = None) -> Tensor:
    """The Euclidean norm of all gradients as one vector, summed in float64 in a fixed order.

    Args:
        grads: [n] tensors of T, read only.
        inv_scale: float32 [], multiplies the gradients.

    Returns:
        float32 [].
    """
